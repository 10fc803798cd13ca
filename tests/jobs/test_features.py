"""Features: of all images that can be read, in order, the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import DataError
from mae_jax.jobs.features import collect, make_extract
from mae_jax.model.vit import ViT
from mae_jax.training.sharding import make_mesh

PIXELS = {"mean": (0.3,), "std": (0.4,)}
ENCODER = ViT(patch_size=2, width=16, depth=1, heads=2)
DIGITS = Dataset(source="digits", split="train[:37]", batch_size=16, image_size=(8, 8), channels=1)


@pytest.fixture(scope="module")
def params():
    return jax.jit(ENCODER.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("pool", ["mean", "cls", "pixels"])
def test_features_are_those_of_each_image_in_order(pool, devices, params):
    # as a user would have them from load_encoder: on the first device
    first = jax.device_put(params, jax.devices()[0])
    got, labels = collect(make_extract(ENCODER, pool, PIXELS), first, DIGITS, make_mesh(data=devices))
    images, want_labels = DIGITS.opened.read(np.arange(37))
    x = mae_jax.normalize(images, **PIXELS)
    if pool == "pixels":
        want = (images.reshape(37, 64) / 255 - 0.3) / 0.4
    else:
        tokens = np.asarray(jax.jit(ENCODER.apply)({"params": params}, x))
        want = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(axis=1)
    assert (got.dtype, labels.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(labels, want_labels)


def test_a_limit_takes_the_first_images(params):
    extract, mesh = make_extract(ENCODER, "mean", PIXELS), make_mesh()
    all_of_them, labels = collect(extract, params, DIGITS, mesh)
    some, some_labels = collect(extract, params, DIGITS, mesh, limit=21)
    np.testing.assert_array_equal(some, all_of_them[:21])
    np.testing.assert_array_equal(some_labels, labels[:21])
    assert len(collect(extract, params, DIGITS, mesh, limit=1000)[0]) == 37


def test_a_bfloat16_encoder_has_float32_features(params):
    encoder = ENCODER.clone(dtype="bfloat16")
    features, _ = collect(make_extract(encoder, "mean", PIXELS), params, DIGITS, make_mesh())
    exact, _ = collect(make_extract(ENCODER, "mean", PIXELS), params, DIGITS, make_mesh())
    assert features.dtype == np.float32
    assert 0 < np.abs(features - exact).max() < 0.1


def test_what_cannot_be_read_has_no_features(params, tmp_path, caplog):
    for name, grey in (("a/1", 10), ("a/2", 20), ("b/3", 30)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), grey).save(path)
    (tmp_path / "b" / "4.png").write_bytes(b"no image")
    data = Dataset(
        source="folder", path=str(tmp_path), split="all", batch_size=8, image_size=(8, 8), channels=1, held_out="all"
    )
    features, labels = collect(make_extract(ENCODER, "pixels", PIXELS), params, data, make_mesh())
    grey = np.round((features.mean(axis=1) * 0.4 + 0.3) * 255).astype(int)
    assert dict(zip(grey.tolist(), labels.tolist(), strict=True)) == {10: 0, 20: 0, 30: 1}
    assert "4.png" in caplog.text
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image of the split 'all' can be read and has a label"):
        collect(make_extract(ENCODER, "pixels", PIXELS), params, data, make_mesh())
