"""Weighted k-nearest-neighbour classification: what features are worth, with nothing trained on top of them.

As Wu et al. 2018 (arXiv 1805.01978, section 3.4) vote; the protocol of DINO (arXiv 2104.14294).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def classify(
    bank: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    ks: Sequence[int],
    *,
    classes: int,
    temperature: float,
    weight: jax.Array | None = None,
    chunk: int = 16384,
) -> jax.Array:
    """The class of each query, as its nearest neighbours in the bank vote.

    A neighbour's vote is exp(cosine similarity / `temperature`). Of equally near neighbours the earlier one counts;
    of classes with equal votes the lower one wins, class 0 where nobody votes. For queries split over devices, call
    it within `jax.shard_map`: left to itself, XLA gives every device all that `lax.top_k` works on.

    >>> bank, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), jnp.array([4, 2, 2])
    >>> classify(bank, labels, jnp.array([[5.0, 4.0]]), (1, 3), classes=5, temperature=1.0).tolist()
    [[4], [2]]

    Args:
      bank: f32[M,D], features of known class. They need not be normalised.
      labels: i32[M], from 0 up to `classes`.
      queries: f32[N,D].
      ks: how many neighbours vote; one answer each. Fewer vote where the bank has fewer.
      temperature: above 0; the smaller, the more the nearest decide.
      weight: f32[M], 0 for what is never a neighbour, such as padding; None: all may be.
      chunk: how much of the bank is looked at together; memory is N * `chunk`.

    Returns:
      i32[len(ks),N].
    """
    ks = [min(k, len(bank)) for k in ks]  # there are no more, and what none is takes memory too
    similarities, voters = _nearest(bank, labels, queries, max(ks), weight, min(chunk, len(bank)))
    # subtracted, so that the largest vote is 1 at any temperature; a max, as XLA sorts all where top_k is sliced again
    nearest = jnp.max(similarities, axis=1, keepdims=True)
    votes = jnp.where(similarities > -jnp.inf, jnp.exp((similarities - nearest) / temperature), 0.0)

    def vote(counts, ballot):
        voter, its_vote = ballot
        return counts + jax.nn.one_hot(voter, classes) * its_vote[:, None], None

    counts, before, answers = jnp.zeros_like(votes, shape=(len(queries), classes)), 0, {}
    for k in sorted(set(ks)):  # one neighbour after the other, as [N,K,classes] would be large
        counts, _ = lax.scan(vote, counts, (voters[:, before:k].T, votes[:, before:k].T))
        before, answers[k] = k, jnp.argmax(counts, axis=1).astype(jnp.int32)
    return jnp.stack([answers[k] for k in ks])


def _nearest(bank, labels, queries, k: int, weight, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The similarities f32[N,k] and labels i32[N,k] of the k nearest, nearest first; -inf where there are no more."""
    size, n = len(bank), len(queries)
    queries = _normalized(queries)
    weight = jnp.ones(size) if weight is None else weight

    def look(found, start):
        first = jnp.minimum(start, size - chunk)  # the last chunk begins with what was seen before
        part, names, valid = (lax.dynamic_slice_in_dim(x, first, chunk) for x in (bank, labels, weight > 0))
        valid &= first + jnp.arange(chunk) >= start
        # accelerators would round the factors otherwise
        similarities = jnp.matmul(queries, _normalized(part).T, precision=lax.Precision.HIGHEST)
        similarities = jnp.where(valid[None], similarities, -jnp.inf)  # [N,chunk]
        # what was found comes first, so that it wins a tie
        similarities = jnp.concatenate([found[0], similarities], axis=1)
        names = jnp.concatenate([found[1], jnp.broadcast_to(names.astype(jnp.int32), (n, chunk))], axis=1)
        similarities, places = lax.top_k(similarities, k)
        return (similarities, jnp.take_along_axis(names, places, axis=1)), None

    nothing = jnp.full_like(queries, -jnp.inf, shape=(n, k)), jnp.zeros_like(queries, jnp.int32, shape=(n, k))
    return lax.scan(look, nothing, jnp.arange(0, size, chunk))[0]


def _normalized(x: jax.Array) -> jax.Array:
    """Rows of length 1; zero stays zero."""
    x = x.astype(jnp.float32)
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)
