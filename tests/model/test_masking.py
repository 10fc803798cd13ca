"""Masks: exactly K patches stay, and which ones depends on the key alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mae_jax.model import masking
from mae_jax.model.masking import SAMPLERS, Mask, from_scores, take, visible_count

GRIDS = [(4, 4), (2, 9), (7, 3)]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@pytest.mark.parametrize(
    "patches, ratio, count",
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (16, 0.75, 4),
        (196, 0.6, 78),
        (196, 0.95, 9),
        (100, 0.9, 9),  # 100 * (1 - 0.9) = 9.999999999999998
        (10, 0.8, 1),  # 1.9999999999999996
        (49, 0.75, 12),
        (50, 0.5, 25),
        (2, 0.5, 1),
        (4, 0.01, 3),
    ],
)
def test_count_of_visible_patches_is_truncated_as_in_the_original(patches, ratio, count):
    assert visible_count(patches, ratio) == count


@pytest.mark.parametrize(
    "patches, ratio", [(16, 0.0), (16, 1.0), (16, 0.95), (10, 0.9), (1, 0.5), (16, 1.5), (16, -0.5), (16, float("nan"))]
)
def test_ratios_that_hide_nothing_or_leave_nothing_are_refused(patches, ratio):
    with pytest.raises(ValueError):
        visible_count(patches, ratio)
    with pytest.raises(ValueError):
        from_scores(jnp.zeros((2, patches)), ratio)


def test_lowest_scores_stay_visible_lowest_first():
    mask = from_scores(jnp.array([[0.4, 0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6], [8.0, 7, 6, 5, 4, 3, 2, 1]]), 0.6)
    assert mask.visible.tolist() == [[1, 5, 3], [7, 6, 5]]
    assert mask.hidden.tolist() == [[0, 7, 6, 4, 2], [4, 3, 2, 1, 0]]
    assert mask.order.tolist() == [[1, 5, 3, 0, 7, 6, 4, 2], [7, 6, 5, 4, 3, 2, 1, 0]]
    assert mask.restore.tolist() == [[3, 0, 7, 2, 6, 1, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]]
    assert mask.removed.tolist() == [[1, 0, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]


def test_fields_of_a_mask_have_their_documented_types():
    mask = masking.sample(jax.random.key(0), 2, (4, 4))
    for indexes in (mask.visible, mask.hidden, mask.order, mask.restore):
        assert indexes.dtype == jnp.int32
    assert mask.removed.dtype == jnp.float32


@every_sampler
@pytest.mark.parametrize("grid", GRIDS)
def test_a_sampler_scores_every_patch_of_every_sample(name, grid):
    scores = SAMPLERS[name](jax.random.key(0), 5, grid)
    assert scores.shape == (5, grid[0] * grid[1])
    assert scores.dtype == jnp.float32
    assert np.isfinite(scores).all()


@every_sampler
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_every_sample_keeps_exactly_its_count_and_loses_no_patch(name, grid, ratio):
    patches = grid[0] * grid[1]
    count = visible_count(patches, ratio)
    mask = masking.sample(jax.random.key(3), 6, grid, name=name, ratio=ratio)
    assert mask.visible.shape == (6, count)
    assert mask.hidden.shape == (6, patches - count)
    np.testing.assert_array_equal(np.sort(mask.order, axis=1), np.tile(np.arange(patches), (6, 1)))
    np.testing.assert_array_equal(np.take_along_axis(mask.order, mask.restore, 1), np.tile(np.arange(patches), (6, 1)))
    removed = np.zeros((6, patches))
    np.put_along_axis(removed, np.asarray(mask.hidden), 1, axis=1)
    np.testing.assert_array_equal(mask.removed, removed)


@every_sampler
def test_masks_differ_between_samples_and_keys_and_repeat_for_the_same_key(name):
    def removed(key):
        return np.asarray(masking.sample(key, 8, (7, 7), name=name).removed)

    one, again, other = (removed(jax.random.fold_in(jax.random.key(0), step)) for step in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert len(np.unique(one, axis=0)) == 8
    assert not np.array_equal(one, other)


@every_sampler
@pytest.mark.parametrize("devices", [1, 8])
def test_masks_are_the_same_on_any_number_of_devices(name, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    batch = NamedSharding(mesh, PartitionSpec("data"))
    draw = partial(masking.sample, num=16, grid=(6, 8), name=name)
    key = jax.random.key(7)
    mask = jax.jit(draw, out_shardings=batch)(key)
    assert len(mask.visible.sharding.device_set) == devices
    assert mask.visible.addressable_shards[0].data.shape == (16 // devices, 12)

    # and where the mask is no output, but follows the sharded images that it is taken from
    images = jax.device_put(np.arange(16 * 48.0).reshape(16, 48, 1), batch)
    seen = jax.jit(lambda key, x: take(x, draw(key).visible))(key, images)
    want = draw(key)
    for got, expected in [(mask.visible, want.visible), (mask.hidden, want.hidden), (mask.removed, want.removed)]:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(seen[..., 0] % 48, want.visible)


def test_random_masking_hides_every_patch_equally_often():
    samples = 4000
    share = np.asarray(masking.sample(jax.random.key(0), samples, (4, 5), ratio=0.75).removed).mean(axis=0)
    assert np.abs(share - 0.75).max() < 5 * (0.75 * 0.25 / samples) ** 0.5


def test_random_masking_hides_patches_independently_of_each_other_but_for_their_number():
    samples, patches = 4000, 20
    removed = np.asarray(masking.sample(jax.random.key(1), samples, (4, 5), ratio=0.75).removed)
    correlation = np.corrcoef(removed.T)[np.triu_indices(patches, 1)]
    assert np.abs(correlation + 1 / (patches - 1)).max() < 5 * samples**-0.5


def test_the_default_is_random_masking_of_three_quarters():
    key = jax.random.key(0)
    mask = masking.sample(key, 2, (4, 4))
    np.testing.assert_array_equal(mask.order, jnp.argsort(jax.random.uniform(key, (2, 16)), axis=1))
    assert mask.visible.shape == (2, 4)


def test_a_mask_passes_through_jit_as_data():
    masks = [masking.sample(jax.random.key(seed), 2, (4, 4)) for seed in (0, 1)]
    traced = []

    @jax.jit
    def removed(mask: Mask):
        traced.append(mask)
        return mask.removed

    for mask in masks:
        np.testing.assert_array_equal(removed(mask), mask.removed)
    assert len(traced) == 1


def test_take_gathers_each_sample_s_own_rows():
    patches = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    index = np.array([[0, 6, 6], [3, 2, 1], [5, 0, 4]])
    got = take(jnp.asarray(patches), jnp.asarray(index))
    np.testing.assert_array_equal(got, np.stack([patches[i, index[i]] for i in range(3)]))
