"""Masks: exactly K patches stay, and which ones depends on the key alone."""

import itertools
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from mae_jax.model import masking
from mae_jax.model.masking import SAMPLERS, Mask, from_scores, take, visible_count
from mae_jax.model.samplers import block_scores

GRIDS = [(4, 4), (2, 9), (7, 3)]
pytestmark = pytest.mark.usefixtures("quick_compilation")
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
        (16, 0.0, 16),
    ],
)
def test_count_of_visible_patches_is_truncated_as_in_the_original(patches, ratio, count):
    assert visible_count(patches, ratio) == count


@pytest.mark.parametrize(
    "patches, ratio", [(16, 1.0), (16, 0.95), (10, 0.9), (1, 0.5), (16, 1.5), (16, -0.5), (16, float("nan"))]
)
def test_ratios_that_leave_nothing_or_more_than_there_is_are_refused(patches, ratio):
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
def test_every_sample_keeps_exactly_its_count_and_loses_no_patch(name, grid):
    patches, ratios = grid[0] * grid[1], (0.25, 0.5, 0.75, 0.9)

    @jax.jit
    def draw(key):
        masks = [masking.sample(key, 6, grid, name=name, ratio=ratio) for ratio in ratios]
        return SAMPLERS[name](key, 6, grid), [(mask, mask.order, mask.restore, mask.removed) for mask in masks]

    scores, masks = draw(jax.random.key(3))
    assert scores.shape == (6, patches)
    assert scores.dtype == jnp.float32
    assert np.isfinite(scores).all()
    for ratio, (mask, order, restore, removed) in zip(ratios, masks, strict=True):
        count = visible_count(patches, ratio)
        assert mask.visible.shape == (6, count)
        assert mask.hidden.shape == (6, patches - count)
        np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(patches), (6, 1)))
        np.testing.assert_array_equal(np.take_along_axis(order, restore, 1), np.tile(np.arange(patches), (6, 1)))
        want = np.zeros((6, patches))
        np.put_along_axis(want, np.asarray(mask.hidden), 1, axis=1)
        np.testing.assert_array_equal(removed, want)


@every_sampler
def test_a_ratio_of_0_hides_nothing(name):
    mask = masking.sample(jax.random.key(0), 2, (3, 4), name=name, ratio=0.0)
    assert mask.hidden.shape == mask.decoded.shape == (2, 0)
    np.testing.assert_array_equal(np.sort(mask.visible, axis=1), np.tile(np.arange(12), (2, 1)))
    np.testing.assert_array_equal(mask.removed, np.zeros((2, 12)))


@every_sampler
def test_a_share_of_the_hidden_patches_is_decoded_whatever_the_sampler(name):
    """The same mask, and each hidden patch as likely as any other, in each sample by itself."""
    draw = jax.jit(lambda key: masking.sample(key, 2000, (2, 5), name=name, ratio=0.6, decoded=0.4))
    mask, whole = draw(jax.random.key(0)), masking.sample(jax.random.key(0), 2000, (2, 5), name=name, ratio=0.6)
    assert mask.decoded.shape == (2000, 3) and mask.skipped == 3, "0.4 of 6 are 2.4"
    np.testing.assert_array_equal(mask.visible, whole.visible)
    np.testing.assert_array_equal(np.sort(mask.hidden, axis=1), np.sort(whole.hidden, axis=1))
    chosen = (np.asarray(mask.decoded)[:, :, None] == np.sort(mask.hidden, axis=1)[:, None]).any(axis=1)  # [N,6]
    assert np.abs(chosen.mean(axis=0) - 0.5).max() < 5 * 0.5 / 2000**0.5
    assert len(np.unique(chosen, axis=0)) == 20, "any three of six"
    assert masking.decoded_count(6, 1e-9) == 1
    with pytest.raises(ValueError, match="a share of 0 "):
        masking.decoded_count(6, 0)


@every_sampler
def test_a_mask_is_drawn_for_each_sample_by_itself(name):
    """What is hidden of one sample tells nothing of another, over 400 keys; and the same key draws the same."""
    draw = jax.jit(jax.vmap(lambda key: masking.sample(key, 3, (4, 5), name=name, ratio=0.5).removed))
    keys = jax.random.split(jax.random.key(0), 400)
    removed = np.asarray(draw(keys), np.float64)  # [keys,samples,L]
    np.testing.assert_array_equal(draw(keys), removed)
    one, other, another = np.moveaxis(removed - removed.mean(axis=0), 1, 0)
    assert np.abs(np.mean(one * other, axis=0)).max() < 5 * 0.25 / 400**0.5
    assert np.abs(np.mean(one * another, axis=0)).max() < 5 * 0.25 / 400**0.5


@every_sampler
@pytest.mark.parametrize("grid", [(14, 14), (7, 3)])
def test_masks_in_units_keep_the_same_count_and_cut_one_unit_at_most(name, grid):
    @jax.jit
    def draw(key):
        return {unit: masking.sample(key, 6, grid, name=name, ratio=0.6, unit=unit).removed for unit in (2, 3)}

    for unit, removed in draw(jax.random.key(3)).items():
        removed = np.asarray(removed, bool).reshape(6, *grid)
        assert (removed.sum(axis=(1, 2)) == grid[0] * grid[1] - visible_count(grid[0] * grid[1], 0.6)).all()
        corners = list(itertools.product(range(0, grid[0], unit), range(0, grid[1], unit)))
        for sample in removed:
            shares = [sample[top : top + unit, left : left + unit].mean() for top, left in corners]
            assert sum(0 < share < 1 for share in shares) <= 1


