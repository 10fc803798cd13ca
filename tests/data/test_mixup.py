"""Mixup and cutmix against the formulas of timm's `Mixup`, written in NumPy, and the distributions they draw from."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mae_jax.data.mixup import blend, draw, draw_box, mix, smoothed
from mae_jax.training.sharding import batch_sharding, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLASSES = 5
SETTINGS = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0, "probability": 0.7, "label_smoothing": 0.1},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def batch(num=8, height=12, width=20, channels=3, seed=0):
    """Images f32[N,H,W,C], labels that differ from their partners', and weights that are not all 1."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((num, height, width, channels)).astype(np.float32)
    labels = np.where(np.arange(num) < num // 2, np.arange(num) % 2, 2 + np.arange(num) % 3).astype(np.int32)
    return images, labels, np.array([1, 0, 1, 1] * (num // 4), np.float32)


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def timms_targets(labels, lam, smoothing):
    """One row after the other, on value and off value."""
    off, on = smoothing / CLASSES, 1 - smoothing + smoothing / CLASSES
    rows = np.full((2, len(labels), CLASSES), off)
    for i, label in enumerate(labels):
        rows[0, i, label] = rows[1, len(labels) - 1 - i, label] = on
    return lam * rows[0] + (1 - lam) * rows[1]


def timms_images(images, lam, cut, box):
    out = images.astype(np.float64)
    top, bottom, left, right = box
    if cut:
        out[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    else:
        out = lam * out + (1 - lam) * images[::-1]
    return out


def timms_box(rng, lam, size):
    """`rand_bbox`, for images as [H,W]."""
    (height, width), ratio = size, np.sqrt(1 - lam)
    high, wide = int(height * ratio), int(width * ratio)
    y, x = rng.integers(0, height), rng.integers(0, width)
    rows, columns = [y - high // 2, y + high // 2], [x - wide // 2, x + wide // 2]
    return [*np.clip(rows, 0, height), *np.clip(columns, 0, width)]


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("box", [None, (2, 9, 0, 5), (0, 12, 0, 20), (4, 4, 7, 7), (11, 12, 13, 20)])
def test_blending_is_that_of_timm(lam, smoothing, box):
    images, labels, _ = batch()
    cut = box is not None
    targets = smoothed(labels, CLASSES, smoothing)
    ours = blend(images, targets, np.ones(8, np.float32), lam, jnp.array(cut), jnp.array(box or (1, 3, 1, 3)))
    if cut:
        lam = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (12 * 20)
    np.testing.assert_allclose(ours[0], timms_images(images, lam, cut, box or (0, 0, 0, 0)), atol=1e-6)
    np.testing.assert_allclose(ours[1], timms_targets(labels, lam, smoothing), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_without_an_alpha_only_labels_are_smoothed_and_nothing_is_drawn(smoothing):
    images, labels, weight = batch()
    same, targets = mix(None, images, labels, weight, CLASSES, label_smoothing=smoothing)
    assert same is images
    np.testing.assert_allclose(targets, timms_targets(labels, 1, smoothing), atol=1e-7)


@every_setting
def test_a_mixed_batch_is_blended_as_its_targets_say(settings):
    """Lambda is read from the targets and the box from the pixels, and the one must explain the other."""
    images, labels, weight = batch()
    smoothing = settings.get("label_smoothing", 0)
    mixed = jax.jit(jax.vmap(partial(mix, classes=CLASSES, **settings), (0, None, None, None)))
    all_images, all_targets = jax.device_get(mixed(keys(60), images, labels, weight))
    partnered = weight[::-1] > 0
    kinds = set()
    for out, targets in zip(all_images, all_targets, strict=True):
        lam = (targets[0, labels[0]] - smoothing / CLASSES) / (1 - smoothing)
        want = np.where(partnered[:, None], timms_targets(labels, lam, smoothing), timms_targets(labels, 1, smoothing))
        np.testing.assert_allclose(targets, want, atol=1e-6)
        assert np.array_equal(out[~partnered], images[~partnered])
        other = (out == images[::-1])[partnered].all(axis=(0, 3))
        own = (out == images)[partnered].all(axis=(0, 3))
        if (own | other).all():
            rows, columns = other.any(axis=1), other.any(axis=0)
            assert np.array_equal(other, rows[:, None] & columns), "a box"
            assert (np.diff(np.flatnonzero(rows)) == 1).all() and (np.diff(np.flatnonzero(columns)) == 1).all()
            assert abs(other.mean() - (1 - lam)) < 1e-6
            kinds.add("cut" if other.any() else "left alone")
        else:
            want = timms_images(images, lam, False, (0, 0, 0, 0))
            np.testing.assert_allclose(out[partnered], want[partnered], atol=1e-5)
            kinds.add("blended")
    expected = {"blended"} if "mixup" in settings else set()
    assert kinds >= expected | ({"cut"} if "cutmix" in settings else set())
    assert ("left alone" in kinds) or "probability" not in settings
    assert "cut" not in kinds or "cutmix" in settings


def test_lambda_has_the_beta_distribution_of_the_kind_that_was_drawn():
    alpha, beta = 0.2, 3.0
    lam, cut = jax.device_get(jax.jit(jax.vmap(lambda key: draw(key, alpha, beta, 1.0)))(keys(4000)))
    assert abs(cut.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert stats.kstest(lam[~cut], stats.beta(alpha, alpha).cdf).pvalue > 0.001
    assert stats.kstest(lam[cut], stats.beta(beta, beta).cdf).pvalue > 0.001


@pytest.mark.parametrize(("alphas", "always"), [((0.8, 0.0), False), ((0.0, 0.8), True)])
def test_one_alpha_alone_decides_the_kind(alphas, always):
    lam, cut = jax.device_get(jax.jit(jax.vmap(lambda key: draw(key, *alphas, 0.7)))(keys(3000)))
    assert (cut == always).all()
    assert abs((lam < 1).mean() - 0.7) < 4 * (0.7 * 0.3 / 3000) ** 0.5
    assert stats.kstest(lam[lam < 1], stats.beta(0.8, 0.8).cdf).pvalue > 0.001


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (224, 160)])
@pytest.mark.parametrize("lam", [0.05, 0.8])
def test_boxes_are_those_of_timm(size, lam):
    ours = np.asarray(jax.jit(jax.vmap(lambda key: draw_box(key, lam, size)))(keys(2000)))
    rng = np.random.default_rng(0)
    theirs = np.array([timms_box(rng, lam, size) for _ in range(2000)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    for box in (ours, theirs):
        assert {(b - t, r - x) for t, b, x, r in box.tolist() if t > 0 and x > 0 and b < size[0] and r < size[1]} <= {
            tuple(int(side * np.sqrt(1 - lam)) // 2 * 2 for side in size)
        }
    areas = [(box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) for box in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 0.001


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_box_that_fits_has_the_area_that_lambda_leaves(lam):
    box = np.asarray(jax.jit(jax.vmap(lambda key: draw_box(key, lam, (1000, 600))))(keys(500)))
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (1000 * 600)
    assert (box >= 0).all() and (area <= 1 - lam).all()
    assert lam == 0 or abs(area.max() - (1 - lam)) < 0.005


def test_an_image_beside_padding_stays_as_it_is():
    images, labels, _ = batch()
    weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    for cut in (False, True):
        out, targets = blend(images, smoothed(labels, CLASSES, 0), weight, 0.4, jnp.array(cut), jnp.array([0, 6, 0, 9]))
        assert np.array_equal(out[:2], images[:2]) and np.array_equal(targets[:2], np.eye(CLASSES)[labels[:2]])
        assert not (np.asarray(out[2:6]) == images[2:6]).all(axis=(1, 2, 3)).any()
        assert (np.asarray(targets[2:6]).max(axis=1) < 0.9).all()


def test_the_same_on_any_number_of_devices():
    arguments = batch(16)
    mixed = jax.jit(partial(mix, classes=CLASSES, **SETTINGS["both"]))
    results = []
    for devices in (1, 8):
        placed = [jax.device_put(x, batch_sharding(make_mesh(data=devices))) for x in arguments]
        outs = [mixed(key, *placed) for key in keys(6)]
        assert all(len(image.sharding.device_set) == devices for image, _ in outs)
        results.append(jax.device_get(outs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), *results)  # but for the last bit


def test_keys_decide():
    images, labels, weight = batch()
    mixed = jax.jit(partial(mix, classes=CLASSES, **SETTINGS["mixup"]))
    one, again, other = (mixed(jax.random.key(seed), images, labels, weight)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_an_odd_batch_has_an_image_that_is_its_own_partner():
    images, labels, _ = batch()
    images, labels, weight = images[:3], labels[:3], np.ones(3, np.float32)
    out, targets = blend(images, smoothed(labels, CLASSES, 0), weight, 0.3, jnp.array(False), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(out[1], images[1], atol=1e-6)
    np.testing.assert_allclose(out[0], 0.3 * images[0] + 0.7 * images[2], atol=1e-6)
    np.testing.assert_allclose(targets, timms_targets(labels, 0.3, 0), atol=1e-6)
