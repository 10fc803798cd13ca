"""The transformer block against plain formulas: values, gradients, and what PyTorch and flax would do otherwise."""

import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model.layers import MLP, REMAT, Attention, Block, Dense, LayerNorm, block_of
from mae_jax.model.vit import ViT
from mae_jax.training.loop import KEEP_BARRIERS

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_params(module: nn.Module, *inputs, seed: int = 0) -> dict:
    """Parameters of `module` of which none is 0 or 1: matrices keep the scale of their inputs, norms stay near 1."""
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        value = rng.standard_normal(shape)
        return 1.5 * value * shape[0] ** -0.5 if len(shape) == 2 else 0.3 * value + (path[-1] == "scale")

    params = {path: jnp.asarray(draw(path, x.shape), jnp.float32) for path, x in shapes.items()}
    return flax.traverse_util.unflatten_dict(params)


def random_tokens(*shape, seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def distance(got, want) -> float:
    """The norm of the difference, relative to that of `want`."""
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def plain_norm(p, x):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * p["scale"][None, None] + p["bias"][None, None]


def plain_dense(p, x):
    return jnp.einsum("ntd,df->ntf", x, p["kernel"]) + p["bias"][None, None]


def plain_attention(p, x, heads):
    """One head and one query at a time, as it is written in the paper."""
    width = x.shape[-1]
    q, k, v = jnp.split(plain_dense(p["qkv"], x), 3, axis=-1)
    outputs = []
    for h in range(heads):
        head = slice(h * width // heads, (h + 1) * width // heads)
        scores = jnp.einsum("nqd,nkd->nqk", q[..., head], k[..., head]) / math.sqrt(width // heads)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        outputs.append(jnp.einsum("nqk,nkd->nqd", weights, v[..., head]))
    return plain_dense(p["out"], jnp.concatenate(outputs, axis=-1))


def plain_mlp(p, x):
    x = plain_dense(p["in"], x)
    return plain_dense(p["out"], x * 0.5 * (1 + jax.scipy.special.erf(x / math.sqrt(2))))


def plain_block(p, x, heads):
    x = x + plain_attention(p["attention"], plain_norm(p["attention_norm"], x), heads)
    return x + plain_mlp(p["mlp"], plain_norm(p["mlp_norm"], x))


PLAIN = {  # the module and the same in plain words, for tokens [3,7,24]
    "Dense": (Dense(10), plain_dense),
    "LayerNorm": (LayerNorm(), plain_norm),
    "MLP": (MLP(40), plain_mlp),
    "Attention": (Attention(4), lambda p, x: plain_attention(p, x, 4)),
    "Attention, 1 head": (Attention(1), lambda p, x: plain_attention(p, x, 1)),
    "Block": (Block(3, 1.5), lambda p, x: plain_block(p, x, 3)),
}


@pytest.mark.parametrize("module, plain", PLAIN.values(), ids=PLAIN)
def test_values_and_gradients_are_those_of_plain_formulas(module, plain):
    x = random_tokens(3, 7, 24)
    params = random_params(module, x)
    back = random_tokens(*jax.eval_shape(plain, params, x).shape, seed=2)  # what the gradient begins with

    def value_and_gradients(function):
        value, pull = jax.vjp(function, params, x)
        return value, pull(back)

    got, got_gradients = jax.jit(lambda: value_and_gradients(lambda p, x: module.apply({"params": p}, x)))()
    want, want_gradients = jax.jit(lambda: value_and_gradients(plain))()
    assert distance(got, want) < 2e-6
    for path, gradient in jax.tree.leaves_with_path(jax.tree.map(distance, got_gradients, want_gradients)):
        assert gradient < 5e-6, path


def test_gelu_is_exact():
    values = np.linspace(-6, 6, 97)
    identity = {"kernel": jnp.eye(97), "bias": jnp.zeros(97)}
    got = MLP(97).apply(
        {"params": {"in": identity, "out": identity}}, jnp.asarray(values, jnp.float32).reshape(1, 1, -1)
    )
    exact = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in values]
    np.testing.assert_allclose(got[0, 0], exact, rtol=0, atol=1e-6)  # the tanh approximation is off by up to 5e-4


def test_gelu_and_its_gradient_stay_finite_far_out():
    one = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    values = jnp.array([-200.0, -20.0, 0.0, 20.0, 200.0]).reshape(1, 5, 1)
    gelu, pull = jax.vjp(lambda x: MLP(1).apply({"params": {"in": one, "out": one}}, x), values)
    np.testing.assert_allclose(gelu.ravel(), [0, 0, 0, 20, 200], atol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones((1, 5, 1)))[0].ravel(), [0, 0, 0.5, 1, 1], atol=1e-6)


def test_epsilon_of_the_norm_is_1e_6():
    x = 1e-3 * jnp.asarray(np.resize([-1.0, 1.0], (1, 1, 32)), jnp.float32)  # its variance is 1e-6
    got = LayerNorm().apply({"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}, x)
    np.testing.assert_allclose(np.abs(got), 0.5**0.5, rtol=1e-5)  # 0.30 with PyTorch's 1e-5, 1.0 with 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_is_computed_in_float32_even_far_from_zero(dtype):
    x = np.float32(300) + random_tokens(2, 3, 256)  # the mean of the squares would lose the variance
    params = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    got = LayerNorm(dtype).apply({"params": params}, x)
    assert got.dtype == dtype
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0, atol=2e-4 if dtype == "float32" else 2e-2)


def test_norm_leaves_none_of_its_sums_to_the_precision_of_matrix_products():
    # GPUs and TPUs round the factors of a float32 product to TF32 or bfloat16 unless told not to; no CPU shows it
    x = random_tokens(2, 3, 8)
    params = random_params(LayerNorm(), x)
    backward = jax.grad(lambda params, x: LayerNorm().apply({"params": params}, x).sum(), argnums=(0, 1))
    program = str(jax.make_jaxpr(backward)(params, x))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_holds_for_scores_that_would_overflow(dtype):
    x = 300 * random_tokens(1, 6, 8)
    params = random_params(Attention(2), x)

    def total(params, x):
        out = Attention(2, dtype).apply({"params": params}, x)
        return out.astype(jnp.float32).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out.astype(jnp.float32), gradients)))


