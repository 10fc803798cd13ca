"""The transformer block of ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), as timm and the original MAE have it.

Parameters are float32; `dtype` is what the matrix products compute in. LayerNorm statistics and the softmax are
always float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.model import ops
from mae_jax.model.patches import sincos_positions


class Dense(nn.Module):
    """x @ kernel + bias over the last axis, or only some `columns` of it; xavier-uniform kernel, zero bias."""

    features: int
    dtype: str = "float32"
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def weights(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """The kernel dtype[inputs,features] and the bias dtype[features]."""
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)

    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        kernel, bias = self.weights(x.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        return ops.linear(rows, kernel[:, columns], bias[columns]).reshape(*x.shape[:-1], -1)


EPSILON = 1e-6  # of the variance in a LayerNorm, as in the original code; PyTorch's default is 1e-5


class LayerNorm(nn.Module):
    """Normalisation over the last axis, with scale and bias."""

    dtype: str = "float32"
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return ops.layer_norm(rows, scale, bias, self.epsilon).astype(self.dtype).reshape(x.shape)


# What tells a token where its patch sits: fixed sines and cosines, or a parameter that begins as these.
POSITIONS = ("sincos", "learned")


def position_table(module: nn.Module, kind: str, grid: Sequence[int], width: int) -> jax.Array:
    """What `module` adds to the tokens of the patches of a `grid` = (rows, columns), and to cls before them.

    Args:
      kind: one of `POSITIONS`. "learned" is a parameter "positions" of the module, and ties it to this grid.

    Returns:
      f32[1,1+L,width]; the first row is that of cls, which is zero unless it is learned.
    """
    if kind not in POSITIONS:
        raise ValueError(f"positions are one of {', '.join(POSITIONS)}, not {kind!r}")
    fixed = jnp.asarray(np.pad(sincos_positions(grid, width), ((1, 0), (0, 0))))[None]
    return module.param("positions", lambda key: fixed) if kind == "learned" else fixed


class Attention(nn.Module):
    """Multi-head self-attention. Queries come from the tokens from `first` on, keys and values from all.

    qkv is one [D,3D] matrix, so that xavier-uniform has the limit sqrt(6/(4D)) of the original.
    """

    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        n, tokens, width = x.shape

        qkv = Dense(3 * width, self.dtype, name="qkv")
        q = qkv(x[:, first:], slice(width)).reshape(n, tokens - first, self.heads, -1)
        kv = qkv(x, slice(width, None)).reshape(n, tokens, 2, self.heads, -1)
        x = ops.attention(q, kv).reshape(n, tokens - first, width)
        return Dense(width, self.dtype, name="out")(x)


class MLP(nn.Module):
    """Two layers with the exact (erf) GELU between; flax's default would be the tanh approximation."""

    hidden: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        inner, outer = Dense(self.hidden, self.dtype, name="in"), Dense(width, self.dtype, name="out")
        rows = x.reshape(-1, width).astype(self.dtype)
        return ops.mlp(rows, *inner.weights(width), *outer.weights(self.hidden)).reshape(x.shape)


class Block(nn.Module):
    """Pre-norm transformer block. Only the tokens from `first` on are computed: [N,M,D] -> [N,M-first,D].

    Attributes:
      drop_path: stochastic depth (Huang et al. 2016, arXiv 1603.09382): how likely a sample leaves out the attention,
        and again the MLP, below 1. Only where `apply` is given an rng "drop_path".
      epsilon: of the LayerNorms.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    drop_path: float = 0.0
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        normal = LayerNorm(self.dtype, self.epsilon, name="attention_norm")(x)
        x = x[:, first:] + self.drop(Attention(self.heads, self.dtype, name="attention")(normal, first))
        normal = LayerNorm(self.dtype, self.epsilon, name="mlp_norm")(x)
        return x + self.drop(MLP(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(normal))

    def drop(self, branch: jax.Array) -> jax.Array:
        """Zero for the samples that leave [N,M,D] out; larger for the others, so that the expectation stays."""
        if not self.drop_path or not self.has_rng("drop_path"):
            return branch
        keep = 1 - self.drop_path
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (len(branch), 1, 1))
        return branch * (kept / keep).astype(branch.dtype)
