"""How long a compiled step takes on other hardware: every operation at the speed of what limits it.

The roofline of Williams et al. 2009, operation by operation: one takes as long as its products at the peak, or as its
bytes at the bandwidth of memory, whichever is longer. What devices send one another takes the bytes of ring algorithms
over the bandwidth of the links; it goes on while the rest is computed, but for what is sent along `tensor`, which the
next product waits for. Peaks are those of `Hardware`, with no factor for what is really reached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from mae_jax.training.hardware import Hardware
from mae_jax.training.hlo import Groups
from mae_jax.training.program import Collective, Program

WAITED_FOR = "tensor"  # collectives along this axis have nothing beside them that could be computed meanwhile


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same axes of the mesh, in one step.

    Attributes:
      arrays: how many there are.
      bytes: of these arrays, as `Collective` has them.
      sent: bytes that each device sends.
      seconds: how long that takes.
    """

    kind: str
    axes: tuple[str, ...]
    arrays: int
    bytes: int
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of the time of a step, in seconds.

    Attributes:
      compute: matrix products, at the peak.
      memory: what operations take longer than that, as they wait for memory.
      exchanges: what devices send one another.
    """

    compute: float
    memory: float
    exchanges: tuple[Exchange, ...]

    @property
    def network(self) -> float:
        """All that is sent."""
        return sum(exchange.seconds for exchange in self.exchanges)

    @property
    def step(self) -> float:
        """With all that can be sent while something else is computed sent like that."""
        waited = sum(exchange.seconds for exchange in self.exchanges if WAITED_FOR in exchange.axes)
        return max(self.compute + self.memory + waited, self.network)

    @property
    def in_turns(self) -> float:
        """With nothing computed while something is sent."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        """What there is most of: "compute", "memory" or "network"."""
        return max(("compute", "memory", "network"), key=lambda term: getattr(self, term))


def estimate(program: Program, hardware: Hardware, dtype: str, mesh: Mapping[str, int]) -> Estimate:
    """The time of a step of a program that was compiled for a mesh, on devices that are like `hardware`.

    Args:
      dtype: of the matrix products.
      mesh: the size of each axis.
    """
    peak = hardware.peak(dtype)
    whole = sum(x.times * max(x.flops / peak, x.bytes / hardware.bandwidth) for x in program.operations)
    compute = program.flops / peak
    return Estimate(compute, whole - compute, exchanges(program.collectives, hardware, mesh))


def exchanges(collectives: tuple[Collective, ...], hardware: Hardware, mesh: Mapping[str, int]) -> tuple[Exchange, ...]:
    """The collectives of a program by kind and axes, the longest first."""
    along = {groups: axes_of(groups, mesh) for groups in {collective.groups for collective in collectives}}
    speed = {groups: hardware.link(groups, axes, mesh) for groups, axes in along.items()}
    alike = {}
    for collective in collectives:
        alike.setdefault((collective.kind, along[collective.groups]), []).append(collective)
    found = [
        Exchange(
            kind,
            axes,
            sum(x.times for x in members),
            sum(x.times * x.bytes for x in members),
            sum(x.times * x.sent for x in members),
            sum(x.times * x.sent / speed[x.groups] for x in members),
        )
        for (kind, axes), members in alike.items()
    ]
    return tuple(sorted(found, key=lambda exchange: -exchange.seconds))


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the members of every group lie, the fewest there are.

    >>> axes_of(((0, 1), (2, 3)), {"data": 2, "fsdp": 2}), axes_of(((0, 1, 2, 3),), {"data": 2, "fsdp": 2})
    (('fsdp',), ('data', 'fsdp'))
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=1)  # [n,axes]
    members = [places[list(group)] for group in groups]
    differs = np.any([np.any(place != place[:1], axis=0) for place in members], axis=0)
    return tuple(axis for axis, different in zip(mesh, differs, strict=True) if different)
