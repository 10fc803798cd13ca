"""The autoencoder: its size and first parameters, the decoders, and the golden file of Hugging Face's model."""

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
from mae_jax.model.layers import BLOCKS
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.masking import Mask
from mae_jax.model.positions import sincos_positions
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


DECODERS = {  # but for its target and width
    "one block": {"depth": 1},
    **{kind: {"depth": 2, "kind": kind} for kind in BLOCKS},
    "mask tokens in the encoder": {"depth": 2, "mask_tokens": "encoder"},
    "linear head": {"depth": 0, "mask_tokens": "encoder"},
}
every_decoder = pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)


def decoded_in_three_ways(options, mask, part, latent):
    """Predictions for the hidden patches, for all of them, and for those of `part`, a mask that decodes some."""
    decoder = Decoder(48, width=16, heads=2, **options)
    latent = latent[:, : None if decoder.mask_tokens == "encoder" else 7]

    @jax.jit
    def in_three_ways(key, mask, part):
        variables = decoder.init(key, latent, mask, (4, 6))
        ways = ((mask, False), (mask, True), (part, False))
        return [decoder.apply(variables, latent, m, (4, 6), every_patch) for m, every_patch in ways]

    return in_three_ways(jax.random.key(0, impl="rbg"), mask, part)


@every_decoder
def test_predicting_some_patches_is_predicting_all_and_keeping_these(golden, options):
    latent = jnp.asarray(np.random.default_rng(0).standard_normal((8, 25, 24)), jnp.float32)
    part = golden.mask.replace(skipped=13)
    hidden, every, some = decoded_in_three_ways(options, golden.mask, part, latent)
    assert (hidden.shape, every.shape, some.shape) == ((8, 18, 48), (8, 24, 48), (8, 5, 48))
    assert distance(hidden, masking.take(every, golden.mask.hidden)) < 1e-5
    assert distance(some, hidden[:, 13:]) < 1e-5


def test_a_cross_decoder_lets_no_mask_token_see_another(golden):
    """Only a patch's own position and the latents count: gone are all others, or they are other ones."""
    latent = jnp.asarray(np.random.default_rng(0).standard_normal((8, 7, 24)), jnp.float32)
    alone = Mask(golden.mask.visible, golden.mask.hidden[:, -1:])  # the rest of the grid is nobody's
    decoder = Decoder(48, width=16, depth=2, heads=2, kind="cross")

    @jax.jit
    def both(key, latent):
        variables = decoder.init(key, latent, alone, (4, 6))
        predict = lambda latent, mask: decoder.apply(variables, latent, mask, (4, 6))  # noqa: E731
        one, pull = jax.vjp(lambda latent: predict(latent, alone), latent)
        return one, predict(latent, golden.mask), pull(jnp.ones_like(one))[0]

    one, all_of_them, gradient = both(jax.random.key(0, impl="rbg"), latent)
    assert distance(one, all_of_them[:, -1:]) < 1e-5
    assert np.abs(gradient).max(axis=-1).min() > 0, "all latents count, that of cls too"


def test_a_linear_head_is_one_layer_and_no_more(golden):
    model, _, images, mask, _ = golden
    linear = MAE(model.encoder, Decoder(48, width=16, depth=0, heads=2, mask_tokens="encoder"))
    params = jax.jit(linear.init)(jax.random.key(0, impl="rbg"), images, mask)["params"]
    assert jax.tree.map(jnp.shape, params["decoder"]) == {"head": {"kernel": (24, 48), "bias": (48,)}}
    encoder = jax.eval_shape(model.encoder.init, jax.random.key(0), images)["params"]
    assert params["encoder"].keys() == encoder.keys(), "it has no mask token"
    assert params["mask_token"].shape == (1, 1, 24)
    everything = masking.from_scores(jnp.zeros((8, 24)), 0.0)
    seeing = MAE(model.encoder, linear.decoder.clone(mask_tokens="decoder"))  # all patches: it needs no mask token
    pred = predict(seeing, {k: params[k] for k in ("encoder", "decoder")}, images, everything, True)
    tokens = jax.jit(model.encoder.apply)({"params": params["encoder"]}, images)[:, 1:]
    head = params["decoder"]["head"]
    assert distance(pred, tokens @ head["kernel"] + head["bias"][None, None]) < 1e-5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"depth": 0}, "linear head"),
        ({"kind": "cross", "mask_tokens": "encoder"}, "mask tokens of its own"),
        ({"kind": "crss"}, "kind is one of self, cross, not 'crss'"),
        ({"mask_tokens": "nobody"}, "one of decoder, encoder, not 'nobody'"),
    ],
)
def test_decoders_that_cannot_be_are_refused(golden, options, words):
    decoder = Decoder(48, **{"width": 16, "depth": 1, "heads": 2, **options})
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(MAE(golden.model.encoder, decoder).init, jax.random.key(0), golden.images, golden.mask)


