"""Pre-train a masked autoencoder (He et al. 2021, sections 3 and 4).

    mae-jax pretrain --config=configs/pretrain.py:digits --workdir=runs/digits

Reads the data set that config.data names. Writes into the workdir:

    config.json           the config, complete
    metrics.jsonl         one JSON object a line: step, train/loss, eval/loss, ...; the same as tensorboard/
    reconstructions/      step_N.png: original, masked, reconstruction, reconstruction with visible patches pasted in
    checkpoints/STEP/     the train state and its config
    summary.json          at the end: final metrics, steps, images seen, wall time, device, versions

The same command again goes on from the newest checkpoint, to the same result as a run that was never stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError, DataError
from mae_jax.jobs import checks, knn, models, panels
from mae_jax.jobs.runs import Run
from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.patches import grid_of, normalize
from mae_jax.model.targets import Target
from mae_jax.model.vit import ViT
from mae_jax.training import optim
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.evaluate import weighted_means
from mae_jax.training.loop import Hook, fit, total_steps
from mae_jax.training.sharding import batch_sharding, make_mesh

WRITES_WORKDIR = True


# What must stay as it is when a run goes on: the model, the order of the data and the randomness.
FIXED = (
    *("encoder.", "decoder.", "target.", "pixels.", "seed"),
    *(f"data.{key}" for key in ("source", "name", "split", "image_size", "channels", "batch_size", "repeats")),
)


def run(config: ConfigDict, workdir: Path) -> None:
    """Train as `config` says, or go on with what is in `workdir`."""
    config, data, held_out = check(config)
    run = Run("pretrain", config, workdir, data, FIXED)
    if run.complete:
        return
    model, target = models.build(config)
    hooks = [
        evaluation(model, target, config, data, held_out, run, **config.eval),
        pictures(model, target, config, held_out, run, **config.pictures),
    ]
    if data.opened.labels and data.opened.labels == held_out.opened.labels:
        hooks.append(knn.monitor(model.encoder, config, data, held_out, run, **config.monitor))
    else:
        print("no eval/knn: the training and the held-out split have no labels, or other ones")
    run.train(*make_parts(model, target, config), hooks)
    final = run.final_metrics
    if "eval/loss" in final:
        loss, baseline = final["eval/loss"], final["eval/baseline_loss"]
        print(f"held-out loss {loss:.4f} is {loss / baseline:.3f} of {baseline:.4f}, that of predicting position means")
    print(f"picture     {workdir}/reconstructions/step_{run.steps}.png")


def make_parts(model: MAE, target: Target, config: ConfigDict) -> tuple[Callable, Callable, Callable]:
    """What `runs.make_step` puts together: how parameters begin, what is random in a step, and the loss."""
    init = lambda key: (models.init(model, config, key), {})  # noqa: E731
    return init, make_draw(model, config), make_loss(model, target, config)


def make_draw(model: MAE, config: ConfigDict) -> Callable:
    """What is random in a step, `f(batch, key)`: the batch with a mask."""

    def draw(batch, key):
        grid = grid_of(batch["image"].shape[1:3], model.encoder.patch_size)
        mask = masking.sample(key, len(batch["image"]), grid, **config.mask)  # K of L patches stay visible
        return batch | {"mask": mask}

    return draw


def hidden_patches(model: MAE, target: Target, config: ConfigDict, params, masked: dict):
    """The path of an image: predictions f32[N,L-K,T] and targets f32[N,L-K,T] of the hidden patches.

    Args:
      masked: a batch with a mask, from `make_draw`.
    """
    images, mask = normalize(masked["image"], **config.pixels), masked["mask"]  # uint8 to f32[N,H,W,C]
    pred = model.apply({"params": params}, images, mask)  # [N,L-K,T]
    want = masking.take(target.encode(images), mask.hidden)  # [N,L-K,T]
    return pred, want


def make_loss(model: MAE, target: Target, config: ConfigDict) -> Callable:
    """The loss to minimise, `f(params, stats, examples)`: the mean squared error on hidden patches."""

    def loss_fn(params, stats, examples):
        return losses.mse(*hidden_patches(model, target, config, params, examples)), stats

    return loss_fn


def evaluation(
    model: MAE,
    target: Target,
    config: ConfigDict,
    data: Dataset,
    held_out: Dataset,
    run: Run,
    *,
    every: int,
    images: int | None = None,
) -> Hook:
    """A hook that measures eval/loss on held-out images, always under the same masks.

    eval/baseline_loss beside it is that of predicting each hidden patch by the mean, over the training images, of
    the patches at its position: what can be had without looking at the visible patches.

    Args:
      every: steps between evaluations; 0: only at the end.
      images: use only so many images of the held-out split, and of the training split for the baseline.
    """
    sharding = batch_sharding(run.mesh)
    draw = make_draw(model, config)

    @jax.jit
    def encode(_, batch, key):
        return target.encode(normalize(batch["image"], **config.pixels))

    @jax.jit
    def measure(state, batch, key):
        params, mean = state  # mean: f32[L,T]
        masked = draw(batch, key)
        pred, want = hidden_patches(model, target, config, params, masked)
        guess = mean[masked["mask"].hidden]  # [N,L-K,T]
        return {"loss": losses.mse(pred, want), "baseline_loss": losses.mse(guess, want)}

    @functools.cache
    def mean_patches():
        plain = data.plain()
        mean, count = weighted_means(encode, None, plain.once(sharding, images), run.eval_key)
        if not count:
            raise DataError(f"config.data: none of the images of the split {data.split!r} can be read")
        return mean

    def hook(state, step):
        batches = held_out.once(sharding, images)
        means, count = weighted_means(measure, (state.params, mean_patches()), batches, run.eval_key)
        if count:
            run.writer.scalars(step, {f"eval/{name}": float(value) for name, value in means.items()})
            report = "  ".join(f"eval/{name} {value:.4f}" for name, value in means.items())
            print(f"step {step}  {report}  on {count} held-out images", flush=True)

    return every, hook


def pictures(
    model: MAE,
    target: Target,
    config: ConfigDict,
    held_out: Dataset,
    run: Run,
    *,
    every: int,
    count: int = 8,
) -> Hook:
    """A hook that draws the same `count` held-out images under the same masks, every `every` steps."""
    images, _ = panels.first_images(held_out, count)
    mask = panels.sample_mask(config, run.eval_key, len(images))
    draw = panels.make_panels(model, target, config)

    def hook(state, step):
        drawn, _ = draw(state.params, images, mask)
        run.writer.picture(step, "reconstructions", panels.sheet(np.asarray(drawn)))

    return every, hook


# Each group of the config is splatted into one function, whose keyword-only parameters are its keys.
SCHEMA = {
    "data": Dataset,
    "pixels": normalize,
    "mask": masking.sample,
    "target": targets.make,
    "encoder": ViT,
    "decoder": Decoder,
    "optim": optim.make,
    "train": total_steps,
    "log": fit,
    "eval": evaluation,
    "monitor": knn.monitor,
    "pictures": pictures,
    "checkpoint": Checkpoints,
    "mesh": make_mesh,
}
VALUES = {"seed": int, "dtype": str, "accumulate": int}


def check(config: ConfigDict) -> tuple[ConfigDict, Dataset, Dataset]:
    """The config with its defaults, and the training and the held-out data that it describes.

    Raises:
      ConfigError: with all that is wrong, before anything is compiled.
    """
    config, problems = complete(config, SCHEMA, VALUES)
    if config is None:
        raise ConfigError(problems)
    problems += checks.untold(problems, checks.autoencoder_problems(config) + checks.run_problems(config))
    checks.raise_if_no_data(problems)
    data = Dataset(**config.data)
    held_out = data.held_out_set()
    problems += checks.data_problems(config, data, held_out)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, data, held_out
