"""What tells a token where its patch sits: added to it, added to attention's scores, or turning queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Relation:
    """What attention is told of where Q queries and T keys stand; by default nothing.

    Along the first axis of each is N, or 1 where all samples are alike.
    """

    queries: jax.Array | None = None  # f32[N,Q,d/2], by which angles to rotate a head's pairs of channels
    keys: jax.Array | None = None  # f32[N,T,d/2]
    bias: jax.Array | None = None  # f32[N,heads,Q,T], added to the scores

    def rotated(self, q: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [N,Q,heads,d], and keys and values [N,T,2,heads,d], of which the keys are rotated too."""
        if self.queries is None:
            return q, kv
        return rotate(q, self.queries), jnp.stack([rotate(kv[:, :, 0], self.keys), kv[:, :, 1]], axis=2)


@struct.dataclass
class Positions:
    """Where the tokens of a grid are: number 0 is cls, and 1+i is patch i, row by row. What is None is not in use."""

    added: jax.Array | None = None  # f32[1,1+L,D], to tokens
    angles: jax.Array | None = None  # f32[1,1+L,d/2], of queries and keys
    biases: jax.Array | None = None  # f32[1,E,heads], of scores ...
    entries: np.ndarray | None = None  # i32[1+L,1+L]: ... and which of these a query and a key have

    def add(self, x: jax.Array, tokens: jax.Array | None = None) -> jax.Array:
        """x [N,M,D] with what is added to the `tokens` i32[N,M]; None: to all, in order. f32[N,M,D]."""
        x = x.astype(jnp.float32)
        return x if self.added is None else x + _rows(self.added, tokens)

    def between(self, queries: jax.Array | None = None, keys: jax.Array | None = None) -> Relation:
        """What attention is told of the tokens `queries` i32[N,Q] and `keys` i32[N,T]; None: all, in order."""
        if self.angles is not None:
            return Relation(queries=_rows(self.angles, queries), keys=_rows(self.angles, keys))
        if self.biases is None:
            return Relation()
        every = jnp.arange(len(self.entries), dtype=jnp.int32)[None]
        queries, keys = (every if tokens is None else tokens for tokens in (queries, keys))
        entries = jnp.asarray(self.entries)[queries[:, :, None], keys[:, None, :]]  # i32[N,Q,T]
        return Relation(bias=self.biases[0, entries].transpose(0, 3, 1, 2))


def _rows(table: jax.Array, tokens: jax.Array | None) -> jax.Array:
    """Rows `tokens` i32[N,M] of a table [1,1+L,D], [N,M,D]; None: all, [1,1+L,D]."""
    return table if tokens is None else table[0, tokens]


