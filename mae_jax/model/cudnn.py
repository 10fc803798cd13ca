"""Attention as one kernel of cuDNN's, through `jax.nn.dot_product_attention`: 16-bit numbers on NVIDIA's GPUs.

It keeps the logarithms of the softmax's sums for the backward pass, f32[N,heads,Q], where the formula in ops.py keeps
the weights, [N,heads,Q,T]. On a mesh, JAX splits it by the batch and by heads. On TPUs and in float32
`jax.nn.dot_product_attention` is that formula itself, so that nothing would be gained.

What is possible is the support matrix of cuDNN's documentation ("Scaled Dot Product Attention") for both ways.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mae_jax.model import native

DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 128  # Hopper has 256, but it alone
OLDEST = 8.0  # compute capability: Ampere


@functools.cache
def capability() -> float:
    """The compute capability of the GPUs, such as 9.0 of an H100; 0 where there are none, or others than NVIDIA's."""
    device = jax.local_devices()[0]
    found = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if found else 0.0


def serves(dtype, head: int) -> bool:
    """Whether attention of `dtype`, in heads of `head` values, is to be computed by cuDNN."""
    possible = jnp.dtype(dtype).name in DTYPES and head % 8 == 0 and head <= LARGEST_HEAD
    return possible and native.wanted() and capability() >= OLDEST


def attention(q, kv):
    """The function of that name in ops.py."""
    queries, tokens = q.shape[1], kv.shape[1]

    def even(x):
        """JAX takes no odd number of tokens where there is a gradient, whether or not there is a bias."""
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    lengths = jnp.full(len(kv), tokens, jnp.int32) if tokens % 2 else None  # of the keys that count
    k, v = even(kv[:, :, 0]), even(kv[:, :, 1])
    out = jax.nn.dot_product_attention(even(q), k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :queries]
