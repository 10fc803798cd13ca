"""The four operations that a transformer's time goes into, with backward passes of their own.

The values are those of the plain formulas and of their derivatives; what differs is what is kept for the backward
pass and how it is computed. XLA's CPU compiler turns the derivative of a plain x @ kernel into a transposed copy,
fused with the whole chain of residual gradients before it, so that work grows with the square of the depth; products
that contract rows directly leave it nothing to transpose. Sums over rows and columns are products with ones, which run
at the speed of matrix products. The softmax keeps one array, and an MLP its hidden values before the GELU: what comes
after it is cheap to compute again. tests/model/test_ops.py proves them equal to autodiff, and
tests/benchmarks/step.py measures what they bring.

Products of bfloat16 arrays accumulate in float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # of layer_norm, as in the original code; PyTorch's default is 1e-5


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
def linear(x, kernel, bias):
    """x @ kernel + bias: [M,I], [I,O], [O] -> [M,O], all of one dtype."""
    return _contract(x, kernel, 1, 0).astype(x.dtype) + bias[None]


def _linear_backward(saved, g):
    x, kernel = saved
    dx = _contract(g, kernel, 1, 1).astype(x.dtype)
    dkernel = _contract(x, g, 0, 0).astype(kernel.dtype)
    return dx, dkernel, _column_sum(g).astype(kernel.dtype)


linear.defvjp(lambda x, kernel, bias: (linear(x, kernel, bias), (x, kernel)), _linear_backward)


def _normal_cdf(x):
    """f32 of any shape and dtype."""
    return 0.5 * (1 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))


@jax.custom_vjp
def mlp(x, kernel, bias, out_kernel, out_bias):
    """gelu(x @ kernel + bias) @ out_kernel + out_bias: [M,I], [I,H], [H], [H,O], [O] -> [M,O], all of one dtype.

    The GELU is the exact one, x times the normal distribution function of x (Hendrycks & Gimpel 2016).
    """
    return _mlp_forward(x, kernel, bias, out_kernel, out_bias)[0]


def _mlp_forward(x, kernel, bias, out_kernel, out_bias):
    hidden = linear(x, kernel, bias)
    active = hidden * _normal_cdf(hidden).astype(x.dtype)
    return linear(active, out_kernel, out_bias), (x, hidden, kernel, out_kernel)


def _mlp_backward(saved, g):
    x, hidden, kernel, out_kernel = saved
    wide, cdf = hidden.astype(jnp.float32), _normal_cdf(hidden)
    active = hidden * cdf.astype(hidden.dtype)
    dactive, dout_kernel, dout_bias = _linear_backward((active, out_kernel), g)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1 / math.sqrt(2 * math.pi))
    dhidden = (dactive * (cdf + wide * density)).astype(hidden.dtype)
    return *_linear_backward((x, kernel), dhidden), dout_kernel, dout_bias


mlp.defvjp(_mlp_forward, _mlp_backward)


@jax.custom_vjp
def layer_norm(x, scale, bias):
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias over rows: f32[M,D], f32[D], f32[D] -> f32[M,D]."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    mean = _row_mean(x)
    centred = x - mean
    inverse = jax.lax.rsqrt(_row_mean(jnp.square(centred)) + EPSILON)
    return centred * inverse * scale[None] + bias[None], (x, scale, mean, inverse)


def _layer_norm_backward(saved, g):
    x, scale, mean, inverse = saved
    normal = (x - mean) * inverse
    scaled = g * scale[None]
    dx = inverse * (scaled - _row_mean(scaled) - normal * _row_mean(scaled * normal))
    return dx, _column_sum(g * normal), _column_sum(g)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v: [N,heads,Q,d], [N,heads,M,d], [N,heads,M,d] -> [N,heads,Q,d].

    The softmax is float32 for any dtype.
    """
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    scores = _contract(q * q.shape[-1] ** -0.5, k, 3, 3, (0, 1))  # f32[N,heads,Q,M]
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return _contract(weights, v, 3, 2, (0, 1)).astype(q.dtype), (q, k, v, weights)


def _attention_backward(saved, g):
    q, k, v, weights = saved
    dv = _contract(weights, g, 2, 2, (0, 1)).astype(v.dtype)
    dweights = _contract(g, v, 3, 3, (0, 1))
    product = weights * dweights
    dscores = (product - weights * product.sum(axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    dscores = dscores.astype(q.dtype)
    dq = _contract(dscores, k, 3, 2, (0, 1)).astype(q.dtype)
    dk = _contract(dscores, q, 2, 2, (0, 1)).astype(k.dtype)
    return dq, dk, dv


attention.defvjp(_attention_forward, _attention_backward)
