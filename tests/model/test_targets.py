"""What is to be predicted, and how it becomes pixels again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model import targets
from mae_jax.model.patches import patchify
from mae_jax.model.targets import TARGETS

SHAPES = {  # patch size and shape [N,H,W,C]
    "square": (4, (2, 8, 8, 3)),
    "wide": (4, (2, 8, 20, 3)),
    "1 channel": (2, (3, 6, 4, 1)),
    "4 channels": (3, (1, 6, 9, 4)),
}
every_target = pytest.mark.parametrize("name", TARGETS)
every_shape = pytest.mark.parametrize("patch_size, shape", SHAPES.values(), ids=SHAPES)


def random_images(shape):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.1, 2, shape) + 0.7, jnp.float32)


@every_target
@every_shape
def test_a_target_is_one_vector_per_patch_of_a_width_known_from_shapes(name, patch_size, shape):
    target = targets.make(patch_size, name=name)
    n, height, width, _ = shape
    encoded = jax.jit(target.encode)(random_images(shape))
    assert encoded.shape[:2] == (n, height // patch_size * (width // patch_size))
    assert encoded.dtype == jnp.float32
    assert np.isfinite(encoded).all()
    assert jax.eval_shape(target.encode, jax.ShapeDtypeStruct(shape, jnp.float32)).shape == encoded.shape


@every_target
@every_shape
def test_decoding_what_was_encoded_gives_the_images_back(name, patch_size, shape):
    target, images = targets.make(patch_size, name=name), random_images(shape)
    decoded = jax.jit(target.decode)(target.encode(images), images)
    assert decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded, images, rtol=0, atol=1e-5)


@every_target
def test_a_prediction_changes_only_its_own_patch_of_the_decoded_image(name):
    target, images = targets.make(4, name=name), random_images((1, 8, 12, 3))
    encoded = target.encode(images)
    changed = np.array(target.decode(encoded.at[0, 4].add(1.0), images) - target.decode(encoded, images))
    assert np.abs(changed[0, 4:8, 4:8]).min() > 1e-3
    changed[0, 4:8, 4:8] = 0  # row 1, column 1 of a 2x3 grid
    assert not changed.any()


@every_target
def test_each_sample_and_each_patch_is_encoded_by_itself(name):
    target, images = targets.make(4, name=name), random_images((2, 8, 12, 3))
    other = images.at[1].add(3.0).at[0, :4, :4].multiply(2.0)
    changed = np.abs(np.asarray(target.encode(other) - target.encode(images))).max(axis=-1) > 0
    assert not changed[0, 1:].any()


def test_pixels_are_the_patches_themselves():
    images = random_images((2, 8, 12, 3))
    np.testing.assert_array_equal(targets.pixels(4).encode(images), patchify(images, 4))


@every_shape
def test_normalized_pixels_have_mean_0_and_unbiased_variance_1_over_the_whole_patch(patch_size, shape):
    images = random_images(shape)
    encoded = np.asarray(targets.normalized_pixels(patch_size).encode(images), np.float64)
    patches = np.asarray(patchify(images, patch_size), np.float64)
    values = patches.shape[-1]
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(
        encoded, (patches - patches.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6), atol=5e-6
    )
    np.testing.assert_allclose(np.square(encoded).sum(axis=-1), values - 1, rtol=1e-3)  # `values` if it were biased


def test_normalized_pixels_add_an_epsilon_of_1e_6_to_the_variance():
    patch = np.resize([-1e-3, 1e-3], 16) * np.sqrt(15 / 16)  # its unbiased variance is 1e-6
    encoded = targets.normalized_pixels(4).encode(jnp.asarray(patch.reshape(1, 4, 4, 1), jnp.float32))
    np.testing.assert_allclose(np.abs(encoded), np.sqrt(15 / 16 / 2), rtol=1e-4)


def test_a_patch_of_one_colour_is_zero_and_comes_back_whole():
    target = targets.normalized_pixels(4)
    images = jnp.full((1, 8, 8, 3), 0.3, jnp.float32)
    np.testing.assert_allclose(target.encode(images), 0, atol=1e-4)  # rounding of the mean, over sqrt(1e-6)
    np.testing.assert_allclose(target.decode(jnp.zeros((1, 4, 48)), images), 0.3, rtol=1e-6)


def test_decoding_gives_the_mean_and_deviation_of_the_true_patch_to_any_prediction():
    images = random_images((1, 8, 8, 3))
    target = targets.normalized_pixels(4)
    pred = np.random.default_rng(1).standard_normal((1, 4, 48)).astype(np.float32)
    got = np.asarray(patchify(target.decode(jnp.asarray(pred), images), 4))
    patches = np.asarray(patchify(images, 4), np.float64)
    want = pred * np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6) + patches.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
