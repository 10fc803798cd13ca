"""The time of a step against sums done by hand."""

import pytest

from mae_jax.training.hardware import Hardware
from mae_jax.training.program import Collective, Operation, Program
from mae_jax.training.roofline import axes_of, estimate

MESH = {"data": 2, "fsdp": 2, "tensor": 1}
ALL, PAIRS, ACROSS = ((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))
SWITCH = Hardware(memory=1e9, flops=1e9, bandwidth=1e8, float32_flops=5e8, network=1e7)


def test_every_operation_takes_as_long_as_what_limits_it():
    """A product of 2 s that needs 1 s of bytes; one of 1 s that needs 3 s, twice; 0.5 s of bytes alone."""
    operations = (Operation(2 * 10**9, 10**8, 1), Operation(10**9, 3 * 10**8, 2), Operation(0, 5 * 10**7, 1))
    found = estimate(Program(operations, ()), SWITCH, "bfloat16", MESH)
    assert found.compute == pytest.approx(2 + 2 * 1)
    assert found.memory == pytest.approx(2 * 2 + 0.5)
    assert found.step == found.in_turns == pytest.approx(8.5)
    assert found.limit == "memory" and found.network == 0


def test_float32_has_a_peak_of_its_own():
    done = Program((Operation(10**9, 0, 1),), ())
    assert estimate(done, SWITCH, "bfloat16", MESH).compute == 1
    assert estimate(done, SWITCH, "float32", MESH).compute == 2


def test_what_is_sent_goes_on_while_the_rest_is_computed():
    """A gradient of 40 MB reduced among four sends 60 MB, in 6 s; 20 MB gathered by two send 10 MB, in 1 s."""
    done = Program(
        (Operation(5 * 10**9, 0, 1),),
        (Collective("all-reduce", 40 * 10**6, ALL, 1), Collective("all-gather", 10 * 10**6, PAIRS, 2)),
    )
    found = estimate(done, SWITCH, "bfloat16", MESH)
    assert found.compute == 5 and found.network == pytest.approx(7)
    assert found.step == pytest.approx(7) and found.in_turns == pytest.approx(12) and found.limit == "network"
    told = [(x.kind, x.axes, x.arrays, x.bytes, x.sent, x.seconds) for x in found.exchanges]
    assert told == [
        ("all-reduce", ("data", "fsdp"), 1, 40e6, 60e6, pytest.approx(6)),
        ("all-gather", ("fsdp",), 2, 20e6, 10e6, pytest.approx(1)),
    ]


def test_what_is_sent_along_tensor_is_waited_for():
    done = Program((Operation(10**9, 0, 1),), (Collective("all-reduce", 10**7, PAIRS, 1),))
    assert estimate(done, SWITCH, "bfloat16", {"data": 2, "fsdp": 1, "tensor": 2}).step == pytest.approx(2)
    assert estimate(done, SWITCH, "bfloat16", MESH).step == pytest.approx(1)


def test_axes_of_groups():
    mesh = {"data": 2, "fsdp": 1, "tensor": 2}
    assert axes_of(PAIRS, mesh) == ("tensor",) and axes_of(ACROSS, mesh) == ("data",)
    assert axes_of(ALL, mesh) == ("data", "tensor")
    assert axes_of(((0, 2), (1, 3), (2, 0), (3, 1)), mesh) == ("data",)  # pairs of a permutation
