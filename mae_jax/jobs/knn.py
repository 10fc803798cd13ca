"""Classify by nearest neighbours among the features of a trained encoder; nothing is trained.

    mae-jax knn --config=configs/knn.py --config.init=runs/fashion_mnist --workdir=runs/neighbours

Reads the encoder of config.init, a workdir of any training job or one of its checkpoints, and the data set it was
trained on, or the one that config.data names. Each held-out image gets the class that its nearest training images vote
for, weighted by their similarity (Wu et al. 2018, arXiv 1805.01978). Writes into the workdir:

    config.json      the config, complete
    results.json     top-1 for each number of neighbours, from which checkpoint, on how many images
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.config import to_json
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError
from mae_jax.files import make_workdir, write_json
from mae_jax.jobs import checks, classification, models
from mae_jax.jobs.features import collect, make_extract
from mae_jax.jobs.runs import Run
from mae_jax.model import knn
from mae_jax.model.classifier import POOLS
from mae_jax.model.vit import ViT
from mae_jax.training import checkpoint
from mae_jax.training.loop import Hook
from mae_jax.training.sharding import make_mesh, place

WRITES_WORKDIR = True
QUERIES = 1024  # classified at a time
TEMPERATURE = 0.07  # of Wu et al. 2018


def run(config: ConfigDict, workdir: Path) -> None:
    """Classify the held-out images as `config` says."""
    config, trained, data, held_out = check(config)
    checks.refuse_training_run(workdir)
    encoder, params = models.load_encoder(config.init)
    make_workdir(workdir)
    mesh = make_mesh()
    extract = make_extract(encoder, config.features, trained.pixels)
    began = time.perf_counter()
    (bank, labels), (queries, truth) = (collect(extract, params, part, mesh) for part in (data, held_out))
    between = time.perf_counter()
    classes = data.opened.labels
    guesses = neighbours(bank, labels, queries, tuple(config.k), len(classes), config.temperature, mesh)
    write_json(workdir / "config.json", to_json(config))
    results = {
        "job": "knn",
        "init": config.init,
        "checkpoint": str(checkpoint.locate(config.init)),
        "features": config.features,
        "data": classification.description(held_out),
        "bank": {"examples": len(bank), **classification.description(data)},
        "examples": len(queries),
        "top1": {str(k): float(np.mean(guess == truth)) for k, guess in zip(config.k, guesses, strict=True)},
        "seconds": {"features": between - began, "neighbours": time.perf_counter() - between},
    }
    write_json(workdir / "results.json", results)
    for k, share in results["top1"].items():
        print(f"{share:8.2%}  of {len(queries)} images right by {k} of {len(bank)} neighbours")
    print(f"results   {workdir}/results.json")


@functools.cache  # a monitor asks again and again
def _classify(ks: tuple[int, ...], classes: int, temperature: float, mesh: Mesh) -> Callable:
    """`knn.classify`, jitted, with queries split over the devices."""
    classify = functools.partial(knn.classify, ks=ks, classes=classes, temperature=temperature)
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    # mapped by hand: a compiler that splits top_k itself gathers what it is taken of
    mapped = jax.shard_map(
        classify, mesh=mesh, in_specs=(everywhere, everywhere, split), out_specs=PartitionSpec(None, mesh.axis_names)
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, everywhere))


def neighbours(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    ks: tuple[int, ...],
    classes: int,
    temperature: float,
    mesh: Mesh,
) -> np.ndarray:
    """`knn.classify` of any number of queries, some at a time, split over the devices: i32[len(ks),N]."""
    classify = _classify(ks, classes, temperature, mesh)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    bank, labels = place((bank, labels.astype(np.int32)), everywhere)
    found = []
    at_once = -(-min(QUERIES, len(queries)) // mesh.size) * mesh.size
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        whole = np.pad(some, ((0, at_once - len(some)), (0, 0)))  # one shape compiles once
        found.append(np.asarray(classify(bank, labels, place(whole, split)))[:, : len(some)])
    return np.concatenate(found, axis=1)


def monitor(
    encoder: ViT,
    config: ConfigDict,
    data: Dataset,
    held_out: Dataset,
    run: Run,
    *,
    every: int = 0,
    bank: int = 5000,
    queries: int = 1000,
    k: int = 20,
    pool: str = "mean",
) -> Hook:
    """A hook that watches what the encoder of an autoencoder is worth while it is trained, as eval/knn.

    Top-1 of held-out images by their nearest neighbours among training images, neither augmented nor masked.

    Args:
      every: steps between two looks; 0: only at the end.
      bank, queries: so many training and held-out images at most.
      k: neighbours that vote.
      pool: a row of `POOLS`.
    """
    extract = make_extract(encoder, pool, config.pixels)
    spent = 0.0

    def hook(state, step):
        nonlocal spent
        began = time.perf_counter()
        params = state.averaged["encoder"]
        features, labels = collect(extract, params, data.plain(), run.mesh, bank)
        asked, truth = collect(extract, params, held_out, run.mesh, queries)
        (guess,) = neighbours(features, labels, asked, (k,), len(data.opened.labels), TEMPERATURE, run.mesh)
        right = float(np.mean(guess == truth))
        spent += time.perf_counter() - began
        run.writer.scalars(step, {"eval/knn": right})
        share = f"{spent / (time.time() - run.began):.1%} of the time"
        print(f"step {step}  eval/knn {right:.2%} by {k} of {len(features)} neighbours  ({share})", flush=True)

    return every, hook


def data_settings(
    *,
    source: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    path: str | None = None,
    split: str | None = None,
    held_out: str | None = None,
    batch_size: int | None = None,
    per_class: int | None = None,
    subset_seed: int | None = None,
) -> dict:
    """Settings of `Dataset` that are to be others than those of the trained model; None: the same."""
    given = dict(locals())
    return {key: value for key, value in given.items() if value is not None}


SCHEMA = {"data": data_settings}
VALUES = {"init": str, "features": str, "k": Sequence[int], "temperature": float}


def own_problems(config: ConfigDict) -> list[str]:
    """What is wrong with this job's own settings, whatever the model, one line each."""
    problems = checks.unknown_names({"config.features": (config.features, (*POOLS, "pixels"))})
    if not config.k or min(config.k) < 1:
        problems.append(f"config.k: {tuple(config.k)} is not one or more numbers above 0")
    if config.temperature <= 0:
        problems.append(f"config.temperature: {config.temperature} is not above 0")
    return problems + checks.count_problems(config)


def check(config: ConfigDict) -> tuple[ConfigDict, ConfigDict, Dataset, Dataset]:
    """The config with its defaults, that of the trained model, and the images to vote and to be classified.

    Raises:
      UserError: with all that is wrong, before anything is compiled.
    """
    config, trained, problems = checks.complete_for_trained(config, SCHEMA, VALUES, own_problems)
    given = data_settings(**config.data)
    data = Dataset(**{**trained.data, "cache": "", **given}).plain()
    held_out = data.held_out_set()
    problems += checks.reading_problems(data, given)
    checks.raise_if_no_data(problems)
    problems += checks.data_problems(config, data, held_out, labelled=True)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, trained, data, held_out
