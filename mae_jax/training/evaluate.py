"""Exact means over a data set whose last batch is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp


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
