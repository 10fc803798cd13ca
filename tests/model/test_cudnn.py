"""Attention by cuDNN: when it is chosen, its values, its backward pass, and how a mesh splits it.

There is no GPU here: the programs for one are looked at, and run with other kernels in the place of cuDNN's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.model import cudnn, native, ops
from mae_jax.model.layers import REMAT, Attention, Block, block_of
from mae_jax.training.sharding import make_mesh, state_sharding

SHAPES = {  # queries, tokens; of MAE at 224 pixels in patches of 16: encoder, decoder, its last block
    "even": (50, 50),
    "odd": (197, 197),
    "few queries": (147, 197),
}


def draw(queries, tokens, heads=2, head=16, n=2, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    q, kv, g = (rng.normal(size=(n, m, *k, heads, head)) for m, k in ((queries, ()), (tokens, (2,)), (queries, ())))
    return [jnp.asarray(x, dtype) for x in (q, kv, g)]


def with_gradients(kind):
    def both(q, kv, g):
        out, pull = jax.vjp(lambda q, kv: ops.attention(q, kv, kind), q, kv)
        return out, *pull(g)

    return both


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(("case", "kind"), [*((case, "auto") for case in SHAPES), ("odd", "fused")])
def test_values_and_gradients_are_those_of_the_formula(case, kind, cudnn_here):
    args = draw(*SHAPES[case])
    got = jax.jit(with_gradients(kind))(*args)
    assert cudnn_here["forward"] and cudnn_here["backward"]
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert [x.shape for x in got] == [x.shape for x in (args[2], *args[:2])]
    assert_close(got, jax.jit(with_gradients("plain"))(*args), 0.01)


@pytest.mark.parametrize("case", ["even", "few queries"])
def test_what_jax_means_by_its_arguments_is_the_formula_in_float32(case, monkeypatch):
    """The call of cuDNN's with `implementation="xla"` in its place, which takes float32 too."""
    call, xla = jax.nn.dot_product_attention, {"implementation": "xla"}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **options: call(*args, **options | xla))
    q, kv, g = draw(*SHAPES[case], dtype=jnp.float32)
    out, pull = jax.vjp(cudnn.attention, q, kv)
    assert_close((out, *pull(g)), with_gradients("plain")(q, kv, g), 1e-5)


@pytest.mark.parametrize("case", SHAPES)
def test_a_gpu_is_given_two_kernels_and_no_weights(case, monkeypatch):
    """Lowered for CUDA: the forward and the backward kernel, and nothing of T x T."""
    monkeypatch.setattr(cudnn, "capability", lambda: 8.0)
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91100)
    q, kv, g = draw(*SHAPES[case], heads=4, head=80)  # ViT-H's
    exported = jax.export.export(
        jax.jit(with_gradients("auto")),
        platforms=["cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{suffix}") for suffix in ("", "Backward")
        ],
    )(q, kv, g)
    module = exported.mlir_module()
    assert module.count("@__cudnn$fmhaSoftmax(") == module.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "dot_general" not in module


@pytest.mark.parametrize(
    ("dtype", "head", "capability", "expected"),
    [
        ("bfloat16", 64, 8.0, True),
        ("bfloat16", 80, 12.0, True),
        ("float16", 32, 9.0, True),
        ("float32", 64, 9.0, False),
        ("bfloat16", 64, 7.5, False),
        ("bfloat16", 20, 9.0, False),
        ("bfloat16", 136, 9.0, False),
        ("bfloat16", 64, 0.0, False),
    ],
)
def test_serves_what_it_can(dtype, head, capability, expected, monkeypatch):
    monkeypatch.setattr(cudnn, "capability", lambda: capability)
    assert cudnn.serves(dtype, head) == cudnn.serves(jnp.dtype(dtype), head) == expected
    assert (ops.no_kernel(dtype, head) is None) == expected
    with native.unused():
        assert not cudnn.serves(dtype, head)


def test_there_is_none_on_a_cpu():
    assert cudnn.capability() == 0
    assert "no kernel for bfloat16 and heads of 64 on 8 cpu device(s)" in ops.no_kernel("bfloat16", 64)


@pytest.mark.parametrize("remat", [row for row in REMAT if row != "none"])
def test_rematerialised_blocks_have_the_gradients_of_the_formula(remat, cudnn_here):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 32)), jnp.float32)
    params = Block(4).init(jax.random.key(0), x)["params"]

    def gradients(kind, remat):
        block = block_of(remat)(4, dtype="bfloat16", attention=kind)
        return jax.jit(jax.grad(lambda p: jnp.square(block.apply({"params": p}, x, 0)).sum()))(params)

    assert_close(gradients("fused", remat), gradients("plain", "none"), 0.02)
    assert len(cudnn_here["backward"]) == 1


MESHES = {  # with the heads and images of 16 that a device has of 4 heads
    "data8": ({"data": 8}, 4, 2),
    "data2-fsdp2-tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2, 4),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_splits_it_by_images_and_heads(name, cudnn_here):
    """From nothing but how parameters and images lie; queries, keys and values end on the device of their head."""
    sizes, heads, images = MESHES[name]
    mesh = make_mesh(**sizes)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 9, 64)), jnp.bfloat16)
    params = {"attention": Attention(4).init(jax.random.key(0), x)["params"]}

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params, x, kind):
        module = Attention(4, "bfloat16", kind)
        loss = lambda p: jnp.square(module.apply({"params": p["attention"]}, x, 4).astype(jnp.float32)).sum()  # noqa: E731
        return jax.grad(loss)(params)

    want = gradients(params, x, "plain")
    placed = jax.device_put(params, state_sharding(params, mesh))
    got = gradients(placed, jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))), "fused")
    assert_close(got, want, 0.02)
    whole = {(images, n, heads, 16) for n in (6, 10)}
    assert {shape for shapes in cudnn_here["backward"] for shape in shapes} == whole
