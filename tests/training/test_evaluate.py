"""Sums and means over a data set are exact: whatever the padding, the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix

from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import digits
from mae_jax.training.evaluate import sums, tally, weighted_means
from mae_jax.training.sharding import batch_sharding, make_mesh

KEY = jax.random.key(7)


@pytest.fixture(params=[1, 8], ids=["1 device", "8 devices"])
def sharding(request):
    return batch_sharding(make_mesh(data=request.param))


def batches_of(values, size, sharding, padding):
    """Batches of `size`, the last one filled up with `padding` of weight 0."""
    for start in range(0, len(values), size):
        part = values[start : start + size]
        filled = np.concatenate([part, np.full((size - len(part), *values.shape[1:]), padding, values.dtype)])
        weight = (np.arange(size) < len(part)).astype(np.float32)
        yield {"x": jax.device_put(filled, sharding), "weight": jax.device_put(weight, sharding)}


@jax.jit
def measure(params, batch, key):
    return {"scaled": params * batch["x"].sum(axis=(1, 2)), "map": batch["x"]}


@pytest.mark.parametrize("padding", [0.0, 1e30, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("count", [13, 16, 3])
def test_padding_counts_for_nothing(count, padding, sharding):
    values = np.random.default_rng(0).normal(size=(count, 3, 2)).astype(np.float32)
    means, number = weighted_means(measure, jnp.float32(2.5), batches_of(values, 8, sharding, padding), KEY)
    assert number == count
    np.testing.assert_allclose(means["map"], values.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(means["scaled"], 2.5 * values.astype(np.float64).sum(axis=(1, 2)).mean(), rtol=1e-5)


def test_an_unreadable_image_in_the_middle_counts_for_nothing(sharding):
    values = np.arange(16, dtype=np.float32).reshape(16, 1, 1) ** 2
    weight = np.ones(16, np.float32)
    weight[[3, 9]] = 0
    batch = {"x": jax.device_put(values, sharding), "weight": jax.device_put(weight, sharding)}
    means, number = weighted_means(measure, jnp.float32(1), [batch], KEY)
    assert number == 14
    assert means["scaled"] == pytest.approx(np.delete(values, [3, 9]).mean(), rel=1e-6)


def test_mean_pixel_of_held_out_digits_is_that_of_the_array(sharding):
    data = Dataset(source="digits", split="test", batch_size=64, image_size=(8, 8), channels=1)
    pixels = jax.jit(lambda params, batch, key: {"mean": batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3))})
    means, number = weighted_means(pixels, None, data.once(sharding), KEY)
    source = digits(split="test")
    images, _ = source.read(np.arange(source.size))
    assert number == source.size == 359, "which 64 does not divide"
    assert means["mean"] == pytest.approx(images.astype(np.float64).mean(), rel=1e-6)


@pytest.mark.parametrize("weights", [[], [0.0] * 8], ids=["no batch", "no weight"])
def test_nothing_to_measure_gives_no_means(weights, sharding):
    x = np.ones((8, 1, 1), np.float32)
    batches = [{"x": jax.device_put(x, sharding), "weight": jax.device_put(np.float32(weights), sharding)}] * bool(
        weights
    )
    assert weighted_means(measure, jnp.float32(1), batches, KEY) == ({}, 0)


def test_randomness_is_that_of_the_batch_number_and_the_same_at_every_call():
    noise = jax.jit(lambda params, batch, key: {"noise": jax.random.uniform(key, (4,))})
    batches = [{"weight": jnp.ones(4)}] * 3
    first, _ = weighted_means(noise, None, batches, KEY)
    again, _ = weighted_means(noise, None, batches, KEY)
    want = np.mean([jax.random.uniform(jax.random.fold_in(KEY, i), (4,)) for i in range(3)])
    assert first["noise"] == again["noise"] == pytest.approx(want, rel=1e-6)


def test_measure_is_compiled_once(sharding):
    fresh = jax.jit(lambda params, batch, key: {"x": batch["x"]})
    values = np.ones((20, 1, 1), np.float32)
    for _ in range(2):
        weighted_means(fresh, None, batches_of(values, 8, sharding, 0.0), KEY)
    assert fresh._cache_size() == 1


COUNT = 37  # 8 does not divide it


def classified(classes, seed=0):
    """Logits f32[37,C] with many ties, and labels i32[37], a few of which are missing."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (COUNT, classes)).astype(np.float32)
    labels = rng.integers(0, classes, COUNT).astype(np.int32)
    labels[[0, 5, 36]] = -1
    return logits, labels


def classified_batches(logits, labels, sharding, padding=np.nan, unreadable=()):
    """Batches of 8, the last one padded; what weighs nothing has a label and logits all the same."""
    for start in range(0, COUNT, 8):
        index = np.minimum(np.arange(start, start + 8), COUNT - 1)
        weight = (np.arange(start, start + 8) < COUNT) & ~np.isin(index, unreadable)
        batch = {
            "logits": np.where(weight[:, None], logits[index], np.float32(padding)),
            "label": np.where(weight, labels[index], 1).astype(np.int32),
            "weight": weight.astype(np.float32),
        }
        yield jax.device_put(batch, sharding)


count_right = jax.jit(lambda scale, batch: tally(scale * batch["logits"], batch["label"], batch["weight"]))


@pytest.mark.parametrize("padding", [0.0, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 5, 9])
def test_tally_is_the_formulas_in_numpy(classes, padding, sharding):
    logits, labels = classified(classes)
    total = sums(count_right, jnp.float32(2), classified_batches(logits, labels, sharding, padding, (7, 20)))
    kept = labels >= 0
    kept[[7, 20]] = False
    truth, logits = labels[kept], 2 * logits[kept].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")  # of equal logits, the first class is the higher one
    assert {name: (value.dtype, value.shape) for name, value in total.items()} == {
        "loss": (np.float64, ()),
        "top5": (np.float64, ()),
        "confusion": (np.float64, (classes, classes)),
    }
    np.testing.assert_array_equal(total["confusion"], confusion_matrix(truth, order[:, 0], labels=range(classes)))
    assert total["confusion"].sum() == kept.sum() == COUNT - 5
    assert total["top5"] == (order[:, :5] == truth[:, None]).any(axis=1).sum()
    assert classes > 5 or total["top5"] == kept.sum(), "with five guesses, one of up to five classes is always found"
    assert total["loss"] == pytest.approx(-log_softmax(logits, axis=1)[np.arange(len(truth)), truth].sum(), rel=1e-6)


def test_of_equal_logits_the_first_class_is_the_guess():
    logits = np.zeros((7, 7), np.float32)
    total = jax.device_get(jax.jit(tally)(logits, np.arange(7), np.ones(7, np.float32)))
    assert total["confusion"][:, 0].tolist() == [1] * 7 and total["confusion"].sum() == 7
    assert total["top5"] == 5, "classes 0 to 4 are the five guesses"


def test_nothing_with_a_label_gives_zeros_and_no_batch_nothing(sharding):
    logits, _ = classified(3)
    total = sums(count_right, jnp.float32(1), classified_batches(logits, np.full(COUNT, -1), sharding))
    assert {name: value.sum() for name, value in total.items()} == {"loss": 0, "top5": 0, "confusion": 0}
    assert sums(count_right, jnp.float32(1), []) == {}


def test_sums_are_exact_where_float32_would_not_be():
    """A count beyond 2**24 does not stand still."""
    batches = [{"count": np.float32(2**24)}, *[{"count": np.float32(1)}] * 3]
    assert sums(lambda scale, batch: {"n": scale * batch["count"]}, np.float32(1), batches) == {"n": 2**24 + 3}
