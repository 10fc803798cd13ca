"""What can be wrong with the numbers of a config: one line each, all of them at once, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.augment import AUGMENTATIONS, DRAWING_NOTHING
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import SOURCES
from mae_jax.errors import ConfigError, UserError, nearest
from mae_jax.jobs import fitting, models
from mae_jax.model import classifier, cudnn, losses, masking, ops, targets
from mae_jax.model.layers import BLOCKS, REMAT
from mae_jax.model.mae import MASK_TOKENS, Decoder
from mae_jax.model.patches import grid_of
from mae_jax.model.positions import POSITIONS
from mae_jax.training import optim
from mae_jax.training.checkpoint import FOLDER
from mae_jax.training.loop import total_steps
from mae_jax.training.sharding import AXES, mesh_shape, slice_count

NO_INIT = "config.init: empty; name the workdir of a training run, or one of its checkpoints"

DTYPES = ("float32", "bfloat16")  # what config.dtype may be

# The least values of settings that count something.
LEAST = {
    "mask_schedule": {"stages": 2},
    "data": {"per_class": 0, "subset_seed": 0},
    "log": {"every": 1},
    "eval": {"every": 0, "images": 1},
    "monitor": {"every": 0, "bank": 1, "queries": 1, "k": 1},
    "pictures": {"every": 0, "count": 1},
    "checkpoint": {"every": 0, "keep": 1, "keep_every": 0, "minutes": 0},
    "guard": {"patience": 1},
}


def autoencoder_problems(config: ConfigDict) -> list[str]:
    """What is wrong with the numbers of an autoencoder and its task, one line each."""
    data, encoder = config.data, config.encoder
    problems = sampling_problems(config) + unknown_names(
        {
            "config.target.name": (config.target.name, targets.TARGETS),
            "config.loss.name": (config.loss.name or "l2", losses.LOSSES),
            "config.loss.patches": (config.loss.patches, losses.PATCHES),
            "config.decoder.kind": (config.decoder.kind, BLOCKS),
            "config.decoder.mask_tokens": (config.decoder.mask_tokens, MASK_TOKENS),
            "config.monitor.pool": (config.monitor.pool, classifier.POOLS),
        }
        | dtype_choice(config)
    )
    patch = encoder.patch_size
    if config.target.name in targets.TARGETS and patch >= 1 and data.channels >= 1:
        problems += target_problems(config)
    if encoder.drop_path or not encoder.final_norm:
        problems.append("config.encoder: drop_path and final_norm=False are for fine-tuning; leave them out")
    if config.optim.layer_decay != 1:
        problems.append("config.optim.layer_decay: is for fine-tuning; leave it out")
    if config.noise.std < 0:
        problems.append(f"config.noise.std: {config.noise.std} is below 0; 0 is off")
    wrong = image_size_problems(config)
    if not wrong:
        grid = grid_of(data.image_size, patch)
        wrong = mask_problems(config, grid, config.loss.patches) + start_problems(config, grid)
        wrong += head_problems(config.decoder, max(config.mask.ratio, config.mask_schedule.start or 0))
    if config.mask.decoded != 1 and config.loss.patches == "all":
        wrong.append("config.mask.decoded: is for a loss of hidden patches; leave it out, or config.loss.patches=all")
    problems += wrong + decoder_problems(config)
    return problems + transformer_problems("encoder", config, 1) + transformer_problems("decoder", config, 0)


def head_problems(decoder: ConfigDict | Decoder, ratio: float) -> list[str]:
    """What is wrong with a decoder of no blocks where this ratio of the patches is hidden: a line, or none."""
    if decoder.depth or decoder.mask_tokens == "encoder" or ratio <= 0:
        return []
    return [
        "config.decoder.depth: 0 is a linear head on the latents of hidden patches, of which the encoder gives none; "
        "set config.decoder.mask_tokens to encoder, or hide nothing (config.mask.ratio=0)"
    ]


def decoder_problems(config: ConfigDict) -> list[str]:
    """What is wrong with how mask tokens are decoded, one line each."""
    encoder, decoder = config.encoder, config.decoder
    from_encoder, blind = decoder.mask_tokens == "encoder", decoder.positions == "none" or not decoder.depth
    problems = []
    if decoder.kind == "cross" and from_encoder:
        problems.append(
            "config.decoder.kind: cross has mask tokens of its own; set config.decoder.mask_tokens to decoder"
        )
    if config.mask.ratio > 0 and blind and (encoder.positions == "none" if from_encoder else decoder.depth):
        told = "config.encoder.positions" if from_encoder else "config.decoder.positions"
        problems.append(f"{told}: none, so that nothing tells one hidden patch from another; give the mask tokens some")
    return problems


def target_problems(config: ConfigDict) -> list[str]:
    """What is wrong with what is predicted of a patch and how that is judged, one line each."""
    name, size, values = config.target.name, config.target.size, models.patch_values(config)
    target, problems = targets.make(config.encoder.patch_size, name=name, size=size), []
    if name == "normalized_pixels" and values < 2:
        problems.append("config.target.name: normalized_pixels needs more than one value in a patch; use pixels")
    if size is not None and not target.fit:
        problems.append(f"config.target.size: {name} has no size; leave it out")
    elif size is not None and size < 1:
        problems.append(f"config.target.size: {size} is below 1")
    elif name == "pca" and len(target.unfitted(values)["components"]) > values:
        told = "96, the default," if size is None else size
        problems.append(f"config.target.size: {told} is more than the {values} values of a patch have components")
    loss = config.loss.name
    if loss in losses.LOSSES and not losses.fits(loss, target.loss):
        fitting_ones = ", ".join(other for other in losses.LOSSES if losses.fits(other, target.loss))
        problems.append(f"config.loss.name: {loss} is not for the target {name}; use {fitting_ones}, or '' for its own")
    return problems


def fitting_problems(config: ConfigDict, data: Dataset) -> list[str]:
    """What is wrong with the number of training images for a target that is fitted to them: a line, or none."""
    target = targets.make(config.encoder.patch_size, **config.target)
    found, needed = fitting.patch_count(config, data), max(map(len, target.unfitted(1).values()), default=0)
    if found >= needed:
        return []
    return [f"config.target.size: {needed}, but there are only {found} patches of training images to fit it to"]


def classifier_problems(config: ConfigDict) -> list[str]:
    """What is wrong with the numbers of a classifier, one line each."""
    encoder, head = config.encoder, config.head
    problems = seed_problems(config) + image_size_problems(config) + transformer_problems("encoder", config, 1)
    problems += unknown_names(
        dtype_choice(config)
        | {
            "config.head.pool": (head.pool, classifier.POOLS),
            "config.head.norm": (head.norm, classifier.NORMS),
        }
    )
    if head.head_std < 0:
        problems.append(f"config.head.head_std: {head.head_std} is below 0")
    for group, keys in {"mixup": ("probability", "label_smoothing"), "erasing": ("probability",)}.items():
        for key in keys if group in config else ():
            if not 0 <= config[group][key] <= 1:
                problems.append(f"config.{group}.{key}: {config[group][key]} is not between 0 and 1")
    for key in ("mixup", "cutmix") if "mixup" in config else ():
        if config.mixup[key] < 0:
            problems.append(f"config.mixup.{key}: {config.mixup[key]} is below 0; 0 is off")
    if "trainable" not in config and config.optim.layer_decay != 1:
        problems.append("config.optim.layer_decay: is for fine-tuning; leave it out")
    if "ema" in config and not 0 <= config.ema < 1:
        problems.append(f"config.ema: {config.ema} is not between 0 (off) and 1")
    if "trainable" in config:
        try:
            classifier.trainable("head/kernel", encoder.depth, config.trainable)
        except ValueError as error:
            problems.append(f"config.trainable: {error}")
    return problems


def dtype_choice(config: ConfigDict) -> dict:
    """config.dtype and what it may be, for `unknown_names`."""
    return {"config.dtype": (config.dtype, DTYPES)}


def image_size_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.data.image_size for the encoder's patches: a line, or none."""
    size, patch = config.data.image_size, config.encoder.patch_size
    if len(size) == 2 and min(size) >= 1 and patch >= 1 and not any(side % patch for side in size):
        return []
    return [
        f"config.data.image_size: {tuple(size)} is not (height, width), both divisible by "
        f"config.encoder.patch_size {patch}"
    ]


