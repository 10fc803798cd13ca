"""The mesh, and how batches and states lie on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mae_jax.training.sharding import batch_sharding, make_mesh, state_sharding


@pytest.mark.parametrize(("data", "count"), [(-1, 8), (8, 8), (3, 3), (1, 1)])
def test_mesh_has_one_data_axis_over_the_first_devices(data, count):
    mesh = make_mesh(data=data)
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)
    assert mesh.devices.tolist() == jax.devices()[:count]


def test_mesh_takes_all_devices_unless_told_otherwise():
    assert make_mesh().size == jax.device_count() == 8


@pytest.mark.parametrize("data", [1, 2, 8])
def test_batches_are_split_evenly_along_their_first_axis(data):
    x = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    array = jax.device_put(x, batch_sharding(make_mesh(data=data)))
    for i, shard in enumerate(sorted(array.addressable_shards, key=lambda s: s.device.id)):
        np.testing.assert_array_equal(shard.data, np.split(x, data)[i])


def test_every_device_holds_the_whole_state():
    mesh = make_mesh()
    state = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(3), "none": None}
    shardings = state_sharding(state, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    placed = jax.device_put(state, shardings)
    for leaf, original in zip(jax.tree.leaves(placed), jax.tree.leaves(state), strict=True):
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, original)


def test_state_sharding_takes_shapes_as_well_as_arrays():
    mesh = make_mesh()
    array = jnp.zeros((4, 2))
    assert state_sharding(jax.eval_shape(lambda: array), mesh) == state_sharding(array, mesh)
