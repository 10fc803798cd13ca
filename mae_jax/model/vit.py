"""The one encoder: a Vision Transformer that sees all patches, or only the visible ones."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.model import positions
from mae_jax.model.layers import EPSILON, Dense, LayerNorm, block_of
from mae_jax.model.masking import take
from mae_jax.model.patches import grid_of, patchify

# Width, depth and heads by name (Dosovitskiy et al. 2021, table 1; Ti and S from DeiT, arXiv 2012.12877).
SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "H": {"width": 1280, "depth": 32, "heads": 16},
}


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch gives a convolution's bias, and the original code keeps."""
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class ViT(nn.Module):
    """Patch embedding, positions, a cls token, `depth` blocks and a final norm.

    The masked and the whole image take the same path: pre-training passes `visible`, everything else does not.

    Attributes:
      patch_size: P, pixels a side.
      width: D, divisible by `heads` and by 4.
      depth: number of transformer blocks.
      heads: attention heads per block.
      mlp_ratio: hidden width of each block's MLP, in units of D.
      positions: a row of `positions.POSITIONS`. Those that are learned tie the encoder to one size of images
        (`positions.RESIZE`).
      drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first, as in timm; only for
        the `draw_paths` that training passes on.
      epsilon: of the LayerNorms; what some of Hugging Face's models have is 1e-12.
      final_norm: without it, tokens are those of the last block: fine-tuning has a norm of its own.
      remat: a row of `layers.REMAT`: what of the blocks is computed twice instead of kept in memory.
      attention: one of `ops.ATTENTION`: which kernel computes it.
      dtype: of the matrix products, "float32" or "bfloat16"; parameters are float32.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    positions: str = "sincos"
    drop_path: float = 0.0
    final_norm: bool = True
    epsilon: float = EPSILON
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        visible: jax.Array | None = None,
        paths: jax.Array | None = None,
        hidden: jax.Array | None = None,
        mask_token: jax.Array | None = None,
    ) -> jax.Array:
        """Encode images f32[N,H,W,C] (already normalised), or only their patches `visible` i32[N,K].

        Args:
          paths: from `draw_paths`; None: every sample takes part in everything.
          hidden: i32[N,M], patches that go along as `mask_token` f32[1,1,D], in place of their embedding (paper, table
            1c). It is a parameter of whoever passes it, and not of the encoder, which is used without it later.

        Returns:
          [N,1+K,D], float32 without `final_norm` and else of `dtype`: the cls token, then the tokens of the visible
          patches in the order of `visible`; of all L patches, row by row, when `visible` is None. With `hidden`,
          [N,1+K+M,D]: those of the hidden ones come last.
        """
        x = patchify(images, self.patch_size)  # [N,L,P*P*C]
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        grid = grid_of(images.shape[1:3], self.patch_size)
        where = positions.make(self.positions, partial(self.param, "positions"), grid, self.width, self.heads)
        tokens = None  # all, in order
        if visible is not None:  # cut before embedding: hidden pixels are never read
            x = take(x, visible)  # [N,K,P*P*C]
            tokens = positions.with_cls(visible)  # i32[N,1+K]
        x = Dense(self.width, self.dtype, torch_bias(x.shape[-1]), name="patch_embedding")(x)
        x = [jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x]
        if hidden is not None:
            x += [jnp.broadcast_to(mask_token, (*hidden.shape, self.width))]
            tokens = jnp.concatenate([tokens, 1 + hidden], axis=1)  # i32[N,1+K+M]
        x = where.add(jnp.concatenate(x, axis=1), tokens)  # float32 from here on, as in every residual stream
        options = (self.heads, self.mlp_ratio, self.dtype, self.epsilon, self.attention)
        relation = where.between(tokens, tokens)
        for i in range(self.depth):
            block = block_of(self.remat)(*options, name=f"block_{i}")
            x = block(x, 0, None if paths is None else paths[:, i], relation)
        return LayerNorm(self.dtype, self.epsilon, name="norm")(x) if self.final_norm else x

    @nn.nowrap
    def draw_paths(self, key: jax.Array, num: int) -> jax.Array | None:
        """Which branches `num` samples leave out (stochastic depth, Huang et al. 2016, arXiv 1603.09382).

        Returns:
          f32[num,depth,2], for the attention and the MLP of each block: 0 where it is left out, else the inverse of how
          likely that is not, so that the expectation stays; None without `drop_path`.
        """
        if not self.drop_path:
            return None
        keep = 1 - self.drop_path * np.arange(self.depth, dtype=np.float32)[None, :, None] / max(self.depth - 1, 1)
        return jax.random.bernoulli(key, keep, (num, self.depth, 2)) / keep
