"""The text of a program taken apart, by hand-written lines in the notations that XLA has."""

import pytest

from mae_jax.training.hlo import bits, parse, replica_groups

TEXT = """HloModule jit_f, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused (param_0: f32[8,4], param_1: s32[]) -> f32[1,4] {
  %param_1 = s32[] parameter(1)
  %param_0 = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %flat = f32[8,4]{1,0} bitcast(%param_0)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%flat, %param_1, %zero), dynamic_slice_sizes={1,4}
}

ENTRY %main.3 (a.1: f32[8,4], b: s32[]) -> (f32[1,4], bf16[2]) {
  %a.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="a(x)"}
  %b = s32[] parameter(1)
  %pair = (f32[1,4]{1,0}, /*index=1*/bf16[2]{0}) custom-call(%a.1), custom_call_target="f(x)"
  %out = f32[1,4]{1,0} fusion(%a.1, %b), kind=kLoop, calls=%fused
  ROOT %both = (f32[1,4]{1,0}, bf16[2]{0}) tuple(%out, %pair)
}
"""


def test_a_program_is_computations_of_instructions():
    computations, entry = parse(TEXT)
    assert entry == "main.3" and set(computations) == {"fused", "main.3"}
    main = computations["main.3"]
    assert list(main) == ["a.1", "b", "pair", "out", "both"]
    assert main["pair"].shapes == (("f32", (1, 4)), ("bf16", (2,))) and main["pair"].bytes == 20
    assert main["out"].opcode == "fusion" and main["out"].operands == ("a.1", "b")
    assert main["out"].called("calls") == "fused"
    assert [user.name for user in main.users["a.1"]] == ["pair", "out"]


def test_parameters_are_in_the_order_of_arguments_and_slices_are_found_behind_bitcasts():
    fused = parse(TEXT)[0]["fused"]
    assert [parameter.name for parameter in fused.parameters] == ["param_0", "param_1"]
    assert [part.name for part in fused.slices_of("param_0")] == ["row"]
    assert fused.slices_of("param_1") is None  # where to slice is no slice


@pytest.mark.parametrize(("dtype", "size"), [("f32", 32), ("bf16", 16), ("pred", 8), ("f8e4m3fn", 8), ("token", 0)])
def test_bits(dtype, size):
    assert bits(dtype) == size


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,3},{1,2}}, x", ((0, 3), (1, 2))),
        ("replica_groups={}, x", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=[2,4]<=[8], x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a'}, x", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a', 'c'}, x", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert replica_groups(text, 8) == groups
