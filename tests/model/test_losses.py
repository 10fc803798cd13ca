"""Losses per sample, and their mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model import losses, masking


def test_mse_is_the_mean_over_patches_and_values_for_each_sample():
    rng = np.random.default_rng(0)
    pred, want = rng.standard_normal((2, 3, 5, 7))
    got = losses.mse(jnp.asarray(pred, jnp.float32), jnp.asarray(want, jnp.float32))
    assert got.shape == (3,)
    np.testing.assert_allclose(got, np.square(pred - want).mean(axis=(1, 2)), rtol=1e-6)


def test_mean_over_hidden_patches_is_the_masked_mean_of_the_original():
    rng = np.random.default_rng(0)
    pred, want = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((2, 4, 16, 7)))
    mask = masking.sample(jax.random.key(0), 4, (4, 4))
    hidden = losses.mse(masking.take(pred, mask.hidden), masking.take(want, mask.hidden))
    everywhere = np.square(np.asarray(pred) - np.asarray(want)).mean(axis=-1)
    original = (everywhere * mask.removed).sum() / mask.removed.sum()
    np.testing.assert_allclose(losses.weighted_mean(hidden, jnp.ones(4)), original, rtol=1e-6)


def test_mse_of_bfloat16_predictions_is_computed_in_float32():
    pred = jnp.full((1, 64, 64), 1.0, jnp.bfloat16)
    want = jnp.full((1, 64, 64), 1.001, jnp.float32)  # 1 in bfloat16
    got = losses.mse(pred, want)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "cross_entropy"])
def test_losses_and_their_gradients_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    pred = (2 * rng.standard_normal((2, 3, 5))).astype(np.float32)
    if name == "cross_entropy":
        want = rng.integers(0, 5, (2, 3, 1))
        theirs = lambda x: torch.nn.functional.cross_entropy(x.mT, torch.tensor(want[..., 0]), reduction="none")  # noqa: E731
    else:
        want = rng.standard_normal((2, 3, 5)).astype(np.float32)
        theirs = lambda x: getattr(torch.nn.functional, f"{name}_loss")(x, torch.tensor(want), reduction="none")  # noqa: E731
    x = torch.tensor(pred, requires_grad=True)
    expected = theirs(x).flatten(1).mean(dim=1)
    expected.sum().backward()
    got, pull = jax.vjp(lambda x: losses.LOSSES[name].of(x, jnp.asarray(want)), jnp.asarray(pred))
    np.testing.assert_allclose(got, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(2))[0], x.grad, rtol=0, atol=1e-6)


def test_cross_entropy_of_soft_targets_and_its_gradient_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((6, 10))).astype(np.float32)
    targets = rng.dirichlet(np.ones(10), 6).astype(np.float32)
    theirs = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(theirs, torch.tensor(targets), reduction="none")
    want.sum().backward()
    got, pull = jax.vjp(lambda x: losses.cross_entropy(x, jnp.asarray(targets)), jnp.asarray(logits))
    np.testing.assert_allclose(got, want.detach(), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(6))[0], theirs.grad, rtol=0, atol=1e-6)


def test_cross_entropy_is_finite_and_right_for_huge_logits():
    logits = jnp.array([[1e4, -1e4, 0.0], [1e38, 0.0, -1e38]])
    loss, pull = jax.vjp(lambda x: losses.cross_entropy(x, jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])), logits)
    np.testing.assert_array_equal(loss, [1e4, 0])
    np.testing.assert_array_equal(pull(jnp.ones(2))[0], [[1, 0, -1], [0, 0, 0]])


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    got = losses.cross_entropy(jnp.zeros((1, 1000), jnp.bfloat16), jnp.full((1, 1000), 1e-3))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.log(1000), rtol=1e-6)


@pytest.mark.parametrize(
    "weight, mean",
    [([1, 1, 1, 1], 3.75), ([1, 0, 1, 0], 2.5), ([0, 0, 0, 1], 8.0), ([0, 0, 0, 0], 0.0), ([0.25, 0, 0.25, 0], 2.5)],
)
def test_weighted_mean(weight, mean):
    values = jnp.array([1.0, 2.0, 4.0, 8.0])
    assert float(losses.weighted_mean(values, jnp.array(weight, jnp.float32))) == mean


def test_what_weighs_nothing_gives_no_gradient():
    gradient = jax.grad(losses.weighted_mean)
    values = jnp.array([1.0, 2.0, 4.0])
    np.testing.assert_array_equal(gradient(values, jnp.array([1.0, 0.0, 1.0])), [0.5, 0, 0.5])
    np.testing.assert_array_equal(gradient(values, jnp.zeros(3)), [0, 0, 0])
