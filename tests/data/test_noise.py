"""Noise on the pixels that the encoder sees, and on nothing else."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from mae_jax.config import complete, load
from mae_jax.data.noise import add_noise
from mae_jax.jobs import models, panels, pretrain
from mae_jax.model import masking
from mae_jax.model.patches import normalize
from mae_jax.training.sharding import batch_sharding, make_mesh

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)


def made(*overrides):
    """A config of pre-training, its model and target."""
    config, _ = load("configs/pretrain.py:digits,tiny", ["--config.encoder.depth=1", *overrides])
    config, problems = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    assert not problems
    return config, *models.build(config)


@pytest.mark.parametrize("std", [0.1, 2.0])
def test_noise_is_normal_and_of_the_deviation_asked_for(std):
    images = np.random.default_rng(0).normal(size=(4, 40, 40, 3)).astype(np.float32)
    noise = (add_noise(KEY, images, std=std) - images) / std
    assert noise.dtype == np.float32
    assert stats.kstest(np.ravel(noise), stats.norm.cdf).pvalue > 0.001
    assert add_noise(KEY, images) is images


@pytest.mark.parametrize("mask", ["random", "most_attended"])
def test_nothing_is_drawn_where_there_is_no_noise(mask):
    config, model, _ = made(f"--config.mask.name={mask}")
    drawn = pretrain.make_draw(model, config)({"image": IMAGES}, KEY)
    assert drawn.keys() == {"image", "mask" if mask == "random" else "noise"}
    if mask == "random":
        want = masking.sample(KEY, 16, (4, 4), **config.mask)
        np.testing.assert_array_equal(drawn["mask"].visible, want.visible, "masks are those that they always were")


def test_noise_is_the_same_on_1_and_8_devices_and_another_in_each_image_and_step():
    config, model, _ = made("--config.noise.std=0.5")

    def seen(devices, key):
        batch = {"image": jax.device_put(IMAGES, batch_sharding(make_mesh(data=devices)))}
        drawn = jax.device_get(jax.jit(pretrain.make_draw(model, config))(batch, key))
        np.testing.assert_array_equal(drawn["image"], IMAGES)
        return drawn["seen"] - normalize(IMAGES, **config.pixels)

    one, eight, later = seen(1, KEY), seen(8, KEY), seen(8, jax.random.key(4))
    np.testing.assert_array_equal(one, eight)
    assert abs(one.std() - 0.5) < 0.05
    assert abs(np.corrcoef(one.reshape(16, -1)) - np.eye(16)).max() < 0.6
    assert abs(np.corrcoef(one.ravel(), later.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("mask", ["random", "most_attended"])
def test_the_encoder_sees_noise_and_the_clean_image_is_predicted(mask):
    config, model, target = made("--config.noise.std=0.5", f"--config.mask.name={mask}")
    params = models.init(model, config, KEY)
    masked = pretrain.with_mask(model, config, params, pretrain.make_draw(model, config)({"image": IMAGES}, KEY))
    pred, want = pretrain.predict(model, target, config, params, masked)
    clean = normalize(IMAGES, **config.pixels)
    np.testing.assert_array_equal(want, masking.take(target.encode(clean, {}), masked["mask"].hidden))
    np.testing.assert_array_equal(pred, model.apply({"params": params}, masked["seen"], masked["mask"]))
    assert np.abs(pred - model.apply({"params": params}, clean, masked["mask"])).max() > 1e-3


def test_pictures_show_what_the_encoder_sees():
    config, model, target = made("--config.noise.std=0.5")
    params = models.init(model, config, KEY)

    def drawn(std):
        other = ConfigDict({**config, "noise": {"std": std}})
        mask, seen = panels.sample(model, other, params, IMAGES, KEY)
        shown, loss = panels.make_panels(model, target, other)(params, IMAGES, mask, seen)
        return np.asarray(shown), np.asarray(loss)

    noisy, loss = drawn(0.5)
    np.testing.assert_array_equal(noisy[:, 0], IMAGES)
    visible = noisy[:, 1] != panels.GREY
    assert (noisy[:, 1] != IMAGES)[visible].mean() > 0.9
    clean, clean_loss = drawn(0.0)
    visible = clean[:, 1] != panels.GREY
    np.testing.assert_array_equal(clean[:, 1][visible], IMAGES[visible])
    assert not np.array_equal(loss, clean_loss)
