"""Decoding, cropping and resizing, against Pillow and against the definition of torchvision's RandomResizedCrop."""

import io
import itertools
import math
import os
import resource
import shutil
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from mae_jax import compiled
from mae_jax.data import augment as module
from mae_jax.data.augment import (
    AUGMENTATIONS,
    DRAWING_NOTHING,
    augment,
    augment_file,
    crops_of_jpegs,
    decode,
    random_crop_box,
    resize,
    uniform,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
OPTIONS = {"scale": SCALE, "ratio": RATIO}


def picture(height, width, channels=3, seed=0, noise=4):
    """A smooth picture with some noise, and no value so extreme that it is clipped: uint8[height,width,channels]."""
    rng = np.random.default_rng(seed)
    bands = [
        np.asarray(
            Image.fromarray(rng.integers(60, 196, (5, 6), dtype=np.uint8)).resize((width, height), Image.BICUBIC), float
        )
        for _ in range(channels)
    ]
    return np.clip(np.stack(bands, -1) + rng.normal(0, noise, (height, width, channels)), 30, 225).astype(np.uint8)


def pil_resize(image, size):
    """Along rows, then along columns: what comes first decides about rounding, and versions of Pillow differ in it."""
    bands = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
    for between in [(size[1], len(image)), (size[1], size[0])]:
        bands = [band.resize(between, Image.BICUBIC) for band in bands]
    return np.stack([np.asarray(band) for band in bands], -1)


@pytest.fixture(params=["C++", "Pillow"])
def resizer(request, monkeypatch):
    """What `resize` and `uniform` are done by."""
    if request.param == "Pillow":
        monkeypatch.setattr(compiled, "library", lambda *_: None)
        monkeypatch.setattr(module, "_operations", module._operations.__wrapped__)
    elif module._operations() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.skipif(not shutil.which((os.environ.get("CXX") or "c++").split()[0]), reason="no C++ compiler")
def test_the_operations_are_there_wherever_there_is_a_compiler():
    """Whatever the processor: all tests of them are skipped, and reading is slower, where they are not."""
    assert module._operations() is not None


def boxes(shape, count, scale=SCALE, ratio=RATIO, seed=3):
    """Crop boxes i32[count,4]: top, left, height, width."""
    seeds = tf.stack([tf.fill([count], tf.constant(seed, tf.int64)), tf.range(count, dtype=tf.int64)], 1)

    @tf.function
    def draw():
        return tf.map_fn(
            lambda s: random_crop_box(tf.constant(shape), s, scale, ratio),
            seeds,
            fn_output_signature=tf.int32,
        )

    return draw().numpy()


def torchvision_boxes(shape, count, scale=SCALE, ratio=RATIO):
    """The same by the definition of RandomResizedCrop.get_params: ten attempts, then the centre."""
    rng = np.random.default_rng(0)
    (high, wide), result = shape, []
    for _ in range(count):
        for _ in range(10):
            area = high * wide * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= wide and 0 < h <= high:
                result.append((rng.integers(0, high - h + 1), rng.integers(0, wide - w + 1), h, w))
                break
        else:
            if wide / high < ratio[0]:
                w, h = wide, round(wide / ratio[0])
            elif wide / high > ratio[1]:
                w, h = round(high * ratio[1]), high
            else:
                w, h = wide, high
            result.append(((high - h) // 2, (wide - w) // 2, h, w))
    return np.array(result)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((97, 130), (32, 32)),
        ((500, 375), (224, 224)),
        ((28, 28), (64, 48)),
        ((60, 200), (61, 20)),
        ((9, 9), (224, 224)),
    ],
)
@pytest.mark.usefixtures("resizer")
def test_resize_is_that_of_pillow(before, after, channels):
    image = picture(*before, channels)
    assert np.array_equal(resize(image, after), pil_resize(image, after))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("most", [20, 100, 400])
@pytest.mark.usefixtures("resizer")
def test_resize_is_that_of_pillow_for_any_size(channels, most):
    rng = np.random.default_rng(most)
    for mirrored in (False, True) * 12:
        high, wide, *size = rng.integers(1, most + 1, 4).tolist()
        image = 255 * rng.integers(0, 2, (high, wide, channels), np.uint8)  # which overshoots most
        ours = resize(image, size, mirrored).numpy()
        assert np.array_equal(ours[:, ::-1] if mirrored else ours, pil_resize(image, size))


@pytest.mark.usefixtures("resizer")
def test_resize_far_down_is_that_of_pillow():
    """Where thousands of pixels make up one."""
    image = np.random.default_rng(0).integers(200, 256, (8000, 1000, 3), np.uint8)
    assert np.array_equal(resize(image, (3, 1000)), pil_resize(image, (3, 1000)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (64, 64)])
@pytest.mark.usefixtures("resizer")
def test_resize_to_the_same_size_changes_nothing(size, channels):
    image = np.random.default_rng(0).integers(0, 256, (*size, channels), np.uint8)
    assert np.array_equal(resize(image, size), image)
    assert np.array_equal(resize(image, size, mirrored=True), image[:, ::-1])


@pytest.mark.usefixtures("resizer")
def test_resize_in_a_graph_to_a_size_known_only_there():
    image = picture(40, 50)
    graph = tf.function(resize, input_signature=[tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec(2, tf.int32)])
    assert np.array_equal(graph(image, (20, 70)), pil_resize(image, (20, 70)))


def test_resize_stays_within_8_bits():
    """Bicubic overshoots at edges; it must not wrap around."""
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = 255
    out = resize(image, (50, 50)).numpy()
    assert (out[:, :20] < 30).all() and (out[:, 30:] > 225).all()


@pytest.mark.parametrize(("name", "margin"), {"none": 1, "centre_crop": 8 / 7}.items())
@pytest.mark.parametrize(
    ("shape", "size"), [((97, 130), (32, 32)), ((130, 97), (32, 32)), ((60, 60), (16, 24)), ((20, 33), (48, 40))]
)
def test_in_evaluation_the_short_side_is_resized_and_the_centre_cut(shape, size, name, margin):
    image = picture(*shape)
    grow = margin * max(size[0] / shape[0], size[1] / shape[1])
    covered = pil_resize(image, (round(shape[0] * grow), round(shape[1] * grow)))
    top, left = (covered.shape[0] - size[0]) // 2, (covered.shape[1] - size[1]) // 2
    ours = AUGMENTATIONS[name](image, size, None, SCALE, RATIO).numpy()
    assert np.array_equal(ours, covered[top : top + size[0], left : left + size[1]])


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = picture(24, 32)
    assert np.array_equal(AUGMENTATIONS["none"](image, (24, 32), None, SCALE, RATIO), image)


def test_an_image_of_imagenet_is_resized_to_256_and_its_centre_cut():
    """As torchvision's Resize(256) and CenterCrop(224) do: from one of 256 pixels, 16 are cut off at each side."""
    image = picture(256, 256)
    ours = AUGMENTATIONS["centre_crop"](image, (224, 224), None, SCALE, RATIO)
    assert np.array_equal(ours, image[16:-16, 16:-16])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (40, 30), (16, 24)])
