"""The transformer block of ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), as timm and the original MAE have it.

Parameters are float32; `dtype` is what the matrix products compute in, with sums in float32. LayerNorm, the softmax and
the residual stream that branches are added to are always float32, as in PyTorch under autocast: LayerNorm's backward
pass keeps its input in float32 anyway, so that a narrower stream would save no memory.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mae_jax.model import native, ops
from mae_jax.model.positions import Relation


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
        return out.reshape(*x.shape[:-1], out.shape[1])


NO_RELATION = Relation()  # of tokens whose positions attention has nothing to do with
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


class Attention(nn.Module):
    """Multi-head self-attention. Queries come from the tokens from `first` on, keys and values from all.

    qkv is one [D,3D] matrix, so that xavier-uniform has the limit sqrt(6/(4D)) of the original.
    """

    heads: int
    dtype: str = "float32"
    kind: str = "auto"  # of `ops.ATTENTION`

    @nn.compact
    def __call__(self, x: jax.Array, first: int = 0, relation: Relation = NO_RELATION) -> jax.Array:
        n, tokens, width = x.shape
        qkv = Dense(3 * width, self.dtype, name="qkv")
        q = qkv(x[:, first:], slice(width)).reshape(n, tokens - first, self.heads, width // self.heads)
        x = attend(q, keys_and_values(qkv, x, width, self.heads), self.kind, relation)
        return Dense(width, self.dtype, name="out")(x)


class CrossAttention(nn.Module):
    """Multi-head attention of `x` to other tokens of any width: [N,Q,D], [N,T,E] -> [N,Q,D]."""

    heads: int
    dtype: str = "float32"
    kind: str = "auto"  # of `ops.ATTENTION`

    @nn.compact
    def __call__(self, x: jax.Array, others: jax.Array, relation: Relation = NO_RELATION) -> jax.Array:
        n, queries, width = x.shape
        q = Dense(width, self.dtype, name="q")(x).reshape(n, queries, self.heads, width // self.heads)
        kv = keys_and_values(Dense(2 * width, self.dtype, name="kv"), others, 0, self.heads)
        return Dense(width, self.dtype, name="out")(attend(q, kv, self.kind, relation))


def keys_and_values(layer: Dense, x: jax.Array, start: int, heads: int) -> jax.Array:
    """The columns of `layer` from `start` on, of tokens [N,T,D]: [N,T,2,heads,d]."""
    n, tokens, _ = x.shape
    if native.serves(x):  # one large product
        return layer(x, slice(start, None)).reshape(n, tokens, 2, heads, -1)
    # two, or a mesh's tensor axis would have the keys on one device and the values on another
    width = (layer.features - start) // 2
    columns = (slice(start + i * width, start + (i + 1) * width) for i in (0, 1))
    k, v = (layer(x, part).reshape(n, tokens, heads, -1) for part in columns)
    return jnp.stack([k, v], axis=2)


def attend(q: jax.Array, kv: jax.Array, kind: str, relation: Relation) -> jax.Array:
    """`ops.attention` of tokens that stand in a `relation`: [N,Q,heads,d], [N,T,2,heads,d] -> [N,Q,heads*d]."""
    n, queries, heads, d = q.shape
    q, kv = relation.rotated(q, kv)
    return ops.attention(q, kv, kind, relation.bias).reshape(n, queries, heads * d)


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
    def __call__(
        self, x: jax.Array, first: int = 0, paths: jax.Array | None = None, relation: Relation = NO_RELATION
    ) -> jax.Array:
        """Compute f32[N,M,D] -> f32[N,M-first,D].

        Args:
          paths: f32[N,2], what each sample's attention and its MLP are multiplied by; see `ViT.draw_paths`.
          relation: of the tokens from `first` on to all.
        """
        normal = LayerNorm(self.dtype, self.epsilon, name="attention_norm")(x)
        branch = Attention(self.heads, self.dtype, self.attention, name="attention")(normal, first, relation)
        x = x[:, first:] + (branch if paths is None else branch * paths[:, :1, None].astype(branch.dtype))
        branch = mlp_branch(self, x)
        return x + (branch if paths is None else branch * paths[:, 1:, None].astype(branch.dtype))


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens attend to other tokens and not to one another: f32[N,Q,D], [N,T,E] -> f32[N,Q,D].

    Attributes:
      epsilon: of the LayerNorms; the others are taken as they are.
      attention: one of `ops.ATTENTION`.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    epsilon: float = EPSILON
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, others: jax.Array, relation: Relation = NO_RELATION) -> jax.Array:
        normal = LayerNorm(self.dtype, self.epsilon, name="attention_norm")(x)
        x = x + CrossAttention(self.heads, self.dtype, self.attention, name="attention")(normal, others, relation)
        return x + mlp_branch(self, x)


def mlp_branch(block: Block | CrossBlock, x: jax.Array) -> jax.Array:
    """The norm and the MLP of a block."""
    normal = LayerNorm(block.dtype, block.epsilon, name="mlp_norm")(x)
    return MLP(int(x.shape[-1] * block.mlp_ratio), block.dtype, name="mlp")(normal)


# What tokens attend to: one another, or other tokens alone.
BLOCKS = {"self": Block, "cross": CrossBlock}
# What is kept of a block until its backward pass; all else is computed a second time then. "none": all that is needed;
# "dots": the results of matrix products, but not attention's; "full": nothing but what went in.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(ops.PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def block_of(remat: str, kind: str = "self") -> type[nn.Module]:
    """A row of `BLOCKS`, rematerialised as the row of `REMAT` says; parameters, their names and values are the same.

    Raises:
      ValueError: there is no such row.
    """
    for name, word, table in (("remat", remat, REMAT), ("kind", kind, BLOCKS)):
        if word not in table:
            raise ValueError(f"{name} is one of {', '.join(table)}, not {word!r}")
    if remat == "none":
        return BLOCKS[kind]
    return nn.remat(BLOCKS[kind], static_argnums=(2,) if kind == "self" else (), policy=REMAT[remat])
