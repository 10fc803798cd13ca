"""The four operations that a transformer's time goes into, with backward passes of their own.

The values are those of the plain formulas and of their derivatives; what differs is what is kept for the backward
pass and how it is computed. XLA's CPU compiler turns the derivative of a plain x @ kernel into a transposed copy,
fused with the whole chain of residual gradients before it, so that work grows with the square of the depth; products
that contract rows directly leave it nothing to transpose. Sums over rows and columns are products with ones, which run
at the speed of matrix products. The softmax keeps one array, and an MLP its hidden values before the GELU: what comes
after it is cheap to compute again. tests/model/test_ops.py proves them equal to autodiff, and
tests/benchmarks/step.py measures what they bring.

On one CPU, what is written here in JAX runs as C++ instead, from the function of the same name in native.cc: `native`
decides. On NVIDIA's GPUs 16-bit attention is cuDNN's: `cudnn` decides. Products of bfloat16 arrays accumulate in
float32.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mae_jax.model import cudnn, native

PRODUCT = "product"  # the name of what a rematerialisation policy may keep: results of large matrix products
EXACT = jax.lax.Precision.HIGHEST  # GPUs and TPUs otherwise round float32 factors to TF32 or bfloat16


def _contract(a, b, a_axis: int, b_axis: int, batch: tuple[int, ...] = (), precision=None):
    """Sum of products over one axis of each; `batch` axes come first in both. f32 for any dtype of the inputs."""
    axes = (((a_axis,), (b_axis,)), (batch, batch))
    return jax.lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)


def _row_mean(x):
    """f32[M,D] -> f32[M,1]."""
    return _contract(x, jnp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype), 1, 0, precision=EXACT)


def _column_sum(x):
    """[M,D] -> f32[D]."""
    return _contract(jnp.ones((1, len(x)), x.dtype), x, 1, 0, precision=EXACT)[0]


@jax.custom_vjp
@native.or_plain
def linear(x, kernel, bias):
    """x @ kernel + bias: [M,I], [I,O], [O] -> [M,O], all of one dtype."""
    return _contract(x, kernel, 1, 0).astype(x.dtype) + bias[None]


@native.or_plain
def _input_gradient(g, kernel):
    return _contract(g, kernel, 1, 1).astype(g.dtype)


@native.or_plain
def _kernel_gradient(x, g):
    """The gradients of the kernel and of the bias."""
    return _contract(x, g, 0, 0).astype(g.dtype), _column_sum(g).astype(g.dtype)


def _linear_backward(saved, g):
    x, kernel = saved
    return _input_gradient(g, kernel), *_kernel_gradient(x, g)


linear.defvjp(lambda x, kernel, bias: (linear(x, kernel, bias), (x, kernel)), _linear_backward)


def _normal_cdf(x):
    """f32 of any shape and dtype."""
    return 0.5 * (1 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))


def _gelu(x):
    """The exact one, x times the normal distribution function of x (Hendrycks & Gimpel 2016)."""
    return x * _normal_cdf(x).astype(x.dtype)


@native.or_plain
def _linear_gelu(x, kernel, bias):
    """The values before the GELU, and after it."""
    hidden = _contract(x, kernel, 1, 0).astype(x.dtype) + bias[None]
    return hidden, _gelu(hidden)


@native.or_plain
def _gelu_gradient(g, kernel, hidden):
    """The gradient of the values before the GELU, from that of the product behind it; and the values after it."""
    wide = hidden.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1 / math.sqrt(2 * math.pi))
    dactive = _contract(g, kernel, 1, 1).astype(g.dtype)
    return (dactive * (_normal_cdf(wide) + wide * density)).astype(hidden.dtype), _gelu(hidden)


@jax.custom_vjp
def mlp(x, kernel, bias, out_kernel, out_bias):
    """gelu(x @ kernel + bias) @ out_kernel + out_bias: [M,I], [I,H], [H], [H,O], [O] -> [M,O], all of one dtype."""
    return _mlp_forward(x, kernel, bias, out_kernel, out_bias)[0]


def _mlp_forward(x, kernel, bias, out_kernel, out_bias):
    hidden, active = _linear_gelu(x, kernel, bias)
    hidden = checkpoint_name(hidden, PRODUCT)
    return linear(active, out_kernel, out_bias), (x, hidden, kernel, out_kernel)


def _mlp_backward(saved, g):
    x, hidden, kernel, out_kernel = saved
    dhidden, active = _gelu_gradient(g, out_kernel, hidden)
    return *_linear_backward((x, kernel), dhidden), *_kernel_gradient(active, g)


mlp.defvjp(_mlp_forward, _mlp_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over rows: f32[M,D], f32[D], f32[D] -> f32[M,D]."""
    return _layer_norm(x, scale, bias, epsilon=epsilon)[0]


