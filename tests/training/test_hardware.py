"""Targets by name and by description, and how fast their links are."""

import dataclasses

import pytest

from mae_jax.errors import ConfigError
from mae_jax.training.hardware import PRESETS, Hardware, describe

WHOLE = {"data": 4, "fsdp": 4, "tensor": 1}
ALONG_FSDP = tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4))
ALONG_DATA = tuple(tuple(range(i, 16, 4)) for i in range(4))
ALL = (tuple(range(16)),)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_this_world(name):
    found = PRESETS[name]
    assert 16 * 2**30 <= found.memory < 200 * 2**30
    assert 1e14 < found.flops < 1e15 and found.peak("float32") <= found.flops
    assert 100 < found.flops / found.bandwidth < 700  # FLOPs a byte
    assert 0 < found.network < found.bandwidth
    assert describe(f"{name}:16") == (found, 16) and describe(name) == (found, 0)


def test_a_description():
    found, devices = describe("devices=4,memory=24GiB,flops=150TFLOP/s,bandwidth=9e11,network=25GB/s,node=2,torus=1")
    assert devices == 4
    assert found == Hardware(memory=24 * 2**30, flops=150e12, bandwidth=9e11, network=25e9, node=2, torus=1)
    assert isinstance(found.node, int)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h1000:8", "did you mean h100?"),
        ("V5E:8", "did you mean v5e?"),
        ("h100:", "'' is not a number of devices"),
        ("h100:0", "'0' is not a number of devices"),
        ("h100:8:8", "'8:8' is not a number of devices"),
        ("h100:-1", "'-1' is not a number of devices"),
        ("memory=1G,flops=1T", "bandwidth=... is missing"),
        ("memory=1G,flops=1T,bandwidth=1G,memory=2G", "memory is given twice"),
        ("memory=1G,flops=1T,bandwidth=1G,netwrok=1G", "did you mean network?"),
        ("memory=1G,flops=1T,bandwidth=1G,", "no key ''"),
        ("memory=1G,flops=1T,bandwidth=0", "'0' is not a number above 0"),
        ("memory=1G,flops=1T,bandwidth=-1", "'-1' is not a number above 0"),
        ("memory=1G,flops=1T,bandwidth=nan", "'nan' is not a number above 0"),
        ("memory=1G,flops=1T,bandwidth=1e999", "'1e999' is not a number above 0"),
        ("memory=1G,flops=1T,bandwidth=1G,devices=1.5", "1.5 is not a whole number"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    with pytest.raises(ConfigError) as raised:
        describe(text)
    (line,) = raised.value.problems
    assert line.startswith(f"--target={text}: ") and words in line


def test_a_switch_gives_every_group_all_links():
    switch = Hardware(memory=1, flops=1, bandwidth=1, network=100)
    assert switch.link(ALONG_FSDP, ("fsdp",), WHOLE) == switch.link(ALL, ("data", "fsdp"), WHOLE) == 100


def test_a_group_leaves_its_node_over_the_links_of_its_members_there():
    machines = Hardware(memory=1, flops=1, bandwidth=1, network=100, node=4, node_network=30)
    assert machines.link(ALONG_FSDP, ("fsdp",), WHOLE) == 100  # within machines
    assert machines.link(ALONG_DATA, ("data",), WHOLE) == 30  # one in each machine
    assert machines.link(ALL, ("data", "fsdp"), WHOLE) == 100  # four in each: 120, and no more than within
    assert dataclasses.replace(machines, node_network=10).link(ALL, ("data", "fsdp"), WHOLE) == 40


def test_a_torus_is_shared_by_the_axes_and_a_line_is_half_a_ring():
    torus = Hardware(memory=1, flops=1, bandwidth=1, network=100, torus=2, ring=16)
    assert torus.link(ALONG_FSDP, ("fsdp",), WHOLE) == 50
    assert torus.link(ALL, ("data", "fsdp"), WHOLE) == 100
    assert torus.link(ALL, ("data",), {"data": 16, "fsdp": 1, "tensor": 1}) == 100
    assert dataclasses.replace(torus, ring=17).link(ALONG_DATA, ("data",), WHOLE) == 25
