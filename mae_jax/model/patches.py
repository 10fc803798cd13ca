"""Images to patches and back, and where each patch sits."""

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


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position embeddings (paper appendix A.1; util/pos_embed.py of the original code).

    The first half of the channels encodes the *column*, the second half the row; each half is [sin | cos] of
    the coordinate times omega_k = 10000^(-k / (width/4)). Computed in float64.

    >>> sincos_positions((2, 3), 8)[5, [0, 2, 4, 6]].astype(float).round(4).tolist()  # sin 2, cos 2, sin 1, cos 1
    [0.9093, -0.4161, 0.8415, 0.5403]

    Args:
      grid: (rows, columns) of patches.
      width: D, divisible by 4.

    Returns:
      f32[L,D], a NumPy constant.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    rows, cols = grid
    omega = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    column_angle = np.tile(np.arange(cols), rows)[:, None] * omega  # [L,D/4]
    row_angle = np.repeat(np.arange(rows), cols)[:, None] * omega
    halves = [np.sin(column_angle), np.cos(column_angle), np.sin(row_angle), np.cos(row_angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def position_rows(grid: Sequence[int], width: int) -> np.ndarray:
    """`sincos_positions` after a row of zeros for the cls token: f32[1,1+L,D]."""
    return np.pad(sincos_positions(grid, width), ((1, 0), (0, 0)))[None]


def resize_positions(positions, grid: Sequence[int], new_grid: Sequence[int]) -> np.ndarray:
    """Positions learned on one grid of patches, for another: bicubic, not antialiased; the row of cls stays.

    As util/pos_embed.py of the original code does with torch.nn.functional.interpolate(align_corners=False).
    Computed in float64.

    Args:
      positions: f32[1,1+L,D] for the L patches of `grid` = (rows, columns).

    Returns:
      f32[1,1+L',D] for the L' patches of `new_grid`, a NumPy array.
    """
    positions = np.asarray(positions, np.float64)
    width = positions.shape[-1]
    rows, cols = (_bicubic_weights(old, new) for old, new in zip(grid, new_grid, strict=True))
    table = positions[0, 1:].reshape(*grid, width)
    table = np.tensordot(cols, np.tensordot(rows, table, (1, 0)), (1, 1))  # [columns',rows',D]
    table = table.swapaxes(0, 1).reshape(1, -1, width)
    return np.concatenate([positions[:, :1], table], axis=1).astype(np.float32)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """What each of `old` samples gives to each of `new`: f64[new,old], rows sum to 1.

    Keys' cubic convolution (1981) with a = -0.75, as in PyTorch; beyond the border stands the border's own sample.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        sample = np.floor(centre) + offset
        x = np.abs(centre - sample)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        column = np.clip(sample, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), column), np.where(x <= 1, near, far))
    return weights
