"""Histograms of oriented gradients (Dalal and Triggs 2005), which MaskFeat predicts (arXiv 2112.09133, section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ORIENTATIONS = 9  # of 20 degrees each, whichever way up
EPSILON = 1e-5  # of the length, as in scikit-image


def hog(images: jax.Array, cell: int) -> jax.Array:
    """The directions in which each cell of `cell` x `cell` pixels changes, for each channel by itself.

    As skimage.feature.hog(channel, 9, (cell, cell), (1, 1), "L2") gives for one channel: a pixel's gradient is the
    difference of its neighbours, along and across, zero at the border; it counts by its length for one orientation;
    and each histogram is divided by its own length, so that contrast and the units of the pixels do not matter.

    Args:
      images: f32[N,H,W,C], H and W divisible by `cell`.

    Returns:
      f32[N,H/cell,W/cell,C,9].
    """
    n, height, width, channels = images.shape
    down = jnp.pad(images[:, 2:] - images[:, :-2], ((0, 0), (1, 1), (0, 0), (0, 0)))
    across = jnp.pad(images[:, :, 2:] - images[:, :, :-2], ((0, 0), (0, 0), (1, 1), (0, 0)))
    size = jnp.sqrt(jnp.square(down) + jnp.square(across))
    part = jnp.floor(jnp.arctan2(down, across) / jnp.pi * ORIENTATIONS).astype(jnp.int32) % ORIENTATIONS

    def amount(orientation):
        counted = jnp.where(part == orientation, size, 0.0)
        return counted.reshape(n, height // cell, cell, width // cell, cell, channels).mean(axis=(2, 4))

    found = jnp.stack([amount(i) for i in range(ORIENTATIONS)], axis=-1)  # one by one: nine times the images otherwise
    return found / jnp.sqrt(jnp.square(found).sum(axis=-1, keepdims=True) + EPSILON**2)
