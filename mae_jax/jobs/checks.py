"""What can be wrong with the numbers of data and runs: one line each, all at once, before anything is compiled."""

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
from mae_jax.jobs import models
from mae_jax.model.extent import MOST_NUMBERS
from mae_jax.training.checkpoint import FOLDER
from mae_jax.training.loop import total_steps
from mae_jax.training.optim import OPTIMIZERS
from mae_jax.training.sharding import AXES, mesh_shape, slice_count

NO_INIT = "config.init: empty; name the workdir of a training run, or one of its checkpoints"

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

# The most of them, where more would fail or never end: each stage compiles a step of its own.
MOST = {"mask_schedule": {"stages": 256}, "data": {"subset_seed": 2**32 - 1}}


def seed_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.seed: a line, or none."""
    return [] if 0 <= config.seed < 2**32 else [f"config.seed: {config.seed} is not between 0 and {2**32 - 1}"]


def run_problems(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> list[str]:
    """What is wrong with the data's and the run's numbers, one line each.

    Args:
      devices: to run on; None: all there are.
    """
    devices = jax.devices() if devices is None else devices
    problems = source_problems(config.data)
    if not any(problem.startswith("config.data.channels") for problem in problems):
        problems += pixel_problems(config)
    wrong = mesh_problems(devices, **config.mesh)
    problems += wrong
    if config.accumulate < 1:
        problems.append(f"config.accumulate: {config.accumulate} is below 1")
    elif not wrong:
        shares = math.prod(mesh_shape(len(devices), **config.mesh)[:2])
        problems += batch_problems(config.data.batch_size, shares, config.accumulate)
    problems += augmentation_problems(config.data)
    if length(config) is None:
        problems.append("config.train: neither steps nor epochs is given")
    elif length(config) <= 0:
        key = "steps" if config.train.steps is not None else "epochs"
        problems.append(f"config.train.{key}: {length(config)} is not above 0")
    problems += optim_problems(config.optim)
    if config.guard.spike and config.guard.spike <= 1:
        problems.append(f"config.guard.spike: {config.guard.spike} is not above 1, or 0 (off)")
    if not 0 <= config.guard.unreadable <= 1:
        problems.append(f"config.guard.unreadable: {config.guard.unreadable} is not between 0 and 1 (off)")
    return problems + count_problems(config)


def source_problems(data: ConfigDict) -> list[str]:
    """What is wrong with where images come from and how they are read, one line each."""
    problems = unknown_names(
        {
            "config.data.source": (data.source, SOURCES),
            "config.data.augment": (data.augment, AUGMENTATIONS),
            "config.data.held_out_augment": (data.held_out_augment, DRAWING_NOTHING),
        }
    )
    if data.channels < 1:
        problems.append(f"config.data.channels: {data.channels} is below 1")
    elif math.prod(data.image_size) * data.channels > MOST_NUMBERS:
        problems.append(
            f"config.data.image_size: {tuple(data.image_size)} times {data.channels} channel(s) are more than the "
            f"{MOST_NUMBERS} numbers that an image may have"
        )
    elif data.source in ("folder", "files", "tfds") and data.channels not in (1, 3):
        problems.append(f"config.data.channels: image files are read as 1 or 3 channels, not {data.channels}")
    return problems


def pixel_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.pixels for images of so many channels, one line each."""
    return [
        f"config.pixels.{key}: {tuple(config.pixels[key])} is not one number{' above 0' * (key == 'std')} "
        f"for each of config.data.channels {config.data.channels}"
        for key in ("mean", "std")
        if len(config.pixels[key]) != config.data.channels or (key == "std" and min(config.pixels.std) <= 0)
    ]


def augmentation_problems(data: ConfigDict) -> list[str]:
    """What is wrong with the numbers of augmentation, one line each."""
    problems = []
    if data.repeats < 1 or data.batch_size % max(data.repeats, 1):
        problems.append(f"config.data.repeats: {data.repeats} does not divide the batch size {data.batch_size}")
    for key in ("scale", "ratio"):
        bounds = data[key]
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] or (key == "scale" and bounds[1] > 1):
            above = " above 0, up to 1" if key == "scale" else " above 0"
            problems.append(f"config.data.{key}: {tuple(bounds)} is not a range (low, high){above}")
    limits = {"randaugment": (10, "not between 0 (off) and 10"), "jitter": (math.inf, "below 0; 0 is off")}
    for key, (most, told) in limits.items():
        if not 0 <= data[key] <= most:
            problems.append(f"config.data.{key}: {data[key]} is {told}")
        elif data[key] and data.channels not in (1, 3):
            problems.append(f"config.data.{key}: is for images of 1 or 3 channels, not {data.channels}; set it to 0")
    return problems


def optim_problems(optim: ConfigDict) -> list[str]:
    """What is wrong with the optimizer and its numbers, one line each."""
    problems = unknown_names({"config.optim.name": (optim.name, OPTIMIZERS)})
    if not 0 < optim.layer_decay <= 1:
        problems.append(f"config.optim.layer_decay: {optim.layer_decay} is not above 0, up to 1 (off)")
    for key in ("base_learning_rate", "min_learning_rate", "warmup_epochs", "weight_decay", "b1", "b2"):
        value = optim[key]
        if value < 0 or (key in ("b1", "b2") and value >= 1):
            problems.append(f"config.optim.{key}: {value} is below 0" + ", or not below 1" * (key in ("b1", "b2")))
    return problems


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
    """Which settings that count something are below the `LEAST` or above the `MOST` they can be, one line each."""
    given = lambda bounds: (  # noqa: E731
        (f"config.{group}.{key}", config[group][key], bound)
        for group, keys in bounds.items()
        for key, bound in keys.items()
        if group in config and config[group].get(key) is not None
    )
    problems = [f"{where}: {value} is below {least}" for where, value, least in given(LEAST) if value < least]
    return problems + [f"{where}: {value} is above {most}" for where, value, most in given(MOST) if value > most]


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
