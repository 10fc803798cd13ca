"""Fine-tune an encoder with a classifier on it, or train the same from nothing (paper section 4, appendix A.1 and A.2).

    mae-jax finetune --config=configs/finetune.py:fashion_mnist --config.init=runs/fashion_mnist --workdir=runs/tuned

Reads the encoder of config.init, a workdir of any training job or one of its checkpoints, and the data set that
config.data names, which needs labels. Where config.init is empty, training begins with random weights. Which part is
trained is config.trainable: all; head; norms; or so many of the last blocks, 0.5 being the MLP of the last one.
Writes into the workdir:

    config.json, metrics.jsonl, tensorboard/, checkpoints/, saved.json, summary.json    as pretrain does
    results.json                     what was evaluated, from which checkpoint, on how many images: top-1, top-5, ...
    confusion.png, curve.png         the same as pictures
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mae_jax.data.erasing import erase
from mae_jax.data.mixup import mix
from mae_jax.data.pipeline import Dataset
from mae_jax.files import alone_in
from mae_jax.jobs import classification, models
from mae_jax.jobs.runs import Run
from mae_jax.model import losses
from mae_jax.model.classifier import UNDECAYED, Classifier, layer_of, trainable
from mae_jax.model.patches import normalize
from mae_jax.model.vit import ViT
from mae_jax.training import optim
from mae_jax.training.checkpoint import FOLDER, Checkpoints, steps_in
from mae_jax.training.guard import Guard
from mae_jax.training.loop import fit, total_steps
from mae_jax.training.sharding import make_mesh

WRITES_WORKDIR = True


def run(config: ConfigDict, workdir: Path) -> None:
    """Train as `config` says, or go on with what is in `workdir`."""
    config, data, held_out = check(classification.remember(config, workdir))
    begins = config.init and not steps_in(workdir / FOLDER)
    start = {"encoder": models.encoder_to_start_from(config)} if begins else {}
    with alone_in(workdir):
        _train(workdir, config, data, held_out, start)


def _train(workdir: Path, config: ConfigDict, data: Dataset, held_out: Dataset, start: dict) -> None:
    run = Run("finetune", config, workdir, data, classification.FIXED)
    if run.complete:
        return
    model = classification.build(config)
    depth = model.encoder.depth
    hooks = [classification.evaluation(held_out, run, classification.logits_of(model, config), **config.eval)]
    run.train(
        lambda key: classification.init(model, config, key),
        make_draw(model, config),
        make_loss(model),
        hooks,
        start=start,
        trained=partial(trainable, depth=depth, what=config.trainable),
        layer_of=partial(layer_of, depth=depth),
        exempt=UNDECAYED,
        ema=config.ema,
    )
    classification.report(held_out, run)


def make_draw(model: Classifier, config: ConfigDict) -> Callable:
    """What is random in a step, `f(batch, key)`: images erased and mixed, their targets, and the paths they take."""

    def draw(batch, key):
        erase_key, mix_key, path_key = jax.random.split(key, 3)
        images = normalize(batch["image"], **config.pixels)  # uint8 to f32[N,H,W,C]
        images = erase(erase_key, images, **config.erasing)
        weight = classification.weight_of(batch)
        images, targets = mix(mix_key, images, batch["label"], weight, model.classes, **config.mixup)
        paths = model.encoder.draw_paths(path_key, len(images))
        return {"image": images, "target": targets, "weight": weight, "paths": paths}

    return draw


def make_loss(model: Classifier) -> Callable:
    """The loss to minimise, `f(params, stats, examples)`: the cross-entropy."""

    def loss_fn(params, stats, examples):
        images, weight, paths = (examples[key] for key in ("image", "weight", "paths"))
        variables = {"params": params, **stats}
        logits, moved = model.apply(variables, images, weight, True, paths, mutable=["batch_stats"])
        return losses.cross_entropy(logits, examples["target"]), dict(moved)

    return loss_fn


# Each group of the config is splatted into one function, whose keyword-only parameters are its keys.
SCHEMA = {
    "data": Dataset,
    "pixels": normalize,
    "erasing": erase,
    "mixup": mix,
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
VALUES = {"seed": int, "dtype": str, "accumulate": int, "init": str, "trainable": str, "ema": float}


def check(config: ConfigDict) -> tuple[ConfigDict, Dataset, Dataset]:
    """See `classification.check`."""
    return classification.check(config, SCHEMA, VALUES)