def test_any_image_comes_out_uint8_of_the_size_asked_for(name, flip, channels, shape):
    image = picture(*shape, channels)
    out = augment(image, tf.constant([1, 2], tf.int64), size=(16, 24), name=name, flip=flip, **OPTIONS)
    assert out.dtype == tf.uint8 and out.shape == (16, 24, channels)
    if shape == (1, 1) and name != "pad_crop":  # whose margin is black
        assert (out.numpy() == image[0, 0]).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_alone_decides(name):
    image = picture(60, 80)

    def draw(*seed):
        return augment(image, tf.constant(seed, tf.int64), size=(16, 16), name=name, flip=True, **OPTIONS).numpy()

    first = draw(0, 7)
    tf.random.set_seed(123)
    assert np.array_equal(first, draw(0, 7))
    others = [draw(*seed) for seed in [(0, 8), (0, 9), (1, 7), (2, 7), (5, 5), (9, 3)]]
    different = sum(not np.array_equal(first, other) for other in others)
    assert different >= (1 if name in DRAWING_NOTHING else 5)
    flips = sum(not np.array_equal(first, other) and np.array_equal(first, other[:, ::-1]) for other in others)
    assert name not in DRAWING_NOTHING or flips == different, "it is flipped or not, and that is all"


def drawn(image, count, **options):
    """The image augmented at positions 0, 1, ... of seed 0: uint8[count,H,W,C]."""
    seeds = tf.stack([tf.zeros(count, tf.int64), tf.range(count, dtype=tf.int64)], 1)

    @tf.function
    def draw():
        one = lambda seed: augment(tf.constant(image), seed, **OPTIONS | options)  # noqa: E731
        return tf.map_fn(one, seeds, fn_output_signature=tf.uint8)

    return draw().numpy()