def transformer_problems(group: str, config: ConfigDict, least: int) -> list[str]:
    """What is wrong with the sizes of the encoder or decoder, of at least so many blocks, one line each."""
    problems, part = [], config[group]
    if part.width < 4 or part.width % 4 or part.heads < 1 or part.width % part.heads:
        problems.append(
            f"config.{group}.width: {part.width} is not divisible by 4 (for its positions) and by "
            f"config.{group}.heads {part.heads}"
        )
    elif part.positions == "rotary" and part.width // part.heads % 4:
        problems.append(
            f"config.{group}.positions: rotary needs heads of a width divisible by 4, not {part.width // part.heads}, "
            f"which is config.{group}.width {part.width} over config.{group}.heads {part.heads}"
        )
    elif config.dtype in DTYPES:
        problems += attention_problems(group, config)
    if part.depth < least:
        problems.append(f"config.{group}.depth: {part.depth} is below {least}")
    if part.mlp_ratio * max(part.width, 1) < 1:
        problems.append(f"config.{group}.mlp_ratio: {part.mlp_ratio} times the width leaves no hidden unit")
    if part.epsilon <= 0:
        problems.append(f"config.{group}.epsilon: {part.epsilon} is not above 0")
    problems += unknown_names(
        {
            f"config.{group}.positions": (part.positions, POSITIONS),
            f"config.{group}.remat": (part.remat, REMAT),
            f"config.{group}.attention": (part.attention, ops.ATTENTION),
        }
    )
    if group == "encoder" and not 0 <= part.drop_path < 1:
        problems.append(f"config.encoder.drop_path: {part.drop_path} is not between 0 and 1")
    return problems


