"""The transformer block of ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), as timm and the original MAE have it.

Parameters are float32; `dtype` is what the matrix products compute in, with sums in float32. LayerNorm, the softmax and
the residual stream that branches are added to are always float32, as in PyTorch under autocast: LayerNorm's backward
pass keeps its input in float32 anyway, so that a narrower stream would save no memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mae_jax.model import native, ops
from mae_jax.model.patches import position_rows


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
        out = checkpoint_name(ops.linear(rows, kernel[:, columns], bias[columns]), ops.PRODUCT)
        return out.reshape(*x.shape[:-1], -1)


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
    fixed = jnp.asarray(position_rows(grid, width))
    return module.param("positions", lambda key: fixed) if kind == "learned" else fixed


class Attention(nn.Module):
    """Multi-head self-attention. Queries come from the tokens from `first` on, keys and values from all.

    qkv is one [D,3D] matrix, so that xavier-uniform has the limit sqrt(6/(4D)) of the original.
    """

    heads: int
    dtype: str = "float32"
    kind: str = "auto"  # of `ops.ATTENTION`

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0) -> jax.Array:
        n, tokens, width = x.shape

        qkv = Dense(3 * width, self.dtype, name="qkv")
        q = qkv(x[:, first:], slice(width)).reshape(n, tokens - first, self.heads, -1)
        if native.serves(q):  # one large product
            kv = qkv(x, slice(width, None)).reshape(n, tokens, 2, self.heads, -1)
        else:  # two, or a mesh's tensor axis would have the keys on one device and the values on another
            k, v = (qkv(x, slice(i * width, (i + 1) * width)).reshape(n, tokens, self.heads, -1) for i in (1, 2))
            kv = jnp.stack([k, v], axis=2)
        x = ops.attention(q, kv, self.kind).reshape(n, tokens - first, width)
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
      epsilon: of the LayerNorms.
      attention: one of `ops.ATTENTION`.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    epsilon: float = EPSILON
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0, paths: jax.Array | None = None) -> jax.Array:
        """Compute f32[N,M,D] -> f32[N,M-first,D].

        Args:
          paths: f32[N,2], what each sample's attention and its MLP are multiplied by; see `ViT.draw_paths`.
        """
        normal = LayerNorm(self.dtype, self.epsilon, name="attention_norm")(x)
        branch = Attention(self.heads, self.dtype, self.attention, name="attention")(normal, first)
        x = x[:, first:] + (branch if paths is None else branch * paths[:, :1, None].astype(branch.dtype))
        normal = LayerNorm(self.dtype, self.epsilon, name="mlp_norm")(x)
        branch = MLP(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(normal)
        return x + (branch if paths is None else branch * paths[:, 1:, None].astype(branch.dtype))


# What is kept of a block until its backward pass; all else is computed a second time then. "none": all that is needed;
# "dots": the results of matrix products, but not attention's; "full": nothing but what went in.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(ops.PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def block_of(remat: str) -> type[nn.Module]:
    """`Block`, rematerialised as the row of `REMAT` says; parameters, their names and values are the same.

    Raises:
      ValueError: there is no such row.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is one of {', '.join(REMAT)}, not {remat!r}")
    return Block if remat == "none" else nn.remat(Block, static_argnums=(2,), policy=REMAT[remat])