def with_cls(patches: jax.Array) -> jax.Array:
    """The numbers of the tokens of cls and of `patches` i32[N,M]: i32[N,1+M]."""
    return jnp.pad(patches + 1, ((0, 0), (1, 0)))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn channels (2i, 2i+1) of each head of x [N,M,heads,d] by angles f32[N,M,d/2], or [1,M,d/2]; same dtype.

    The product of a query and a key turned like this depends on the difference of their angles alone (RoFormer, arXiv
    2104.09864, section 3.2).
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd, cos, sin = pairs[..., 0], pairs[..., 1], jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def sincos(learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """Fixed sines and cosines, added to the patches; zeros for cls (paper, appendix A.1)."""
    return Positions(added=jnp.asarray(position_rows(grid, width)))


def learned(learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """The same, as a parameter f32[1,1+L,D] that begins with these values."""
    return Positions(added=learned(lambda key: jnp.asarray(position_rows(grid, width))))


def relative(learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """A learned bias of the scores for each head and offset of rows and columns (BEiT, arXiv 2106.08254, section 2.1).

    It is shared by all blocks, begins with zeros, and has entries of their own for cls to a patch, a patch to cls and
    cls to itself. The parameter is f32[1,3+(2R-1)(2C-1),heads], for a grid of R x C: these three, then the offsets of
    the query from the key, row by row.
    """
    shape = (1, 3 + (2 * grid[0] - 1) * (2 * grid[1] - 1), heads)
    return Positions(biases=learned(lambda key: jnp.zeros(shape)), entries=offsets(grid))


def rotary(learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """Queries and keys are rotated, by the row in the first half of a head and by the column in the second.

    Axial, as in EVA-02 (arXiv 2303.11331) and RoPE-ViT (arXiv 2403.13298); frequencies as for sines and cosines. cls is
    not rotated.
    """
    return Positions(angles=jnp.asarray(rotary_angles(grid, width // heads)))


def none(learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """Nothing: the encoder sees a set of patches."""
    return Positions()


# A row is `f(learned, grid, width, heads) -> Positions`: for tokens of `width` channels on a `grid` = (rows, columns),
# and attention with `heads` heads. What it learns it asks for by `learned(init)`, once: the parameter "positions" of
# the encoder or decoder, f32[1,rows,channels], which begins as `init(key)`. That ties it to this grid; see `RESIZE`.
POSITIONS = {"sincos": sincos, "learned": learned, "relative": relative, "rotary": rotary, "none": none}


def make(kind: str, learned: Callable, grid: Sequence[int], width: int, heads: int) -> Positions:
    """The row `kind` of `POSITIONS`.

    Raises:
      ValueError: there is no such row.
    """
    if kind not in POSITIONS:
        raise ValueError(f"positions are one of {', '.join(POSITIONS)}, not {kind!r}")
    return POSITIONS[kind](learned, grid, width, heads)


def offsets(grid: Sequence[int]) -> np.ndarray:
    """Which entry of `relative` each query has for each key, i32[1+L,1+L].

    >>> offsets((1, 2)).tolist()  # cls to cls is 2; of 3, 4, 5 the middle one is no offset
    [[2, 0, 0], [1, 4, 3], [1, 5, 4]]
    """
    rows, cols = grid
    row, col = (x.ravel() for x in np.indices(grid))
    down, across = row[:, None] - row[None] + rows - 1, col[:, None] - col[None] + cols - 1
    entries = np.zeros((1 + rows * cols, 1 + rows * cols), np.int32)
    entries[1:, 1:] = 3 + down * (2 * cols - 1) + across
    entries[1:, 0], entries[0, 0] = 1, 2
    return entries


def rotary_angles(grid: Sequence[int], head: int) -> np.ndarray:
    """By which angle each pair of channels is turned, f32[1,1+L,head/2]; by none for cls.

    The first half is the row and the second the column, times omega_k = 10000^(-k / (head/4)).

    >>> rotary_angles((2, 3), 4)[0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]
    """
    if head % 4:
        raise ValueError(f"rotary positions need heads of a width divisible by 4, not {head}")
    angles = np.concatenate([axis.reshape(-1, 1) * frequencies(head // 4) for axis in np.indices(grid)], axis=1)
    return np.pad(angles, ((1, 0), (0, 0)))[None].astype(np.float32)


def frequencies(count: int) -> np.ndarray:
    """omega_k = 10000^(-k / count), f64[count]."""
    return 10000.0 ** -(np.arange(count, dtype=np.float64) / count)


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
    omega = frequencies(width // 4)
    column_angle = np.tile(np.arange(cols), rows)[:, None] * omega  # [L,D/4]
    row_angle = np.repeat(np.arange(rows), cols)[:, None] * omega
    halves = [np.sin(column_angle), np.cos(column_angle), np.sin(row_angle), np.cos(row_angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def position_rows(grid: Sequence[int], width: int) -> np.ndarray:
    """`sincos_positions` after a row of zeros for the cls token: f32[1,1+L,D]."""
    return np.pad(sincos_positions(grid, width), ((1, 0), (0, 0)))[None]


def resize_positions(positions, grid: Sequence[int], new_grid: Sequence[int], first: int = 1) -> np.ndarray:
    """Positions learned on one grid of patches, for another: bicubic, not antialiased; the row of cls stays.

    As util/pos_embed.py of the original code does with torch.nn.functional.interpolate(align_corners=False).
    Computed in float64.

    Args:
      positions: f32[1,first+L,D] for the L patches of `grid` = (rows, columns).
      first: how many rows are not of patches.

    Returns:
      f32[1,first+L',D] for the L' patches of `new_grid`, a NumPy array.
    """
    positions = np.asarray(positions, np.float64)
    width = positions.shape[-1]
    rows, cols = (_bicubic_weights(old, new) for old, new in zip(grid, new_grid, strict=True))
    table = positions[0, first:].reshape(*grid, width)
    table = np.tensordot(cols, np.tensordot(rows, table, (1, 0)), (1, 1))  # [columns',rows',D]
    table = table.swapaxes(0, 1).reshape(1, -1, width)
    return np.concatenate([positions[:, :first], table], axis=1).astype(np.float32)


def resize_biases(biases, grid: Sequence[int], new_grid: Sequence[int]) -> np.ndarray:
    """The parameter of `relative` on one grid of patches, for another: as `resize_positions`, on the grids of offsets.

    Args:
      biases: f32[1,3+(2R-1)(2C-1),heads] for a `grid` of R x C.

    Returns:
      f32[1,3+(2R'-1)(2C'-1),heads] for a `new_grid` of R' x C', a NumPy array; that of no offset stays too.
    """
    return resize_positions(biases, *([2 * side - 1 for side in sides] for sides in (grid, new_grid)), first=3)


# How the rows of `POSITIONS` that learn something take what they have learned to another grid.
RESIZE = {"learned": resize_positions, "relative": resize_biases}


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