def attention_problems(group: str, config: ConfigDict) -> list[str]:
    """What is wrong with config.encoder.attention, or decoder.attention, for the devices there are: a line, or none."""
    part = config[group]
    head = part.width // part.heads
    biased = part.positions == "relative"
    if part.attention == "fused" and (reason := ops.NO_BIAS if biased else ops.no_kernel(config.dtype, head)):
        return [f"config.{group}.attention: fused, but {reason}; use auto"]
    if (
        biased
        or part.attention == "plain"
        or not cudnn.serves(config.dtype, head)
        or mesh_problems(jax.devices(), **config.mesh)
    ):
        return []
    tensor = mesh_shape(jax.device_count(), **config.mesh)[2]
    if part.heads % tensor == 0:
        return []
    return [  # XLA would split single heads, which cuDNN cannot
        f"config.mesh.tensor: {tensor} does not divide config.{group}.heads {part.heads}, as cuDNN's attention needs; "
        f"give a divisor, or set config.{group}.attention to plain"
    ]


def sampling_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.mask.name and config.seed, one line each."""
    return unknown_names({"config.mask.name": (config.mask.name, masking.SAMPLERS)}) + seed_problems(config)


def seed_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.seed: a line, or none."""
    return [] if 0 <= config.seed < 2**32 else [f"config.seed: {config.seed} is not between 0 and {2**32 - 1}"]


