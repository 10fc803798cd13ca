"""From one encoded or raw image to the uint8 image the model is fed: decode, crop, resize, flip.

All randomness is stateless, seeded by (seed, position): the same position of the same run always gives the same
image, whatever was computed before it and on whichever host.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epy
from PIL import Image

from mae_jax import compiled

with epy.lazy_imports():
    import tensorflow as tf

MAX_PIXELS = 2**29 // 3  # of a file, 512 MiB of RGB, as in Pillow: a few bytes can claim more than there is memory
MAX_ASPECT = 16  # sides of a resized image over those of its target; else a line of pixels would fill the memory


def decode(data, channels: int):
    """Any image file to uint8[h,w,C]: JPEG, PNG, GIF, WebP, BMP and what else Pillow reads; of an animation, frame 0.

    The content decides, not the name. Transparency is dropped; C = 1 takes the luminance of ITU-R BT.601, as PIL does.
    What claims more than `MAX_PIXELS` is an error, before there is memory taken for it.
    """
    start = tf.strings.substr(data, 0, 3)
    is_jpeg, is_png = start == b"\xff\xd8\xff", start == b"\x89PN"

    def with_tensorflow():
        # how high and wide a PNG is, is at one place
        of_png = lambda: tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.int32, little_endian=False)  # noqa: E731
        pixels = _limited(tf.cond(is_jpeg, lambda: tf.image.extract_jpeg_shape(data)[:2], of_png))
        with tf.control_dependencies([pixels]):
            return tf.io.decode_image(data, channels=3, expand_animations=False)

    # TensorFlow is the faster, but refuses animated and transparent WebP, gets BMPs with a palette wrong, and makes
    # room for all frames of a GIF
    image = tf.cond(
        is_jpeg | is_png,
        with_tensorflow,
        lambda: tf.numpy_function(_decode_with_pillow, [data[None]], tf.uint8, stateful=False),
    )
    image = tf.ensure_shape(image, (None, None, 3))
    if channels == 1:
        parts = tf.unstack(tf.cast(image, tf.int32), axis=-1)
        luminance = (299 * parts[0] + 587 * parts[1] + 114 * parts[2] + 500) // 1000
        image = tf.cast(luminance, tf.uint8)[..., None]
    return image


def _limited(shape):
    """The `shape` i32[2] that a file claims; an error where that is more than `MAX_PIXELS`."""
    pixels = tf.reduce_prod(tf.cast(shape, tf.int64))
    with tf.control_dependencies([tf.debugging.Assert(pixels <= MAX_PIXELS, [pixels, "pixels are too many"])]):
        return tf.identity(shape)


def _decode_with_pillow(data: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(data[0]), formats=_formats()) as image:
        if image.width * image.height > MAX_PIXELS:  # if Pillow was told to take more
            raise ValueError(f"{image.width * image.height} pixels are too many")
        if image.mode.startswith("I;16"):  # Pillow would clip to 255 what is brighter
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32-bit pixels, of which nobody knows the range")
        return np.asarray(image.convert("RGB"))


@functools.cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads but for EPS: that is a program, which Ghostscript would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def resize(image, size: Sequence[int], mirrored=False):
    """Antialiased bicubic: uint8[h,w,C] to uint8[H,W,C], left to right or `mirrored`; pixels as Pillow's.

    As those of Pillow up to version 12, that is, and those that any version gives along one axis after the other;
    Pillow 13 begins with the columns of some images, and so rounds differently.
    """
    operations = _operations()
    if operations:
        out = operations.mae_resize(image=image, size=size, mirrored=mirrored)
    else:
        out = tf.numpy_function(_resize_with_pillow, [image, size, mirrored], tf.uint8, stateful=False)
    return tf.ensure_shape(out, (*([None, None] if tf.is_tensor(size) else size), image.shape[-1]))


@functools.cache
def _operations():
    """TensorFlow's functions from augment.cc; None where it cannot be compiled."""
    options = [*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags(), f"-DTENSORFLOW={tf.__version__}"]
    options.append(f"-DMAX_PIXELS={MAX_PIXELS}")
    options += [f"-I{tf.sysconfig.get_include()}/external/libjpeg_turbo", "-l:libtensorflow_cc.so.2"]
    return compiled.library(Path(__file__).with_name("augment.cc"), tf.load_op_library, *options)


