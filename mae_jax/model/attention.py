"""What an encoder looks at."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mae_jax.model import positions
from mae_jax.model.layers import LayerNorm
from mae_jax.model.patches import grid_of
from mae_jax.model.vit import ViT


def attended(encoder: ViT, params: dict, images: jax.Array) -> jax.Array:
    """How much of its attention the cls token gives to each patch, in the last block, on average over its heads.

    The encoder sees all patches, as far as the last block's queries and keys: nearly the cost of a whole forward pass.

    Args:
      params: of the encoder.
      images: f32[N,H,W,C], normalised.

    Returns:
      f32[N,L], above 0; with what cls gives to itself, a sum of 1.
    """
    last, width, heads = params[f"block_{encoder.depth - 1}"], encoder.width, encoder.heads
    x = encoder.clone(depth=encoder.depth - 1, final_norm=False).apply({"params": params}, images)  # [N,1+L,D]
    x = LayerNorm(encoder.dtype, encoder.epsilon).apply({"params": last["attention_norm"]}, x)
    kernel, bias = (last["attention"]["qkv"][name].astype(x.dtype) for name in ("kernel", "bias"))
    query = x[:, :1] @ kernel[:, :width] + bias[None, None, :width]
    keys = x @ kernel[:, width : 2 * width] + bias[None, None, width : 2 * width]
    query, keys = (y.reshape(*y.shape[:-1], heads, -1) for y in (query, keys))
    grid = grid_of(images.shape[1:3], encoder.patch_size)
    where = positions.make(encoder.positions, lambda init: params["positions"], grid, width, heads)
    relation = where.between(jnp.zeros((1, 1), jnp.int32))  # of cls to all
    query, keys = relation.rotated(query, jnp.stack([keys, keys], axis=2))
    query, keys = query[:, 0].astype(jnp.float32), keys[:, :, 0].astype(jnp.float32)
    logits = jnp.einsum("nhd,nlhd->nhl", query, keys) * (width // heads) ** -0.5
    if relation.bias is not None:
        logits += relation.bias[:, :, 0]
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)[:, 1:]
