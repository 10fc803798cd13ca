"""Patches and their order."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model.patches import denormalize, grid_of, normalize, patchify, unpatchify

IMAGES = {  # patch size and shape [N,H,W,C]
    "square": (4, (2, 8, 8, 3)),
    "wide": (4, (2, 8, 20, 3)),
    "tall, 1 channel": (3, (2, 12, 6, 1)),
    "4 channels": (2, (3, 6, 4, 4)),
    "one patch": (4, (1, 4, 4, 3)),
    "patches of a pixel": (1, (2, 3, 5, 2)),
}


@pytest.mark.parametrize("patch_size, shape", IMAGES.values(), ids=IMAGES)
def test_patches_run_row_by_row_and_hold_row_column_channel(patch_size, shape):
    n, height, width, channels = shape
    images = np.arange(math.prod(shape)).reshape(shape)
    patches = np.asarray(patchify(jnp.asarray(images), patch_size))
    cols = width // patch_size
    assert patches.shape == (n, height // patch_size * cols, patch_size**2 * channels)
    for i, row, column, channel in np.ndindex(*shape):
        patch = row // patch_size * cols + column // patch_size
        inside = (row % patch_size * patch_size + column % patch_size) * channels + channel
        assert patches[i, patch, inside] == images[i, row, column, channel]


@pytest.mark.parametrize("patch_size, shape", IMAGES.values(), ids=IMAGES)
def test_unpatchify_inverts_patchify(patch_size, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    patches = patchify(jnp.asarray(images), patch_size)
    assert patches.dtype == np.uint8
    back = unpatchify(patches, patch_size, shape[1:3])
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)


@pytest.mark.parametrize("size, patch_size", [((8, 9), 4), ((9, 8), 4), ((3, 3), 4)])
def test_images_that_do_not_divide_are_refused(size, patch_size):
    for divide in (
        lambda: grid_of(size, patch_size),
        lambda: patchify(jnp.zeros((1, *size, 3)), patch_size),
        lambda: unpatchify(jnp.zeros((1, 4, 48)), patch_size, size),
    ):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} does not divide into patches of {patch_size}"):
            divide()


def test_grid_is_rows_then_columns():
    assert grid_of((8, 20), 4) == (2, 5)


def test_normalize_takes_each_channel_s_own_mean_and_deviation():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = normalize(jnp.asarray(images), mean=mean, std=std)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (images / 255 - np.array(mean)) / np.array(std), rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_denormalize_inverts_normalize_for_every_value(channels):
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = np.concatenate([np.roll(values, c, axis=1) for c in range(channels)], axis=-1)
    pixels = {"mean": np.linspace(0.1, 0.9, channels), "std": np.linspace(0.5, 0.01, channels)}
    back = denormalize(normalize(jnp.asarray(images), **pixels), **pixels)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, images)


def test_denormalize_rounds_and_clips():
    values = jnp.array([-3.0, -0.001, 10.4 / 255, 10.6 / 255, 1.001, 7.0]).reshape(1, 1, 6, 1)
    assert denormalize(values, mean=(0.0,), std=(1.0,)).ravel().tolist() == [0, 0, 10, 11, 255, 255]
