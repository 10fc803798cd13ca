"""Which patches stay visible. The mask is data: a job samples it, the model receives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mae_jax.model.samplers import GUIDED, SAMPLERS


@struct.dataclass
class Mask:
    """The patches of each sample, split in two: K stay visible, L-K are hidden; M of these are decoded in training.

    Its arrays index patches, in the order in which the model sees them, so that static shapes and gathers are
    all that masking needs.
    """

    visible: jax.Array  # i32[N,K]
    hidden: jax.Array  # i32[N,L-K]
    skipped: int = struct.field(pytree_node=False, default=0)  # L-K-M: so many hidden ones, the first, are not decoded

    @property
    def decoded(self) -> jax.Array:
        """i32[N,M]: the last of the hidden patches."""
        return self.hidden[:, self.skipped :]

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

    >>> visible_count(196, 0.75), visible_count(100, 0.9), visible_count(196, 0.0)
    (49, 9, 196)
    """
    count = int(num_patches * (1 - ratio))
    if not 0 < count <= num_patches:
        raise ValueError(f"a mask ratio of {ratio} leaves {count} of {num_patches} patches visible")
    return count


def decoded_count(num_hidden: int, share: float) -> int:
    """M, the least number of hidden patches that is no smaller than this share of them.

    >>> decoded_count(147, 0.25), decoded_count(147, 1.0)
    (37, 147)
    """
    count = math.ceil(num_hidden * share)
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} is {count} of {num_hidden} hidden patches")
    return count


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
    key: jax.Array,
    num: int,
    grid: Sequence[int],
    *,
    name: str = "random",
    ratio: float = 0.75,
    unit: int = 1,
    temperature: float = 1.0,
    decoded: float = 1.0,
) -> Mask:
    """Masks for `num` samples of `grid` = (rows, columns) patches, one independent draw per sample.

    Args:
      name: a row of `SAMPLERS`. The rows of `GUIDED` are `random` here; see `guided`.
      ratio: the share of patches to hide, below 1; with 0 all are visible.
      unit: patches are hidden in squares of `unit` x `unit`, less at the lower and right border where that does not
        divide (SimMIM, arXiv 2111.09886, hides 32 pixels where a patch has 16). K is the same as for single patches,
        so that one square of each sample may be hidden in part.
      temperature: of the rows of `GUIDED`: how far they are from hiding what is attended to most, or least, for sure.
      decoded: the share of the hidden patches, above 0, that the decoder predicts in training, drawn at random whatever
        the sampler (CrossMAE, arXiv 2401.14391, section 3.3).
    """
    mask = from_scores(_of_patches(SAMPLERS[name](key, num, units_of(grid, unit)), grid, unit), ratio)
    return mask if decoded == 1 else some_decoded(mask, lots(key, num, grid), decoded)


def lots(key: jax.Array, num: int, grid: Sequence[int]) -> jax.Array:
    """What decides which hidden patches are decoded, f32[num,L]; no sampler draws the same from this key."""
    return jax.random.uniform(jax.random.fold_in(key, 1), (num, grid[0] * grid[1]))


def some_decoded(mask: Mask, lots: jax.Array, share: float) -> Mask:
    """The same mask, of whose hidden patches a share is decoded: those of the highest `lots` f32[N,L]."""
    order = jnp.argsort(jnp.take_along_axis(lots, mask.hidden, axis=1), axis=1)
    hidden = jnp.take_along_axis(mask.hidden, order, axis=1)
    return Mask(mask.visible, hidden, skipped=hidden.shape[1] - decoded_count(hidden.shape[1], share))


def guided(
    noise: jax.Array,
    lots: jax.Array,
    attended: jax.Array,
    grid: Sequence[int],
    *,
    name: str = "random",
    ratio: float = 0.75,
    unit: int = 1,
    temperature: float = 1.0,
    decoded: float = 1.0,
) -> Mask:
    """Masks that hide what is attended to most, or least.

    The squares to hide are drawn without replacement, each as likely as its attention to the power of 1/temperature.

    Args:
      noise: `SAMPLERS[name](key, num, units_of(grid, unit))`.
      lots: `lots(key, num, grid)`.
      attended: f32[N,L], above 0: how much each patch is.
      name: a row of `GUIDED`.
      ratio, unit, temperature, decoded: as in `sample`.
    """
    (rows, cols), n = units_of(grid, unit), len(attended)
    missing = [(0, 0), (0, rows * unit - grid[0]), (0, cols * unit - grid[1])]
    cut = lambda x: jnp.pad(x.reshape(-1, *grid), missing).reshape(-1, rows, unit, cols, unit)  # noqa: E731
    mean = cut(attended).sum(axis=(2, 4)) / cut(jnp.ones((1, *attended.shape[1:]))).sum(axis=(2, 4))
    scores = noise + GUIDED[name] / temperature * jnp.log(mean.reshape(n, -1))
    mask = from_scores(_of_patches(scores, grid, unit), ratio)
    return mask if decoded == 1 else some_decoded(mask, lots, decoded)


def units_of(grid: Sequence[int], unit: int) -> tuple[int, int]:
    """Rows and columns of squares of `unit` x `unit` patches, those that the border cuts included."""
    return -(-grid[0] // unit), -(-grid[1] // unit)


def _of_patches(scores: jax.Array, grid: Sequence[int], unit: int) -> jax.Array:
    """The scores of squares of patches, as those of the patches: [N,L'] to the ranks f32[N,L]."""
    if unit == 1:
        return scores
    ranks = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)  # no two are equal, so that K cuts no more than one
    ranks = ranks.reshape(-1, *units_of(grid, unit)).repeat(unit, axis=1).repeat(unit, axis=2)
    return ranks[:, : grid[0], : grid[1]].reshape(len(scores), -1).astype(jnp.float32)


def ratios(steps: int, end: float, *, start: float | None = None, stages: int = 4) -> list[tuple[int, float]]:
    """The share of patches to hide over a run of `steps`: from which step on, and how many.

    It changes in stages, each of which is compiled by itself: the shapes of a step are fixed.

    >>> ratios(100, 0.75, start=0.25, stages=3)
    [(0, 0.25), (33, 0.5), (66, 0.75)]

    Args:
      end: that of the last stage.
      start: that of the first stage; None: all are the last.
      stages: at least two, of equal length, with equal differences.
    """
    if start is None:
        return [(0, end)]
    return [(i * steps // stages, start + (end - start) * i / (stages - 1)) for i in range(stages)]


def take(patches: jax.Array, index: jax.Array) -> jax.Array:
    """Row gather per sample: patches [N,L,T] at index i32[N,M] to [N,M,T]."""
    return jnp.take_along_axis(patches, index[:, :, None], axis=1)
