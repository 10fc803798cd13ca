"""Which patches stay visible. The mask is data: a job samples it, the model receives it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Mask:
    """The patches of each sample, split in two: K stay visible, L-K are hidden.

    Both fields index patches, in the order in which the model sees them, so that static shapes and gathers are
    all that masking needs.
    """

    visible: jax.Array  # i32[N,K]
    hidden: jax.Array  # i32[N,L-K]

    @property
    def order(self) -> jax.Array:
        """i32[N,L]: the visible patches, then the hidden ones (`ids_shuffle` of the original code)."""
        return jnp.concatenate([self.visible, self.hidden], axis=1)

    @property
    def restore(self) -> jax.Array:
        """i32[N,L]: where each patch stands in `order` (`ids_restore` of the original code)."""
        return jnp.argsort(self.order, axis=1)

    @property
    def removed(self) -> jax.Array:
        """f32[N,L]: 1 where a patch is hidden, 0 where it is visible (`mask` of the original code)."""
        return (self.restore >= self.visible.shape[1]).astype(jnp.float32)


def visible_count(num_patches: int, ratio: float) -> int:
    """K = int(L * (1 - ratio)), truncated in floating point exactly as the original code does.

    >>> visible_count(196, 0.75), visible_count(100, 0.9)
    (49, 9)
    """
    count = int(num_patches * (1 - ratio))
    if not 0 < count < num_patches:
        raise ValueError(f"a mask ratio of {ratio} leaves {count} of {num_patches} patches visible")
    return count


def random_scores(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """Uniform noise: every patch is as likely to be hidden as any other (paper section 3, the default)."""
    return jax.random.uniform(key, (num, grid[0] * grid[1]))


BLOCKS = 64  # drawn for each sample: enough to hide nine tenths of any grid but for a patch or two
BLOCK_AREA = (0.08, 0.4)  # of the grid: from 16 to 75 of 196 patches
BLOCK_ASPECT = 0.3  # and up to its inverse


def block_scores(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """Rectangles anywhere in the grid, hidden one after the other (BEiT, arXiv 2106.08254, algorithm 1).

    The last one that K needs is made smaller from all sides; there, none is larger than what is left to hide. What no
    rectangle covers is hidden last, in random order. As there, all lie within the grid, and so leave its border visible
    more often than its middle.
    """
    (rows, cols), block_key, rest_key = grid, *jax.random.split(key)
    draws = jax.random.uniform(block_key, (4, num, BLOCKS, 1))
    area = (BLOCK_AREA[0] + draws[0] * (BLOCK_AREA[1] - BLOCK_AREA[0])) * (rows * cols)
    aspect = BLOCK_ASPECT ** (2 * draws[1] - 1)
    height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, cols)
    top, left = jnp.floor(draws[2] * (rows - height + 1)), jnp.floor(draws[3] * (cols - width + 1))
    down = jnp.abs(jnp.arange(rows).reshape(1, 1, -1) - top - (height - 1) / 2) / height  # [N,BLOCKS,rows]
    across = jnp.abs(jnp.arange(cols).reshape(1, 1, -1) - left - (width - 1) / 2) / width
    distance = jnp.maximum(down[:, :, :, None], across[:, :, None, :])  # from the centre, below 1/2 within the block
    turn = jnp.arange(BLOCKS).reshape(1, -1, 1, 1) + distance
    turn = jnp.where(distance < 0.5, turn, jnp.inf).min(axis=1)  # [N,rows,cols]: which block hides a patch first
    rest = BLOCKS + jax.random.uniform(rest_key, turn.shape)
    return -jnp.where(turn < BLOCKS, turn, rest).reshape(num, -1)


def grid_scores(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """One patch of every 2x2 stays, the same in all samples (paper figure 6); nothing is drawn.

    Any other ratio has the most regular pattern that there is for it, the order of Bayer's dither matrix: 1/2 is a
    chequerboard, 15/16 keeps one patch of every 4x4.
    """
    # where the number of rows is odd, the second row is the first to stay: a quarter of 7x7 is 3x4, not 4x4
    row, col = np.indices(grid) + np.array([grid[0] % 2, 0]).reshape(2, 1, 1)
    rank = np.zeros(grid, np.int64)
    for bit in range(int(max(grid)).bit_length()):
        r, c = row >> bit & 1, col >> bit & 1
        rank = 4 * rank + 2 * (r ^ c) + r
    return _same_for_all(np.argsort(np.argsort(rank, axis=None)), num)


def centre_scores(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """The middle is hidden, of the shape of the grid, the same in all samples; nothing is drawn.

    As in the Context Encoder (arXiv 1604.07379, section 3.2), which hides a quarter of the image.
    """
    down, across = (np.abs(np.arange(side) - (side - 1) / 2) / side for side in grid)
    ring = np.maximum.outer(down, across)
    within = np.add.outer(down, across) / (4 * max(grid))  # a ring that K cuts is hidden from its sides' middles on
    return _same_for_all(-(ring + within).ravel(), num)


def _same_for_all(scores: np.ndarray, num: int) -> jax.Array:
    return jnp.tile(jnp.asarray(scores, jnp.float32)[None], (num, 1))


# A sampler is `f(key, num, grid) -> f32[N,L]`, one score per patch of each of `num` samples; the K patches of
# lowest score stay visible. So every sampler keeps exactly K patches per sample and has static shapes. One of one's
# own is a row more: `SAMPLERS["mine"] = f`.
SAMPLERS = {"random": random_scores, "block": block_scores, "grid": grid_scores, "centre": centre_scores}


def from_scores(scores: jax.Array, ratio: float) -> Mask:
    """The mask that keeps the lowest scores: f32[N,L] to K visible and L-K hidden patches, lowest score first."""
    count = visible_count(scores.shape[1], ratio)
    order = jnp.argsort(scores, axis=1)
    return Mask(visible=order[:, :count], hidden=order[:, count:])


def from_removed(removed) -> Mask:
    """A mask of one's own: the inverse of `Mask.removed`, with the patches of each part in the order of the grid.

    >>> from_removed([[0, 1, 1, 0], [1, 0, 0, 1]]).hidden.tolist()
    [[1, 2], [0, 3]]

    Args:
      removed: bool or 0 and 1, [N,L] or [N,rows,columns], true where a patch is hidden; values, not tracers.

    Raises:
      ValueError: the samples do not all hide the same number of patches, or hide none or all.
    """
    removed = np.asarray(removed, bool)
    removed = removed.reshape(len(removed), -1)
    hidden = np.unique(removed.sum(axis=1))
    if len(hidden) != 1 or not 0 < hidden[0] < removed.shape[1]:
        raise ValueError(f"each sample must hide as many of {removed.shape[1]} patches, not none or all: {hidden}")
    order = jnp.asarray(np.argsort(removed, axis=1, kind="stable"), jnp.int32)
    return Mask(visible=order[:, : -hidden[0]], hidden=order[:, -hidden[0] :])


def sample(
    key: jax.Array, num: int, grid: Sequence[int], *, name: str = "random", ratio: float = 0.75, unit: int = 1
) -> Mask:
    """Masks for `num` samples of `grid` = (rows, columns) patches, one independent draw per sample.

    Args:
      name: a row of `SAMPLERS`.
      ratio: the share of patches to hide, strictly between 0 and 1.
      unit: patches are hidden in squares of `unit` x `unit`, less at the lower and right border where that does not
        divide (SimMIM, arXiv 2111.09886, hides 32 pixels where a patch has 16). K is the same as for single patches,
        so that one square of each sample may be hidden in part.
    """
    units = [-(-side // unit) for side in grid]
    scores = SAMPLERS[name](key, num, units)
    return from_scores(scores if unit == 1 else _of_patches(scores, units, unit, grid), ratio)


def _of_patches(scores: jax.Array, units: Sequence[int], unit: int, grid: Sequence[int]) -> jax.Array:
    """The scores of squares of patches, as those of the patches: [N,L'] to the ranks f32[N,L]."""
    ranks = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)  # no two are equal, so that K cuts no more than one
    ranks = ranks.reshape(-1, *units).repeat(unit, axis=1).repeat(unit, axis=2)
    return ranks[:, : grid[0], : grid[1]].reshape(len(scores), -1).astype(jnp.float32)


def take(patches: jax.Array, index: jax.Array) -> jax.Array:
    """Row gather per sample: patches [N,L,T] at index i32[N,M] to [N,M,T]."""
    return jnp.take_along_axis(patches, index[:, :, None], axis=1)
