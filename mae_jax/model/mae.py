"""The decoder, and the autoencoder that joins it to a ViT (paper section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.model import positions
from mae_jax.model.layers import EPSILON, Dense, LayerNorm, block_of
from mae_jax.model.masking import Mask, take
from mae_jax.model.patches import grid_of
from mae_jax.model.vit import ViT

# Where mask tokens come in: with the "decoder", or with the "encoder", which then sees all patches (paper, table 1c).
MASK_TOKENS = ("decoder", "encoder")


class Decoder(nn.Module):
    """A small transformer that predicts the hidden patches from the latents of the visible ones.

    Attention does not care in which order tokens stand, so they stay in the order of the mask, visible first:
    nothing is shuffled back in training, and the last block computes the tokens that are asked for alone.

    With the `kind` "cross" it is that of CrossMAE (arXiv 2401.14391): mask tokens attend to latents, never to one
    another, so that what is predicted of a patch does not depend on which others are. All blocks attend to the
    encoder's last latents; the paper's learned mixture of those of its blocks is left out.

    Attributes:
      target_width: T, values to predict per patch.
      width, depth, heads, mlp_ratio: as in `ViT`; the paper's decoder is 512, 8, 16, 4. A depth of 0 is one linear
        layer on the latents of the patches to predict, which therefore must be among them.
      kind: a row of `layers.BLOCKS`: "self" or "cross".
      mask_tokens: one of `MASK_TOKENS`. With "encoder" the latents are of all patches, in the order of `Mask.order`.
      positions, epsilon, remat, attention: as in `ViT`; the paper's positions are fixed.
      dtype: of the matrix products.
    """

    target_width: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    kind: str = "self"
    mask_tokens: str = "decoder"
    positions: str = "sincos"
    epsilon: float = EPSILON
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, latent: jax.Array, mask: Mask, grid: Sequence[int], every_patch: bool = False) -> jax.Array:
        """Predict from latents dtype[N,1+K,D] of the patches `mask.visible` of a `grid` = (rows, columns).

        Returns:
          dtype[N,M,T], a prediction for each patch of `mask.decoded`; with `every_patch`, dtype[N,L,T] for all
          patches, row by row.

        Raises:
          ValueError: no such kind, or one that has no use for where mask tokens come in or for a depth of 0.
        """
        if self.mask_tokens not in MASK_TOKENS:
            raise ValueError(f"mask tokens are of one of {', '.join(MASK_TOKENS)}, not {self.mask_tokens!r}")
        if self.kind == "cross" and self.mask_tokens == "encoder":
            raise ValueError("a decoder of the kind cross has mask tokens of its own")
        asked = mask.order if every_patch else mask.decoded
        first = 1 + mask.order.shape[1] - asked.shape[1]  # they come last
        if not self.depth:
            if latent.shape[1] < 1 + mask.order.shape[1]:
                raise ValueError("a linear head predicts patches from their own latents, but has none of hidden ones")
            x = latent[:, first:]
        elif self.kind == "cross":
            x = self._cross(latent, mask, asked, grid)
        else:
            x = self._self(latent, mask, first, grid)
        if self.depth:
            x = LayerNorm(self.dtype, self.epsilon, name="norm")(x)
        x = Dense(self.target_width, self.dtype, name="head")(x)
        return take(x, mask.restore) if every_patch else x

    def _self(self, latent: jax.Array, mask: Mask, first: int, grid: Sequence[int]) -> jax.Array:
        """The tokens from `first` on, after blocks in which all attend to all: f32[N,1+L-first,width]."""
        tokens = positions.with_cls(mask.order)  # i32[N,1+L]
        where, x = self._where(grid), Dense(self.width, self.dtype, name="embedding")(latent)
        if self.mask_tokens == "decoder":
            x = jnp.concatenate([x, self._mask_token(mask.hidden)], axis=1)
        x = where.add(x, tokens)  # [N,1+L,width], float32, and so is the residual stream
        for i in range(self.depth):
            start = first if i == self.depth - 1 else 0
            x = self._block(i)(x, start, None, where.between(tokens[:, start:], tokens))
        return x

    def _cross(self, latent: jax.Array, mask: Mask, asked: jax.Array, grid: Sequence[int]) -> jax.Array:
        """The tokens of the patches `asked` i32[N,M], after blocks in which they attend to latents: f32[N,M,width]."""
        where, asked = self._where(grid), 1 + asked
        x = where.add(self._mask_token(asked), asked)
        relation = where.between(asked, positions.with_cls(mask.visible))
        for i in range(self.depth):
            x = self._block(i)(x, latent, relation)
        return x

    def _where(self, grid: Sequence[int]) -> positions.Positions:
        return positions.make(self.positions, partial(self.param, "positions"), grid, self.width, self.heads)

    def _mask_token(self, patches: jax.Array) -> jax.Array:
        """The mask token for each of `patches` i32[N,M]: f32[N,M,width]."""
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        return jnp.broadcast_to(token, (*patches.shape, self.width))

    def _block(self, i: int) -> nn.Module:
        options = (self.heads, self.mlp_ratio, self.dtype, self.epsilon, self.attention)
        return block_of(self.remat, self.kind)(*options, name=f"block_{i}")


class MAE(nn.Module):
    """Masked autoencoder: `encoder` on the visible patches, `decoder` for the hidden ones.

    Where the decoder leaves mask tokens to the encoder, the token is a parameter of this module, "mask_token": what
    is kept after pre-training, the encoder, is none of its business.
    """

    encoder: ViT
    decoder: Decoder

    @nn.compact
    def __call__(self, images: jax.Array, mask: Mask, every_patch: bool = False) -> jax.Array:
        """Predict the hidden patches of images f32[N,H,W,C] (already normalised); see `Decoder` for the shapes."""
        tokens = ()
        if self.decoder.mask_tokens == "encoder":
            tokens = mask.hidden, self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.encoder.width))
        latent = self.encoder(images, mask.visible, None, *tokens)  # [N,1+K,D]; with mask tokens, [N,1+L,D]
        grid = grid_of(images.shape[1:3], self.encoder.patch_size)
        return self.decoder(latent, mask, grid, every_patch)  # [N,M,T]
