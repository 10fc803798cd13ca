"""The decoder, and the autoencoder that joins it to a ViT (paper section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.model.layers import EPSILON, Dense, LayerNorm, block_of, position_table
from mae_jax.model.masking import Mask, take
from mae_jax.model.patches import grid_of
from mae_jax.model.vit import ViT


class Decoder(nn.Module):
    """A small transformer that predicts the hidden patches from the latents of the visible ones.

    Attention does not care in which order tokens stand, so they stay in the order of the mask, visible first:
    nothing is shuffled back in training, and the last block computes the hidden tokens alone.

    Attributes:
      target_width: T, values to predict per patch.
      width, depth, heads, mlp_ratio: as in `ViT`; the paper's decoder is 512, 8, 16, 4. A depth of 0 is a linear
        head on the encoder.
      positions, epsilon, remat, attention: as in `ViT`; the paper's positions are fixed.
      dtype: of the matrix products.
    """

    target_width: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    positions: str = "sincos"
    epsilon: float = EPSILON
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, latent: jax.Array, mask: Mask, grid: Sequence[int], every_patch: bool = False) -> jax.Array:
        """Predict from latents dtype[N,1+K,D] of the patches `mask.visible` of a `grid` = (rows, columns).

        Returns:
          dtype[N,L-K,T], a prediction for each patch of `mask.hidden`; with `every_patch`, dtype[N,L,T] for all
          patches, row by row.
        """
        x = Dense(self.width, self.dtype, name="embedding")(latent)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        table = position_table(self, self.positions, grid, self.width)  # float32, and so is the residual stream
        positions = table[0, 1:]
        cls, seen = x[:, :1] + table[:, :1], x[:, 1:] + positions[mask.visible]
        x = jnp.concatenate([cls, seen, mask_token + positions[mask.hidden]], axis=1)  # [N,1+L,width]
        first = 1 if every_patch else 1 + mask.visible.shape[1]
        options = (self.heads, self.mlp_ratio, self.dtype, self.epsilon, self.attention)
        for i in range(self.depth):
            last = i == self.depth - 1
            block = block_of(self.remat)(*options, name=f"block_{i}")
            x = block(x, first if last else 0)
        x = LayerNorm(self.dtype, self.epsilon, name="norm")(x if self.depth else x[:, first:])
        x = Dense(self.target_width, self.dtype, name="head")(x)
        return take(x, mask.restore) if every_patch else x


class MAE(nn.Module):
    """Masked autoencoder: `encoder` on the visible patches, `decoder` for the hidden ones."""

    encoder: ViT
    decoder: Decoder

    def __call__(self, images: jax.Array, mask: Mask, every_patch: bool = False) -> jax.Array:
        """Predict the hidden patches of images f32[N,H,W,C] (already normalised); see `Decoder` for the shapes."""
        latent = self.encoder(images, mask.visible)  # [N,1+K,D]
        grid = grid_of(images.shape[1:3], self.encoder.patch_size)
        return self.decoder(latent, mask, grid, every_patch)  # [N,L-K,T]
