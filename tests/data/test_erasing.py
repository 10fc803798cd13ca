"""Random erasing against the loop of timm's `RandomErasing`, written in NumPy, and against its definition."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

from mae_jax.data.erasing import draw_boxes, erase
from mae_jax.training.sharding import batch_sharding, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


def timms_boxes(size, count):
    """Top, left, height, width of each image's box: ten attempts, then none."""
    rng = np.random.default_rng(0)
    (height, width), boxes = size, []
    for _ in range(count):
        box = (0, 0, 0, 0)
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                box = (rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w)
                break
        boxes.append(box)
    return np.array(boxes)


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (8, 8), (16, 60), (5, 2)])
def test_boxes_are_distributed_as_in_timm(size):
    draw = jax.jit(draw_boxes, static_argnums=(1, 2))
    ours, theirs = np.stack(draw(jax.random.key(0), 4000, size), axis=1), timms_boxes(size, 4000)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    for a in range(4):
        for b in range(a):
            assert stats.ks_2samp(ours[:, a] * ours[:, b], theirs[:, a] * theirs[:, b]).pvalue > 0.001
    top, left, height, width = ours.T
    assert (ours >= 0).all() and (top + height <= size[0]).all() and (left + width <= size[1]).all()
    assert (height < size[0]).all() and (width < size[1]).all()


def test_area_is_uniform_and_aspect_log_uniform():
    """Where nearly every attempt fits: the few that do not are long and large."""
    _, _, height, width = (np.asarray(x) for x in draw_boxes(jax.random.key(1), 20_000, (4096, 4096)))
    area, aspect = height * width / 4096**2, np.log(height / width)
    assert area.min() > 0.0199 and area.max() < 0.334
    small = area < 0.29  # 0.3 is the first that does not fit at the most extreme aspect
    assert stats.kstest(area[small], stats.uniform(0.02, 0.27).cdf).pvalue > 0.001
    limit = math.log(1 / 0.3)
    assert stats.kstest(aspect[small], stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.001


def erased(images, out):
    """Of each image, the pixels that were changed: bool[N,H,W]; all channels are, or none."""
    changed = np.asarray(out) != images
    assert np.array_equal(changed.all(axis=-1), changed.any(axis=-1))
    return changed.any(axis=-1)


@pytest.mark.parametrize(("probability", "channels"), [(0.25, 3), (1.0, 1)])
def test_what_is_erased_is_a_box_of_noise_in_some_images(probability, channels):
    rng = np.random.default_rng(0)
    images = rng.uniform(5, 9, (1000, 16, 20, channels)).astype(np.float32)  # which noise hardly is
    out = np.asarray(jax.jit(partial(erase, probability=probability))(jax.random.key(0), images))
    changed = erased(images, out)
    assert abs(changed.any(axis=(1, 2)).mean() - probability) <= 4 * (probability * (1 - probability) / 1000) ** 0.5
    rows, columns = changed.any(axis=2), changed.any(axis=1)
    assert np.array_equal(changed, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):  # without a gap
        assert (np.abs(np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int), axis=1)).sum(axis=1) <= 2).all()
    noise = out[changed]
    assert stats.kstest(noise.ravel()[:20_000], stats.norm.cdf).pvalue > 0.001
    if channels > 1:
        assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 4 / len(noise) ** 0.5


def test_images_are_erased_independently_each_with_noise_of_its_own_and_as_the_key_says():
    images = np.full((400, 12, 12, 1), 9, np.float32)
    eraser = jax.jit(partial(erase, probability=1.0))
    out, again, other = (np.asarray(eraser(jax.random.key(seed), images)) for seed in (1, 1, 2))
    assert np.array_equal(out, again) and not np.array_equal(out, other)
    changed = erased(images, out)
    share = changed.mean(axis=(1, 2))
    assert abs(np.corrcoef(share[1:], share[:-1])[0, 1]) < 4 / 400**0.5
    values = out[changed]
    assert len(np.unique(values)) > 0.99 * values.size


def test_nothing_is_erased_or_drawn_at_probability_0():
    images = np.ones((2, 8, 8, 3), np.float32)
    assert erase(None, images) is images


def test_an_image_of_one_line_is_left_alone():
    _, _, height, width = draw_boxes(jax.random.key(0), 50, (1, 7))
    assert not (height * width).any()


def test_the_same_on_any_number_of_devices():
    images = np.random.default_rng(0).standard_normal((16, 12, 12, 3)).astype(np.float32)
    outs = []
    for devices in (1, 8):
        placed = jax.device_put(images, batch_sharding(make_mesh(data=devices)))
        outs.append(jax.jit(partial(erase, probability=0.5))(jax.random.key(5), placed))
        assert len(outs[-1].sharding.device_set) == devices
    assert np.array_equal(*outs) and not np.array_equal(outs[0], images)
