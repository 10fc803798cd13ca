"""The transformer block of ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), as timm and the original MAE have it.

Parameters are float32; `dtype` is what the matrix products compute in. LayerNorm statistics and the softmax are
always float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.model import ops


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


class LayerNorm(nn.Module):
    """Normalisation over the last axis, epsilon 1e-6, with scale and bias."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return ops.layer_norm(rows, scale, bias).astype(self.dtype).reshape(x.shape)


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
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        attended = Attention(self.heads, self.dtype, name="attention")(
            LayerNorm(self.dtype, name="attention_norm")(x), first
        )
        x = x[:, first:] + self.drop(attended)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        return x + self.drop(MLP(hidden, self.dtype, name="mlp")(LayerNorm(self.dtype, name="mlp_norm")(x)))

    def drop(self, branch: jax.Array) -> jax.Array:
        """Zero for the samples that leave [N,M,D] out; larger for the others, so that the expectation stays."""
        if not self.drop_path or not self.has_rng("drop_path"):
            return branch
        keep = 1 - self.drop_path
        kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, (len(branch), 1, 1))
        return branch * (kept / keep).astype(branch.dtype)
