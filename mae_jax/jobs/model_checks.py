"""What can be wrong with the numbers of a model and its task: one line each, all of them at once."""

from __future__ import annotations

import math

import jax
from ml_collections import ConfigDict

from mae_jax.data.pipeline import Dataset
from mae_jax.jobs import checks, fitting, models
from mae_jax.model import classifier, cudnn, losses, masking, ops, targets
from mae_jax.model.extent import MOST_BLOCKS, MOST_NUMBERS, MOST_PARAMETERS, parameter_count, table_size
from mae_jax.model.layers import BLOCKS, REMAT
from mae_jax.model.mae import MASK_TOKENS, Decoder
from mae_jax.model.patches import grid_of
from mae_jax.model.positions import POSITIONS
from mae_jax.training.sharding import mesh_shape

MOST_SIZE = fitting.IMAGES * fitting.PATCHES  # of a target: what is fitted is to so many patches at most
DTYPES = ("float32", "bfloat16")  # what config.dtype may be


def autoencoder_problems(config: ConfigDict) -> list[str]:
    """What is wrong with the numbers of an autoencoder and its task, one line each."""
    data, encoder = config.data, config.encoder
    problems = sampling_problems(config) + checks.unknown_names(
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
    if config.target.name in targets.TARGETS and 1 <= patch <= max(data.image_size, default=0) and data.channels >= 1:
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
        wrong += head_problems(config.decoder, most_hidden(config))
    if config.mask.decoded != 1 and config.loss.patches == "all":
        wrong.append("config.mask.decoded: is for a loss of hidden patches; leave it out, or config.loss.patches=all")
    problems += wrong + decoder_problems(config)
    return problems + transformer_problems("encoder", config, 1) + transformer_problems("decoder", config, 0)


def most_hidden(config: ConfigDict) -> float:
    """The largest ratio that is hidden in any stage of training or in evaluation."""
    return max(config.mask.ratio, config.mask_schedule.start or 0)


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
    if most_hidden(config) > 0 and blind and (encoder.positions == "none" if from_encoder else decoder.depth):
        told = "config.encoder.positions" if from_encoder else "config.decoder.positions"
        problems.append(f"{told}: none, so that nothing tells one hidden patch from another; give the mask tokens some")
    return problems


def target_problems(config: ConfigDict) -> list[str]:
    """What is wrong with what is predicted of a patch and how that is judged, one line each."""
    name, size, values = config.target.name, config.target.size, models.patch_values(config)
    possible = size is None or 1 <= size <= MOST_SIZE
    target, problems = targets.make(config.encoder.patch_size, name=name, size=size if possible else None), []
    if size is not None and target.size is None:
        problems.append(f"config.target.size: {name} has no size; leave it out")
    elif not possible:
        wrong = "below 1" if size < 1 else f"above {MOST_SIZE}"
        problems.append(f"config.target.size: {size} is {wrong}")
    elif size is not None and target.size != size:
        problems.append(f"config.target.size: {name} is of {target.size}, not {size}; leave it out")
    elif target.least > values:
        told = f"{target.size}, the default," if size is None else size
        key, what = ("name", name) if target.size is None else ("size", told)
        problems.append(
            f"config.target.{key}: {what} needs {target.least} values in a patch, more than the {values} here"
        )
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
    problems = checks.seed_problems(config) + image_size_problems(config) + transformer_problems("encoder", config, 1)
    problems += checks.unknown_names(
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
    """config.dtype and what it may be, for `checks.unknown_names`."""
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
    problems += extent_problems(group, config)
    if part.depth < least:
        problems.append(f"config.{group}.depth: {part.depth} is below {least}")
    if part.mlp_ratio * max(part.width, 1) < 1:
        problems.append(f"config.{group}.mlp_ratio: {part.mlp_ratio} times the width leaves no hidden unit")
    if part.epsilon <= 0:
        problems.append(f"config.{group}.epsilon: {part.epsilon} is not above 0")
    problems += checks.unknown_names(
        {
            f"config.{group}.positions": (part.positions, POSITIONS),
            f"config.{group}.remat": (part.remat, REMAT),
            f"config.{group}.attention": (part.attention, ops.ATTENTION),
        }
    )
    if group == "encoder" and not 0 <= part.drop_path < 1:
        problems.append(f"config.encoder.drop_path: {part.drop_path} is not between 0 and 1")
    return problems


def extent_problems(group: str, config: ConfigDict) -> list[str]:
    """What is wrong with the extent of the encoder or decoder, which no machine could hold or compile: a line, or none.

    Positions are tables that are computed where a model is only looked at, so that this has to be told before.
    """
    part, size, patch = config[group], config.data.image_size, config.encoder.patch_size
    if part.depth > MOST_BLOCKS:
        return [f"config.{group}.depth: {part.depth} is above {MOST_BLOCKS}"]
    embedded = patch**2 * config.data.channels if group == "encoder" else 0
    parameters = parameter_count(max(part.depth, 1), part.width, part.mlp_ratio, embedded)
    if parameters > MOST_PARAMETERS:
        return [
            f"config.{group}.width: {part.width} makes {parameters:.1e} parameters, with config.{group}.depth "
            f"{part.depth} and config.{group}.mlp_ratio {part.mlp_ratio}; more than {MOST_PARAMETERS:.1e} are too many"
        ]
    if image_size_problems(config) or math.prod(size) * config.data.channels > MOST_NUMBERS:
        return []
    numbers = table_size(size, patch, part.width, part.positions)
    if numbers > MOST_NUMBERS:
        return [
            f"config.{group}.positions: a table of {numbers} numbers, for {math.prod(grid_of(size, patch))} patches; "
            f"more than {MOST_NUMBERS} are too many: give larger patches or smaller images"
        ]
    return []


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
        or checks.mesh_problems(jax.devices(), **config.mesh)
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
    unknown = checks.unknown_names({"config.mask.name": (config.mask.name, masking.SAMPLERS)})
    return unknown + checks.seed_problems(config)


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