@native.or_plain
def _layer_norm(x, scale, bias, *, epsilon):
    """With the mean and 1 / sqrt(variance + epsilon) of the rows, f32[M,1]."""
    mean = _row_mean(x)
    centred = x - mean
    inverse = jax.lax.rsqrt(_row_mean(jnp.square(centred)) + epsilon)
    return centred * inverse * scale[None] + bias[None], mean, inverse


def _layer_norm_forward(x, scale, bias, epsilon):
    y, mean, inverse = _layer_norm(x, scale, bias, epsilon=epsilon)
    return y, (x, scale, mean, inverse)


@native.or_plain
def _layer_norm_gradient(x, scale, mean, inverse, g):
    normal = (x - mean) * inverse
    scaled = g * scale[None]
    dx = inverse * (scaled - _row_mean(scaled) - normal * _row_mean(scaled * normal))
    return dx, _column_sum(g * normal), _column_sum(g)


layer_norm.defvjp(_layer_norm_forward, lambda _, saved, g: _layer_norm_gradient(*saved, g))


# How attention is computed. "auto": by a kernel that never writes the weights down, where there is one, and else by the
# formula; "plain": by the formula; "fused": by such a kernel.
ATTENTION = ("auto", "plain", "fused")


def no_kernel(dtype, head: int) -> str | None:
    """Why attention of `dtype`, in heads of `head` values, cannot be "fused" here; None: it can."""
    if native.serves(jax.ShapeDtypeStruct((), dtype)) or cudnn.serves(dtype, head):
        return None
    return (
        f"no kernel for {jnp.dtype(dtype)} and heads of {head} on {jax.device_count()} {jax.default_backend()} "
        f"device(s): there is C++ for float32 on one CPU, and cuDNN for bfloat16 and heads of 8, 16, ... "
        f"{cudnn.LARGEST_HEAD} on NVIDIA GPUs of compute capability {cudnn.OLDEST} and above"
    )


NO_BIAS = "no kernel adds a bias to the scores, as relative positions do"


def attention(q, kv, kind="auto", bias=None):
    """softmax(q k^T / sqrt(d) + bias) v of each head: [N,Q,heads,d], [N,T,2,heads,d] -> [N,Q,heads,d].

    The softmax is float32 for any dtype.

    Args:
      q, kv: queries, and keys and values.
      kind: one of `ATTENTION`.
      bias: f32[N,heads,Q,T], or f32[1,heads,Q,T] for all samples; no kernel takes one. None: zeros.

    Raises:
      ValueError: there is no such kind, or it is "fused", and there is no kernel for that.
    """
    if kind not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}, not {kind!r}")
    if kind == "fused" and (reason := NO_BIAS if bias is not None else no_kernel(q.dtype, q.shape[-1])):
        raise ValueError(f"attention cannot be fused: {reason}")
    if bias is not None:
        return _attention(q, kv, jnp.broadcast_to(bias.astype(jnp.float32), (q.shape[0], *bias.shape[1:])), "plain")
    if kind != "plain" and cudnn.serves(q.dtype, q.shape[-1]):
        return cudnn.attention(q, kv)
    return _attention(q, kv, None, kind)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, kv, bias, kind):
    return _attention_forward(q, kv, bias, kind)[0]


def _attention_forward(q, kv, bias, kind):
    if kind != "plain" and native.serves(q, kv):  # there the softmax is computed again, from the logarithms of its sums
        n, tokens, heads, _ = q.shape
        out, logsum = native.call("attention", (q.shape, (n, heads, tokens)), q, kv)
        return out, (q, kv, out, logsum)
    q, (k, v) = q.swapaxes(1, 2), kv.transpose(2, 0, 3, 1, 4)  # [N,heads,Q,d], twice [N,heads,T,d]
    scores = _contract(q * q.shape[-1] ** -0.5, k, 3, 3, (0, 1))  # f32[N,heads,Q,T]
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(q.dtype)
    biased = None if bias is None else ()  # a tree without leaves
    return _contract(weights, v, 3, 2, (0, 1)).astype(q.dtype).swapaxes(1, 2), (q, k, v, weights, biased)


def _attention_backward(kind, saved, g):
    q, kv, *_ = saved
    if kv.ndim == 5:  # keys and values together, as C++ has kept them
        return *native.call("attention_gradient", (q.shape, kv.shape), *saved, g), None
    q, k, v, weights, biased = saved
    g = g.swapaxes(1, 2)
    dv = _contract(weights, g, 2, 2, (0, 1)).astype(v.dtype)
    dweights = _contract(g, v, 3, 3, (0, 1))
    product = weights * dweights
    dbias = product - weights * product.sum(axis=-1, keepdims=True)
    dscores = (dbias * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = _contract(dscores, k, 3, 2, (0, 1)).astype(q.dtype)
    dk = _contract(dscores, q, 2, 2, (0, 1)).astype(k.dtype)
    dkv = jnp.stack([dk, dv]).transpose(1, 3, 0, 2, 4)
    return dq.swapaxes(1, 2), dkv, None if biased is None else dbias


_attention.defvjp(_attention_forward, _attention_backward)
