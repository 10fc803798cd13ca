"""RandAugment: a few operations on an image, drawn from a table (Cubuk et al. 2020, arXiv 1909.13719).

The operations, their ranges and their order are those of timm's "rand-m9-mstd0.5-inc1", with which the original code
fine-tunes: all grow stronger with the magnitude.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

DEVIATION = 0.5  # of the magnitude, from one operation to the next
PROBABILITY = 0.5  # with which an operation that was drawn is carried out
FILL = {1: (117,), 3: (124, 116, 104)}  # what comes in from outside, by channels: the mean of ImageNet


def _posterize(image, level, sign, fill):
    step = 2 ** (4 + int(4 * level))  # 256, all black, at level 1: which timm asks for, and Pillow 13 refuses
    return image.point([i // step * step for i in range(256)] * len(image.getbands()))


def _solarize(image, level, sign, fill):
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image, level, sign, fill):
    brighter = [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)]
    return image.point(brighter * len(image.getbands()))


def _enhance(kind):
    return lambda image, level, sign, fill: kind(image).enhance(1 + sign * 0.9 * level)


def _affine(matrix):
    """What samples the pixel (x, y) at (ax + by + c, dx + ey + f), if `matrix` gives a to f for a level and a size."""
    return lambda image, level, sign, fill: image.transform(
        image.size, Image.AFFINE, matrix(sign * level, *image.size), Image.BICUBIC, fillcolor=fill
    )


# An operation is `f(image, level, sign, fill) -> image`, of Pillow's images of mode "L" or "RGB": `level`, from 0 to
# 1, says how strong, `sign`, 1 or -1, which way, and `fill`, a colour, what comes in from outside.
OPERATIONS = {
    "auto_contrast": lambda image, level, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, level, sign, fill: ImageOps.invert(image),
    "rotate": lambda image, level, sign, fill: image.rotate(sign * 30 * level, Image.BICUBIC, fillcolor=fill),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),  # of a grey image: nothing
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda s, width, height: (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": _affine(lambda s, width, height: (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": _affine(lambda s, width, height: (1, 0, 0.45 * s * width, 0, 1, 0)),
    "translate_y": _affine(lambda s, width, height: (1, 0, 0, 0, 1, 0.45 * s * height)),
}


def rand_augment(image: np.ndarray, seed: np.ndarray, *, layers: int, magnitude: float) -> np.ndarray:
    """The image after `layers` operations, drawn with replacement, of which each is left out as often as not.

    Args:
      image: uint8[H,W,C], C = 1 or 3.
      seed: i64[2], which alone decides.
      layers: how many operations.
      magnitude: how strong they are, from 0 to 10: the mean of a normal distribution, cut off at both ends.

    Returns:
      uint8[H,W,C].
    """
    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    # RandomState, as its methods are promised never to change
    rng = np.random.RandomState(np.random.Philox(key=seed.astype(np.uint64)))
    operations = list(OPERATIONS.values())
    for _ in range(layers):
        chosen, carried_out, negative = rng.random_sample(3)
        level = np.clip(rng.normal(magnitude, DEVIATION), 0, 10) / 10
        if carried_out < PROBABILITY:
            operation = operations[int(chosen * len(operations))]
            picture = operation(picture, level, -1 if negative < 0.5 else 1, FILL[channels])
    return np.asarray(picture).reshape(image.shape)
