"""What is to be predicted, and how it becomes pixels again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from mae_jax.config import complete, load
from mae_jax.jobs import model_checks, models, panels, pretrain
from mae_jax.model import losses, targets
from mae_jax.model.hog import hog
from mae_jax.model.losses import LOSSES
from mae_jax.model.patches import patchify
from mae_jax.model.targets import TARGETS
from mae_jax.training.sharding import batch_sharding, make_mesh

SHAPES = {  # patch size and shape [N,H,W,C]
    "square": (4, (2, 8, 8, 3)),
    "wide": (4, (2, 8, 20, 3)),
    "1 channel": (2, (3, 6, 4, 1)),
    "4 channels": (3, (1, 6, 9, 4)),
}
pytestmark = pytest.mark.usefixtures("quick_compilation")
every_target = pytest.mark.parametrize("name", TARGETS)
every_shape = pytest.mark.parametrize("patch_size, shape", SHAPES.values(), ids=SHAPES)


def random_images(shape):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.1, 2, shape) + 0.7, jnp.float32)


def target_for(name, patch_size, channels, size=5):
    """A target, of a `size` where it is fitted to anything, and what it was fitted to: patches of random images."""
    target = targets.make(patch_size, name=name)
    if not target.fit:
        return target, {}
    values = patch_size**2 * channels
    target = targets.make(patch_size, name=name, size=min(size, values))
    patches = np.random.default_rng(2).standard_normal((400, values)).astype(np.float32) + 0.7
    fitted = target.fit(patches)
    assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in target.unfitted(values).items()}
    assert all(value.dtype == np.float32 for value in fitted.values())
    return target, jax.tree.map(jnp.asarray, fitted)


def perfect(target, encoded):
    """The prediction that is sure of what was encoded."""
    return jax.vmap(lambda values: target.prediction(values, 1e6))(target.values(encoded))


# What every row of TARGETS must do


@every_target
@every_shape
def test_a_target_is_one_vector_per_patch_and_a_picture_of_it_is_encoded_the_same(name, patch_size, shape):
    (target, fitted), images = target_for(name, patch_size, shape[-1]), random_images(shape)
    n, height, width, _ = shape

    def there_and_back(images):
        encoded = target.encode(images, fitted)
        picture = target.decode(perfect(target, encoded), images, fitted) if target.decode else None
        again = encoded if picture is None else target.encode(picture, fitted)
        return encoded, target.values(encoded), picture, again

    encoded, values, picture, again = jax.jit(there_and_back)(images)
    assert encoded.shape[:2] == values.shape[:2] == (n, height // patch_size * (width // patch_size))
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()
    known = jax.eval_shape(there_and_back, jax.ShapeDtypeStruct(shape, jnp.float32))[1]
    assert known.shape == values.shape, "so that a decoder can be as wide"
    assert picture is None or (picture.shape, picture.dtype) == (shape, jnp.float32)
    np.testing.assert_allclose(again, encoded, rtol=0, atol=2e-5)


@every_target
def test_a_prediction_changes_only_its_own_patch_of_the_picture(name):
    (target, fitted), images = target_for(name, 4, 3), random_images((1, 8, 12, 3))
    if not target.decode:
        return

    @jax.jit
    def change(images):
        right = perfect(target, target.encode(images, fitted))
        wrong = right.at[0, 4].set(-right[0, 4])
        return target.decode(wrong, images, fitted) - target.decode(right, images, fitted)

    changed = np.array(change(images))
    assert np.median(np.abs(changed[0, 4:8, 4:8])) > 1e-3
    changed[0, 4:8, 4:8] = 0  # row 1, column 1 of a 2x3 grid
    assert not changed.any()


@every_target
def test_what_is_to_be_predicted_for_a_patch_is_of_that_patch(name):
    """A target that looks beyond its patch, as HOG does by a pixel, is changed the most where the image is."""
    (target, fitted), images = target_for(name, 8, 3), random_images((1, 16, 24, 3))
    values = jax.jit(lambda images: target.values(target.encode(images, fitted)))
    for row, (top, left) in enumerate(itertools.product((0, 8), (0, 8, 16))):
        patch = np.s_[:, top + 2 : top + 6, left + 2 : left + 6]
        changed = np.abs(values(images.at[patch].multiply(-3)) - values(images))[0].sum(axis=-1)
        assert changed.argmax() == row and changed.max() > 2 * np.delete(changed, row).max()


@every_target
def test_each_sample_is_encoded_by_itself_and_the_same_on_8_devices(name):
    (target, fitted), images = target_for(name, 4, 3), random_images((8, 8, 12, 3))
    encode = jax.jit(target.encode)
    encoded = encode(images, fitted)
    other = encode(images.at[1].add(images[2]), fitted)
    assert np.abs(np.asarray(other - encoded)[1]).max() > 0
    np.testing.assert_array_equal(np.delete(other, 1, axis=0), np.delete(encoded, 1, axis=0))
    mesh = make_mesh()
    split = encode(jax.device_put(images, batch_sharding(mesh)), jax.device_put(fitted, NamedSharding(mesh, P())))
    assert len(split.sharding.device_set) == 8
    np.testing.assert_allclose(split, encoded, rtol=0, atol=1e-6)


OWN = {name: targets.make(4, name=name).loss for name in TARGETS}  # each target with its own loss ...
# ... and each loss with a target that it fits
PAIRS = [*OWN.items()] + [
    (next(name for name, own in OWN.items() if losses.fits(loss, own)), loss)
    for loss in LOSSES
    if loss not in OWN.values()
]


@pytest.mark.parametrize(("name", "loss"), PAIRS)
def test_every_loss_is_of_each_sample_and_teaches(name, loss):
    (target, fitted), images = target_for(name, 4, 3), random_images((3, 8, 12, 3))
    loss, _ = losses.make(target.loss, name=loss)

    @jax.jit
    def look(images, noise):
        want = target.encode(images, fitted)
        values = target.values(want)
        pred = jax.random.normal(noise, values.shape)
        guess = jnp.broadcast_to(target.prediction(values.mean(axis=0), 3), pred.shape)
        value, pull = jax.vjp(lambda pred: loss(pred, want), pred)
        half = loss(pred.astype(jnp.bfloat16), want)
        step = pred - 1e-2 * jnp.sign(pull(jnp.ones(3))[0])
        some = pull(jnp.array([1.0, 0.0, 1.0]))[0]
        return value, half, some, loss(step, want), loss(perfect(target, want), want), loss(guess, want)

    value, half, gradient, after_a_step, of_the_right_one, of_a_guess = look(images, jax.random.key(0))
    assert value.shape == (3,)
    assert value.dtype == half.dtype == jnp.float32
    assert np.isfinite(gradient).all() and np.isfinite(of_a_guess).all()
    assert np.abs(gradient[0]).max() > 0 and not gradient[1].any()
    assert (after_a_step < value).all()
    assert (of_the_right_one < 1e-4).all()


def test_a_loss_is_the_target_s_own_on_hidden_patches_unless_a_config_says_otherwise():
    assert losses.make("cross_entropy") == (losses.token_cross_entropy, False)
    assert losses.make("l2", name="l1", patches="all") == (losses.l1, True)


# What some of them are


@pytest.mark.parametrize("name", ["pixels", "normalized_pixels", "pca"])
@every_shape
def test_decoding_what_was_encoded_gives_the_images_back(name, patch_size, shape):
    """Of PCA, with as many components as there are values."""
    (target, fitted), images = target_for(name, patch_size, shape[-1], size=10**6), random_images(shape)
    decoded = jax.jit(target.decode)(target.encode(images, fitted), images, fitted)
    np.testing.assert_allclose(decoded, images, rtol=0, atol=1e-5)


def test_pca_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    patches = (rng.standard_normal((500, 48)) @ rng.standard_normal((48, 48)) + 2).astype(np.float32)
    target, theirs = targets.make(4, name="pca", size=7), PCA(7).fit(patches.astype(np.float64))
    fitted, images = target.fit(patches), random_images((3, 8, 12, 3))
    want = theirs.transform(np.asarray(patchify(images, 4), np.float64).reshape(-1, 48))
    got = target.encode(images, fitted)
    np.testing.assert_allclose(np.asarray(got).reshape(-1, 7), want, rtol=0, atol=1e-4)
    back = target.decode(got, images, fitted)
    np.testing.assert_allclose(
        np.asarray(patchify(back, 4)).reshape(-1, 48), theirs.inverse_transform(want), rtol=0, atol=1e-4
    )


def test_the_sizes_that_no_config_says():
    assert targets.make(16, name="pca").unfitted(768)["components"].shape == (96, 768)
    assert targets.make(16, name="tokens").unfitted(768)["centroids"].shape == (512, 768)


def test_tokens_are_those_of_scikit_learn():
    patches = np.random.default_rng(0).standard_normal((1000, 12)).astype(np.float32)
    fitted = targets.make(2, name="tokens", size=20).fit(patches)
    theirs = MiniBatchKMeans(20, random_state=0, n_init=1).fit(patches)
    images = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8, 12, 3)), jnp.float32)
    target = targets.make(2, name="tokens", size=20)
    got = target.encode(images, fitted)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got.ravel(), theirs.predict(np.asarray(patchify(images, 2)).reshape(-1, 12)))
    picture = target.decode(perfect(target, got), images, fitted)
    np.testing.assert_array_equal(patchify(picture, 2), theirs.cluster_centers_[got[..., 0]])


def test_guessing_tokens_by_position_is_to_say_how_often_each_is_there():
    target = targets.tokenized(lambda images, fitted: images[:, :, 0, 0].astype(jnp.int32), 4)
    images = jnp.array([0, 0, 0, 1, 0, 2, 0, 0.0]).reshape(4, 2, 1, 1)  # of position 1: 1, 2, 0 and 0
    encoded = target.encode(images, {})
    guess = target.prediction(target.values(encoded).mean(axis=0), 4)
    np.testing.assert_allclose(np.exp(guess), np.array([[4 + 1, 1, 1, 1], [3, 2, 2, 1]]) / 8, rtol=1e-6)
    loss = losses.token_cross_entropy(jnp.broadcast_to(guess, (4, 2, 4)), encoded)
    np.testing.assert_allclose(loss, [-np.log(5 / 8 * p) / 2 for p in (3 / 8, 2 / 8, 2 / 8, 3 / 8)], rtol=1e-6)


def test_a_tokenizer_of_one_s_own_is_a_row(monkeypatch):
    brightness = lambda patch_size, size=None: targets.tokenized(  # noqa: E731
        lambda images, fitted: jnp.digitize(patchify(images, patch_size).mean(axis=-1), jnp.linspace(-1, 1, 7)), 8
    )
    monkeypatch.setitem(TARGETS, "brightness", brightness)
    config, _ = load("configs/pretrain.py:digits,tiny", ["--config.target.name=brightness", "--config.encoder.depth=1"])
    config, problems = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    assert problems + model_checks.autoencoder_problems(config) == []
    model, target = models.build(config)
    assert model.decoder.target_width == 8
    params = jax.jit(lambda key: models.init(model, config, key))(jax.random.key(0))
    batch = {"image": np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1), "weight": np.ones(2, np.float32)}
    examples = pretrain.make_draw(model, config)(batch, jax.random.key(0))
    loss, _ = jax.jit(pretrain.make_loss(model, target, config))(params, {}, examples)
    assert np.isfinite(loss).all()
    seen = batch["image"].astype(np.float32)
    drawn, _ = jax.eval_shape(panels.make_panels(model, target, config), params, batch["image"], examples["mask"], seen)
    assert drawn.shape == (2, 2, 8, 8, 1), "without a way back there is no reconstruction to be seen"
    assert panels.sheet(np.zeros(drawn.shape, np.uint8)).shape[1] == 4 + 2 * (112 + 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("target.name=mine target.size=16", ""),
        ("target.name=mine target.size=0", "config.target.size: 0 is below 1"),
        ("target.name=mine loss.name=smoothed", ""),
        ("target.name=mine loss.name=l1", "l1 is not for the target mine; use cross_entropy, smoothed, or"),
        ("target.name=of_eight target.size=8", ""),
        ("target.name=of_eight target.size=16", "config.target.size: of_eight is of 8, not 16; leave it out"),
        ("target.name=large", "config.target.name: large needs 5 values in a patch, more than the 4 here"),
        ("target.name=tokens target.size=16 loss.name=smoothed", ""),
        ("loss.name=smoothed", "smoothed is not for the target pixels; use l2, l1, smooth_l1, or"),
    ],
)
def test_rows_of_one_s_own_say_for_themselves_what_fits_them(settings, words, monkeypatch):
    tokenize = lambda images, fitted: patchify(images, 2).argmax(axis=-1)  # noqa: E731
    monkeypatch.setitem(TARGETS, "mine", lambda patch_size, size: targets.tokenized(tokenize, size or 4))
    monkeypatch.setitem(TARGETS, "of_eight", lambda patch_size, size: targets.tokenized(tokenize, 8))
    monkeypatch.setitem(TARGETS, "large", lambda patch_size, size: targets.pixels(patch_size)._replace(least=5))
    smoothed = lambda logits, tokens: losses.token_cross_entropy(0.9 * logits, tokens)  # noqa: E731
    monkeypatch.setitem(LOSSES, "smoothed", losses.Loss(smoothed, tokens=True))
    config, _ = load("configs/pretrain.py:digits,tiny", [f"--config.{setting}" for setting in settings.split()])
    config, problems = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    problems += model_checks.autoencoder_problems(config)
    assert len(problems) == bool(words) and all(words in problem for problem in problems)
    if not words and config.target.size:
        assert models.build(config)[0].decoder.target_width == config.target.size


def cell_histogram(channel, cell):
    """Histograms of oriented gradients as they are told in words, pixel by pixel: f64[H/cell,W/cell,9]."""
    height, width = channel.shape
    found = np.zeros((height // cell, width // cell, 9))
    for row, col in itertools.product(range(height), range(width)):
        down = channel[row + 1, col] - channel[row - 1, col] if 0 < row < height - 1 else 0.0
        across = channel[row, col + 1] - channel[row, col - 1] if 0 < col < width - 1 else 0.0
        angle = np.degrees(np.arctan2(down, across)) % 180
        found[row // cell, col // cell, int(angle // 20) % 9] += np.hypot(down, across) / cell**2
    return found / np.sqrt(np.square(found).sum(axis=-1, keepdims=True) + 1e-10)


@pytest.mark.parametrize(
    "patch_size, shape, cell", [(8, (2, 16, 24, 3), 4), (4, (1, 8, 12, 1), 4), (9, (1, 9, 18, 2), 9)]
)
def test_hog_is_what_it_is_in_words(patch_size, shape, cell):
    images = random_images(shape)
    got = np.asarray(jax.jit(targets.make(patch_size, name="hog").encode)(images))
    channels = np.moveaxis(np.asarray(images, np.float64), -1, 1)  # [N,C,H,W]
    want = np.stack([[cell_histogram(channel, cell) for channel in image] for image in channels])
    want = np.moveaxis(want, 1, 3)  # [N,H/cell,W/cell,C,9]
    want = patchify(want.reshape(*want.shape[:3], -1), patch_size // cell)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_hog_is_that_of_scikit_image():
    feature = pytest.importorskip("skimage.feature")
    images = random_images((2, 32, 48, 3))
    got = np.asarray(jax.jit(hog, static_argnums=1)(images, 8))
    for i, c in itertools.product(range(2), range(3)):
        channel = np.asarray(images[i, :, :, c], np.float64)
        want = feature.hog(channel, 9, (8, 8), (1, 1), "L2", feature_vector=False)[:, :, 0, 0]
        np.testing.assert_allclose(got[i, :, :, c], want, rtol=0, atol=1e-4)


def test_hog_does_not_depend_on_contrast_or_brightness():
    images = random_images((1, 16, 16, 3))
    one, other = jax.jit(lambda images: (hog(images, 8), hog(0.3 * images + 5, 8)))(images)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


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
