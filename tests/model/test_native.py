"""The functions of native.cc against their definitions, by NumPy in float64: of any shape, and for any number."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import ndtr

from mae_jax.model import layers, native

SIZES = (1, 5, 12, 13, 31, 33, 50, 257, 300, 1024)  # around the sizes of vectors, tiles and panels, and beyond them


@pytest.fixture(autouse=True)
def compiled_here():
    if not native._registered():
        pytest.skip("no C++ compiler")


def draw(*shapes):
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def density(x):
    return np.exp(-0.5 * np.square(x)) / np.sqrt(2 * np.pi)


def linear(x, kernel, bias):
    return x @ kernel + bias


def linear_gelu(x, kernel, bias):
    hidden = x @ kernel + bias
    return hidden, hidden * ndtr(hidden)


def input_gradient(g, kernel):
    return g @ kernel.T


def gelu_gradient(g, kernel, hidden):
    return g @ kernel.T * (ndtr(hidden) + hidden * density(hidden)), hidden * ndtr(hidden)


def kernel_gradient(x, g):
    return x.T @ g, g.sum(0)


def softmax(q, kv):
    """Weights [N,H,Q,T], and the logarithms of the sums they were divided by."""
    scores = np.einsum("nqhd,nkhd->nhqk", q, kv[:, :, 0]) / np.sqrt(q.shape[-1])
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total, (top + np.log(total))[..., 0]


def attention(q, kv):
    weights, logsum = softmax(q, kv)
    return np.einsum("nhqk,nkhd->nqhd", weights, kv[:, :, 1]), logsum


def attention_gradient(q, kv, out, logsum, g):
    weights, _ = softmax(q, kv)
    dweights = np.einsum("nqhd,nkhd->nhqk", g, kv[:, :, 1])
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dk, dv = np.einsum("nhqk,nqhd->nkhd", dscores, q), np.einsum("nhqk,nqhd->nkhd", weights, g)
    return np.einsum("nhqk,nkhd->nqhd", dscores, kv[:, :, 0]), np.stack([dk, dv], 2)


def layer_norm(x, scale, bias):
    mean = x.mean(1, keepdims=True)
    inverse = 1 / np.sqrt(x.var(1, keepdims=True) + layers.EPSILON)
    return (x - mean) * inverse * scale + bias, mean, inverse


def layer_norm_gradient(x, scale, mean, inverse, g):
    normal, scaled = (x - mean) * inverse, g * scale
    dx = inverse * (scaled - scaled.mean(1, keepdims=True) - normal * (scaled * normal).mean(1, keepdims=True))
    return dx, (g * normal).sum(0), g.sum(0)


PRODUCTS = (linear, linear_gelu, input_gradient, gelu_gradient, kernel_gradient)


def native_and_exact(*calls):
    """For each (definition, *arguments): the results of the function in native.cc with its name, and the true ones."""
    exact = [jax.tree.leaves(f(*(np.asarray(x, np.float64) for x in args))) for f, *args in calls]

    def run(arguments):
        for (f, *_), args, results in zip(calls, arguments, exact, strict=True):
            attributes = {"epsilon": layers.EPSILON} if f is layer_norm else {}
            yield native.call(f.__name__, [x.shape for x in results], *args, **attributes)

    ours = jax.jit(lambda arguments: list(run(arguments)))([args for _, *args in calls])  # one program for all
    return list(zip(jax.tree.map(np.asarray, ours), exact, strict=True))


def arguments_of_products(m, i, o):
    x, kernel, bias, g = draw((m, i), (i, o), (o,), (m, o))
    return [(x, kernel, bias), (x, kernel, bias), (g, kernel), (g, kernel, x), (x, g)]


@pytest.mark.parametrize("rows", SIZES)
def test_products_of_any_shape(rows):
    """Over all rows, every pair of sizes occurs once at every two of the three places."""
    calls = []
    for j, inputs in enumerate(SIZES):
        outputs = SIZES[(SIZES.index(rows) + j) % len(SIZES)]
        calls += [(f, *args) for f, args in zip(PRODUCTS, arguments_of_products(rows, inputs, outputs), strict=True)]
    for (f, *args), (ours, exact) in zip(calls, native_and_exact(*calls), strict=True):
        sizes = jax.tree.leaves(f(*map(np.abs, args)))  # of what is summed, however much of it cancels
        for a, b, size in zip(ours, exact, sizes, strict=True):
            assert a.shape == b.shape and (np.abs(a - b) <= 1e-6 * size).all()


def test_products_of_nothing_are_zero():
    bias = np.arange(20, dtype=np.float32)
    calls = (linear, *draw((3, 0), (0, 20)), bias), (kernel_gradient, *draw((0, 30), (0, 20)))
    for ours, exact in native_and_exact(*calls):
        for a, b in zip(ours, exact, strict=True):
            assert np.array_equal(a, b)


def attention_and_gradients(q, kv, g):
    (values,) = native_and_exact((attention, q, kv))
    (gradients,) = native_and_exact((attention_gradient, q, kv, *values[0], g))
    return values, gradients


def layer_norm_and_gradients(x, scale, bias, g):
    (values,) = native_and_exact((layer_norm, x, scale, bias))
    (gradients,) = native_and_exact((layer_norm_gradient, x, scale, *values[0][1:], g))
    return values, gradients


def assert_close(ours, exact, tolerance):
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape and np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("queries", "tokens", "heads", "width"),
    [
        (1, 2, 1, 1),
        (1, 5, 3, 20),
        (5, 5, 2, 64),
        (13, 13, 3, 1),
        (12, 31, 2, 20),
        (50, 50, 16, 64),  # 1024 numbers from token to token
        (33, 129, 1, 20),
        (40, 10, 2, 33),
        (257, 257, 2, 20),
        (300, 300, 1, 300),
        (24, 1024, 1, 64),  # as many scores from query to query
        (7, 1300, 1, 5),
    ],
)
def test_attention_of_any_shape(queries, tokens, heads, width):
    of_queries = (2, queries, heads, width)
    values, gradients = attention_and_gradients(*draw(of_queries, (2, tokens, 2, heads, width), of_queries))
    assert_close(*values, 1e-6)
    assert_close(*gradients, 1e-5)


def test_attention_to_one_token_is_its_value():
    q, kv, g = draw((2, 3, 2, 20), (2, 1, 2, 2, 20), (2, 3, 2, 20))
    ((out, _), _), ((dq, dkv), _) = attention_and_gradients(q, kv, g)
    np.testing.assert_allclose(out, np.broadcast_to(kv[:, :, 1], out.shape), rtol=1e-6)
    np.testing.assert_allclose(dq, 0, atol=1e-5)
    np.testing.assert_allclose(dkv[:, 0], np.stack([np.zeros((2, 2, 20)), g.sum(1)], 1), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 63, 65, 130])
@pytest.mark.parametrize("width", [3, 15, 16, 17, 50, 192, 1024])
def test_layer_norm_of_any_shape(rows, width):
    values, gradients = layer_norm_and_gradients(*draw((rows, width), (width,), (width,), (rows, width)))
    assert_close(*values, 1e-6)
    assert_close(*gradients, 1e-5)


def digest_of_results():
    """Of products of many tiles, and of the other functions for more rows than one thread gets."""
    q, kv, g = draw((3, 70, 2, 20), (3, 130, 2, 2, 20), (3, 70, 2, 20))
    x, scale = draw((300, 100), (100,))
    calls = [(attention_gradient, q, kv, *attention(q, kv), g), (attention, q, kv), (layer_norm, x, scale, scale)]
    calls += [(layer_norm_gradient, x, scale, *layer_norm(x, scale, scale)[1:], x)]
    for shape in [(700, 300, 900), (50, 31, 257)]:
        calls += [(f, *args) for f, args in zip(PRODUCTS, arguments_of_products(*shape), strict=True)]
    assert {f.__name__ for f, *_ in calls} == set(native.FUNCTIONS)
    return hashlib.sha256(b"".join(x.tobytes() for ours, _ in native_and_exact(*calls) for x in ours)).hexdigest()


def test_results_are_the_same_every_time_and_on_any_number_of_threads():
    results = {digest_of_results() for _ in range(3)}
    script = f"import {Path(__file__).stem} as here; here.native._registered(); print(here.digest_of_results())"
    environment = os.environ | {"PJRT_NPROC": "3", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    results.add(subprocess.check_output(command, cwd=Path(__file__).parent, env=environment, text=True).strip())
    assert len(results) == 1


SPECIAL = {"nan": np.nan, "infinity": np.inf, "minus infinity": -np.inf}


def assert_same_numbers(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # for which a NaN equals a NaN, and nothing else


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("f", PRODUCTS)
@np.errstate(invalid="ignore")
def test_nan_and_infinity_in_products(f, value):
    calls = []
    for which in range(len(arguments_of_products(30, 20, 40)[PRODUCTS.index(f)])):
        args = arguments_of_products(30, 20, 40)[PRODUCTS.index(f)]
        args[which].flat[args[which].size // 2] = SPECIAL[value]
        calls.append((f, *args))
    for results in native_and_exact(*calls):
        assert_same_numbers(*results)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", ["query", "key", "value", "gradient"])
@np.errstate(invalid="ignore")
def test_nan_and_infinity_in_attention(where, value):
    q, kv, g = draw((2, 20, 2, 10), (2, 40, 2, 2, 10), (2, 20, 2, 10))
    {"query": q[0, 7], "key": kv[0, 7, 0], "value": kv[0, 7, 1], "gradient": g[0, 7]}[where][1, 3] = SPECIAL[value]
    values, gradients = attention_and_gradients(q, kv, g)
    assert_same_numbers(*values)
    if value == "nan":  # gradients by infinities are infinite or NaN, as the order of the operations will have it
        assert_same_numbers(*gradients)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", ["x", "scale", "bias", "gradient"])
@np.errstate(invalid="ignore")
def test_nan_and_infinity_in_layer_norm(where, value):
    x, scale, bias, g = draw((70, 20), (20,), (20,), (70, 20))
    {"x": x[9], "scale": scale, "bias": bias, "gradient": g[9]}[where][5] = SPECIAL[value]
    for results in layer_norm_and_gradients(x, scale, bias, g):
        assert_same_numbers(*results)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12])
def test_weights_sum_up_to_one_however_large_the_scores(size):
    q, kv, g = draw((2, 20, 2, 20), (2, 40, 2, 2, 20), (2, 20, 2, 20))
    q, kv[:, :, 0], kv[:, :, 1] = size * q, size * kv[:, :, 0], 1
    ((out, _), _), (gradients, _) = attention_and_gradients(q, kv, g)
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients)


def gelu(x):
    """(ours, exact) of the values and of the derivatives: of an MLP with one input, one hidden unit and one output."""
    x, one = np.float32(x)[:, None], np.ones((1, 1), np.float32)
    calls = (linear_gelu, x, one, np.zeros(1, np.float32)), (gelu_gradient, np.ones_like(x), one, x)
    ((_, values), exact), ((derivatives, again), exact_derivatives) = native_and_exact(*calls)
    assert np.array_equal(values, again)
    return (values, exact[1]), (derivatives, exact_derivatives[0])


def test_gelu_is_accurate_wherever_it_is_not_zero():
    x = np.linspace(-12.5, 12.5, 100_000)
    (values, exact), (derivatives, exact_derivatives) = gelu(x)
    assert (np.abs(values - exact) <= 1e-5 * np.abs(exact)).all()
    sizes = (ndtr(x) + np.abs(x * density(x)))[:, None]  # of the two parts, which cancel around -0.75
    assert (np.abs(derivatives - exact_derivatives) <= 1e-5 * sizes).all()


def test_gelu_far_out_is_zero_or_its_argument():
    x = np.array([13, 14, 20, 1e10, 1e30])
    for ours, exact in gelu(np.concatenate([x, -x])):
        np.testing.assert_allclose(ours, exact, rtol=1e-7, atol=1e-35)


def test_unused_ends_with_its_block_even_by_an_error(monkeypatch):
    monkeypatch.setattr(native.jax, "device_count", lambda: 1)
    x = np.ones((2, 2), np.float32)
    with pytest.raises(KeyError), native.unused():
        with native.unused():
            assert not native.serves(x)
        assert not native.serves(x)
        raise KeyError
    assert native.serves(x)


def test_serves_float32_on_one_device_alone(monkeypatch):
    x = np.ones((2, 2), np.float32)
    assert not native.serves(x)  # there are 8
    monkeypatch.setattr(native.jax, "device_count", lambda: 1)
    assert native.serves(x) and not native.serves(x.astype(np.float16)) and not native.serves(x.astype(np.int32))
    assert not native.serves(x, x.astype(np.float16))
