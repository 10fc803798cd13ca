"""Exact sums and means over a data set whose last batch is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

TOP = 5  # guesses that may hold the right one for top-5


def weighted_means(measure: Callable, params, batches: Iterable[dict], key: jax.Array) -> tuple[dict, int]:
    """Average what `measure` returns over all examples of weight 1; padding and unreadable images weigh 0.

    Args:
      measure: a jitted `f(params, batch, key) -> {name: f32[N, ...]}`. It must be the same object at every call, or
        it compiles anew.
      batches: dicts with `weight` f32[N].
      key: folded with the batch's number, so that every call sees the same randomness.

    Returns:
      The means by name, as arrays of what follows the first axis, and the count of examples. No means if it is 0.
    """
    totals, count = None, 0.0
    for i, batch in enumerate(batches):
        values = measure(params, batch, jax.random.fold_in(key, i))
        sums, number = _weighted_sums(values, batch["weight"])
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        count += float(number)
    if not count:
        return {}, 0
    return jax.tree.map(lambda total: total / count, totals), int(count)


@jax.jit
def _weighted_sums(values, weight):
    # not a dot product, which accelerators round to 10 bits; and 0 times an overflow must stay 0
    def total(v):
        w = weight.reshape(-1, *[1] * (v.ndim - 1))
        return jnp.where(w > 0, v * w, 0).sum(axis=0)

    return jax.tree.map(total, values), weight.sum()


def tally(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """What a classifier made of a batch: sums over the examples of weight 1 that have a label.

    Args:
      logits: f32[N,C].
      labels: i32[N]; -1 where there is none.
      weight: f32[N], 0 for padding.

    Returns:
      `loss` f32[], the cross-entropy; `top5` f32[], right within five guesses; `confusion` f32[C,C], examples by their
      class (row) and the first guess (column). Of equal logits the first class counts as the higher one.
    """
    classes = logits.shape[-1]
    weight = jnp.where(labels >= 0, weight, 0.0)
    _, guesses = jax.lax.top_k(logits, min(TOP, classes))
    truth = jax.nn.one_hot(labels, classes)
    loss = -jnp.sum(jax.nn.log_softmax(logits) * truth, axis=-1)
    right = jnp.any(guesses == labels[:, None], axis=-1)
    return {
        "loss": jnp.sum(jnp.where(weight > 0, loss, 0.0)),
        "top5": jnp.sum(weight * right),
        "confusion": (truth * weight[:, None]).T @ jax.nn.one_hot(guesses[:, 0], classes),  # whole numbers: exact
    }


def sums(measure: Callable, args, batches: Iterable[dict]) -> dict[str, np.ndarray]:
    """Add up what a jitted `measure(args, batch) -> {name: sum over the batch}` gives, in float64; {} of no batch."""
    total = {}
    for batch in batches:
        values = jax.device_get(measure(args, batch))
        total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in values.items()}
    return total
