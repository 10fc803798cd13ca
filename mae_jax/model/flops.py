"""How much arithmetic a model needs, counted from its shapes: what speed is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from mae_jax.model.mae import MAE
from mae_jax.model.masking import visible_count
from mae_jax.model.patches import grid_of


def block_flops(tokens: int, computed: int, width: int, mlp_ratio: float) -> int:
    """Of a transformer block on `tokens` tokens, of which `computed` are asked for: its matrix products."""
    hidden = int(width * mlp_ratio)
    keys_and_values = 2 * tokens * width * 2 * width
    queries_and_output = 2 * computed * width * 2 * width
    attention = 2 * computed * tokens * 2 * width
    return keys_and_values + queries_and_output + attention + 2 * computed * 2 * width * hidden


def forward_flops(
    model: MAE, image_size: Sequence[int], channels: int, ratio: float, every_patch: bool = False
) -> dict[str, int]:
    """Of the loss of one image, by part: multiplications and additions of the matrix products, two per pair.

    Counts what the loss needs: visible patches in the encoder, and in the decoder's last block and head the hidden
    ones alone.

    Args:
      image_size: (H, W).
      channels: C.
      ratio: the share of patches that is hidden.
      every_patch: the loss is of all patches, which the decoder's last block and head then compute.
    """
    encoder, decoder = model.encoder, model.decoder
    rows, cols = grid_of(image_size, encoder.patch_size)
    patches = rows * cols
    seen = visible_count(patches, ratio)
    told = patches if every_patch else patches - seen
    pixels = encoder.patch_size**2 * channels
    blocks = [patches + 1] * (decoder.depth - 1) + [told] * bool(decoder.depth)
    return {
        "patch_embedding": 2 * seen * pixels * encoder.width,
        "encoder": encoder.depth * block_flops(1 + seen, 1 + seen, encoder.width, encoder.mlp_ratio),
        "decoder_embedding": 2 * (1 + seen) * encoder.width * decoder.width,
        "decoder": sum(block_flops(1 + patches, n, decoder.width, decoder.mlp_ratio) for n in blocks),
        "head": 2 * told * decoder.width * decoder.target_width,
    }


def training_flops(
    model: MAE, image_size: Sequence[int], channels: int, ratio: float, every_patch: bool = False
) -> int:
    """Of one image in a training step: the loss, and twice that for the gradients of both factors of each product.

    Less the gradient of the pixels, which nobody needs. The optimizer and all that is done to single numbers, which
    is below 2 % from a width of 192 on, is not counted.
    """
    parts = forward_flops(model, image_size, channels, ratio, every_patch)
    return 3 * sum(parts.values()) - parts["patch_embedding"]
