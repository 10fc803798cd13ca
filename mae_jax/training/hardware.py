"""Machines that are planned for: what a device holds, computes and sends, and how devices are joined.

A target is written as NAME[:DEVICES], a row of `PRESETS`, or as what is known of it, KEY=NUMBER[,KEY=NUMBER ...]: the
attributes of `Hardware`, and `devices`. Numbers may end in k, M, G, T, P (powers of 1000) or Ki, Mi, Gi, Ti (of 1024),
and then in B, B/s, FLOPS or FLOP/s: 24GiB, 900GB/s, 150TFLOP/s.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

from mae_jax.errors import ConfigError, nearest
from mae_jax.training.hlo import Groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device of many that are alike, and its links. Speeds are peaks: nothing reaches them all the time.

    Attributes:
      memory: bytes.
      flops: FLOP/s of matrix products of bfloat16, dense, with sums in float32.
      float32_flops: of float32, at JAX's default precision, which is TF32 on GPUs and bfloat16 on TPUs; 0: the same.
      bandwidth: bytes/s of its memory.
      network: bytes/s that it sends to other devices of its node, over all its links together; 0: not known.
      node: how many devices fast links join: GPUs of a machine, chips of a TPU pod; 0: all there are.
      node_network: bytes/s that a device sends to other nodes; 0: nodes are not joined.
      torus: dimensions of the torus that the fast links make, and so the axes of a mesh share them; 0: a switch, where
        every group of devices has all links of its members.
      ring: devices from which on the torus is closed; fewer are joined in lines, in which a collective takes twice as
        long as in rings.
    """

    memory: float
    flops: float
    bandwidth: float
    float32_flops: float = 0
    network: float = 0
    node: int = 0
    node_network: float = 0
    torus: int = 0
    ring: int = 1

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of float32 or bfloat16."""
        return self.float32_flops or self.flops if dtype == "float32" else self.flops

    def link(self, groups: Groups, axes: Collection[str], mesh: Mapping[str, int]) -> float:
        """Bytes/s that each device can send in a collective among `groups`, which lie along `axes` of the `mesh`.

        A torus' links are divided evenly among the axes of the mesh that are longer than 1, as
        jax.experimental.mesh_utils lays axes along dimensions. Of a group in several nodes, the members in one node
        send what leaves it over their own links out of it, side by side.
        """
        share = 1.0
        if self.torus:
            long = [axis for axis, size in mesh.items() if size > 1]
            share = len([axis for axis in long if axis in axes]) / len(long)
            share /= 1 if math.prod(mesh.values()) >= self.ring else 2
        speed = self.network * share
        if not self.node:
            return speed
        nodes = [[device // self.node for device in group] for group in groups]
        if all(len(set(group)) == 1 for group in nodes):
            return speed
        fewest = min(group.count(node) for group in nodes for node in group)
        return min(speed, fewest * self.node_network)


# Per chip or GPU, from what its maker publishes, dense. Links count one way: half of what "bidirectional" sums up.
# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (memory there is in GiB, as v5p's page says); links of v4: Jouppi
# et al. 2023, arXiv 2304.01433, table 4, 6 of 50 GB/s; closed tori: from a cube of 4x4x4 on, and the whole 16x16.
# GPUs: the data sheets of A100 80GB SXM and H100 SXM; NVLink within a machine of eight, and between machines the
# network cards of DGX A100 and H100, 200 and 400 Gb/s a GPU.
PRESETS = {
    "a100": Hardware(
        memory=80e9,
        flops=312e12,
        float32_flops=156e12,
        bandwidth=2039e9,
        network=300e9,
        node=8,
        node_network=25e9,
    ),
    "h100": Hardware(
        memory=80e9,
        flops=989e12,
        float32_flops=494e12,
        bandwidth=3350e9,
        network=450e9,
        node=8,
        node_network=50e9,
    ),
    "v4": Hardware(memory=32 * 2**30, flops=275e12, bandwidth=1200e9, network=300e9, node=4096, torus=3, ring=64),
    "v5e": Hardware(memory=16 * 2**30, flops=197e12, bandwidth=819e9, network=200e9, node=256, torus=2, ring=256),
    "v5p": Hardware(memory=95 * 2**30, flops=459e12, bandwidth=2765e9, network=600e9, node=8960, torus=3, ring=64),
    "v6e": Hardware(memory=32 * 2**30, flops=918e12, bandwidth=1638e9, network=400e9, node=256, torus=2, ring=256),
}
WHOLE = ("node", "torus", "ring", "devices")  # numbers that count something


def describe(text: str) -> tuple[Hardware, int]:
    """The hardware that a target names or describes, and how many devices of it; 0 where that is not said.

    >>> describe("v5e:256")[1], describe("devices=2,memory=24Gi,flops=1.5T,bandwidth=1e12")[0].memory
    (256, 25769803776.0)

    Raises:
      ConfigError: with all that is wrong with it.
    """
    if "=" in text:
        return _described(text)
    name, colon, count = text.partition(":")
    if name not in PRESETS:
        raise ConfigError(
            f"--target={text}: no {name!r}; use one of {', '.join(PRESETS)}, or say what it is: "
            f"--target=memory=24Gi,flops=150T,bandwidth=900G,...{nearest(name.lower(), PRESETS)}"
        )
    if colon and not re.fullmatch(r"[1-9]\d{0,9}", count):
        raise ConfigError(f"--target={text}: {count!r} is not a number of devices; write {name}:8")
    return PRESETS[name], int(count or 0)


def _described(text: str) -> tuple[Hardware, int]:
    fields = {field.name: field.default for field in dataclasses.fields(Hardware)}
    known, given, problems = [*fields, "devices"], {}, []
    for part in text.split(","):
        key, _, number = (word.strip() for word in part.partition("="))
        value = _number(number)
        if key not in known:
            problems.append(f"no key {key!r}; there are {', '.join(known)}{nearest(key, known)}")
        elif key in given:
            problems.append(f"{key} is given twice")
        elif value is None:
            problems.append(f"{key}: {number!r} is not a number above 0, such as 24Gi, 150T or 9e11")
        elif key in WHOLE and value != int(value):
            problems.append(f"{key}: {number} is not a whole number")
        else:
            given[key] = int(value) if key in WHOLE else value
    told = " ".join(problems)
    problems += [
        f"{key}=... is missing"
        for key, default in fields.items()
        if default is dataclasses.MISSING and key not in given and f"{key}:" not in told
    ]
    if problems:
        raise ConfigError([f"--target={text}: {problem}" for problem in problems])
    devices = given.pop("devices", 0)
    return Hardware(**given), devices


def _number(text: str) -> float | None:
    """24Gi and 24GiB are 24 * 2**30; None of what is no finite number above 0."""
    match = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d{1,3})?)(?:([kMGTP])(i?))?(?:B|B/s|FLOPS|FLOP/s)?", text)
    if not match:
        return None
    prefix = " kMGTP".index(match[2]) if match[2] else 0
    value = float(match[1]) * (1024 if match[3] else 1000) ** prefix
    return value if 0 < value < math.inf else None
