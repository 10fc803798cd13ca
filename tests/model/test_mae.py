"""The autoencoder: its size and first parameters, the decoder, and the golden file of Hugging Face's model."""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.masking import Mask
from mae_jax.model.vit import SIZES, ViT

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parents[1] / "golden" / "mae.npz"  # written by tests/test_parity.py


def distance(got, want) -> float:
    """The norm of the difference, relative to that of `want`."""
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


class Golden(NamedTuple):
    """Inputs, parameters in our layout, and what Hugging Face's ViTMAEForPreTraining makes of them."""

    model: MAE
    params: dict
    images: np.ndarray  # f32[8,16,24,3]
    mask: Mask
    expected: dict  # loss and gradients by target, predictions, removed, restore

    @property
    def hidden_pixels(self) -> np.ndarray:
        removed = np.asarray(self.mask.removed, bool).reshape(8, 4, 6)
        return removed.repeat(4, axis=1).repeat(4, axis=2)[..., None]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        case = json.loads(str(file["case"]))
        tree = {key: file[key].astype(np.float32) for key in file if key != "case"}
    tree = flax.traverse_util.unflatten_dict(tree, sep="/")
    width = case["encoder"]["patch_size"] ** 2 * case["channels"]
    model = MAE(ViT(**case["encoder"]), Decoder(width, **case["decoder"]))
    mask = masking.from_scores(tree.pop("noise"), case["ratio"])
    return Golden(model, tree.pop("params"), tree.pop("images"), mask, tree)


@partial(jax.jit, static_argnums=(0, 4))
def predict(model, params, images, mask, every_patch=False):
    return model.apply({"params": params}, images, mask, every_patch)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, images, mask, encoded):
    def loss_fn(params):
        pred = model.apply({"params": params}, images, mask)
        return losses.mse(pred, masking.take(encoded, mask.hidden)).mean()

    return jax.value_and_grad(loss_fn)(params)


def test_golden_mask(golden):
    np.testing.assert_array_equal(golden.mask.removed, golden.expected["removed"])
    np.testing.assert_array_equal(golden.mask.restore, golden.expected["restore"])


def test_golden_predictions(golden):
    pred = predict(golden.model, golden.params, golden.images, golden.mask, True)
    assert distance(pred, golden.expected["predictions"]) <= 1e-4


@pytest.mark.parametrize("name", ["pixels", "normalized_pixels"])
def test_golden_loss_and_gradients(golden, name):
    encoded = targets.make(golden.model.encoder.patch_size, name=name).encode(golden.images)
    loss, gradients = loss_and_gradients(golden.model, golden.params, golden.images, golden.mask, encoded)
    want = golden.expected[name]
    assert abs(loss - want["loss"]) <= 1e-5 * want["loss"]
    for path, apart in jax.tree.leaves_with_path(jax.tree.map(distance, gradients, want["gradients"])):
        assert apart <= 1e-4, path


