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
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import complete, flatten, make_workdir, to_json, write_json
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import CheckpointError, ConfigError, DataError
from mae_jax.jobs import checks, models, panels
from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.patches import grid_of, normalize
from mae_jax.model.targets import Target
from mae_jax.model.vit import ViT
from mae_jax.training import metrics, optim
from mae_jax.training.checkpoint import Checkpoints, steps_in
from mae_jax.training.evaluate import weighted_means
from mae_jax.training.loop import Hook, create_state, fit, make_train_step, total_steps
from mae_jax.training.sharding import batch_sharding, make_mesh

WRITES_WORKDIR = True


def run(config: ConfigDict, workdir: Path) -> None:
    """Train as `config` says, or go on with what is in `workdir`."""
    began = time.time()
    config, data, held_out = check(config)
    steps_per_epoch = data.opened.size // data.batch_size
    steps = total_steps(steps_per_epoch, **config.train)
    make_workdir(workdir)
    compare_with_earlier_run(config, workdir)
    checkpoints = Checkpoints(workdir, to_json(config), **config.checkpoint)
    if (checkpoints.latest_step or 0) > steps:
        raise ConfigError(
            f"config.train: {steps} steps, but {workdir} has trained {checkpoints.latest_step}; "
            "give more, or a new --workdir"
        )
    if checkpoints.latest_step == steps and (workdir / "summary.json").exists():
        print(f"already complete: {workdir} has trained {steps} steps")
        return
    write_json(workdir / "config.json", to_json(config))
    (workdir / "summary.json").unlink(missing_ok=True)  # of a shorter run, now made longer

    mesh = make_mesh(**config.mesh)
    init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    model, target = models.build(config)
    tx, schedule = optim.make(data.batch_size, steps, steps_per_epoch, **config.optim)
    abstract, new_state = create_state(lambda: models.init(model, config, init_key), tx, mesh)
    print(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
    state = new_state() if checkpoints.latest_step is None else checkpoints.restore(abstract)
    start = int(state.step)
    print(
        f"{'resuming' if start else 'training'} from step {start} of {steps} on {mesh.size} device(s); compiling",
        flush=True,
    )

    train_step = make_train_step(make_loss(model, target, config), tx, schedule, train_key, mesh)
    batches = data.shuffled(config.seed, start, batch_sharding(mesh))
    writer = metrics.Writer(workdir, start)
    hooks = [
        evaluation(model, target, config, data, held_out, mesh, eval_key, writer, **config.eval),
        pictures(model, target, config, held_out, eval_key, writer, **config.pictures),
        (checkpoints.every, checkpoints.save),
    ]
    progress = metrics.Progress(writer, steps, data.batch_size)
    try:
        fit(state, train_step, batches, steps, hooks, checkpoints.save, progress, **config.log)
    finally:
        checkpoints.close()
        writer.close()
    summarize(config, workdir, mesh, steps, time.time() - began)


def hidden_patches(model: MAE, target: Target, config: ConfigDict, params, batch: dict, key: jax.Array):
    """The path of an image: predictions f32[N,L-K,T] and targets f32[N,L-K,T] of the hidden patches, and the mask."""
    images = normalize(batch["image"], **config.pixels)  # uint8 to f32[N,H,W,C]
    grid = grid_of(images.shape[1:3], model.encoder.patch_size)
    mask = masking.sample(key, len(images), grid, **config.mask)  # K of L patches stay visible
    pred = model.apply({"params": params}, images, mask)  # [N,L-K,T]
    want = masking.take(target.encode(images), mask.hidden)  # [N,L-K,T]
    return pred, want, mask


def make_loss(model: MAE, target: Target, config: ConfigDict) -> Callable:
    """The loss to minimise, `f(params, batch, key) -> f32[]`: the mean squared error on hidden patches."""

    def loss_fn(params, batch, key):
        pred, want, _ = hidden_patches(model, target, config, params, batch, key)
        return losses.weighted_mean(losses.mse(pred, want), batch["weight"])

    return loss_fn


def evaluation(
    model: MAE,
    target: Target,
    config: ConfigDict,
    data: Dataset,
    held_out: Dataset,
    mesh: Mesh,
    key: jax.Array,
    writer: metrics.Writer,
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
    sharding = batch_sharding(mesh)

    @jax.jit
    def encode(_, batch, key):
        return target.encode(normalize(batch["image"], **config.pixels))

    @jax.jit
    def measure(state, batch, key):
        params, mean = state  # mean: f32[L,T]
        pred, want, mask = hidden_patches(model, target, config, params, batch, key)
        guess = mean[mask.hidden]  # [N,L-K,T]
        return {"loss": losses.mse(pred, want), "baseline_loss": losses.mse(guess, want)}

    @functools.cache
    def mean_patches():
        plain = data.but(augment="none", flip=False)
        mean, count = weighted_means(encode, None, plain.once(sharding, images), key)
        if not count:
            raise DataError(f"config.data: none of the images of the split {data.split!r} can be read")
        return mean

    def hook(state, step):
        means, count = weighted_means(measure, (state.params, mean_patches()), held_out.once(sharding, images), key)
        if count:
            writer.scalars(step, {f"eval/{name}": float(value) for name, value in means.items()})
            report = "  ".join(f"eval/{name} {value:.4f}" for name, value in means.items())
            print(f"step {step}  {report}  on {count} held-out images", flush=True)

    return every, hook


def pictures(
    model: MAE,
    target: Target,
    config: ConfigDict,
    held_out: Dataset,
    key: jax.Array,
    writer: metrics.Writer,
    *,
    every: int,
    count: int = 8,
) -> Hook:
    """A hook that draws the same `count` held-out images under the same masks, every `every` steps."""
    images, _ = panels.first_images(held_out, count)
    mask = panels.sample_mask(config, key, len(images))
    draw = panels.make_panels(model, target, config)

    def hook(state, step):
        drawn, _ = draw(state.params, images, mask)
        writer.picture(step, "reconstructions", panels.sheet(np.asarray(drawn)))

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
    "pictures": pictures,
    "checkpoint": Checkpoints,
    "mesh": make_mesh,
}
VALUES = {"seed": int, "dtype": str}
WITHOUT_WHICH_NO_DATA = (
    "config.data.source",
    "config.data.batch_size",
    "config.data.channels",
    "config.data.image_size",
)


def check(config: ConfigDict) -> tuple[ConfigDict, Dataset, Dataset]:
    """The config with its defaults, and the training and the held-out data that it describes.

    Raises:
      ConfigError: with all that is wrong, before anything is compiled.
    """
    config, problems = complete(config, SCHEMA, VALUES)
    if config is None:
        raise ConfigError(problems)
    told = [problem.split(":")[0] for problem in problems]  # of a setting that is wrong, the rest does not matter
    for problem in checks.model_problems(config) + checks.run_problems(config):
        if not any(key.startswith(problem.split(":")[0]) for key in told):
            problems.append(problem)
    if any(problem.startswith(WITHOUT_WHICH_NO_DATA) for problem in problems):
        raise ConfigError(problems)
    data = Dataset(**config.data)
    held_out = data.held_out_set()
    for name, part in {"training": data, "held-out": held_out}.items():
        try:
            source = part.opened
        except ConfigError as error:
            problems += error.problems
            continue
        if source.shape and source.shape[-1] != data.channels:
            problems.append(
                f"config.data.channels: {data.source} has images of {source.shape[-1]} channel(s), not {data.channels}"
            )
        least = data.batch_size if name == "training" else 1
        if source.size < least:
            problems.append(
                f"config.data: the {name} split {part.split!r} has {source.size} images, fewer than "
                + (f"config.data.batch_size {least}" if name == "training" else "one")
            )
        elif name == "training" and not any(problem.startswith("config.train") for problem in problems):
            steps = total_steps(source.size // least, **config.train)
            if not 1 <= steps < 2**31:
                problems.append(f"config.train: {steps} steps in all; give more than none and fewer than {2**31}")
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, data, held_out


def compare_with_earlier_run(config: ConfigDict, workdir: Path) -> None:
    """Make sure that what is in `workdir` can go on as `config` says; print what is different but may be.

    Raises:
      ConfigError: the model, the order of the data or the randomness would be another.
    """
    path = workdir / "config.json"
    if not steps_in(workdir / "checkpoints") or not path.exists():
        return
    fixed = (
        "encoder.",
        "decoder.",
        "target.",
        "pixels.",
        "data.source",
        "data.name",
        "data.split",
        "data.image_size",
        "data.channels",
        "data.batch_size",
        "data.repeats",
        "seed",
    )
    try:
        before, now = flatten(json.loads(path.read_text())), flatten(to_json(config))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable ({error}); copy that of the newest checkpoint over it") from error
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    told = {key: f"config.{key}: {before.get(key)} in {path}, now {now.get(key)}" for key in changed}
    refused = [f"{told[key]}; use a new --workdir" for key in changed if key.startswith(fixed)]
    if refused:
        raise ConfigError(refused)
    for line in told.values():
        print(f"changed: {line}")


def summarize(config: ConfigDict, workdir: Path, mesh: Mesh, steps: int, seconds: float) -> None:
    """Write summary.json and say where everything is."""
    final = {}
    for line in metrics.read(workdir / "metrics.jsonl"):
        final.update(line)
    final.pop("step", None)
    summary = {
        "job": "pretrain",
        "steps": steps,
        "images_seen": steps * config.data.batch_size,
        "wall_time_seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "device_count": mesh.size,
        "versions": {name: version(name) for name in ("mae_jax", "jax", "flax", "optax", "orbax-checkpoint")},
        "metrics": final,
    }
    write_json(workdir / "summary.json", summary)
    if "eval/loss" in final:
        loss, baseline = final["eval/loss"], final["eval/baseline_loss"]
        print(f"held-out loss {loss:.4f} is {loss / baseline:.3f} of {baseline:.4f}, that of predicting position means")
    print(f"picture     {workdir}/reconstructions/step_{steps}.png")
    print(f"metrics     {workdir}/metrics.jsonl, {workdir}/summary.json; tensorboard --logdir {workdir}")
    print(f"checkpoint  {workdir}/checkpoints/{steps}")