def mask_problems(config: ConfigDict, grid: tuple[int, int], patches: str) -> list[str]:
    """What is wrong with the numbers of config.mask for a `grid` of patches, one line each.

    Args:
      patches: what the loss is of, config.loss.patches in training.
    """
    (rows, cols), problems = grid, []
    try:
        if masking.visible_count(rows * cols, config.mask.ratio) == rows * cols and patches == "hidden":
            problems.append(
                f"config.mask.ratio: {config.mask.ratio} hides no patch, but the loss is of hidden ones; give a ratio "
                "above 0, or train with config.loss.patches=all"
            )
    except ValueError as error:
        problems.append(f"config.mask.ratio: {error}; give a ratio between 0 and 1 that keeps some")
    if not 1 <= config.mask.unit < max(rows, cols, 2):
        problems.append(f"config.mask.unit: {config.mask.unit} is not from 1 on and smaller than {rows}x{cols} patches")
    if config.mask.temperature <= 0:
        problems.append(f"config.mask.temperature: {config.mask.temperature} is not above 0")
    if not 0 < config.mask.decoded <= 1:
        problems.append(f"config.mask.decoded: {config.mask.decoded} is not above 0, up to 1 (all hidden patches)")
    return problems


def start_problems(config: ConfigDict, grid: tuple[int, int]) -> list[str]:
    """What is wrong with config.mask_schedule.start for a `grid` of patches: a line, or none."""
    try:
        start, patches = config.mask_schedule.start, grid[0] * grid[1]
        if start is None or masking.visible_count(patches, start) < patches or config.loss.patches != "hidden":
            return []
        error = f"a mask ratio of {start} hides no patch, but the loss is of hidden ones"
    except ValueError as wrong:
        error = wrong
    return [f"config.mask_schedule.start: {error}; give a ratio between 0 and 1, or leave it out"]


def run_problems(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> list[str]:
    """What is wrong with the data's and the run's numbers, one line each.

    Args:
      devices: to run on; None: all there are.
    """
    devices = jax.devices() if devices is None else devices
    data, train = config.data, config.train
    problems = unknown_names(
        {
            "config.data.source": (data.source, SOURCES),
            "config.data.augment": (data.augment, AUGMENTATIONS),
            "config.data.held_out_augment": (data.held_out_augment, DRAWING_NOTHING),
            "config.optim.name": (config.optim.name, optim.OPTIMIZERS),
        }
    )
    channels = data.channels
    if channels < 1:
        problems.append(f"config.data.channels: {channels} is below 1")
    elif data.source in ("folder", "files", "tfds") and channels not in (1, 3):
        problems.append(f"config.data.channels: image files are read as 1 or 3 channels, not {channels}")
    else:
        for key in ("mean", "std"):
            if len(config.pixels[key]) != channels or (key == "std" and min(config.pixels.std) <= 0):
                problems.append(
                    f"config.pixels.{key}: {tuple(config.pixels[key])} is not one number{' above 0' * (key == 'std')} "
                    f"for each of config.data.channels {channels}"
                )
    wrong = mesh_problems(devices, **config.mesh)
    problems += wrong
    if config.accumulate < 1:
        problems.append(f"config.accumulate: {config.accumulate} is below 1")
    elif not wrong:
        shares = math.prod(mesh_shape(len(devices), **config.mesh)[:2])
        problems += batch_problems(data.batch_size, shares, config.accumulate)
    if data.repeats < 1 or data.batch_size % max(data.repeats, 1):
        problems.append(f"config.data.repeats: {data.repeats} does not divide the batch size {data.batch_size}")
    for key in ("scale", "ratio"):
        bounds = data[key]
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] or (key == "scale" and bounds[1] > 1):
            above = " above 0, up to 1" if key == "scale" else " above 0"
            problems.append(f"config.data.{key}: {tuple(bounds)} is not a range (low, high){above}")
    if length(config) is None:
        problems.append("config.train: neither steps nor epochs is given")
    elif length(config) <= 0:
        key = "steps" if train.steps is not None else "epochs"
        problems.append(f"config.train.{key}: {length(config)} is not above 0")
    if not 0 < config.optim.layer_decay <= 1:
        problems.append(f"config.optim.layer_decay: {config.optim.layer_decay} is not above 0, up to 1 (off)")
    for key in ("base_learning_rate", "min_learning_rate", "warmup_epochs", "weight_decay", "b1", "b2"):
        value = config.optim[key]
        if value < 0 or (key in ("b1", "b2") and value >= 1):
            problems.append(f"config.optim.{key}: {value} is below 0" + ", or not below 1" * (key in ("b1", "b2")))
    if config.guard.spike and config.guard.spike <= 1:
        problems.append(f"config.guard.spike: {config.guard.spike} is not above 1, or 0 (off)")
    if not 0 <= config.guard.unreadable <= 1:
        problems.append(f"config.guard.unreadable: {config.guard.unreadable} is not between 0 and 1 (off)")
    if not 0 <= data.randaugment <= 10:
        problems.append(f"config.data.randaugment: {data.randaugment} is not between 0 (off) and 10")
    elif data.randaugment and channels not in (1, 3):
        problems.append(f"config.data.randaugment: is for images of 1 or 3 channels, not {channels}; set it to 0")
    if data.jitter < 0:
        problems.append(f"config.data.jitter: {data.jitter} is below 0; 0 is off")
    elif data.jitter and channels not in (1, 3):
        problems.append(f"config.data.jitter: is for images of 1 or 3 channels, not {channels}; set it to 0")
    return problems + count_problems(config)


