"""Random erasing: a box of noise in place of a part of an image (Zhong et al. 2020, arXiv 1708.04896)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

AREA = (0.02, 1 / 3)  # of the box, as a share of the image's
ASPECT = (0.3, 1 / 0.3)  # height / width
ATTEMPTS = 10


def erase(key: jax.Array, images: jax.Array, *, probability: float = 0.0) -> jax.Array:
    """Fill a random box of some images with N(0, 1) noise: `RandomErasing` of timm, with its mode "pixel".

    Args:
      images: f32[N,H,W,C], normalised, so that the noise is as bright and as varied as they are.
      probability: share of the images that get a box, each on its own.
    """
    if not probability:
        return images
    box_key, noise_key, choice_key = jax.random.split(key, 3)
    num, height, width, _ = images.shape
    top, left, high, wide = (x[:, None, None] for x in draw_boxes(box_key, num, (height, width)))
    rows, columns = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    inside = (rows >= top) & (rows < top + high) & (columns >= left) & (columns < left + wide)  # [N,H,W]
    chosen = jax.random.uniform(choice_key, (num, 1, 1)) < probability
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where((inside & chosen)[..., None], noise, images)


def draw_boxes(key: jax.Array, num: int, size: Sequence[int]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A box (top, left, height, width), i32[num] each, for each of `num` images of `size` = (H, W).

    Its area is uniform in `AREA`, its aspect log-uniform in `ASPECT`. The ten attempts are drawn at once and the
    first that is smaller than the image, both ways, is taken; if none is, the box is empty.
    """
    high, wide = size
    area, aspect, down, right = jax.random.uniform(key, (4, num, ATTEMPTS))
    area = high * wide * (AREA[0] + (AREA[1] - AREA[0]) * area)
    aspect = jnp.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * aspect)
    heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (heights < high) & (widths < wide)
    tops, lefts = jnp.floor(down * (high - heights + 1)), jnp.floor(right * (wide - widths + 1))
    first = jnp.argmax(fits, axis=1, keepdims=True)

    def taken(values):
        return jnp.take_along_axis(jnp.where(fits, values, 0), first, axis=1)[:, 0].astype(jnp.int32)

    return taken(tops), taken(lefts), taken(heights), taken(widths)