@pytest.mark.parametrize("count", [1, 3, 4, 41])
@pytest.mark.usefixtures("resizer")
def test_random_numbers_are_those_of_tensorflow_for_each_seed(count):
    seeds = np.array([[[0, 0], [0, 1]], [[7, 2**40 + 3], [-1, 5]], [[2**32 - 1, -(2**62)], [3, 3]]], np.int64)
    want = [[tf.random.stateless_uniform((count,), seed) for seed in row] for row in seeds]
    assert np.array_equal(uniform(tf.constant(seeds), count), want)


def test_half_of_the_images_are_flipped():
    image = picture(8, 8)
    out = drawn(image, 1000, size=(8, 8), name="none", flip=True)
    as_it_is, mirrored = ((out == x).all(axis=(1, 2, 3)) for x in (image, image[:, ::-1]))
    assert (as_it_is ^ mirrored).all()
    assert abs(mirrored.sum() - 500) < 64  # four standard deviations


def test_flips_do_not_depend_on_crops():
    """A gradient from left to right tells where the crop was taken and whether it was flipped."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (64, 256, 1))
    crop = {"size": (2, 16), "name": "random_resized_crop", "scale": (0.05, 0.1), "ratio": (1, 1)}
    rows = drawn(ramp, 1000, **crop, flip=True)[:, 0, :, 0].astype(int)
    flipped, place = rows[:, 0] > rows[:, -1], rows.mean(1)
    assert stats.ks_2samp(place[flipped], place[~flipped]).pvalue > 0.001
    assert stats.ks_2samp(place[1:][flipped[:-1]], place[1:][~flipped[:-1]]).pvalue > 0.001  # nor on the next image's
    assert place.std() > 30


@pytest.mark.parametrize("shape", [(100, 100), (375, 500), (50, 200), (300, 40), (7, 5), (2, 2)])
def test_crops_are_inside_and_of_the_area_and_aspect_asked_for(shape):
    top, left, height, width = boxes(shape, 2000).T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= shape[0]).all() and (left + width <= shape[1]).all()
    # the sides are rounded, each by at most half a pixel
    fallback = (top == (shape[0] - height) // 2) & (left == (shape[1] - width) // 2)
    drawn = ~fallback
    assert ((height + 0.51) * (width + 0.51) >= SCALE[0] * shape[0] * shape[1])[drawn].all()
    assert ((width + 0.51) / (height - 0.51) >= RATIO[0]).all()
    assert ((width - 0.51) / (height + 0.51) <= RATIO[1]).all()


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((375, 500), SCALE, RATIO),
        ((224, 224), SCALE, RATIO),
        ((224, 224), (0.08, 1.0), RATIO),
        ((100, 400), SCALE, RATIO),  # many attempts do not fit
        ((64, 64), (0.2, 0.4), (1.0, 1.0)),
        ((20, 30), (0.5, 0.5), (0.5, 2.0)),
    ],
)
def test_crops_are_distributed_as_in_torchvision(shape, scale, ratio):
    ours, theirs = boxes(shape, 4000, scale, ratio), torchvision_boxes(shape, 4000, scale, ratio)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    assert stats.ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 0.001
    for a, b in itertools.combinations(range(4), 2):  # and together
        assert stats.ks_2samp(ours[:, a] * ours[:, b], theirs[:, a] * theirs[:, b]).pvalue > 0.001


def test_the_area_of_crops_is_uniform_where_all_fit():
    area = np.prod(boxes((1000, 1000), 4000, scale=(0.1, 0.5), ratio=(0.8, 1.25))[:, 2:], axis=1) / 1e6
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 0.001


@pytest.mark.parametrize(
    ("shape", "box"),
    {
        (1, 200): (0, 99, 1, 1),
        (200, 1): (99, 0, 1, 1),
        (3, 300): (0, 148, 3, 4),
        (300, 3): (148, 0, 4, 3),
        (1, 1): (0, 0, 1, 1),
    }.items(),
)
def test_where_no_attempt_fits_the_centre_is_taken(shape, box):
    assert {tuple(b) for b in boxes(shape, 50).tolist()} == {box}


def test_an_image_within_the_ratio_that_nothing_fits_is_taken_whole():
    assert {tuple(b) for b in boxes((100, 120), 20, scale=(1.0, 1.0), ratio=(1.3, 1.3)).tolist()} == {(4, 0, 92, 120)}
    assert {tuple(b) for b in boxes((100, 120), 20, scale=(4.0, 4.0)).tolist()} == {(0, 0, 100, 120)}


def test_random_resized_crop_is_the_box_resized():
    image = picture(60, 90)
    for position in range(5):
        seed = tf.constant([0, position], tf.int64)
        top, left, height, width = (int(x) for x in random_crop_box((60, 90), seed, SCALE, RATIO))
        ours = augment(image, seed, size=(24, 16), name="random_resized_crop", flip=False, **OPTIONS).numpy()
        assert np.array_equal(ours, pil_resize(image[top : top + height, left : left + width], (24, 16)))


def jpeg(height, width, **options):
    return encoded(picture(height, width, seed=height), "JPEG", quality=90, **options)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.skipif(module._operations() is None, reason="no C++ compiler")
def test_crops_of_many_jpegs_are_those_of_each(repeats, flip):
    files = [jpeg(60, 90), jpeg(64, 48, progressive=True), jpeg(9, 300), jpeg(1, 1), FILES["grey jpeg"][0]]
    files += [FILES["cmyk jpeg"][0], jpeg(33, 70, subsampling=0)]
    others = [FILES["png"][0], b"", b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9", jpeg(60, 90)[:-300]]
    numbers = np.arange((len(files) + len(others)) * repeats).reshape(-1, repeats)
    seeds = tf.constant(np.stack([np.full_like(numbers, 5), numbers], -1))
    crops, done = crops_of_jpegs(tf.constant(files + others), seeds, size=(32, 24), flip=flip, **OPTIONS)
    assert done.numpy().tolist() == [True] * len(files) + [False] * len(others)
    assert not crops[len(files) :].numpy().any()
    settings = {"size": (32, 24), "name": "random_resized_crop", "flip": flip, **OPTIONS}
    for data, some, made in zip(files, seeds, crops.numpy(), strict=False):
        for seed, crop in zip(some, made, strict=True):
            if repeats == 1:
                want = augment_file(tf.constant(data), 3, seed, **settings)
            else:
                want = augment(decode(tf.constant(data), 3), seed, **settings)
            assert np.array_equal(crop, want)


def test_fixed_crop_is_any_window_of_the_image_resized_to_eight_sevenths():
    image = picture(32, 48)
    covered = resize(image, (16, 24)).numpy()
    places = set()
    for out in drawn(image, 150, size=(14, 14), name="fixed_crop", flip=False):
        windows = [(t, x) for t in range(3) for x in range(11) if np.array_equal(out, covered[t : t + 14, x : x + 14])]
        assert len(windows) == 1
        places.update(windows)
    assert {t for t, _ in places} == {0, 1, 2} and {x for _, x in places} == set(range(11))


def test_pad_crop_is_any_window_of_the_image_with_a_black_margin():
    image = picture(32, 48)
    padded = np.pad(image[:, 8:40], [(4, 4), (4, 4), (0, 0)])
    places = set()
    for out in drawn(image, 1000, size=(32, 32), name="pad_crop", flip=False):
        rows, columns = np.flatnonzero(out.any((1, 2))), np.flatnonzero(out.any((0, 2)))
        y, x = 4 - rows[0] + (31 - rows[-1]), 4 - columns[0] + (31 - columns[-1])
        assert np.array_equal(out, padded[y : y + 32, x : x + 32])
        places.add((int(y), int(x)))
    assert len(places) == 81


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("margin", [1.0, 8 / 7])
def test_a_line_of_pixels_does_not_fill_the_memory(shape, margin):
    image = np.zeros((*shape, 3), np.uint8)
    covered = module._resize_short_side(image, (224, 224), margin)
    assert min(covered.shape[:2]) == round(224 * margin) and max(covered.shape[:2]) <= 8192


# What people have in folders: name -> (bytes, what it shows, how far lossy compression may be off)
RGB = picture(23, 37, noise=0)
GREY = RGB[..., :1]


def encoded(image, fmt, mode=None, **options):
    file = io.BytesIO()
    image = (
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        if isinstance(image, np.ndarray)
        else image
    )
    (image.convert(mode) if mode else image).save(file, fmt, **options)
    return file.getvalue()


def transparent(image):
    alpha = np.tile(np.array([0, 128, 255], np.uint8), 1000)[: 23 * 37].reshape(23, 37, 1)
    return np.concatenate([image, alpha], -1)


PALETTE = Image.fromarray(RGB).quantize(200)
QUANTIZED = np.asarray(PALETTE.convert("RGB"))
FILES = {
    "jpeg": (encoded(RGB, "JPEG", quality=95), RGB, 30),
    "progressive jpeg": (encoded(RGB, "JPEG", quality=95, progressive=True), RGB, 30),
    "grey jpeg": (encoded(GREY, "JPEG", quality=95), GREY, 10),
    "cmyk jpeg": (encoded(RGB, "JPEG", "CMYK", quality=95), RGB, 30),
    "png": (encoded(RGB, "PNG"), RGB, 0),
    "grey png": (encoded(GREY, "PNG"), GREY, 0),
    "rgba png": (encoded(transparent(RGB), "PNG"), RGB, 0),
    "grey and alpha png": (encoded(Image.fromarray(GREY[..., 0]).convert("LA"), "PNG"), GREY, 0),
    "palette png": (encoded(PALETTE, "PNG"), QUANTIZED, 0),
    "1-bit png": (encoded(Image.fromarray(GREY[..., 0] > 127), "PNG"), (GREY > 127) * 255, 0),
    "16-bit png": (encoded(GREY.astype(np.uint16) * 256 + 77, "PNG"), GREY, 0),
    "tiff": (encoded(RGB, "TIFF"), RGB, 0),
    "16-bit tiff": (encoded(GREY.astype(np.uint16) * 256 + 77, "TIFF"), GREY, 0),
    "cmyk tiff": (encoded(RGB, "TIFF", "CMYK"), RGB, 0),
    "gif": (encoded(PALETTE, "GIF"), QUANTIZED, 0),
    "animated gif": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)] * 3),
        QUANTIZED,
        0,
    ),
    "bmp": (encoded(RGB, "BMP"), RGB, 0),
    "grey bmp": (encoded(GREY, "BMP"), GREY, 0),
    "webp": (encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "lossy webp": (encoded(RGB, "WEBP", quality=95), RGB, 30),
    "animated webp": (
        encoded(Image.fromarray(RGB), "WEBP", save_all=True, append_images=[PALETTE.rotate(180)] * 3, lossless=True),
        RGB,
        0,
    ),
    "palette bmp": (encoded(PALETTE, "BMP"), QUANTIZED, 0),
    "rgba webp": (encoded(transparent(RGB), "WEBP", lossless=True, exact=True), RGB, 0),
    "one pixel": (encoded(RGB[:1, :1], "PNG"), RGB[:1, :1], 0),
    "one pixel jpeg": (encoded(Image.fromarray(RGB[:1, :1]), "JPEG", quality=95), RGB[:1, :1], 8),
    "row of pixels": (encoded(Image.fromarray(RGB[:1]), "PNG"), RGB[:1], 0),
}


@pytest.mark.parametrize("name", FILES)
def test_any_file_decodes_to_three_channels(name):
    data, shown, tolerance = FILES[name]
    image = decode(tf.constant(data), 3)
    assert image.dtype == tf.uint8 and image.shape == (*shown.shape[:2], 3)
    off = np.abs(image.numpy().astype(int) - shown)
    assert off.max() <= tolerance and off.mean() <= tolerance / 5


@pytest.mark.parametrize("name", FILES)
def test_any_file_decodes_to_the_luminance_of_pillow(name):
    data, shown, tolerance = FILES[name]
    image = decode(tf.constant(data), 1)
    want = shown if shown.shape[-1] == 1 else np.asarray(Image.fromarray(shown).convert("L"))[..., None]
    assert image.dtype == tf.uint8 and image.shape == want.shape
    assert np.abs(image.numpy().astype(int) - want).max() <= (max(tolerance, 1) if shown.shape[-1] == 3 else tolerance)


def test_eight_bit_grey_is_exact():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode(tf.constant(encoded(grey, "PNG")), 1)[..., 0], grey)


FLOATS = encoded(Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)), "TIFF")  # of what range?


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n", b"not a picture" * 50, FLOATS, *(FILES[n][0][:-60] for n in ("jpeg", "png"))]
)
def test_what_is_no_picture_is_an_error(data):
    with pytest.raises((tf.errors.OpError, OSError, ValueError)):
        decode(tf.constant(data), 3)


CROPPED = {"size": (24, 24), "name": "random_resized_crop", "scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": True}


def jpeg_of(mode, **options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).resize((301, 203), Image.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


JPEGS = {
    "fine colour": (jpeg_of("RGB", subsampling=0), 0),
    "coarse colour": (jpeg_of("RGB", subsampling=2), 12),  # which is blended across the edge of the crop
    "grey": (jpeg_of("L"), 0),
    "cmyk": (jpeg_of("CMYK"), 0),
    "junk after its end": (jpeg_of("RGB", subsampling=0) + b"junk", 0),
}


@pytest.mark.parametrize(("file", "tolerance"), JPEGS.values(), ids=JPEGS)
def test_a_crop_decoded_alone_is_the_crop_of_the_whole(file, tolerance):
    for i in range(8):
        seed = tf.constant([3, i], tf.int64)
        crop = module.augment_file(tf.constant(file), 3, seed, **CROPPED).numpy().astype(int)
        whole = augment(decode(tf.constant(file), 3), seed, **CROPPED).numpy().astype(int)
        assert np.abs(crop - whole).max() <= tolerance


def test_a_jpeg_cut_short_is_noticed_wherever_the_crop_lies():
    file = jpeg_of("RGB")
    for i in range(8):
        with pytest.raises(tf.errors.InvalidArgumentError):
            module.augment_file(tf.constant(file[: len(file) * 9 // 10]), 3, tf.constant([3, i], tf.int64), **CROPPED)


def png_of(width, height, rows=b""):
    """A PNG that says it is so large, with `rows` of it, compressed."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def patched(data, after, skip, numbers):
    """`data` with `numbers` in the place that comes `skip` bytes after the bytes `after`."""
    at = data.index(after) + skip
    return data[:at] + numbers + data[at + len(numbers) :]