def mesh_problems(there: Sequence[jax.Device], **sizes: int) -> list[str]:
    """What is wrong with config.mesh for the devices there are: a line that says what would be right, or none."""
    devices, slices, hosts = len(there), slice_count(there), jax.process_count()

    def fits(**changed) -> bool:
        try:
            mesh_shape(devices, slices, hosts, **(sizes | changed))
        except ValueError:
            return False
        return True

    if fits():
        return []
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = f"{devices} device(s) there are" + f", in {slices} slices, over which data is split" * (slices > 1)
    found += f", on {hosts} hosts, of which none may be left out" * (hosts > 1)
    possible = {axis: [n for n in divisors if fits(**{axis: n})] for axis in AXES}
    possible = {axis: fitting for axis, fitting in possible.items() if fitting}
    told = " or ".join(f"{axis} {', '.join(map(str, fitting))}" for axis, fitting in possible.items())
    if len(possible) == 1:
        (axis,) = possible
        return [f"config.mesh.{axis}: {sizes[axis]} does not fit the {found}; possible with the rest: {told}"]
    given = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    told = f"possible is {told}" if told else f"give sizes of product {devices}, or -1 for one of them"
    return [f"config.mesh: {given} do not fit the {found}; {told}"]


def count_problems(config: ConfigDict) -> list[str]:
    """Which settings that count something are below the `LEAST` they can be, one line each."""
    return [
        f"config.{group}.{key}: {config[group][key]} is below {least}"
        for group, keys in LEAST.items()
        for key, least in keys.items()
        if group in config and config[group].get(key) is not None and config[group][key] < least
    ]


def length(config: ConfigDict) -> float | None:
    """config.train.steps, where given, or else epochs."""
    return config.train.steps if config.train.steps is not None else config.train.epochs


