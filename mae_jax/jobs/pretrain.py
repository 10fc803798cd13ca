"""Pre-train a masked autoencoder (He et al. 2021, sections 3 and 4).

    mae-jax pretrain --config=configs/pretrain.py:digits --workdir=runs/digits

Reads the data set that config.data names. Writes into the workdir:

    config.json           the config, complete
    metrics.jsonl         one JSON object a line: step, train/loss, eval/loss, ...; the same as tensorboard/
    reconstructions/      step_N.png: original, masked, reconstruction, reconstruction with visible patches pasted in
    checkpoints/STEP/     the train state, its config, and sums of their bytes
    saved.json            that there has been a checkpoint: where all are gone nothing begins anew
    summary.json          at the end: final metrics, steps, images seen, wall time, device, versions

The same command again goes on from the newest checkpoint, to the same result as a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.noise import add_noise
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError, DataError
from mae_jax.files import alone_in
from mae_jax.jobs import checks, fitting, knn, model_checks, models, panels
from mae_jax.jobs.runs import Run
from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.patches import grid_of, normalize
from mae_jax.model.targets import Target
from mae_jax.model.vit import ViT
from mae_jax.training import optim
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.evaluate import weighted_means
from mae_jax.training.guard import Guard
from mae_jax.training.loop import Hook, fit, total_steps
from mae_jax.training.sharding import batch_sharding, make_mesh, whole

WRITES_WORKDIR = True


# What must stay as it is when a run goes on: the model, the order of the data and the randomness.
FIXED = (
    *("encoder.", "decoder.", "target.", "pixels.", "seed"),
    *(f"data.{key}" for key in ("source", "name", "split", "image_size", "channels", "batch_size", "repeats")),
)


def run(config: ConfigDict, workdir: Path) -> None:
    """Train as `config` says, or go on with what is in `workdir`."""
    checked = check(config)
    with alone_in(workdir):
        _train(workdir, *checked)


def _train(workdir: Path, config: ConfigDict, data: Dataset, held_out: Dataset) -> None:
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
    begins = run.checkpoints.latest_step is None
    stages = []
    for step, ratio in masking.ratios(run.steps, config.mask.ratio, **config.mask_schedule):
        then = ConfigDict({**config, "mask": {**config.mask, "ratio": ratio}})
        stages.append((step, make_draw(model, then), make_loss(model, target, then)))
    (_, draw, loss_fn), *later = stages
    run.train(
        make_init(model, config),
        draw,
        loss_fn,
        hooks,
        later=later,
        start={"target": fitting.fit(target, config, data)} if begins and target.fit else {},
        trained=trained,
    )
    final = run.final_metrics
    loss, baseline = final.get("eval/loss"), final.get("eval/baseline_loss")
    if loss is not None and baseline:  # finite, that is
        print(
            f"held-out loss {loss:.4f} is {loss / baseline:.3f} of {baseline:.4f}, that of guessing by position alone"
        )
    print(f"picture     {workdir}/reconstructions/step_{run.steps}.png")


def trained(path: str) -> bool:
    """Whether a parameter is trained: all are, but for what the target was fitted to."""
    return not path.startswith("target/")


def make_init(model: MAE, config: ConfigDict) -> Callable:
    """What a run begins with, `f(key) -> (params, stats)`."""
    return lambda key: (models.init(model, config, key), {})


def make_draw(model: MAE, config: ConfigDict) -> Callable:
    """What is random in a step, `f(batch, key)`: the batch with a mask and, where there is noise, what is then seen."""

    def draw(batch, key):
        if config.noise.std:
            key, noise_key = jax.random.split(key)
            images = normalize(batch["image"], **config.pixels)
            batch = batch | {"seen": add_noise(noise_key, images, **config.noise)}  # f32[N,H,W,C]
        if config.mask.name in masking.GUIDED:  # the mask depends on parameters too
            return batch | {"noise": models.mask_noise(config, key, len(batch["image"]))}
        grid = grid_of(batch["image"].shape[1:3], model.encoder.patch_size)
        mask = masking.sample(key, len(batch["image"]), grid, **config.mask)  # K of L patches stay visible
        return batch | {"mask": mask}

    return draw


def with_mask(model: MAE, config: ConfigDict, params, drawn: dict) -> dict:
    """A batch from `make_draw` with its mask, where that is for the encoder to say."""
    if config.mask.name not in masking.GUIDED:
        return drawn
    images = drawn["seen"] if "seen" in drawn else normalize(drawn["image"], **config.pixels)
    return drawn | {"mask": models.mask_of(model, config, params, images, drawn["noise"])}


def predict(model: MAE, target: Target, config: ConfigDict, params, masked: dict, every_patch: bool = False):
    """The path of an image: predictions [N,M,T] of the decoded patches, and what they should be, f32[N,M,T].

    Args:
      masked: a batch from `make_draw`, with `with_mask`.
      every_patch: of all patches, row by row, not of hidden ones alone.
    """
    images, mask = normalize(masked["image"], **config.pixels), masked["mask"]  # uint8 to f32[N,H,W,C]
    pred = model.apply({"params": params}, masked.get("seen", images), mask, every_patch)  # [N,M,T]
    want = target.encode(images, targets.fitted_of(params))  # [N,L,T]; of tokens their numbers, [N,L,1]
    return pred, want if every_patch else masking.take(want, mask.decoded)


def make_loss(model: MAE, target: Target, config: ConfigDict) -> Callable:
    """The loss to minimise, `f(params, stats, examples)`: by default the mean squared error on hidden patches."""
    loss, every_patch = losses.make(target.loss, **config.loss)

    def loss_fn(params, stats, examples):
        masked = with_mask(model, config, params, examples)
        return loss(*predict(model, target, config, params, masked, every_patch)), stats

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

    All hidden patches count, whatever share of them is decoded in training. eval/baseline_loss beside it is that of
    predicting each patch by the mean, over the training images, of the targets at its position, or by how often each
    token is there: what can be had without looking at the visible patches.

    Args:
      every: steps between evaluations; 0: only at the end.
      images: use only so many images of the held-out split, and of the training split for the baseline.
    """
    sharding = batch_sharding(run.mesh)
    config = ConfigDict({**config, "mask": {**config.mask, "decoded": 1.0}})
    draw = make_draw(model, config)
    loss, every_patch = losses.make(target.loss, **config.loss)
    baseline = None  # f32[L,T]

    @jax.jit
    def values(fitted, batch, key):
        return target.values(target.encode(normalize(batch["image"], **config.pixels), fitted))

    @jax.jit
    def measure(state, batch, key):
        params, guess = state
        masked = with_mask(model, config, params, draw(batch, key))
        pred, want = predict(model, target, config, params, masked, every_patch)
        guess = jnp.broadcast_to(guess, pred.shape) if every_patch else guess[masked["mask"].hidden]
        return {"loss": loss(pred, want), "baseline_loss": loss(guess, want)}

    def guess_by_position(params):
        batches = data.plain().once(sharding, images)
        mean, count = weighted_means(values, targets.fitted_of(params), batches, run.eval_key)
        if not count:
            raise DataError(f"config.data: none of the images of the split {data.split!r} can be read")
        return target.prediction(mean, count)

    def hook(state, step):
        nonlocal baseline
        baseline = guess_by_position(state.params) if baseline is None else baseline
        batches = held_out.once(sharding, images)
        means, count = weighted_means(measure, (state.params, baseline), batches, run.eval_key)
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
    draw = panels.make_panels(model, target, config)

    def hook(state, step):
        drawn, _ = draw(state.params, images, *panels.sample(model, config, state.params, images, run.eval_key))
        run.writer.picture(step, "reconstructions", panels.sheet(whole(drawn, run.mesh)))

    return every, hook


# Each group of the config is splatted into one function, whose keyword-only parameters are its keys.
SCHEMA = {
    "data": Dataset,
    "pixels": normalize,
    "noise": add_noise,
    "mask": masking.sample,
    "mask_schedule": masking.ratios,
    "target": targets.make,
    "loss": losses.make,
    "encoder": ViT,
    "decoder": Decoder,
    "optim": optim.make,
    "train": total_steps,
    "log": fit,
    "eval": evaluation,
    "monitor": knn.monitor,
    "pictures": pictures,
    "checkpoint": Checkpoints,
    "guard": Guard,
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
    problems += checks.untold(problems, model_checks.autoencoder_problems(config) + checks.run_problems(config))
    checks.raise_if_no_data(problems)
    data = Dataset(**config.data)
    held_out = data.held_out_set()
    problems += checks.data_problems(config, data, held_out)
    problems = problems or model_checks.fitting_problems(config, data)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, data, held_out
