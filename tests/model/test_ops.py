"""The operations equal autodiff on the plain formulas: values and backward passes, written in JAX and in native.cc."""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model import native, ops


def plain_linear(x, kernel, bias):
    return x @ kernel + bias[None]


def plain_mlp(x, kernel, bias, out_kernel, out_bias):
    return plain_linear(jax.nn.gelu(plain_linear(x, kernel, bias), approximate=False), out_kernel, out_bias)


def plain_layer_norm(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-6) * scale[None] + bias[None]


def plain_attention(q, kv, bias=0.0):
    q, (k, v) = q.swapaxes(1, 2), jnp.moveaxis(kv, (2, 3), (0, 2))
    weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / jnp.sqrt(jnp.float32(q.shape[-1])) + bias, axis=-1)
    return (weights @ v).swapaxes(1, 2)


def biased(q, kv, bias):
    return ops.attention(q, kv, "auto", bias)


CASES = {
    "linear": (ops.linear, plain_linear, ((24, 12), (12, 20), (20,))),
    "mlp": (ops.mlp, plain_mlp, ((24, 12), (12, 48), (48,), (48, 20), (20,))),
    "layer_norm": (functools.partial(ops.layer_norm, epsilon=1e-6), plain_layer_norm, ((24, 12), (12,), (12,))),
    "attention": (ops.attention, plain_attention, ((8, 6, 2, 8), (8, 6, 2, 2, 8))),
    "attention of few queries": (ops.attention, plain_attention, ((8, 4, 2, 8), (8, 6, 2, 2, 8))),
    "attention with a bias": (biased, plain_attention, ((8, 4, 2, 8), (8, 6, 2, 2, 8), (8, 2, 4, 6))),
    "attention with one bias": (biased, plain_attention, ((8, 4, 2, 8), (8, 6, 2, 2, 8), (1, 2, 4, 6))),
}
CALLS = {  # of functions in native.cc, for values and gradients
    "linear": {"linear", "input_gradient", "kernel_gradient"},
    "mlp": {"linear_gelu", "linear", "gelu_gradient", "input_gradient", "kernel_gradient"},
    "layer_norm": {"layer_norm", "layer_norm_gradient"},
    "attention": {"attention", "attention_gradient"},
    "attention of few queries": {"attention", "attention_gradient"},
    "attention with a bias": set(),
    "attention with one bias": set(),
}


def draw(shapes, dtype=jnp.float32, batch=()):
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.normal(size=(*batch, *shape)), dtype) for shape in shapes]


def with_gradients(f):
    """The values, and the gradients for cotangents that differ from place to place."""

    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

    return both


@functools.cache
def autodiff(case):
    return jax.jit(with_gradients(CASES[case][1]))


def operation(case):
    """A new function, lest JAX find it traced already, in JAX instead of C++ or the other way round."""
    return lambda *args: CASES[case][0](*args)


@pytest.fixture(params=["jax", "native"])
def calls(request, monkeypatch):
    """By case, the functions of native.cc that it must call: none, or those in `CALLS`, as if there were one device."""
    if request.param == "jax":
        return {case: set() for case in CASES}
    monkeypatch.setattr(native.jax, "device_count", lambda: 1)
    if not native._registered():
        pytest.skip("no C++ compiler")
    return CALLS


def run(f, args, calls):
    """f(*args), compiled, after a look at what of native.cc it calls."""
    lowered = jax.jit(f).lower(*args)
    assert set(re.findall(r"@mae_(\w+)", lowered.as_text())) == calls
    return lowered.compile()(*args)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def assert_equal_autodiff(values, gradients, case, args):
    their_values, their_gradients = autodiff(case)(*args)
    assert_close(values, their_values, 1e-6)
    assert_close(gradients, their_gradients, 1e-5)


TRANSFORMATIONS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": lambda f: lambda *args: jax.lax.scan(lambda c, _: (c, f(*args)), 0.0, None, length=1)[1][0],
}


def test_every_operation_with_its_own_backward_pass_is_a_case():
    own = {name.removeprefix("_") for name, f in vars(ops).items() if isinstance(f, jax.custom_vjp)}
    assert own == {case.split()[0] for case in CASES}