def data_problems(config: ConfigDict, data: Dataset, held_out: Dataset, labelled: bool = False) -> list[str]:
    """What is wrong with the training and the held-out data once they are opened, one line each.

    Args:
      labelled: whether there must be classes, the same ones in both.
    """
    least = data.batch_size if "train" in config else 1
    in_training = split_problems(data, "training", least, labelled)
    in_held_out = split_problems(held_out, "held-out", 1, labelled)
    if not in_training and "train" in config and (length(config) or 0) > 0:
        steps = total_steps(data.opened.size // least, **config.train)
        if not 1 <= steps < 2**31:
            in_training.append(f"config.train: {steps} steps in all; give more than none and fewer than {2**31}")
    if labelled and not in_training + in_held_out and data.opened.labels != held_out.opened.labels:
        in_held_out.append("config.data: the training and the held-out split have other classes")
    return in_training + in_held_out


def split_problems(data: Dataset, name: str, least: int = 1, labelled: bool = False) -> list[str]:
    """What is wrong with a split once it is opened, one line each; `name` is what to call it, `least` how many images.

    Args:
      labelled: whether there must be classes.
    """
    try:
        source = data.opened
    except ConfigError as error:
        return error.problems
    problems = []
    if source.shape and source.shape[-1] != data.channels:
        problems.append(
            f"config.data.channels: {data.source} has images of {source.shape[-1]} channel(s), not {data.channels}"
        )
    if source.size < least:
        problems.append(
            f"config.data: the {name} split {data.split!r} has {source.size} images, fewer than "
            + (f"config.data.batch_size {least}" if least > 1 else "one")
        )
    if labelled and not source.labels:
        problems.append(f"config.data: the {name} split {data.split!r} has no labels, of at least two classes")
    return problems


# What a source reads besides its split; other sources would not notice that it is given.
READ_BY = {"name": ("tfds",), "data_dir": ("tfds",), "path": ("folder", "files")}


def reading_problems(data: Dataset, given: dict) -> list[str]:
    """What is wrong with the settings of data that is read once, over all devices there are, one line each.

    Args:
      given: the settings of `data` that are others than in training.
    """
    problems = unknown_names(
        {
            "config.data.source": (data.source, SOURCES),
            "config.data.held_out_augment": (data.held_out_augment, DRAWING_NOTHING),
        }
    )
    problems += [
        f"config.data.{key}: {given[key]!r}, which the source {data.source!r} does not read; "
        f"set config.data.source to {' or '.join(sources)}"
        for key, sources in READ_BY.items()
        if key in given and data.source in SOURCES and data.source not in sources
    ]
    return problems + batch_problems(data.batch_size, jax.device_count())


def batch_problems(size: int, devices: int, parts: int = 1) -> list[str]:
    """What is wrong with a batch of so many images, split over so many devices and into parts: a line, or none."""
    if size >= 1 and size % (devices * parts) == 0:
        return []
    times = f", times the {parts} parts of config.accumulate" * (parts > 1)
    return [f"config.data.batch_size: {size} is not a multiple of the {devices} device(s){times}, above 0"]


def untold(problems: list[str], more: list[str]) -> list[str]:
    """Those of `more` about settings that `problems` does not mention: of one that is wrong, the rest is no matter."""
    told = [problem.split(":")[0] for problem in problems]
    return [problem for problem in more if not any(key.startswith(problem.split(":")[0]) for key in told)]


WITHOUT_WHICH_NO_DATA = tuple(f"config.data.{key}" for key in ("source", "batch_size", "channels", "image_size"))


def complete_for_trained(
    config: ConfigDict, schema: dict, values: dict, own_problems: Callable[[ConfigDict], list[str]]
) -> tuple[ConfigDict, ConfigDict, list[str]]:
    """The config of a job that looks at a trained model, with its defaults; the config of that model; what is wrong.

    Args:
      own_problems: what is wrong with the settings that can be judged without the model.

    Raises:
      UserError: either is missing.
    """
    config, problems = complete(config, schema, values)
    if config is None:
        raise ConfigError(problems)
    problems += untold(problems, own_problems(config))
    if not config.init:
        raise ConfigError([*problems, NO_INIT])
    try:
        return config, models.load_config(config.init), problems
    except UserError as error:
        raise ConfigError([*problems, *error.problems]) if problems else error from None


def refuse_training_run(workdir: Path) -> None:
    """A ConfigError where a job that only looks at a model would overwrite the files of a training run."""
    if (workdir / FOLDER).exists():
        raise ConfigError(f"--workdir={workdir}: holds a training run, whose files would be overwritten; name another")


def raise_if_no_data(problems: list[str]) -> None:
    """A ConfigError where there is no sense in opening the data."""
    if any(problem.startswith(WITHOUT_WHICH_NO_DATA) for problem in problems):
        raise ConfigError(problems)


def unknown_names(choices: dict[str, tuple[str, Iterable[str]]]) -> list[str]:
    """A line for each {key: (word, table)} whose word is no row of its table."""
    return [
        f"{key}: no {word!r}; use one of {', '.join(table)}{nearest(word, table)}"
        for key, (word, table) in choices.items()
        if word not in table
    ]
