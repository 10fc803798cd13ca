"""Which patches stay visible. The mask is data: a job samples it, the model receives it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
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


# A sampler is `f(key, num, grid) -> f32[N,L]`, one score per patch of each of `num` samples; the K patches of
# lowest score stay visible. So every sampler keeps exactly K patches per sample and has static shapes.
SAMPLERS = {"random": random_scores}


def from_scores(scores: jax.Array, ratio: float) -> Mask:
    """The mask that keeps the lowest scores: f32[N,L] to K visible and L-K hidden patches, lowest score first."""
    count = visible_count(scores.shape[1], ratio)
    order = jnp.argsort(scores, axis=1)
    return Mask(visible=order[:, :count], hidden=order[:, count:])


def sample(key: jax.Array, num: int, grid: Sequence[int], *, name: str = "random", ratio: float = 0.75) -> Mask:
    """Masks for `num` samples of `grid` = (rows, columns) patches, one independent draw per sample.

    Args:
      name: a row of `SAMPLERS`.
      ratio: the share of patches to hide, strictly between 0 and 1.
    """
    return from_scores(SAMPLERS[name](key, num, grid), ratio)


def take(patches: jax.Array, index: jax.Array) -> jax.Array:
    """Row gather per sample: patches [N,L,T] at index i32[N,M] to [N,M,T]."""
    return jnp.take_along_axis(patches, index[:, :, None], axis=1)
