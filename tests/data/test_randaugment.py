"""RandAugment: each operation is the call of Pillow that timm makes, and the seed alone decides which."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps, ImageStat

from mae_jax.data import randaugment as module
from mae_jax.data.randaugment import OPERATIONS, rand_augment

LEVELS = (0.0, 0.13, 0.5, 0.87, 1.0)
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def picture(mode, size=(33, 24)):
    """Smooth, with some noise, and neither black nor white."""
    rng = np.random.default_rng(0)
    bands = [Image.fromarray(rng.integers(40, 200, (5, 6), np.uint8)).resize(size, Image.BICUBIC) for _ in mode]
    noise = rng.integers(0, 20, (size[1], size[0], len(mode)), np.uint8)
    return Image.fromarray((np.stack(bands, -1) + noise).squeeze()) if mode == "L" else Image.merge(mode, bands)


def table(image, function):
    """Each grey level of each channel by itself."""
    return Image.fromarray(np.array([function(i) for i in range(256)], np.uint8)[np.asarray(image)])


def affine(image, fill, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def blended(image, degenerate, factor):
    return Image.blend(degenerate.convert(image.mode), image, factor)


def grey(image):
    mean = int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
    return Image.new("L", image.size, mean)


# What timm does, for a magnitude of 0 to 10 (`v` = magnitude / 10 and `s` = v or -v): fixed points of the ranges
# in its comments: 30 degrees, shear 0.3, 45 % of a side, factors 0.1 to 1.9, 4 bits to none, 256 to 0, 0 to 110.
EXPECTED = {
    "auto_contrast": lambda x, v, s, fill: ImageOps.autocontrast(x),
    "equalize": lambda x, v, s, fill: ImageOps.equalize(x),
    "invert": lambda x, v, s, fill: table(x, lambda i: 255 - i),
    "rotate": lambda x, v, s, fill: x.rotate(30 * s, resample=Image.Resampling.BICUBIC, fillcolor=fill),
    "posterize": lambda x, v, s, fill: (
        ImageOps.posterize(x, 4 - int(v * 4)) if v < 1 else Image.new(x.mode, x.size)  # no bits at all: black
    ),
    "solarize": lambda x, v, s, fill: table(x, lambda i: i if i < 256 - int(v * 256) else 255 - i),
    "solarize_add": lambda x, v, s, fill: table(x, lambda i: min(255, i + int(v * 110)) if i < 128 else i),
    "color": lambda x, v, s, fill: blended(x, x.convert("L"), 1 + 0.9 * s),
    "contrast": lambda x, v, s, fill: blended(x, grey(x), 1 + 0.9 * s),
    "brightness": lambda x, v, s, fill: blended(x, Image.new(x.mode, x.size), 1 + 0.9 * s),
    "sharpness": lambda x, v, s, fill: blended(x, x.filter(ImageFilter.SMOOTH), 1 + 0.9 * s),
    "shear_x": lambda x, v, s, fill: affine(x, fill, 1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda x, v, s, fill: affine(x, fill, 1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda x, v, s, fill: affine(x, fill, 1, 0, 0.45 * s * x.width, 0, 1, 0),
    "translate_y": lambda x, v, s, fill: affine(x, fill, 1, 0, 0, 0, 1, 0.45 * s * x.height),
}


def test_there_are_the_operations_of_timms_increasing_set():
    assert list(OPERATIONS) == list(EXPECTED) and len(OPERATIONS) == 15


@every_operation
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_operation_is_the_call_that_timm_makes(name, mode):
    image, fill = picture(mode), (128, 100, 90)[: len(mode)]
    for level, sign in itertools.product(LEVELS, (1, -1)):
        ours = OPERATIONS[name](image, level, sign, fill)
        theirs = EXPECTED[name](image, level, sign * level, fill)
        assert ours.mode == theirs.mode == mode
        assert np.array_equal(ours, theirs)


@every_operation
def test_an_operation_grows_with_its_level(name):
    image = picture("RGB")

    def change(level):
        out = OPERATIONS[name](image, level, 1, (128,) * 3)
        return np.abs(np.asarray(out, float) - np.asarray(image, float)).mean()

    if name in ("auto_contrast", "equalize", "invert"):
        assert change(0) == change(1) > 0
    else:
        assert change(1) > change(0.3) >= change(0)
        assert name == "posterize" or change(0) == 0  # it begins with four bits


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_comes_in_from_outside_is_filled(name, mode):
    white = Image.new(mode, (40, 40), "white")
    out = np.asarray(OPERATIONS[name](white, 1.0, 1, (77,) * len(mode))).reshape(40, 40, -1)
    corners = out[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 77).all(axis=1).any()
    assert (out[20, 20] == 255).all()


def test_colour_of_a_grey_image_is_left_alone():
    image = picture("L")
    assert np.array_equal(OPERATIONS["color"](image, 1.0, -1, (128,)), image)


SETTINGS = {"layers": 2, "magnitude": 9.0}


def drawn(image, count, **settings):
    return [rand_augment(image, np.array([0, i]), **SETTINGS | settings) for i in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (8, 8), (24, 33)])
@pytest.mark.parametrize("magnitude", [0.5, 9.0, 10.0])
def test_shape_and_type_stay(size, channels, magnitude):
    image = np.random.default_rng(0).integers(0, 256, (*size, channels), np.uint8)
    for out in drawn(image, 100, layers=4, magnitude=magnitude):
        assert out.shape == image.shape and out.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_seed_alone_decides_and_both_of_its_numbers_do(mode):
    image = np.asarray(picture(mode)).reshape(24, 33, len(mode))
    before = image.copy()

    def draw(*seed):
        return rand_augment(image, np.array(seed, np.int64), **SETTINGS).tobytes()

    first = [draw(3, i) for i in range(30)]
    np.random.default_rng().random(5)
    assert first == [draw(3, i) for i in range(30)]
    assert np.array_equal(image, before)
    for other in (
        [draw(4, i) for i in range(30)],
        [draw(3, 2**40 + i) for i in range(30)],
        [draw(i, 3) for i in range(30)],
    ):
        assert sum(a != b for a, b in zip(first, other, strict=True)) > 15


@pytest.mark.parametrize("fill", [(117,), (124, 116, 104)], ids=["L", "RGB"])
def test_what_comes_in_from_outside_has_the_mean_of_imagenet(fill, monkeypatch):
    monkeypatch.setattr(module, "OPERATIONS", {"translate_x": OPERATIONS["translate_x"]})
    monkeypatch.setattr(module, "PROBABILITY", 1.0)
    black = np.zeros((24, 40, len(fill)), np.uint8)
    out = rand_augment(black, np.array([0, 1]), layers=1, magnitude=10.0)
    assert fill in {tuple(x) for x in out.reshape(-1, len(fill)).tolist()}


def test_operations_are_drawn_alike_half_carried_out_and_of_magnitudes_spread_about_the_mean(monkeypatch):
    calls = []

    def noted(name):
        return lambda image, level, sign, fill: (calls.append((name, level, sign)), image)[1]

    monkeypatch.setattr(module, "OPERATIONS", {name: noted(name) for name in OPERATIONS})
    image, count = np.zeros((2, 2, 3), np.uint8), 8000
    for magnitude in (5.0, 9.0):
        calls.clear()
        sizes = []
        for i in range(count):
            before = len(calls)
            rand_augment(image, np.array([1, i]), layers=2, magnitude=magnitude)
            sizes.append(len(calls) - before)
        assert np.abs(np.bincount(sizes) / count - (0.25, 0.5, 0.25)).max() < 4 * 0.5 / count**0.5
        frequency = np.array(list(collections.Counter(name for name, _, _ in calls).values())) / len(calls)
        assert len(frequency) == 15 and np.abs(frequency - 1 / 15).max() < 4 * (1 / 15 / len(calls)) ** 0.5
        levels, signs = np.array([level for _, level, _ in calls]), np.array([sign for _, _, sign in calls])
        assert levels.min() >= 0 and levels.max() <= 1
        assert abs(signs.mean()) < 4 / len(calls) ** 0.5
        assert abs(np.median(levels) - magnitude / 10) < 0.003
        if magnitude == 5:
            assert abs(levels.std() - 0.05) < 0.002
        else:
            assert abs((levels == 1).mean() - 0.0228) < 4 * (0.0228 / len(calls)) ** 0.5  # two deviations and more


def test_no_layers_change_nothing():
    image = np.asarray(picture("RGB"))
    assert all(np.array_equal(out, image) for out in drawn(image, 5, layers=0))