PROGRESSIVE = encoded(RGB, "JPEG", progressive=True)
BOMBS = {
    "png": png_of(50_000, 50_000, zlib.compress(bytes(1000))),
    "png as Pillow would not take it": png_of(20_000, 20_000, zlib.compress(bytes(1000))),
    "jpeg": patched(FILES["jpeg"][0], b"\xff\xc0", 5, struct.pack(">HH", 50_000, 50_000)),
    "jpeg as Pillow would not take it": patched(FILES["jpeg"][0], b"\xff\xc0", 5, struct.pack(">HH", 20_000, 20_000)),
    "progressive jpeg": patched(PROGRESSIVE, b"\xff\xc2", 5, struct.pack(">HH", 20_000, 20_000)),
    "gif": patched(FILES["gif"][0], b"GIF8", 6, struct.pack("<HH", 50_000, 50_000)),
    "webp": patched(FILES["webp"][0], b"VP8L", 9, struct.pack("<I", 16_382 | 16_382 << 14)),
    "bmp": patched(FILES["bmp"][0], b"BM", 18, struct.pack("<ii", 50_000, 50_000)),
}


def assert_refused(data):
    """The file is an error however it is read, and takes no memory to speak of."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((tf.errors.OpError, OSError, ValueError, Image.DecompressionBombError)):
        decode(tf.constant(data), 3)
    with pytest.raises((tf.errors.OpError, OSError, ValueError, Image.DecompressionBombError)):
        module.augment_file(tf.constant(data), 3, tf.constant([3, 1], tf.int64), **CROPPED)
    settings = {key: value for key, value in CROPPED.items() if key != "name"}
    found = crops_of_jpegs(tf.constant([data]), tf.constant([[[3, 1]]], tf.int64), **settings)
    assert found is None or not found[1].numpy().any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024  # KiB


@pytest.mark.parametrize("name", BOMBS)
def test_what_claims_more_than_the_memory_can_hold_is_an_error(name):
    assert_refused(BOMBS[name])


@pytest.mark.slow
def test_a_picture_of_nothing_that_would_fill_the_memory_is_an_error():
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * 20_000)) for _ in range(20_000)) + packer.flush()
    assert len(rows) < 2**23
    assert_refused(png_of(20_000, 20_000, rows))


def test_a_program_is_no_picture():
    """Pillow would have Ghostscript run it."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"
    with pytest.raises((tf.errors.OpError, OSError, ValueError), match="cannot identify"):
        decode(tf.constant(program), 3)
