"""Evaluate a probed or fine-tuned model on any split or data set with the same classes, or with some of them.

    mae-jax evaluate --config=configs/evaluate.py --config.init=runs/tuned --workdir=runs/judged

Reads the classifier of config.init, a workdir of probe or finetune or one of its checkpoints, and the held-out split it
was trained with, or what config.data names. Classes are told by their names: where a data set has only some of the
model's, the choice is among those; with config.occurring_only, among those of which it has images, as is the custom for
ImageNet-A and -R, which TFDS gives all the names of ImageNet. config.names evaluates several TFDS data sets in one go.
Writes into the workdir:

    config.json      the config, complete
    results.json     what was evaluated, from which checkpoint, on how many images: top-1, top-5, loss, by class
    confusion.png    the confusion matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.config import to_json
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import labels_of
from mae_jax.errors import ConfigError, DataError
from mae_jax.files import make_workdir, write_json
from mae_jax.jobs import checks, classification
from mae_jax.training import checkpoint
from mae_jax.training.evaluate import sums, tally
from mae_jax.training.sharding import batch_sharding, make_mesh, place

WRITES_WORKDIR = True

# Errors of AlexNet, each the mean over the five severities of a corruption: what ImageNet-C divides by (Hendrycks and
# Dietterich 2019, arXiv 1903.12261, in the code that goes with it).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTED = "imagenet2012_corrupted/"


def run(config: ConfigDict, workdir: Path) -> None:
    """Evaluate as `config` says."""
    config, trained, sets = check(config)
    checks.refuse_training_run(workdir)
    model, trained, variables = classification.load(config.init)
    make_workdir(workdir)
    forward = classification.logits_of(model, trained)
    mesh = make_mesh()
    variables = place(variables, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def measure(args, batch):
        variables, columns, number_of = args
        stats = {key: value for key, value in variables.items() if key != "params"}
        labels = jnp.where(batch["label"] >= 0, number_of[batch["label"]], -1)
        return tally(forward(variables["params"], stats, batch)[:, columns], labels, batch["weight"])

    write_json(workdir / "config.json", to_json(config))
    about = {"job": "evaluate", "init": config.init, "checkpoint": str(checkpoint.locate(config.init))}
    found = {}
    for name, data in sets.items():
        names = data.opened.labels
        kept = np.unique(labels_of(data.opened)) if config.occurring_only else np.arange(len(names))
        kept = kept[kept >= 0]
        if not len(kept):
            raise DataError(f"{name}: no image has a label")
        columns = jnp.array([trained.classes.index(names[label]) for label in kept])
        number_of = jnp.full(len(names), -1).at[kept].set(np.arange(len(kept)))  # label -> column
        total = sums(measure, (variables, columns, number_of), data.once(batch_sharding(mesh)))
        summary = classification.summary(total, [names[label] for label in kept])
        found[name] = summary | {"data": classification.description(data)}
        print(f"{name}  {classification.describe(found[name])}", flush=True)
    if len(sets) == 1:
        classification.leave(workdir, about | found[name], total["confusion"])
        return
    results = about | {"top1": float(np.mean([one["top1"] for one in found.values()])), "sets": found}
    errors = {
        name.removeprefix(CORRUPTED): 1 - one["top1"] for name, one in found.items() if name.startswith(CORRUPTED)
    }
    if errors:
        results["mce"] = mean_corruption_error(errors)
        part = "" if len(errors) == 5 * len(ALEXNET) else f", of which published numbers take {5 * len(ALEXNET)}"
        print(f"mCE {results['mce']:.2%} of {len(errors)} corrupted sets{part}")
    write_json(workdir / "results.json", results)
    print(f"mean top-1 {results['top1']:.2%} of {len(sets)} data sets\nresults     {workdir}/results.json")


def mean_corruption_error(errors: dict[str, float]) -> float:
    """mCE of ImageNet-C: the mean, over corruptions, of the error in units of AlexNet's.

    >>> round(mean_corruption_error({"fog_1": 0.2, "fog_2": 0.4, "snow_1": 0.433408}), 4)  # 0.3 / 0.8193, 1 / 2
    0.4331

    Args:
      errors: by "corruption_severity", as TFDS names them; the mean over the severities that are given counts.
    """
    by_corruption = {}
    for name, error in errors.items():
        by_corruption.setdefault(name.rpartition("_")[0], []).append(error)
    return float(np.mean([np.mean(found) / ALEXNET[name] for name, found in by_corruption.items()]))


def data_settings(
    *,
    source: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    path: str | None = None,
    split: str | None = None,
    held_out_augment: str | None = None,
    batch_size: int | None = None,
) -> dict:
    """Settings of `Dataset` that are to be others than in training; None: the same, the held-out split being meant."""
    given = dict(locals())
    return {key: value for key, value in given.items() if value is not None}


SCHEMA = {"data": data_settings}
VALUES = {"init": str, "names": Sequence[str], "occurring_only": bool}


def check(config: ConfigDict) -> tuple[ConfigDict, ConfigDict, dict[str, Dataset]]:
    """The config with its defaults, that of the trained model, and the data sets to evaluate it on, by name.

    Raises:
      UserError: with all that is wrong, before anything is compiled.
    """
    config, trained, problems = checks.complete_for_trained(config, SCHEMA, VALUES, lambda config: [])
    if "head" not in trained:
        problems.append(f"config.init: {config.init} holds no classifier; name a run of probe or finetune")
        raise ConfigError(problems)
    given = data_settings(**config.data)
    held_out = Dataset(**{**trained.data, "cache": "", **given}).held_out_set()
    held_out = held_out.but(split=given.get("split", held_out.split))
    sets = {name: held_out.but(name=name) for name in config.names}
    told = classification.description(held_out)
    sets = sets or {told.get("name") or told.get("path") or told["source"]: held_out}
    problems += checks.reading_problems(held_out, given)
    if config.names and held_out.source != "tfds":
        problems.append(
            f"config.names: data sets of TFDS, but config.data.source is {held_out.source!r}; set it to tfds"
        )
        raise ConfigError(problems)
    checks.raise_if_no_data(problems)
    for name, data in sets.items():
        wrong = checks.split_problems(data, name, labelled=True)
        if wrong:
            problems += wrong
            continue
        unknown = [label for label in data.opened.labels if label not in trained.classes]
        if unknown:
            problems.append(
                f"config.data: {name} has classes that {config.init} does not know: {', '.join(unknown[:5])}"
                + f" and {len(unknown) - 5} more" * (len(unknown) > 5)
            )
        elif name.startswith(CORRUPTED) and name.removeprefix(CORRUPTED).rpartition("_")[0] not in ALEXNET:
            problems.append(f"config.names: of {name} no error of AlexNet is known; mCE knows {', '.join(ALEXNET)}")
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, trained, sets
