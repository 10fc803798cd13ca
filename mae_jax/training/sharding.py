"""The device mesh, and which axis of it each array is split over."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(*, data: int = -1) -> Mesh:
    """A mesh with the one axis `data`, over the first `data` devices of all hosts; -1: over all of them."""
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    # linen annotates nothing, so the axes must be Auto; jax.make_mesh's own default is Explicit
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: its first axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_sharding(state, mesh: Mesh):
    """How the train state lies on the mesh: a whole copy on every device (data parallelism)."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
