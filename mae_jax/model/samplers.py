"""Which patches are hidden first: a score for each (paper, section 3 and figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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


def attention_scores(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """Gumbel noise, to which `guided` adds what the encoder attends to; by itself it is random masking."""
    return jax.random.gumbel(key, (num, grid[0] * grid[1]))


def _same_for_all(scores: np.ndarray, num: int) -> jax.Array:
    return jnp.tile(jnp.asarray(scores, jnp.float32)[None], (num, 1))


# A sampler is `f(key, num, grid) -> f32[N,L]`, one score per patch of each of `num` samples; the K patches of
# lowest score stay visible. So every sampler keeps exactly K patches per sample and has static shapes. One of one's
# own is a row more: `SAMPLERS["mine"] = f`.
SAMPLERS = {
    "random": random_scores,
    "block": block_scores,
    "grid": grid_scores,
    "centre": centre_scores,
    "most_attended": attention_scores,
    "least_attended": attention_scores,
}
GUIDED = {"most_attended": 1.0, "least_attended": -1.0}  # those that see what the encoder attends to, and which way