def _resize_with_pillow(image: np.ndarray, size: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    (height, _, channels), (high, wide) = image.shape, size.tolist()
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    picture = picture.resize((wide, height), Image.BICUBIC).resize((wide, high), Image.BICUBIC)
    return np.asarray(picture).reshape(high, wide, channels)[:, :: -1 if mirrored else 1]


def _resize_short_side(image, size: Sequence[int], margin: float):
    """Resize so that the image just covers `margin` times `size`, keeping its shape.

    Of an image more than `MAX_ASPECT` times as long as that, only the middle is taken.
    """
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    scale = tf.maximum(margin * size[0] / height, margin * size[1] / width)
    height = tf.minimum(height, tf.math.ceil(MAX_ASPECT * margin * size[0] / scale))
    width = tf.minimum(width, tf.math.ceil(MAX_ASPECT * margin * size[1] / scale))
    kept = tf.stack([tf.cast(height, tf.int32), tf.cast(width, tf.int32)])
    top, left = tf.unstack((tf.shape(image)[:2] - kept) // 2)
    image = tf.image.crop_to_bounding_box(image, top, left, kept[0], kept[1])
    covered = tf.stack([tf.round(height * scale), tf.round(width * scale)])
    covered = tf.maximum(tf.cast(covered, tf.int32), tf.constant(size))
    return tf.cond(tf.reduce_all(covered == tf.shape(image)[:2]), lambda: image, lambda: resize(image, covered))


def whole(image, size, seed, scale, ratio):
    """No augmentation: the largest centred crop of the right shape, resized."""
    return _centred(_resize_short_side(image, size, margin=1.0), size)


def centre_crop(image, size, seed, scale, ratio):
    """The middle of the image resized to 8/7 of it (256 for 224): how ImageNet is evaluated."""
    return _centred(_resize_short_side(image, size, margin=8 / 7), size)


def _centred(image, size):
    top, left = tf.unstack((tf.shape(image)[:2] - tf.constant(size)) // 2)
    return tf.image.crop_to_bounding_box(image, top, left, *size)


def fixed_crop(image, size, seed, scale, ratio):
    """A random crop of fixed size from the image resized to 8/7 of it (256 for 224): "crop, fixed size" in table 1e."""
    image = _resize_short_side(image, size, margin=8 / 7)
    return tf.image.stateless_random_crop(image, (*size, image.shape[-1]), seed=seed)


def pad_crop(image, size, seed, scale, ratio):
    """A random window of the image with a black margin of an eighth of its sides: 4 of 32 pixels (He et al. 2016)."""
    image = whole(image, size, seed, scale, ratio)
    padded = tf.pad(image, [[size[0] // 8] * 2, [size[1] // 8] * 2, [0, 0]])
    return tf.image.stateless_random_crop(padded, (*size, image.shape[-1]), seed=seed)


def random_resized_crop(image, size, seed, scale, ratio):
    """A crop of random area and aspect ratio, resized: torchvision's RandomResizedCrop, with its ten attempts.

    `scale` is the range of the area as a share of the image's; `ratio` the range of width / height, log-uniform.
    """
    top, left, height, width = tf.unstack(random_crop_box(tf.shape(image)[:2], seed, scale, ratio))
    return resize(tf.image.crop_to_bounding_box(image, top, left, height, width), size)


def random_crop_box(shape, seed, scale: Sequence[float], ratio: Sequence[float]):
    """The crops i32[...,4] (top, left, height, width) of `random_resized_crop` in images of `shape` i32[...,2].

    The ten attempts are drawn at once and the first that fits is taken; if none fits, the largest centred crop
    within `ratio`, as in torchvision.
    """
    # in 64 bits, so that nothing hangs on how many numbers a processor takes the exponentials of at once
    draws = tf.split(tf.cast(uniform(seed, 40), tf.float64), 4, axis=-1)
    high, wide = tf.unstack(tf.cast(shape, tf.float64)[..., None, :], axis=-1)
    area = high * wide * (scale[0] + (scale[1] - scale[0]) * draws[0])
    aspect = tf.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws[1])
    widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = (widths >= 1) & (widths <= wide) & (heights >= 1) & (heights <= high)
    first = tf.argmax(fits, axis=-1)[..., None]
    fits, width, height, down, right = (
        tf.gather(x, first, axis=-1, batch_dims=len(seed.shape) - 1) for x in (fits, widths, heights, *draws[2:])
    )
    within = tf.clip_by_value(wide / high, ratio[0], ratio[1])
    width = tf.maximum(tf.where(fits, width, tf.minimum(wide, tf.round(high * within))), 1)
    height = tf.maximum(tf.where(fits, height, tf.minimum(high, tf.round(wide / within))), 1)
    top = tf.floor(tf.where(fits, down * (high - height + 1), (high - height) / 2))
    left = tf.floor(tf.where(fits, right * (wide - width + 1), (wide - width) / 2))
    return tf.cast(tf.concat([top, left, height, width], axis=-1), tf.int32)


def uniform(seed, count: int):
    """Numbers f32[...,count] from [0, 1): for each seed i64[...,2] those of `tf.random.stateless_uniform`."""
    seeds = tf.reshape(seed, (-1, 2))
    operations = _operations()
    if operations:
        numbers = operations.mae_uniform(seeds=seeds, count=count)
    else:
        draw = lambda one: tf.random.stateless_uniform((count,), one)  # noqa: E731
        numbers = tf.map_fn(draw, seeds, fn_output_signature=tf.float32)
    numbers = tf.reshape(numbers, tf.concat([tf.shape(seed)[:-1], [count]], axis=0))
    return tf.ensure_shape(numbers, (*seed.shape[:-1], count))


# An augmentation is `f(image uint8[h,w,C], size, seed i64[2], scale, ratio) -> uint8[H,W,C]`.
AUGMENTATIONS = {
    "none": whole,
    "centre_crop": centre_crop,
    "fixed_crop": fixed_crop,
    "pad_crop": pad_crop,
    "random_resized_crop": random_resized_crop,
}
DRAWING_NOTHING = ("none", "centre_crop")  # rows that give the same pixels every time


def augment_file(data, channels: int, seed, *, size, name: str, scale, ratio, flip: bool):
    """`augment` of `decode`, of an image file; where the augmentation crops a JPEG, only the crop is decoded."""
    settings = {"size": size, "name": name, "scale": scale, "ratio": ratio, "flip": flip}
    if name != "random_resized_crop" or channels != 3:
        return augment(decode(data, channels), seed, **settings)

    def crop_of_jpeg():
        box = random_crop_box(_limited(tf.image.extract_jpeg_shape(data)[:2]), seed, scale, ratio)
        return tf.image.decode_and_crop_jpeg(data, box, channels=3)

    def crop_of_image():
        image = decode(data, channels)
        box = random_crop_box(tf.shape(image)[:2], seed, scale, ratio)
        return tf.image.crop_to_bounding_box(image, *tf.unstack(box))

    # a JPEG without its end is cut short, which a crop from its beginning would not notice
    start, end = tf.strings.substr(data, 0, 3), tf.strings.substr(data, -2, 2)
    whole_jpeg = (tf.strings.length(data) > 4) & (start == b"\xff\xd8\xff") & (end == b"\xff\xd9")
    image = tf.ensure_shape(tf.cond(whole_jpeg, crop_of_jpeg, crop_of_image), (None, None, 3))
    return resize(image, size, mirrored=flip and is_mirrored(seed))


def crops_of_jpegs(data, seeds, *, size, scale, ratio, flip: bool):
    """Random resized crops of many files at once, of those that are JPEGs, if there is a C++ compiler.

    Args:
      data: string[n].
      seeds: i64[n,repeats,2]; each crop is the one that `augment_file` would make with this seed.

    Returns:
      uint8[n,repeats,H,W,3], and bool[n]: which files these are crops of; all others are black. None without compiler.
    """
    operations = _operations()
    if not operations:
        return None
    shapes = tf.ensure_shape(operations.mae_jpeg_shapes(files=data), (None, 2))
    boxes = random_crop_box(tf.maximum(shapes, 1)[:, None], seeds, scale, ratio)
    mirrored = is_mirrored(seeds) if flip else tf.zeros(tf.shape(seeds)[:-1], tf.bool)
    crops, done = operations.mae_jpeg_crops(files=data, shapes=shapes, boxes=boxes, mirrored=mirrored, size=size)
    return tf.ensure_shape(crops, (None, seeds.shape[1], *size, 3)), tf.ensure_shape(done, (None,))


def is_mirrored(seed):
    """Whether an image is to be flipped left to right, bool[...] for i64[...,2]: every other."""
    return uniform(seed + 1, 1)[..., 0] < 0.5


def augment(image, seed, *, size, name: str, scale: Sequence[float], ratio: Sequence[float], flip: bool):
    """The image as training sees it: uint8[h,w,C] to uint8[H,W,C], `size` = (H, W), `name` a row of `AUGMENTATIONS`."""
    image = AUGMENTATIONS[name](image, size, seed, scale, ratio)
    if flip:
        image = tf.cond(is_mirrored(seed), lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, (*size, image.shape[-1]))