def in_pytorch(torch, model, params, images, mask):
    """The predictions of `model` for `mask.decoded`, written down once more, on the golden grid of 4x6."""
    functional, params = torch.nn.functional, jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params)
    encoder, decoder, n = model.encoder, model.decoder, len(images)
    visible, hidden, decoded = (torch.from_numpy(np.array(x)).long() for x in (mask.visible, mask.hidden, mask.decoded))

    def dense(p, x):
        return functional.linear(x, p["kernel"].T, p["bias"])

    def norm(p, x):
        return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)

    def attention(heads, out, *projected):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected)
        return dense(out, functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def block(p, x, heads, others=None):
        y, p_attention = norm(p["attention_norm"], x), p["attention"]
        if others is None:
            projected = dense(p_attention["qkv"], y).chunk(3, -1)
        else:
            projected = dense(p_attention["q"], y), *dense(p_attention["kv"], others).chunk(2, -1)
        x = x + attention(heads, p_attention["out"], *projected)
        return x + dense(p["mlp"]["out"], functional.gelu(dense(p["mlp"]["in"], norm(p["mlp_norm"], x))))

    table = lambda width: torch.from_numpy(sincos_positions((4, 6), width))  # noqa: E731
    p = params["encoder"]
    x = images.reshape(n, 4, 4, 6, 4, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, 24, -1)
    x = dense(p["patch_embedding"], torch.from_numpy(x))  # [N,24,D], hidden patches too
    if "mask_token" in params:
        removed = torch.zeros(n, 24, 1).scatter(1, hidden[:, :, None], 1.0)
        x = removed * params["mask_token"] + (1 - removed) * x + table(encoder.width)
    else:
        x = (x + table(encoder.width))[torch.arange(n)[:, None], visible]
    x = torch.cat([p["cls_token"].expand(n, 1, -1), x], dim=1)
    for i in range(encoder.depth):
        x = block(p[f"block_{i}"], x, encoder.heads)
    x, p = norm(p["norm"], x), params["decoder"]
    if decoder.kind == "cross":
        x, latent = p["mask_token"] + table(decoder.width)[decoded], x
        for i in range(decoder.depth):
            x = block(p[f"block_{i}"], x, decoder.heads, latent)
    else:  # all patches in the order of the grid
        if decoder.depth:
            x = dense(p["embedding"], x)
            x[:, 1:] += table(decoder.width)
        for i in range(decoder.depth):
            x = block(p[f"block_{i}"], x, decoder.heads)
        x = x[:, 1:][torch.arange(n)[:, None], decoded]
    return dense(p["head"], norm(p["norm"], x) if decoder.depth else x)


@pytest.mark.parametrize("name", ["cross", "mask tokens in the encoder", "linear head"])
def test_predictions_are_those_of_pytorch_and_hidden_pixels_have_no_gradient(golden, name):
    torch = pytest.importorskip("torch")
    model = MAE(golden.model.encoder, Decoder(48, width=16, heads=2, **DECODERS[name]))
    images, mask = golden.images, golden.mask.replace(skipped=7)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, mask)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * max(x.shape[0], 4) ** -0.5, shapes)

    def loss_fn(params, images):
        pred = model.apply({"params": params}, images, mask)
        return jnp.square(pred).mean(), pred

    (_, pred), gradient = jax.jit(jax.value_and_grad(loss_fn, 1, has_aux=True))(params, images)
    assert distance(pred, in_pytorch(torch, model, params, images, mask).numpy()) < 1e-5
    assert not np.asarray(gradient)[np.broadcast_to(golden.hidden_pixels, images.shape)].any()


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