def test_attention_does_not_care_in_which_order_tokens_stand():
    x = random_tokens(2, 9, 16)
    module = Block(4)
    params = random_params(module, x)
    order = np.random.default_rng(0).permutation(9)
    apply = jax.jit(lambda x: module.apply({"params": params}, x))
    np.testing.assert_allclose(apply(x[:, order]), apply(x)[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [1, 8])
def test_a_block_from_first_on_is_the_tail_of_the_whole_block(first):
    x = random_tokens(2, 9, 16)
    module = Block(4)
    params = random_params(module, x)
    back = random_tokens(2, 9 - first, 16, seed=2)

    def value_and_gradients(tail):
        value, pull = jax.vjp(tail, params, x)
        return value, pull(back)

    got = jax.jit(lambda: value_and_gradients(lambda p, x: module.apply({"params": p}, x, first)))()
    want = jax.jit(lambda: value_and_gradients(lambda p, x: module.apply({"params": p}, x)[:, first:]))()
    for path, apart in jax.tree.leaves_with_path(jax.tree.map(distance, got, want)):
        assert apart < 5e-6, path


def test_drop_path_leaves_out_each_branch_of_each_sample_by_itself_and_keeps_the_expectation():
    rate, n = 0.3, 1000
    x = random_tokens(1, 3, 8)
    module = Block(2)
    params = random_params(module, x)
    everyone = jnp.tile(x, (n, 1, 1))  # equal samples differ by what they leave out
    paths = ViT(patch_size=1, width=8, depth=2, heads=2, drop_path=rate).draw_paths(jax.random.key(0), n)[:, 1]
    got = jax.jit(lambda paths: module.apply({"params": params}, everyone, 0, paths))(paths)

    def outcome(attention, mlp):
        y = x + attention * plain_attention(params["attention"], plain_norm(params["attention_norm"], x), 2)
        return np.asarray(y + mlp * plain_mlp(params["mlp"], plain_norm(params["mlp_norm"], y)))[0]

    kept = 1 / (1 - rate)
    outcomes = np.stack([outcome(a, b) for a in (0, kept) for b in (0, kept)])
    apart = np.abs(np.asarray(got)[:, None] - outcomes).max(axis=(2, 3))  # [n,4]
    assert apart.min(axis=1).max() < 1e-5
    assert np.partition(apart, 1, axis=1)[:, 1].min() > 1e-2
    attention, mlp = np.divmod(apart.argmin(axis=1), 2)
    limit = 4 * np.sqrt(rate * (1 - rate) / n)
    assert abs(attention.mean() * kept - 1) < limit * kept
    assert abs(mlp.mean() * kept - 1) < limit * kept
    assert abs((attention * mlp).mean() - (1 - rate) ** 2) < 4 * np.sqrt(0.25 / n)
    assert abs((attention[1:] * attention[:-1]).mean() - (1 - rate) ** 2) < 4 * np.sqrt(0.25 / n)


MODULES = {
    "Dense": lambda dtype: Dense(10, dtype),
    "MLP": lambda dtype: MLP(40, dtype),
    "LayerNorm": LayerNorm,
    "Attention": lambda dtype: Attention(4, dtype),
    "Block": lambda dtype: Block(4, dtype=dtype),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_bfloat16_computes_in_bfloat16_with_parameters_and_gradients_in_float32(make):
    x = random_tokens(3, 7, 24)
    params = random_params(make("float32"), x)
    fresh = jax.eval_shape(make("bfloat16").init, jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}

    def value_and_gradients(dtype):
        def total(params):
            out = make(dtype).apply({"params": params}, x.astype(dtype))
            return jnp.square(out.astype(jnp.float32)).mean(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return out, gradients

    half, half_gradients = value_and_gradients("bfloat16")
    full, full_gradients = value_and_gradients("float32")
    assert half.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half_gradients)} == {jnp.dtype("float32")}
    assert 1e-4 < distance(half.astype(jnp.float32), full) < 0.02
    for path, apart in jax.tree.leaves_with_path(jax.tree.map(distance, half_gradients, full_gradients)):
        assert apart < 0.05, path


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_qkv_is_drawn_as_one_matrix(heads):
    width = 128
    params = Attention(heads).init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 2, width)))["params"]
    assert params["qkv"]["kernel"].shape == (width, 3 * width)
    limit = math.sqrt(6 / (4 * width))  # three matrices of their own would have sqrt(6 / (2 * width))
    for part in np.split(np.asarray(params["qkv"]["kernel"]), 3, axis=1):
        assert 0.99 * limit < np.abs(part).max() <= limit
        np.testing.assert_allclose(part.std(), limit / math.sqrt(3), rtol=0.02)


