"""Losses, one number per sample: the job weighs and averages them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mse(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over patches and their values: [N,M,T], [N,M,T] -> f32[N].

    Given hidden patches only, its mean over samples is the loss of the paper (section 3): each sample hides as
    many patches as any other, so the mean of means is the mean over all hidden patches.
    """
    return jnp.mean(jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32)), axis=(1, 2))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of soft targets, f32[N,C] with rows that sum to 1 (labels smoothed or mixed): logits [N,C] -> f32[N]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of f32[N] with weights f32[N], 0 where nothing weighs: a batch of unreadable images teaches nothing."""
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)
