"""How much arithmetic a model needs, counted from its shapes: what speed is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from mae_jax.model.mae import MAE
from mae_jax.model.masking import decoded_count, visible_count
from mae_jax.model.patches import grid_of


def block_flops(tokens: int, computed: int, width: int, mlp_ratio: float) -> int:
    """Of a transformer block on `tokens` tokens, of which `computed` are asked for: its matrix products."""
    hidden = int(width * mlp_ratio)
    keys_and_values = 2 * tokens * width * 2 * width
    queries_and_output = 2 * computed * width * 2 * width
    attention = 2 * computed * tokens * 2 * width
    return keys_and_values + queries_and_output + attention + 2 * computed * 2 * width * hidden


def cross_block_flops(queries: int, tokens: int, width: int, tokens_width: int, mlp_ratio: float) -> int:
    """Of a block whose `queries` of `width` attend to `tokens` of `tokens_width`: its matrix products."""
    hidden = int(width * mlp_ratio)
    keys_and_values = 2 * tokens * tokens_width * 2 * width
    queries_and_output = 2 * queries * width * 2 * width
    attention = 2 * queries * tokens * 2 * width
    return keys_and_values + queries_and_output + attention + 2 * queries * 2 * width * hidden


def forward_flops(
    model: MAE, image_size: Sequence[int], channels: int, ratio: float, every_patch: bool = False, decoded: float = 1.0
) -> dict[str, int]:
    """Of the loss of one image, by part: multiplications and additions of the matrix products, two per pair.

    Counts what the loss needs: visible patches in the encoder, unless it has the mask tokens, and in the decoder's last
    block and head the patches that are decoded alone.

    Args:
      image_size: (H, W).
      channels: C.
      ratio: the share of patches that is hidden.
      every_patch: the loss is of all patches, which the decoder's last block and head then compute.
      decoded: the share of the hidden patches that the loss is of.
    """
    encoder, decoder = model.encoder, model.decoder
    rows, cols = grid_of(image_size, encoder.patch_size)
    patches = rows * cols
    seen = visible_count(patches, ratio)
    told = patches if every_patch else decoded_count(patches - seen, decoded)
    pixels = encoder.patch_size**2 * channels
    encoded = 1 + (patches if decoder.mask_tokens == "encoder" else seen)
    embedded, width = 0, decoder.width
    if not decoder.depth:
        width, blocks = encoder.width, []
    elif decoder.kind == "cross":
        blocks = [cross_block_flops(told, encoded, width, encoder.width, decoder.mlp_ratio)] * decoder.depth
    else:
        embedded = encoded
        computed = [1 + patches] * (decoder.depth - 1) + [told]
        blocks = [block_flops(1 + patches, n, width, decoder.mlp_ratio) for n in computed]
    return {
        "patch_embedding": 2 * seen * pixels * encoder.width,
        "encoder": encoder.depth * block_flops(encoded, encoded, encoder.width, encoder.mlp_ratio),
        "decoder_embedding": 2 * embedded * encoder.width * width,
        "decoder": sum(blocks),
        "head": 2 * told * width * decoder.target_width,
    }


def training_flops(
    model: MAE, image_size: Sequence[int], channels: int, ratio: float, every_patch: bool = False, decoded: float = 1.0
) -> int:
    """Of one image in a training step: the loss, and twice that for the gradients of both factors of each product.

    Less the gradient of the pixels, which nobody needs. The optimizer and all that is done to single numbers, which
    is below 2 % from a width of 192 on, is not counted.
    """
    parts = forward_flops(model, image_size, channels, ratio, every_patch, decoded)
    return 3 * sum(parts.values()) - parts["patch_embedding"]


def attended_flops(model: MAE, image_size: Sequence[int], channels: int) -> int:
    """Of what the cls token of one image attends to (`model.attention`), which guided masks are drawn from."""
    encoder = model.encoder
    rows, cols = grid_of(image_size, encoder.patch_size)
    patches, width = rows * cols, encoder.width
    tokens = 1 + patches
    embedding = 2 * patches * encoder.patch_size**2 * channels * width
    query, keys, logits = 2 * width * width, 2 * tokens * width * width, 2 * tokens * width
    before = (encoder.depth - 1) * block_flops(tokens, tokens, width, encoder.mlp_ratio)
    return embedding + before + query + keys + logits
