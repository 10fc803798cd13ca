"""What probe, finetune and evaluate share: the classifier of a config, how it is looked at, and what it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import CheckpointError, ConfigError, DataError
from mae_jax.files import write_json
from mae_jax.jobs import checks, model_checks, models, plots
from mae_jax.jobs.runs import Run, earlier_config
from mae_jax.model.classifier import Classifier
from mae_jax.model.patches import normalize
from mae_jax.model.vit import ViT
from mae_jax.training import checkpoint, metrics
from mae_jax.training.evaluate import TOP, sums, tally
from mae_jax.training.loop import Hook
from mae_jax.training.sharding import batch_sharding

# What must stay as it is when a run goes on: the model, the order of the data and the randomness.
FIXED = (
    *("encoder.", "head.", "pixels.", "seed", "init", "trainable", "ema", "classes"),
    *(f"data.{key}" for key in ("source", "name", "split", "image_size", "channels", "batch_size", "repeats")),
    *("data.per_class", "data.subset_seed"),
)


def check(
    config: ConfigDict, schema: dict, values: dict, needs_init: bool = False
) -> tuple[ConfigDict, Dataset, Dataset]:
    """The config with its defaults, and the training and the held-out data that it describes.

    What config.encoder leaves out is as in config.init.

    Raises:
      UserError: with all that is wrong, before anything is compiled.
    """
    init, encoder = config.get("init"), config.get("encoder")
    told = isinstance(encoder, ConfigDict) and "width" in encoder
    if init == "" and needs_init:
        raise ConfigError(checks.NO_INIT)
    if init == "" and not told:
        raise ConfigError(f"{checks.NO_INIT}; or train from nothing with a recipe that says so, such as digits,scratch")
    if isinstance(init, str) and init and isinstance(encoder, ConfigDict) and not told:
        config = ConfigDict(config.to_dict())
        config.encoder = {**models.load_config(init).encoder.to_dict(), **encoder.to_dict()}
    config, problems = complete(config, schema, values)
    if config is None:
        raise ConfigError(problems)
    problems += checks.untold(problems, model_checks.classifier_problems(config) + checks.run_problems(config))
    checks.raise_if_no_data(problems)
    data = Dataset(**config.data)
    held_out = data.held_out_set()
    problems += checks.data_problems(config, data, held_out, labelled=True)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    config.classes = data.opened.labels
    with contextlib.suppress(CheckpointError):  # of a run that goes on, what it began with may be gone
        before = dict(models.load_config(init).pixels) if init else dict(config.pixels)
        if before != dict(config.pixels):
            print(f"note: {init} was trained on pixels of {before}, and config.pixels is {dict(config.pixels)}")
    return config, data, held_out


def remember(config: ConfigDict, workdir: Path) -> ConfigDict:
    """`config`, and where `workdir` has a run to go on with, its encoder: what that began with may be gone."""
    before, path, _ = earlier_config(workdir)
    with contextlib.suppress(KeyError, TypeError):  # of another job; the run says what is different
        if path is not None:
            config = ConfigDict(config.to_dict())
            config.encoder = {**before["encoder"], **config.encoder.to_dict()}
    return config


def build(config: ConfigDict) -> Classifier:
    """The classifier that the completed config of probe or finetune describes."""
    encoder = ViT(**config.encoder, dtype=config.dtype)
    return Classifier(encoder, len(config.classes), **config.head)


def init(model: Classifier, config: ConfigDict, key: jax.Array) -> tuple[dict, dict]:
    """Fresh parameters of `model`, and its statistics, {"batch_stats": ...} or {}; jittable."""
    variables = dict(model.init(key, jnp.zeros(models.example_images(config).shape)))
    return variables.pop("params"), variables


def load(path: str | Path) -> tuple[Classifier, ConfigDict, dict]:
    """A trained classifier, computing in float32, its config and its variables for `apply`.

    Of a model with moving averages of its parameters, those are what is loaded.

    Args:
      path: a workdir of probe or finetune, whose newest checkpoint is read, or one checkpoint in it.

    Raises:
      CheckpointError: there is none, or it does not fit its config, or it is of an autoencoder.
    """
    config = models.load_config(path)
    if "head" not in config:
        raise CheckpointError(
            f"{path}: holds no classifier but what pretrain has trained; name a workdir of probe or finetune"
        )
    config.dtype = "float32"
    model = build(config)
    params, stats = jax.eval_shape(lambda: init(model, config, jax.random.key(0)))
    state = checkpoint.load(path, {"params": params, "stats": stats} if stats else {"params": params})
    return model, config, {"params": models.averaged(path, state["params"]), **state.get("stats", {})}


def evaluation(held_out: Dataset, run: Run, forward: Callable, *, every: int = 0, images: int | None = None) -> Hook:
    """A hook that measures eval/top1, eval/top5 and eval/loss on held-out images.

    Args:
      forward: `f(params, stats, batch) -> logits f32[N,C]`.
      every: steps between evaluations; 0: only at the end.
      images: use only so many of the held-out images before the end; the last evaluation is of all.
    """

    @jax.jit
    def measure(state, batch):
        params, stats = state
        return tally(forward(params, stats, batch), batch["label"], batch["weight"])

    def hook(state, step):
        limit = None if step == run.steps else images
        total = sums(measure, (state.averaged, state.stats), held_out.once(batch_sharding(run.mesh), limit))
        run.last_look = total  # reported once the run is saved: nothing that goes wrong there loses it
        if total and total["confusion"].any():
            found = summary(total, run.config.classes)
            run.writer.scalars(step, {f"eval/{name}": found[name] for name in ("top1", "top5", "loss")})
            print(f"step {step}  {describe(found)}", flush=True)

    return every, hook


def report(held_out: Dataset, run: Run) -> None:
    """Leave the results of a run that is trained to the end, as its last evaluation found them.

    Raises:
      DataError: there was no image with a label.
    """
    about = {
        "job": run.job,
        "init": run.config.init,
        "checkpoint": f"{run.workdir}/checkpoints/{run.steps}",
        "data": description(held_out),
        "trained_on": {"examples": run.data.opened.size, **description(run.data)},
        "steps": run.steps,
    }
    leave(run.workdir, about | summary(run.last_look, run.config.classes), run.last_look.get("confusion"))


def description(data: Dataset) -> dict:
    """Which images these are, for results.json."""
    where = {"tfds": ["name"], "folder": ["path"], "files": ["path"]}.get(data.source, [])
    return {key: getattr(data, key) for key in ("source", *where, "split")}


def summary(total: dict[str, np.ndarray], classes: Sequence[str]) -> dict:
    """The numbers of results.json from the sums of `tally`.

    Raises:
      DataError: there was no image with a label.
    """
    confusion = total["confusion"] if total else np.zeros((len(classes),) * 2)
    count, right = confusion.sum(axis=1), np.diag(confusion)
    if not count.sum():
        raise DataError("no image of the evaluated split could be read, or none has a label")
    return {
        "examples": int(count.sum()),
        "top1": float(right.sum() / count.sum()),
        f"top{TOP}": float(total["top5"] / count.sum()),
        "loss": float(total["loss"] / count.sum()),
        "correct": int(right.sum()),
        "per_class": {
            name: {"examples": int(n), "top1": float(r / n) if n else None}
            for name, n, r in zip(classes, count, right, strict=True)
        },
    }


def describe(found: dict) -> str:
    """One line of what `summary` found."""
    shares = f"top-1 {found['top1']:.2%}  top-5 {found['top5']:.2%}"
    return f"{shares}  loss {found['loss']:.4f}  on {found['examples']} images"


def leave(workdir: Path, results: dict, confusion: np.ndarray) -> None:
    """Write results.json, confusion.png and, where there are metrics, curve.png."""
    write_json(workdir / "results.json", {**results, "confusion": confusion.astype(int).tolist()})
    plots.confusion(workdir / "confusion.png", confusion, list(results["per_class"]))
    lines = metrics.read(workdir / "metrics.jsonl")
    if lines:
        plots.curves(workdir / "curve.png", lines)
    print(f"results     {workdir}/results.json, confusion.png" + ", curve.png" * bool(lines))


def weight_of(batch: dict) -> jax.Array:
    """f32[N]: what an example counts for in training; nothing without a label."""
    return jnp.where(batch["label"] >= 0, batch["weight"], 0.0)


def logits_of(model: Classifier, config: ConfigDict) -> Callable:
    """`f(params, stats, batch) -> logits f32[N,C]` of images, as evaluation wants them."""

    def forward(params, stats, batch):
        return model.apply({"params": params, **stats}, normalize(batch["image"], **config.pixels))

    return forward
