"""Means over a data set are exact: whatever the padding, the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import digits
from mae_jax.training.evaluate import weighted_means
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