def test_loss_and_gradients_are_the_same_on_1_and_8_devices(golden):
    model, params, images, mask, _ = golden
    encoded = targets.normalized_pixels(4).encode(images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put((images, mask, encoded), NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    loss, gradients = loss_and_gradients(model, everywhere, *split)
    assert len(loss.sharding.device_set) == 8
    want_loss, want_gradients = loss_and_gradients(model, params, images, mask, encoded)
    assert abs(float(loss) - float(want_loss)) <= 1e-6 * float(want_loss)
    for path, apart in jax.tree.leaves_with_path(jax.tree.map(distance, gradients, want_gradients)):
        assert apart < 1e-5, path


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_predicting_hidden_patches_only_is_predicting_all_and_keeping_the_hidden(golden, depth):
    decoder = Decoder(48, width=16, depth=depth, heads=2)
    latent = jnp.asarray(np.random.default_rng(0).standard_normal((8, 1 + 6, 24)), jnp.float32)

    @jax.jit
    def both_ways(key, mask):
        variables = decoder.init(key, latent, mask, (4, 6))
        return [decoder.apply(variables, latent, mask, (4, 6), every_patch) for every_patch in (False, True)]

    hidden, every = both_ways(jax.random.key(0, impl="rbg"), golden.mask)
    assert hidden.shape == (8, 18, 48)
    assert every.shape == (8, 24, 48)
    assert distance(hidden, masking.take(every, golden.mask.hidden)) < 1e-5


def test_order_within_the_mask_changes_nothing_but_the_order_of_the_predictions(golden):
    model, params, images, mask, _ = golden
    rng = np.random.default_rng(0)
    seen, unseen = rng.permutation(6), rng.permutation(18)
    other = Mask(visible=mask.visible[:, seen], hidden=mask.hidden[:, unseen])
    one, two = (predict(model, params, images, m) for m in (mask, other))
    assert distance(two, one[:, unseen]) < 1e-5
    one, two = (predict(model, params, images, m, True) for m in (mask, other))
    assert distance(two, one) < 1e-5


def test_no_prediction_depends_on_hidden_pixels(golden):
    model, params, images, mask, _ = golden
    overwritten = np.where(golden.hidden_pixels, np.float32(np.nan), images)
    assert np.isnan(overwritten).mean() == 0.75
    one, two = (np.asarray(predict(model, params, x, mask, True)) for x in (images, overwritten))
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, two)


def test_bfloat16_keeps_float32_parameters_and_predicts_in_bfloat16(golden):
    model, params, images, mask, _ = golden
    half = MAE(model.encoder.clone(dtype="bfloat16"), model.decoder.clone(dtype="bfloat16"))
    fresh = jax.eval_shape(half.init, jax.random.key(0), images, mask)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    pred = predict(half, params, images, mask)
    assert pred.dtype == jnp.bfloat16
    assert 1e-4 < distance(pred, predict(model, params, images, mask)) < 0.03


@pytest.mark.parametrize(
    "name, patch_size, count", [("B", 16, 111_655_680), ("L", 16, 329_239_296), ("H", 14, 656_613_964)]
)
def test_model_of_the_paper_has_exactly_its_number_of_parameters(name, patch_size, count):
    decoder = Decoder(patch_size**2 * 3, width=512, depth=8, heads=16)
    model = MAE(ViT(patch_size, **SIZES[name]), decoder)
    patches = (224 // patch_size) ** 2
    mask = Mask(*(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (patches // 4, patches - patches // 4)))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, mask)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.fixture(scope="module")
def draws():
    """First parameters for 128 keys, so that even a token of 16 numbers has a distribution."""
    model = MAE(ViT(4, width=32, depth=1, heads=4), Decoder(48, width=16, depth=1, heads=2))
    images, mask = jnp.zeros((1, 16, 24, 3)), masking.from_scores(jnp.zeros((1, 24)), 0.75)
    init = jax.vmap(lambda key: model.init(key, images, mask)["params"])
    draws = jax.jit(init)(jax.random.split(jax.random.key(0, impl="rbg"), 128))  # compiles faster than the default
    return {path: np.asarray(x, np.float64) for path, x in flax.traverse_util.flatten_dict(draws).items()}


def test_every_parameter_starts_as_in_the_original(draws):
    for path, values in draws.items():
        if path[-1] in ("cls_token", "mask_token"):
            limit, deviation, scatter = math.inf, 0.02, 0.5**0.5
            assert np.abs(values).max() > 3 * deviation, path  # nothing is cut off at two deviations
        elif path[-1] == "kernel" or path[-2] == "patch_embedding":
            limit = math.sqrt(6 / sum(values.shape[1:])) if path[-1] == "kernel" else 1 / math.sqrt(4 * 4 * 3)
            deviation, scatter = limit / math.sqrt(3), 0.2**0.5
            assert np.abs(values).max() > 0.99 * limit, path
        else:
            assert path[-1] in ("scale", "bias"), path
            assert np.all(values == (path[-1] == "scale")), path
            continue
        assert np.abs(values).max() <= limit * (1 + 1e-6), path
        assert abs(values.mean()) < 5 * deviation / values.size**0.5, path
        assert abs(values.std() / deviation - 1) < 5 * scatter / values.size**0.5, path


def test_no_two_parameters_and_no_two_keys_draw_the_same(draws):
    random = [x.reshape(128, -1)[:, :8] for path, x in draws.items() if np.ptp(x)]
    assert len(random) == 2 + 2 + 2 + 4 + 4  # tokens, patch embedding, the decoder's ends, and a block each
    numbers = np.concatenate([x / np.abs(x).max() for x in random])  # without the limits, in which they do differ
    assert len(np.unique(numbers.round(4), axis=0)) == len(numbers)
