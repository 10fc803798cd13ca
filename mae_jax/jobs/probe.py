"""Linear probing: a linear classifier on a frozen encoder (paper section 4 and appendix A.1, table 10).

    mae-jax probe --config=configs/probe.py:fashion_mnist --config.init=runs/fashion_mnist --workdir=runs/probe

Reads the encoder of config.init, a workdir of any training job or one of its checkpoints, and the data set that
config.data names, which needs labels. Writes into the workdir:

    config.json, metrics.jsonl, tensorboard/, checkpoints/, saved.json, summary.json    as pretrain does
    results.json                     what was evaluated, from which checkpoint, on how many images: top-1, top-5, ...
    confusion.png, curve.png         the same as pictures

Without augmentation every image has the same features at every step: they are computed once then.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mae_jax.data.pipeline import Dataset
from mae_jax.files import alone_in
from mae_jax.jobs import classification, models
from mae_jax.jobs.features import collect, make_extract
from mae_jax.jobs.runs import Run
from mae_jax.model import losses
from mae_jax.model.classifier import Classifier, trainable
from mae_jax.model.patches import normalize
from mae_jax.model.vit import ViT
from mae_jax.training import optim
from mae_jax.training.checkpoint import FOLDER, Checkpoints, steps_in
from mae_jax.training.guard import Guard
from mae_jax.training.loop import fit, total_steps
from mae_jax.training.sharding import make_mesh

WRITES_WORKDIR = True


def run(config: ConfigDict, workdir: Path) -> None:
    """Train the head as `config` says, or go on with what is in `workdir`."""
    config, data, held_out = check(classification.remember(config, workdir))
    resumed = bool(steps_in(workdir / FOLDER))
    start = {} if resumed else {"encoder": models.encoder_to_start_from(config)}
    with alone_in(workdir):
        _train(workdir, config, data, held_out, start)


def _train(workdir: Path, config: ConfigDict, data: Dataset, held_out: Dataset, start: dict) -> None:
    run = Run("probe", config, workdir, data, classification.FIXED)
    if run.complete:
        return
    model = classification.build(config)
    shown, looked_at = data, held_out
    once = not data.augmented
    if once:
        began = time.perf_counter()
        extract = make_extract(model.encoder, model.pool, config.pixels)
        # config.init may have been trained further since the run began
        encoder = start["encoder"] if start else models.load_encoder(workdir)[1]
        shown, looked_at = (part.holding(*collect(extract, encoder, part, run.mesh)) for part in (data, held_out))
        took = time.perf_counter() - began
        print(f"features of {shown.opened.size} and {looked_at.opened.size} images in {took:.1f} s", flush=True)

    def features(params, batch):
        if once:
            return batch["image"]
        images = normalize(batch["image"], **config.pixels)
        return model.apply({"params": params}, images, method="features")

    def logits(params, stats, batch, **options):
        variables = {"params": params, **stats}
        return model.apply(variables, features(params, batch), method="classify", **options)

    def draw(batch, key):
        return batch | {"weight": classification.weight_of(batch)}

    def loss_fn(params, stats, batch):
        out, moved = logits(params, stats, batch, weight=batch["weight"], update=True, mutable=["batch_stats"])
        targets = jax.nn.one_hot(batch["label"], model.classes)
        return losses.cross_entropy(out, targets), dict(moved)

    hooks = [classification.evaluation(looked_at, run, logits, **config.eval)]
    run.train(
        lambda key: classification.init(model, config, key),
        draw,
        loss_fn,
        hooks,
        batches=shown,
        start=start,
        trained=lambda path: trainable(path, model.encoder.depth, "head"),
    )
    classification.report(looked_at, run)


# Each group of the config is splatted into one function, whose keyword-only parameters are its keys.
SCHEMA = {
    "data": Dataset,
    "pixels": normalize,
    "encoder": ViT,
    "head": Classifier,
    "optim": optim.make,
    "train": total_steps,
    "log": fit,
    "eval": classification.evaluation,
    "checkpoint": Checkpoints,
    "guard": Guard,
    "mesh": make_mesh,
}
VALUES = {"seed": int, "dtype": str, "accumulate": int, "init": str}


def check(config: ConfigDict) -> tuple[ConfigDict, Dataset, Dataset]:
    """See `classification.check`; a probe needs an encoder to probe."""
    return classification.check(config, SCHEMA, VALUES, needs_init=True)
