"""Nearest neighbours, against scikit-learn's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mae_jax.model import knn

pytestmark = pytest.mark.usefixtures("quick_compilation")

KS = (20, 1, 5, 200)
classify = jax.jit(knn.classify, static_argnames=("ks", "classes", "chunk"))


def neighbours(bank, labels, queries, ks, temperature):
    """What scikit-learn says, in float64."""
    votes = lambda distances: np.exp((1 - distances) / temperature)  # noqa: E731
    answers = []
    for k in ks:
        judge = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute")
        answers.append(judge.fit(np.asarray(bank, np.float64), labels).predict(np.asarray(queries, np.float64)))
    return np.stack(answers)


@pytest.fixture(scope="module")
def digits():
    """Pixels of digits, less their mean: 1500 for the bank, and its labels; 296 queries, a multiple of 8."""
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean(axis=0)).astype(np.float32)
    return images[:1500], labels[:1500].astype(np.int32), images[1500:1796]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_digits_are_classified_as_by_scikit_learn(digits, temperature):
    got = classify(*digits, KS, classes=10, temperature=temperature)
    assert got.shape == (len(KS), 296)
    assert got.dtype == jnp.int32
    want = neighbours(*digits, KS, temperature)
    np.testing.assert_array_equal(got, want)
    assert all((want[i] != want[j]).any() for i in range(4) for j in range(i)), "each k must have its own answers"


@pytest.mark.parametrize("chunk", [7, 750, 1499])
def test_the_chunk_does_not_matter(digits, chunk):
    got = classify(*digits, (1, 30, 9), classes=10, temperature=0.07, chunk=chunk)
    np.testing.assert_array_equal(got, neighbours(*digits, (1, 30, 9), 0.07))


@pytest.mark.parametrize("chunk", [100, 16384])
def test_what_weighs_nothing_is_never_a_neighbour(digits, chunk):
    bank, labels, queries = digits
    weight = np.random.default_rng(0).integers(0, 2, len(bank)).astype(np.float32)
    broken = np.where(weight[:, None] > 0, bank, np.nan)
    got = classify(broken, labels, queries, KS, classes=10, temperature=0.07, weight=weight, chunk=chunk)
    kept = weight > 0
    np.testing.assert_array_equal(got, neighbours(bank[kept], labels[kept], queries, KS, 0.07))
    assert (got != classify(bank, labels, queries, KS, classes=10, temperature=0.07)).any()


@pytest.mark.parametrize("chunk", [10, 60])
def test_a_bank_of_fewer_than_k_votes_as_a_whole(digits, chunk):
    bank, labels, queries = digits
    few = slice(0, 60)
    got = classify(bank[few], labels[few], queries, (10**11, 3, 60), classes=10, temperature=0.07, chunk=chunk)
    np.testing.assert_array_equal(got, neighbours(bank[few], labels[few], queries, (60, 3, 60), 0.07))
    weight = (np.arange(60) < 25).astype(np.float32)
    got = classify(bank[few], labels[few], queries, (30,), classes=10, temperature=0.07, weight=weight, chunk=chunk)
    np.testing.assert_array_equal(got, neighbours(bank[:25], labels[:25], queries, (25,), 0.07))


def test_where_nobody_votes_the_answer_is_class_0():
    got = classify(
        np.ones((4, 2)), np.full(4, 3), np.ones((2, 2)), (1, 3), classes=5, temperature=1, weight=np.zeros(4)
    )
    np.testing.assert_array_equal(got, np.zeros((2, 2)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_of_equally_near_neighbours_the_first_counts_and_of_equal_votes_the_lower_class_wins(chunk):
    bank = np.array([[0, 1], [3, 0], [1, 0], [0, 0], [2, 0]], np.float32)
    labels = np.array([0, 4, 2, 1, 3], np.int32)
    got = classify(bank, labels, np.array([[1, 0]], np.float32), (1, 2, 3), classes=5, temperature=0.1, chunk=chunk)
    np.testing.assert_array_equal(got[:, 0], [4, 2, 2])
    # to a query of zeros all are equally near
    got = classify(bank, labels, np.zeros((1, 2), np.float32), (1, 2, 5), classes=5, temperature=0.1, chunk=chunk)
    np.testing.assert_array_equal(got[:, 0], [0, 0, 0])
    got = classify(bank[1:], labels[1:], np.zeros((1, 2), np.float32), (1, 2, 3), classes=5, temperature=1, chunk=chunk)
    np.testing.assert_array_equal(got[:, 0], [4, 2, 1])


def test_at_a_tiny_temperature_the_nearest_decides(digits):
    one, many = classify(*digits, (1, 200), classes=10, temperature=1e-6)
    np.testing.assert_array_equal(one, many)  # exp(1e6) would overflow, and 0 / 0 decide
    assert (classify(*digits, (200,), classes=10, temperature=1.0)[0] != one).any()


def test_only_directions_matter(digits):
    bank, labels, queries = digits
    scale = np.random.default_rng(0).choice([0.25, 1.0, 8.0, 1024.0], (1500, 1)).astype(np.float32)
    got = classify(bank * scale, labels, queries * 0.125, KS, classes=10, temperature=0.07)
    np.testing.assert_array_equal(got, classify(*digits, KS, classes=10, temperature=0.07))


def test_queries_over_8_devices_get_the_answers_of_one(digits):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("data")
    args = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(digits, (whole, whole, split), strict=True)]
    function = partial(knn.classify, ks=KS, classes=10, temperature=0.07, chunk=400)
    each = jax.shard_map(function, mesh=mesh, in_specs=(whole, whole, split), out_specs=PartitionSpec(None, "data"))
    compiled = jax.jit(each).lower(*args).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute"))
    want = classify(*digits, KS, classes=10, temperature=0.07)
    np.testing.assert_array_equal(compiled(*args), want)
    np.testing.assert_array_equal(jax.jit(function)(*args), want)


def test_neighbours_are_found_without_sorting_the_bank():
    """XLA for CPUs does, and takes many times as long, where it cannot tell a top_k from a sort that is cut."""
    bank, labels, queries = jnp.zeros((1000, 8)), jnp.zeros(1000, jnp.int32), jnp.zeros((16, 8))
    classify = jax.jit(partial(knn.classify, ks=(5, 20), classes=10, temperature=0.07))
    program = classify.lower(bank, labels, queries).compile().as_text()
    assert "TopK" in program and " sort(" not in program