def test_every_function_in_cpp_is_called():
    assert set().union(*CALLS.values()) == set(native.FUNCTIONS)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_autodiff(case, transformation, calls):
    args = draw(CASES[case][2])
    f = with_gradients(TRANSFORMATIONS[transformation](operation(case)))
    assert_equal_autodiff(*run(f, args, calls[case]), case, args)


@pytest.mark.parametrize("calls", ["native"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_without_jit(case, calls, monkeypatch):
    called, call = set(), native.call
    monkeypatch.setattr(native, "call", lambda name, *args, **kwargs: called.add(name) or call(name, *args, **kwargs))
    args = draw(CASES[case][2])
    assert_equal_autodiff(*with_gradients(operation(case))(*args), case, args)
    assert called == calls[case]


@pytest.mark.parametrize("case", CASES)
def test_under_vmap(case, calls):
    args = draw(CASES[case][2], batch=(3,))
    together = run(jax.vmap(with_gradients(operation(case))), args, calls[case])
    for i in range(3):
        assert_equal_autodiff(*jax.tree.map(operator.itemgetter(i), together), case, [a[i] for a in args])


@pytest.mark.parametrize("case", CASES)
def test_sharded_over_eight_devices(case, calls):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args = draw(CASES[case][2])

    def place(x):
        spec = jax.sharding.PartitionSpec("data") if x.shape[0] % 8 == 0 else jax.sharding.PartitionSpec()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    placed = [place(x) for x in args]
    assert any(not x.sharding.is_fully_replicated for x in placed)
    assert_equal_autodiff(*run(with_gradients(operation(case)), placed, calls[case]), case, args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("calls")
def test_bfloat16_stays_bfloat16_and_close(case):
    if case == "layer_norm":
        pytest.skip("always float32: its caller casts")
    args = draw(CASES[case][2], jnp.bfloat16)
    values, gradients = run(with_gradients(operation(case)), args, calls=set())
    assert {x.dtype for x in (values, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    _, theirs = autodiff(case)(*(a.astype(jnp.float32) for a in args))
    assert_close(gradients, theirs, 0.03)


def test_large_scores_do_not_overflow(calls):
    q, kv = draw(CASES["attention"][2])
    args = 300 * q, kv.at[:, :, 0].multiply(300)
    values, gradients = run(with_gradients(operation("attention")), args, calls["attention"])
    assert_close(values, autodiff("attention")(*args)[0], 1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_unused_is_plain_jax(calls):
    args = draw(CASES["mlp"][2])
    with native.unused():
        run(with_gradients(operation("mlp")), args, calls=set())
    run(with_gradients(operation("mlp")), args, calls["mlp"])


def test_attention_says_how_it_is_computed(calls):
    """Plain is the formula wherever it runs; fused is a kernel, or refused with what there is."""
    args = draw(CASES["attention"][2])
    f = with_gradients(lambda *args: ops.attention(*args, "plain"))
    assert_equal_autodiff(*run(f, args, calls=set()), "attention", args)
    if calls["attention"]:
        run(with_gradients(lambda *args: ops.attention(*args, "fused")), args, calls["attention"])
    else:
        with pytest.raises(ValueError, match=r"no kernel for float32 and heads of 8 on 8 cpu device\(s\): there"):
            ops.attention(*args, "fused")
    with pytest.raises(ValueError, match="attention is one of auto, plain, fused, not 'flash'"):
        ops.attention(*args, "flash")


def test_the_backward_pass_goes_with_the_forward_pass(calls):
    """Whatever is to be used when it is traced."""
    args = draw(CASES["attention"][2])
    with native.unused():
        out, pull = jax.vjp(operation("attention"), *args)
    assert_close(pull(out), jax.vjp(plain_attention, *args)[1](out), 1e-5)
    out, pull = jax.vjp(operation("attention"), *args)
    with native.unused():
        assert_close(pull(out), jax.vjp(plain_attention, *args)[1](out), 1e-5)
