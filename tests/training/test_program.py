"""What a compiled program does, against products and collectives that are counted by hand, and against XLA's count."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.training import program
from mae_jax.training.program import Collective
from mae_jax.training.roofline import axes_of
from mae_jax.training.sharding import make_mesh

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def compiled(function, *specs, shape=(64, 64), out=None, sizes=MESH):
    """`function` of arrays that lie on a mesh as `specs` say."""
    mesh = make_mesh(**sizes)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    outside = None if out is None else NamedSharding(mesh, out)
    return jax.jit(function, out_shardings=outside).lower(*arrays).compile()


def sent(*args, sizes=MESH, **kwargs):
    """{(kind, axes): bytes of the arrays} of what a program sends."""
    found = {}
    for x in program.read(compiled(*args, sizes=sizes, **kwargs).as_text(), 8).collectives:
        key = x.kind, *axes_of(x.groups, sizes)
        found[key] = found.get(key, 0) + x.bytes * x.times
    return found


def test_a_product_split_over_what_is_summed_is_reduced():
    assert sent(jnp.matmul, P(None, "tensor"), P("tensor", None)) == {("all-reduce", "tensor"): 64 * 64 * 4}


def test_columns_that_are_made_apart_are_gathered():
    """Of the 32 rows that a device along data has."""
    assert sent(jnp.matmul, P("data", None), P(None, "fsdp"), out=P("data")) == {("all-gather", "fsdp"): 32 * 64 * 4}


def test_a_sum_of_which_everyone_keeps_a_part_is_scattered():
    """As a gradient: rows are split over data and fsdp, and the result over fsdp."""
    rows = P(("data", "fsdp"))
    found = sent(lambda x, g: x.T @ g, rows, rows, out=P("fsdp"), sizes={"data": 2, "fsdp": 4, "tensor": 1})
    assert found == {("reduce-scatter", "fsdp"): 64 * 64 * 4, ("all-reduce", "data"): 16 * 64 * 4}


def test_groups_may_lie_along_two_axes():
    assert sent(lambda x: x.sum(0), P(("data", "fsdp")), out=P()) == {("all-reduce", "data", "fsdp"): 64 * 4}


def test_alone_nothing_is_sent():
    assert sent(lambda x, y: x @ y, P(), P()) == {}


def test_loops_count_as_often_as_they_run():
    mesh = make_mesh(data=1, tensor=8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "tensor"), P("tensor")), out_specs=P(None, "tensor"))
    def five_times(x, y):  # f32[64,8], f32[8,64]
        again = lambda x, _: (jax.lax.psum_scatter(x @ y, "tensor", scatter_dimension=1, tiled=True), None)  # noqa: E731
        return jax.lax.scan(again, x, length=5)[0]

    step = compiled(five_times, P(None, "tensor"), P("tensor"), sizes={"data": 1, "fsdp": 1, "tensor": 8})
    done = program.read(step.as_text(), 8)
    assert done.flops == 5 * 2 * 64 * 8 * 64
    assert [(x.kind, x.bytes, x.times) for x in done.collectives] == [("reduce-scatter", 64 * 64 * 4, 5)]


def test_products_and_bytes_are_those_of_xla_where_nothing_is_repeated():
    def layer(x, y):
        return jax.nn.gelu(x @ y) @ y.T + x

    step = compiled(jax.grad(lambda x, y: layer(x, y).sum()), P(), P(), shape=(128, 128))
    done, cost = program.read(step.as_text(), 8), step.cost_analysis()
    assert done.flops == pytest.approx(cost["flops"], rel=0.05)
    assert done.bytes == pytest.approx(cost["bytes accessed"], rel=0.1)


def test_a_change_of_dtype_alone_touches_nothing():
    wide = "%x = f32[4]{0} parameter(0)\n  %y = bf16[4]{0} convert(%x)\n  ROOT %z = bf16[4]{0} negate(%y)\n}"
    done = program.read(f"ENTRY %main (x: f32[4]) -> bf16[4] {{\n  {wide}", 1)
    assert done.bytes == 2 * 8  # read as bfloat16 by what is beside, and written


@pytest.mark.parametrize(
    ("kind", "bytes_sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_what_a_ring_of_four_sends_of_100_bytes(kind, bytes_sent):
    assert Collective(kind, 100, ((0, 1, 2, 3),), 1).sent == bytes_sent


def test_tuples_and_asynchronous_forms():
    text = """
ENTRY %main (a: f32[8], b: bf16[4]) -> f32[4] {
  %a = f32[8]{0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %both = (f32[8]{0}, bf16[4]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %left = f32[8]{0} get-tuple-element(%both), index=0
  %right = bf16[4]{0} get-tuple-element(%both), index=1
  %begun = (f32[8]{0}, f32[16]{0}) all-gather-start(%left), replica_groups={{0,2},{1,3}}, dimensions={0}
  %done = f32[16]{0} all-gather-done(%begun)
  ROOT %half = f32[4]{0} dynamic-slice(%a, %where), dynamic_slice_sizes={4}
}
"""
    pairs, across = ((0, 1), (2, 3)), ((0, 2), (1, 3))
    assert program.read(text, 4).collectives == (
        Collective("all-reduce", 32, pairs, 1),
        Collective("all-reduce", 8, pairs, 1),
        Collective("all-gather", 64, across, 1),
    )


@pytest.mark.parametrize(
    ("taken", "kind"),
    [
        ("dynamic-slice(%p, %i, %i), dynamic_slice_sizes={2,8}", "reduce-scatter"),
        ("slice(%p), slice={[0:2], [0:8]}", "all-reduce"),  # the same on every device
        ("dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}", "all-reduce"),  # not the share of one of four
    ],
)
def test_a_slice_that_is_put_into_something_larger_is_all_that_is_kept(taken, kind):
    """As gradients are whose arrays are put together to be computed with."""
    rows = 1 if "{1,8}" in taken else 2
    text = f"""
%put (p: f32[8,8], i: s32[]) -> f32[{rows},24] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %part = f32[{rows},8]{{1,0}} {taken}
  ROOT %wide = f32[{rows},24]{{1,0}} pad(%part, %zero), padding=0_0x0_16
}}

ENTRY %main (a: f32[8,8], i: s32[]) -> f32[{rows},24] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[8,8]{{1,0}} all-reduce(%a), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %out = f32[{rows},24]{{1,0}} fusion(%sum, %i), kind=kLoop, calls=%put
}}
"""
    assert [(x.kind, x.bytes) for x in program.read(text, 4).collectives] == [(kind, 256)]
