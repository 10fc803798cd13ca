"""Colour jitter: the three changes of torchvision's ColorJitter, as Pillow makes them, and the seed alone decides."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mae_jax.data import jitter as module
from mae_jax.data.jitter import CHANGES, jitter


def picture(channels):
    """Smooth, with all grey levels in it: uint8[24,33,channels]."""
    rng = np.random.default_rng(0)
    bands = [Image.fromarray(rng.integers(0, 256, (5, 6), np.uint8)).resize((33, 24)) for _ in range(channels)]
    return np.stack([np.asarray(band) for band in bands], -1)


def by_formula(image, kind, factor):
    """One change by the definition of torchvision's adjust_brightness, adjust_contrast and adjust_saturation."""
    grey = np.asarray(Image.fromarray(image.squeeze()).convert("L"), float)[..., None]
    towards = {"Brightness": 0.0, "Contrast": int(grey.mean() + 0.5)}
    towards = towards.get(kind, grey)
    return np.clip(towards + factor * (image.astype(float) - towards), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.4, 2.5])
def test_a_change_is_the_formula_of_torchvision(kind, factor, channels):
    image = picture(channels)
    ours = np.asarray(kind(Image.fromarray(image.squeeze())).enhance(factor)).reshape(image.shape)
    assert np.abs(ours.astype(int) - by_formula(image, kind.__name__, factor)).max() <= 1


@pytest.fixture
def calls(monkeypatch):
    """What is changed how, instead of changing it."""
    made = []

    def noted(name):
        def kind(image):
            kind.enhance = lambda factor: (made.append((name, factor)), image)[1]
            return kind

        return kind

    monkeypatch.setattr(module, "CHANGES", [noted(kind.__name__) for kind in CHANGES])
    return made


@pytest.mark.parametrize(("strength", "low"), [(0.4, 0.6), (1.0, 0.0), (2.0, 0.0)])
def test_each_change_is_made_once_in_any_order_with_factors_uniform_in_the_range(strength, low, calls):
    image, count = np.zeros((1, 1, 3), np.uint8), 3000
    for i in range(count):
        jitter(image, np.array([0, i]), strength=strength)
    orders = [tuple(name for name, _ in calls[i : i + 3]) for i in range(0, 3 * count, 3)]
    kinds = ["Brightness", "Contrast", "Color"]
    for order in itertools.permutations(kinds):
        assert abs(orders.count(order) / count - 1 / 6) < 4 * (5 / 36 / count) ** 0.5
    for kind in kinds:
        factors = np.array([factor for name, factor in calls if name == kind])
        assert low <= factors.min() < low + 0.01 and 1 + strength - 0.01 < factors.max() <= 1 + strength
        assert abs(factors.mean() - (low + 1 + strength) / 2) < 4 * (1 + strength - low) / (12 * count) ** 0.5


def test_changes_are_those_of_pillow_one_after_the_other(calls, monkeypatch):
    image, seed = picture(3), np.array([3, 7])
    jitter(image, seed, strength=0.4)
    want = Image.fromarray(image)
    for name, factor in calls:
        want = getattr(ImageEnhance, name)(want).enhance(factor)
    monkeypatch.setattr(module, "CHANGES", CHANGES)
    assert np.array_equal(jitter(image, seed, strength=0.4), want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (24, 33)])
def test_shape_and_type_stay_and_black_stays_black(size, channels):
    image = np.random.default_rng(0).integers(0, 256, (*size, channels), np.uint8)
    before = image.copy()
    for i in range(20):
        out = jitter(image, np.array([0, i]), strength=1.5)
        assert out.shape == image.shape and out.dtype == np.uint8
        assert not jitter(np.zeros_like(image), np.array([0, i]), strength=1.5).any()
    assert np.array_equal(image, before)


def test_the_seed_alone_decides_and_both_of_its_numbers_do():
    image = picture(3)

    def draw(*seed):
        return jitter(image, np.array(seed, np.int64), strength=0.4).tobytes()

    first = [draw(3, i) for i in range(20)]
    np.random.default_rng().random(5)
    assert first == [draw(3, i) for i in range(20)]
    assert not set(first) & {draw(4, i) for i in range(20)} | set(first) & {draw(3, 2**40 + i) for i in range(20)}
    assert len(set(first)) == 20
