"""Losses, one number per sample: the job weighs and averages them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def mse(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over patches and their values: [N,M,T], [N,M,T] -> f32[N].

    Given hidden patches only, its mean over samples is the loss of the paper (section 3): each sample hides as
    many patches as any other, so the mean of means is the mean over all hidden patches.
    """
    return jnp.mean(jnp.square(_difference(pred, target)), axis=(1, 2))


def l1(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute error over patches and their values (SimMIM, arXiv 2111.09886): [N,M,T], [N,M,T] -> f32[N]."""
    return jnp.mean(jnp.abs(_difference(pred, target)), axis=(1, 2))


def smooth_l1(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Half the square up to a difference of 1, and linear beyond, as in PyTorch: [N,M,T], [N,M,T] -> f32[N]."""
    size = jnp.abs(_difference(pred, target))
    return jnp.mean(jnp.where(size < 1, 0.5 * jnp.square(size), size - 0.5), axis=(1, 2))


def token_cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy over patches, of the right tokens i32[N,M,1] under logits [N,M,T]: f32[N]."""
    found = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(found, tokens, axis=-1), axis=(1, 2))


def _difference(pred: jax.Array, target: jax.Array) -> jax.Array:
    return pred.astype(jnp.float32) - target.astype(jnp.float32)


class Loss(NamedTuple):
    """A row of `LOSSES`: a function, and what it is for."""

    # predictions [N,M,T], what was encoded -> f32[N]
    of: Callable[[jax.Array, jax.Array], jax.Array]
    # whether that is the numbers of tokens i32[N,M,1], and predictions are their logits; else values f32[N,M,T]
    tokens: bool = False


# One of one's own is a row more: `LOSSES["mine"] = Loss(f)`, or `Loss(f, tokens=True)`.
LOSSES = {
    "l2": Loss(mse),
    "l1": Loss(l1),
    "smooth_l1": Loss(smooth_l1),
    "cross_entropy": Loss(token_cross_entropy, tokens=True),
}
PATCHES = ("hidden", "all")


def fits(name: str, default: str) -> bool:
    """Whether the loss `name` is for targets whose own loss is `default`."""
    return LOSSES[name].tokens == LOSSES[default].tokens


def make(default: str, *, name: str = "", patches: str = "hidden") -> tuple[Callable, bool]:
    """The loss, the function of a row of `LOSSES`, and whether it is of every patch.

    Args:
      default: the row of `LOSSES` that the target brings.
      name: another row; empty: the target's.
      patches: of the "hidden" patches, or of "all" (paper, section 3: half a percent worse).
    """
    return LOSSES[name or default].of, patches == "all"


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of soft targets, f32[N,C] with rows that sum to 1 (labels smoothed or mixed): logits [N,C] -> f32[N]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of f32[N] with weights f32[N], 0 where nothing weighs: a batch of unreadable images teaches nothing."""
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)
