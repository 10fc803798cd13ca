"""Images to patches and back."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


def normalize(images, *, mean: Sequence[float], std: Sequence[float]):
    """uint8 pixels to standardised floats: (images / 255 - mean) / std, with one mean and std per channel.

    Args:
      images: uint8[N,H,W,C].
      mean, std: C numbers each, in units of the 0..1 range.

    Returns:
      f32[N,H,W,C].
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (images.astype(jnp.float32) / 255.0 - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)


def denormalize(images, *, mean: Sequence[float], std: Sequence[float]):
    """The inverse of `normalize`, clipped and rounded: f32[N,H,W,C] to uint8[N,H,W,C]."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    images = images * std.reshape(1, 1, 1, -1) + mean.reshape(1, 1, 1, -1)
    return jnp.clip(jnp.round(images * 255.0), 0, 255).astype(jnp.uint8)


def grid_of(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `image_size` = (H, W).

    >>> grid_of((32, 48), 16)
    (2, 3)
    """
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height}x{width} does not divide into patches of {patch_size}")
    return height // patch_size, width // patch_size


def patchify(images, patch_size: int):
    """Cut images into patches, row by row; a patch is a vector in the order row, column, channel.

    Args:
      images: [N,H,W,C] of any dtype, H and W divisible by `patch_size`.

    Returns:
      [N,L,P*P*C] of the same dtype, L = (H/P)*(W/P).
    """
    n, height, width, channels = images.shape
    rows, cols = grid_of((height, width), patch_size)
    x = images.reshape(n, rows, patch_size, cols, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * cols, patch_size * patch_size * channels)


def unpatchify(patches, patch_size: int, image_size: Sequence[int]):
    """The inverse of `patchify`: [N,L,P*P*C] to [N,H,W,C], for `image_size` = (H, W)."""
    rows, cols = grid_of(image_size, patch_size)
    n, _, target = patches.shape
    x = patches.reshape(n, rows, cols, patch_size, patch_size, target // patch_size**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, *image_size, -1)