def memory_and_gradients(remat, make_loss, params):
    """Temporary bytes of the compiled gradients, as training compiles them, and their values with the loss."""
    compiled = jax.jit(jax.value_and_grad(make_loss(remat)), compiler_options=KEEP_BARRIERS).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(params)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_rematerialisation_changes_memory_and_not_the_loss(dtype):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16, 16, 3)), jnp.float32)
    encoder = ViT(patch_size=4, width=64, depth=4, heads=4, drop_path=0.2, dtype=dtype)
    init = lambda module: module.init(jax.random.key(0), images)["params"]  # noqa: E731
    params = jax.jit(lambda: init(encoder))()
    paths = encoder.draw_paths(jax.random.key(1), 64)

    def make_loss(remat):
        module = encoder.clone(remat=remat)
        shapes = jax.eval_shape(lambda: init(module))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes), "same names"
        return lambda params: jnp.square(module.apply({"params": params}, images, paths=paths)[:, 0]).mean()

    found = {remat: memory_and_gradients(remat, make_loss, params) for remat in REMAT}
    memory = [found[remat][0] for remat in ("none", "dots", "full")]
    assert memory[1] < 0.8 * memory[0] and memory[2] < 0.8 * memory[1], memory
    loss, gradients = found["none"][1]
    for remat in ("dots", "full"):
        np.testing.assert_allclose(found[remat][1][0], loss, rtol=1e-6)
        for got, want in zip(jax.tree.leaves(found[remat][1][1]), jax.tree.leaves(gradients), strict=True):
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + 1e-9


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match="remat is one of none, dots, full, not 'half'"):
        block_of("half")


@pytest.mark.parametrize("final_norm", [True, False])
def test_the_residual_stream_is_float32_in_bfloat16_too(final_norm):
    """As PyTorch's autocast has it."""
    seen = {}

    def note(function, args, kwargs, context):
        out = function(*args, **kwargs)
        if context.method_name == "__call__":
            seen[context.module.name] = out.dtype
        return out

    encoder = ViT(patch_size=4, width=16, depth=2, heads=2, final_norm=final_norm, dtype="bfloat16")
    with nn.intercept_methods(note):
        out, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert {seen[name] for name in ("block_0", "block_1")} == {jnp.dtype("float32")}
    assert {seen[name] for name in ("qkv", "out", "attention", "mlp", "mlp_norm")} == {jnp.dtype("bfloat16")}
    assert out.dtype == ("bfloat16" if final_norm else "float32")
