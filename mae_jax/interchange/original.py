"""What a model is, told from the tensors of the original MAE code or of timm's ViT: no config lies beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.interchange.huggingface import IMAGENET, are_numbers, mlp_ratio
from mae_jax.interchange.names import ORIGINAL, count_blocks
from mae_jax.model.layers import EPSILON
from mae_jax.model.vit import SIZES

# Heads by width, where nothing else says so: the sizes of ViT, and the decoder of the paper (512 wide).
HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
DECODER_HEADS = {512: 16}


# The tensors from whose shapes the rest is told: what these should be.
TELLING = {
    "patch_embed.proj.weight": ("(width, channels, side, side)", lambda s: len(s) == 4 and s[2] == s[3]),
    "pos_embed": ("(1, 1 + patches, width)", lambda s: len(s) == 3 and s[1] > 1),
    "blocks.0.mlp.fc1.weight": ("(hidden, width)", lambda s: len(s) == 2),
    "decoder_embed.weight": ("(width, width of the encoder)", lambda s: len(s) == 2),
    "decoder_blocks.0.mlp.fc1.weight": ("(hidden, width)", lambda s: len(s) == 2),
    "head.weight": ("(classes, width)", lambda s: len(s) == 2),
}
ALWAYS = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")


def describe(
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    heads: Sequence[int] = (),
    image_size: Sequence[int] = (),
    target: str = "",
    pool: str = "",
) -> dict:
    """The groups of a config that `huggingface.describe` gives, from the shapes of all tensors by name.

    Args:
      where: the file, for messages.
      heads: of the encoder and, where there is one, of the decoder; empty: those of ViT's sizes.
      image_size: (H, W); empty: a square.
      target: what the decoder predicts; empty: "normalized_pixels", or "pixels" where the file's name begins with
        mae_visualize, as the published ones do.
      pool: of a classifier without fc_norm; empty: "cls", timm's default.

    Raises:
      CheckpointError: a tensor that all models have is missing or misshapen.
      ConfigError: what no tensor says must be given.
    """
    problems = [
        f"{where}: missing: {name}"
        if name not in shapes
        else f"{where}: misshapen: {name} is {shapes[name]}, not {of}, all above 0"
        for name, (of, fits) in TELLING.items()
        if (name in shapes or name in ALWAYS) and not (name in shapes and fits(shapes[name]) and all(shapes[name]))
    ]
    if problems:
        raise CheckpointError(problems)
    kernel, positions = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
    width, channels, patch, _ = kernel
    patches = positions[1] - 1
    side = math.isqrt(patches)
    if not image_size and side**2 != patches:
        raise ConfigError(f"{where}: {patches} patches are no square; give --image_size=HEIGHT,WIDTH")
    size = tuple(image_size) or (side * patch, side * patch)
    if any(length % patch for length in size):
        raise ConfigError(f"--image_size={size[0]},{size[1]}: is not divisible into patches of {patch}")
    config = {
        "image_size": size,
        "channels": channels,
        "encoder": {"patch_size": patch, **_transformer(shapes, "encoder", width, HEADS, heads[:1], where)},
    }
    if "decoder_embed.weight" in shapes:
        width = shapes["decoder_embed.weight"][0]
        config["decoder"] = _transformer(shapes, "decoder", width, DECODER_HEADS, heads[1:], where)
        if not target:
            target = "pixels" if where.rpartition("/")[2].startswith("mae_visualize") else "normalized_pixels"
        config["target"] = {"name": target}
        config["mask"] = {"name": "random", "ratio": 0.75}
    elif "head.weight" in shapes:
        config["classes"] = tuple(map(str, range(shapes["head.weight"][0])))
        after = "fc_norm.weight" in shapes
        config["head"] = {"pool": "mean" if after else pool or "cls", "norm": "layer" if after else "none"}
        config["encoder"]["final_norm"] = not after
    return config


def _transformer(
    shapes: Mapping, part: str, width: int, usual: Mapping[int, int], heads: Sequence[int], where: str
) -> dict:
    depth = count_blocks(shapes, ORIGINAL, part)
    if not heads and depth and width not in usual:
        raise ConfigError(
            f"{where}: no tensor says how many heads the {part}, {width} wide, has; give --heads=ENCODER"
            + ",DECODER" * ("decoder_embed.weight" in shapes)
        )
    if heads and width % heads[0]:
        raise ConfigError(f"--heads: the {part} is {width} wide, which {heads[0]} heads do not divide")
    hidden = shapes.get(ORIGINAL[part + "/block_{i}/mlp/in"].replace("{i}", "0") + ".weight", (4 * width,))[0]
    return {
        "width": width,
        "depth": depth,
        "heads": heads[0] if heads else usual.get(width, 1),
        "mlp_ratio": mlp_ratio(hidden, width),
        "positions": "learned",
        "epsilon": EPSILON,
    }


def pixels_of(settings: Mapping, channels: int) -> tuple[dict, bool]:
    """The `pixels` group, and whether it is what timm's config.json says or an assumption: that of ImageNet."""
    if are_numbers(settings.get("mean"), channels) and are_numbers(settings.get("std"), channels):
        return {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])}, True
    if channels == 3:
        return IMAGENET, False
    return {key: (sum(value) / 3,) * channels for key, value in IMAGENET.items()}, False
