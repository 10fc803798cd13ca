"""What can be wrong with the numbers of a config: one line each, all of them at once, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from mae_jax.data.augment import AUGMENTATIONS
from mae_jax.data.sources import SOURCES
from mae_jax.errors import nearest
from mae_jax.model import masking, targets
from mae_jax.model.patches import grid_of
from mae_jax.training import optim


def model_problems(config: ConfigDict) -> list[str]:
    """What is wrong with the model's numbers, one line each."""
    data, encoder, decoder = config.data, config.encoder, config.decoder
    problems = sampling_problems(config) + unknown_names(
        {
            "config.target.name": (config.target.name, targets.TARGETS),
            "config.dtype": (config.dtype, ("float32", "bfloat16")),
        }
    )
    patch = encoder.patch_size
    if config.target.name == "normalized_pixels" and patch**2 * data.channels < 2:
        problems.append("config.target.name: normalized_pixels needs more than one value in a patch; use pixels")
    if len(data.image_size) != 2 or min(data.image_size) < 1 or patch < 1 or any(s % patch for s in data.image_size):
        problems.append(
            f"config.data.image_size: {tuple(data.image_size)} is not (height, width), both divisible by "
            f"config.encoder.patch_size {patch}"
        )
    else:
        problems += ratio_problems(config, grid_of(data.image_size, patch))
    for group, part in {"encoder": encoder, "decoder": decoder}.items():
        least = 1 if group == "encoder" else 0
        if part.width < 4 or part.width % 4 or part.heads < 1 or part.width % part.heads:
            problems.append(
                f"config.{group}.width: {part.width} is not divisible by 4 (for its positions) and by "
                f"config.{group}.heads {part.heads}"
            )
        if part.depth < least:
            problems.append(f"config.{group}.depth: {part.depth} is below {least}")
        if part.mlp_ratio * max(part.width, 1) < 1:
            problems.append(f"config.{group}.mlp_ratio: {part.mlp_ratio} times the width leaves no hidden unit")
    return problems


def sampling_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.mask.name and config.seed, one line each."""
    problems = unknown_names({"config.mask.name": (config.mask.name, masking.SAMPLERS)})
    if not 0 <= config.seed < 2**32:
        problems.append(f"config.seed: {config.seed} is not between 0 and {2**32 - 1}")
    return problems


def ratio_problems(config: ConfigDict, grid: tuple[int, int]) -> list[str]:
    """What is wrong with config.mask.ratio for a `grid` of patches: a line, or none."""
    try:
        masking.visible_count(grid[0] * grid[1], config.mask.ratio)
    except ValueError as error:
        return [f"config.mask.ratio: {error}; give a ratio between 0 and 1 that hides some and keeps some"]
    return []


def run_problems(config: ConfigDict) -> list[str]:
    """What is wrong with the data's and the run's numbers, one line each."""
    data, train = config.data, config.train
    problems = unknown_names(
        {
            "config.data.source": (data.source, SOURCES),
            "config.data.augment": (data.augment, AUGMENTATIONS),
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
    devices = jax.device_count()
    used = devices if config.mesh.data == -1 else config.mesh.data
    if not 1 <= used <= devices:
        problems.append(
            f"config.mesh.data: {used} is not between 1 and the {devices} device(s) there are, nor -1 for all"
        )
    elif data.batch_size < 1 or data.batch_size % used:
        problems.append(f"config.data.batch_size: {data.batch_size} is not a multiple of the {used} device(s), above 0")
    hosts = jax.process_count()
    if data.repeats < 1 or data.batch_size % (max(data.repeats, 1) * hosts):
        problems.append(f"config.data.repeats: {data.repeats}, times {hosts} host(s), does not divide the batch size")
    for key in ("scale", "ratio"):
        bounds = data[key]
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] or (key == "scale" and bounds[1] > 1):
            above = " above 0, up to 1" if key == "scale" else " above 0"
            problems.append(f"config.data.{key}: {tuple(bounds)} is not a range (low, high){above}")
    length = next((key for key in ("steps", "epochs") if train[key] is not None), None)
    if length is None:
        problems.append("config.train: neither steps nor epochs is given")
    elif train[length] <= 0:
        problems.append(f"config.train.{length}: {train[length]} is not above 0")
    for key in ("base_learning_rate", "warmup_epochs", "weight_decay", "b1", "b2"):
        value = config.optim[key]
        if value < 0 or (key in ("b1", "b2") and value >= 1):
            problems.append(f"config.optim.{key}: {value} is below 0" + ", or not below 1" * (key in ("b1", "b2")))
    for group, key, least in (
        ("log", "every", 1),
        ("eval", "every", 0),
        ("eval", "images", 1),
        ("pictures", "every", 0),
        ("pictures", "count", 1),
        ("checkpoint", "every", 0),
        ("checkpoint", "keep", 1),
        ("checkpoint", "keep_every", 0),
    ):
        value = config[group][key]
        if value is not None and value < least:
            problems.append(f"config.{group}.{key}: {value} is below {least}")
    return problems


def unknown_names(choices: dict[str, tuple[str, Iterable[str]]]) -> list[str]:
    """A line for each {key: (word, table)} whose word is no row of its table."""
    return [
        f"{key}: no {word!r}; use one of {', '.join(table)}{nearest(word, table)}"
        for key, (word, table) in choices.items()
        if word not in table
    ]