@every_sampler
@pytest.mark.parametrize("devices", [1, 8])
def test_masks_are_the_same_on_any_number_of_devices(name, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    batch = NamedSharding(mesh, PartitionSpec("data"))
    draw = jax.jit(partial(masking.sample, num=16, grid=(6, 8), name=name))
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


def test_the_samplers_fill_a_quarter_of_the_paper_s_grids_as_in_its_figure_6():
    """224 pixels by 16 and 28 by 4: the grid keeps one of every 2x2, the middle is one rectangle."""
    kept = np.argwhere(shown("grid", (14, 14)) == 0)
    np.testing.assert_array_equal(kept, [(row, col) for row in range(0, 14, 2) for col in range(0, 14, 2)])
    kept = np.argwhere(shown("grid", (7, 7)) == 0)
    np.testing.assert_array_equal(kept, [(row, col) for row in range(1, 7, 2) for col in range(0, 7, 2)])
    middle = shown("centre", (14, 14))
    assert middle[1:13, 1:13].all() and middle[0].sum() == 0, "147 of 196 are 12x12 and three more"
    np.testing.assert_array_equal(shown("centre", (14, 14), 64 / 196)[3:11, 3:11], np.ones((8, 8)))
    assert shown("centre", (7, 7))[1:6, 1:6].all()
    np.testing.assert_array_equal(shown("centre", (4, 8), 0.25)[1:3, 2:6], np.ones((2, 4))), "of the grid's shape"


def shown(name, grid, ratio=0.75, key=0):
    return np.asarray(masking.sample(jax.random.key(key), 1, grid, name=name, ratio=ratio).removed).reshape(grid)


@pytest.mark.parametrize("ratio, period", [(0.5, None), (0.75, 2), (15 / 16, 4)])
def test_a_grid_is_regular_at_other_ratios_too(ratio, period):
    kept = shown("grid", (16, 16), ratio) == 0
    row, col = np.indices((16, 16))
    want = (row + col) % 2 == 0 if period is None else (row % period == 0) & (col % period == 0)
    np.testing.assert_array_equal(kept, want)


def test_blocks_are_few_and_large():
    """Neighbours share their fate: of all pairs, far fewer differ than under random masking."""

    def differing(name):
        draw = jax.jit(lambda key: masking.sample(key, 200, (14, 14), name=name, ratio=0.5).removed)
        removed = np.asarray(draw(jax.random.key(0))).reshape(-1, 14, 14)
        return (np.mean(removed[:, 1:] != removed[:, :-1]) + np.mean(removed[:, :, 1:] != removed[:, :, :-1])) / 2

    assert differing("random") == pytest.approx(0.5, abs=0.02)
    assert 0.02 < differing("block") < 0.15


def test_the_last_block_is_cut_to_what_is_left_and_the_others_stay_whole():
    """The masks of one key are nested: a higher ratio hides more, and nothing less."""
    scores = jax.jit(lambda key: block_scores(key, 1, (14, 14)))(jax.random.key(4))
    ratios = (0.1, 0.3, 0.5, 0.75, 0.9, 0.99)
    masks = [np.asarray(from_scores(scores, ratio).removed).reshape(14, 14) for ratio in ratios]
    for less, more in itertools.pairwise(masks):
        assert (more >= less).all()
    first = np.argwhere(masks[0])
    height, width = np.ptp(first, axis=0) + 1
    assert height * width - len(first) < max(height, width) * 2, "all but a row or a column of a rectangle"


def test_a_mask_of_one_s_own_goes_there_and_back():
    mine = np.zeros((2, 3, 4), bool)
    mine[0, 1:, 1:] = mine[1, :2, :3] = True
    mask = masking.from_removed(mine)
    assert mask.visible.dtype == mask.hidden.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(mask.removed, bool).reshape(mine.shape), mine)
    assert mask.hidden.tolist()[0] == [5, 6, 7, 9, 10, 11]
    drawn = masking.sample(jax.random.key(0), 5, (4, 5))
    np.testing.assert_array_equal(masking.from_removed(drawn.removed).removed, drawn.removed)


@pytest.mark.parametrize("removed", [[[0, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1, 1], [0, 0, 1]]])
def test_a_mask_of_one_s_own_must_hide_as_many_patches_of_each_sample(removed):
    with pytest.raises(ValueError, match="each sample must hide as many"):
        masking.from_removed(removed)


def test_a_sampler_of_one_s_own_is_a_row(monkeypatch):
    monkeypatch.setitem(
        SAMPLERS, "rows", lambda key, num, grid: jnp.tile(jnp.arange(grid[0] * grid[1] * 1.0)[None], (num, 1))
    )
    mask = masking.sample(jax.random.key(0), 2, (4, 4), name="rows", ratio=0.5)
    np.testing.assert_array_equal(mask.visible, np.tile(np.arange(8), (2, 1)))


def test_a_ratio_goes_from_one_to_another_in_stages():
    assert masking.ratios(10, 0.75) == [(0, 0.75)]
    stages = masking.ratios(1000, 0.9, start=0.5)
    assert [step for step, _ in stages] == [0, 250, 500, 750]
    np.testing.assert_allclose([ratio for _, ratio in stages], [0.5, 0.5 + 0.4 / 3, 0.9 - 0.4 / 3, 0.9])


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


def test_the_picture_in_the_docs_is_what_its_command_draws(tmp_path):
    path = tmp_path / "masks.png"
    runpy.run_path("docs/masks.py")["main"](path)
    drawn, shown = (np.asarray(Image.open(file)) for file in (path, "docs/masks.png"))
    np.testing.assert_array_equal(drawn, shown)
