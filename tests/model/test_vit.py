"""The encoder: its sizes, what it sees, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from mae_jax.model import masking
from mae_jax.model.layers import LayerNorm
from mae_jax.model.positions import resize_positions, sincos_positions
from mae_jax.model.vit import SIZES, ViT

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Patch size and trainable parameters of the encoder on 3 channels: those of timm without its head and positions.
COUNTS = {
    "Ti": (16, 5_486_592),
    "S": (16, 21_590_016),
    "B": (16, 85_647_360),
    "L": (16, 303_099_904),
    "H": (14, 630_435_840),
}
GRID = (4, 6)
ENCODER = ViT(patch_size=4, width=32, depth=2, heads=4)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 24, 3)), jnp.float32)


@pytest.fixture(scope="module")
def mask():
    return masking.sample(jax.random.key(1), 3, GRID)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(ENCODER.init)(jax.random.key(0, impl="rbg"), images)["params"]  # compiles faster than the default


encode = jax.jit(lambda params, images, visible=None: ENCODER.apply({"params": params}, images, visible))


def test_every_size_has_its_count_here():
    assert list(COUNTS) == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_encoder_has_exactly_its_number_of_parameters(name):
    patch_size, count = COUNTS[name]
    encoder = ViT(patch_size, **SIZES[name])
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_tokens_are_cls_and_then_the_patches_seen(params, images, mask):
    assert encode(params, images, mask.visible).shape == (3, 1 + 6, 32)
    assert encode(params, images).shape == (3, 1 + 24, 32)


@pytest.mark.parametrize("value", [0.0, 1e9, np.nan, np.inf])
def test_hidden_pixels_leave_no_trace_in_the_output(params, images, mask, value):
    hidden = np.repeat(np.repeat(mask.removed.reshape(3, *GRID), 4, axis=1), 4, axis=2) > 0
    assert hidden.mean() == 0.75
    overwritten = jnp.where(hidden[..., None], value, images)
    want = np.asarray(encode(params, images, mask.visible))
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(encode(params, overwritten, mask.visible), want)


def test_every_visible_pixel_counts(params, images, mask):
    gradient = jax.jit(jax.grad(lambda images: jnp.abs(encode(params, images, mask.visible)).sum()))(images)
    hidden = np.repeat(np.repeat(mask.removed.reshape(3, *GRID), 4, axis=1), 4, axis=2) > 0
    np.testing.assert_array_equal(np.asarray(gradient != 0).all(axis=-1), ~hidden)


def test_seeing_all_patches_in_order_is_seeing_the_whole_image(params, images):
    everything = jnp.tile(jnp.arange(24), (3, 1))
    np.testing.assert_allclose(encode(params, images, everything), encode(params, images), rtol=0, atol=1e-6)


def test_order_of_the_visible_patches_is_only_the_order_of_the_tokens(params, images, mask):
    order = np.random.default_rng(0).permutation(6)
    tokens, permuted = (encode(params, images, mask.visible[:, o]) for o in (np.arange(6), order))
    np.testing.assert_allclose(permuted[:, 0], tokens[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(permuted[:, 1:], tokens[:, 1:][:, order], rtol=0, atol=1e-5)


def test_each_sample_is_encoded_by_itself(params, images, mask):
    other = images.at[1:].multiply(3.0)
    tokens, changed = encode(params, images, mask.visible), encode(params, other, mask.visible)
    np.testing.assert_allclose(changed[0], tokens[0], rtol=0, atol=1e-6)
    assert np.abs(changed[1:] - tokens[1:]).max() > 1e-2


def test_equal_patches_are_told_apart_by_where_they_are(params):
    tokens = np.asarray(encode(params, jnp.ones((1, 16, 24, 3))))[0, 1:]
    apart = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)
    assert apart[~np.eye(24, dtype=bool)].min() > 1e-2


@pytest.mark.parametrize("size", [(8, 8), (12, 40)])
def test_one_set_of_parameters_serves_images_of_any_size(params, size):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32)
    patches = size[0] * size[1] // 16
    tokens = encode(params, images)
    assert tokens.shape == (2, 1 + patches, 32)
    everything = jnp.tile(jnp.arange(patches), (2, 1))
    np.testing.assert_allclose(encode(params, images, everything), tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_any_number_of_channels(channels):
    params = jax.eval_shape(ENCODER.init, jax.random.key(0), jnp.zeros((1, 8, 8, channels)))["params"]
    assert params["patch_embedding"]["kernel"].shape == (16 * channels, 32)


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="18x16 does not divide into patches of 4"):
        jax.eval_shape(ENCODER.init, jax.random.key(0), jnp.zeros((1, 18, 16, 3)))


def test_bfloat16_gives_bfloat16_tokens_close_to_those_of_float32_from_float32_parameters(params, images, mask):
    half = ENCODER.clone(dtype="bfloat16")
    fresh = jax.eval_shape(half.init, jax.random.key(0), images)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    tokens = jax.jit(half.apply)({"params": params}, images, mask.visible)
    assert tokens.dtype == jnp.bfloat16
    want = np.asarray(encode(params, images, mask.visible))
    error = np.linalg.norm(tokens.astype(jnp.float32) - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.02


LEARNED = ENCODER.clone(positions="learned")
encode_learned = jax.jit(lambda params, images, visible=None: LEARNED.apply({"params": params}, images, visible))


@pytest.fixture(scope="module")
def learned(images):
    return jax.jit(LEARNED.init)(jax.random.key(0, impl="rbg"), images)["params"]


def test_learned_positions_begin_as_the_fixed_ones_with_zeros_for_cls(params, learned, images, mask):
    rest, positions = {**learned}, learned["positions"]
    del rest["positions"]
    jax.tree.map(np.testing.assert_array_equal, rest, params)
    assert positions.shape == (1, 25, 32)
    assert not positions[:, 0].any()
    np.testing.assert_array_equal(positions[0, 1:], sincos_positions(GRID, 32))
    for visible in (None, mask.visible):
        want = encode(params, images, visible)
        np.testing.assert_allclose(encode_learned(learned, images, visible), want, rtol=0, atol=1e-6)


def test_learned_positions_get_gradients_where_there_are_tokens(learned, images, mask):
    one, visible = images[:1], mask.visible[:1]
    total = lambda params: jnp.square(encode_learned(params, one, visible) - 0.1).sum()  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(total))(learned)["positions"])[0]
    assert (gradient != 0).any(axis=1).tolist() == [True, *(mask.removed[0] == 0).tolist()]


def test_learned_positions_are_of_one_size_and_can_be_resized(learned):
    images = jnp.zeros((1, 20, 12, 3))
    with pytest.raises(ScopeParamShapeError):
        jax.eval_shape(encode_learned, learned, images)
    resized = {**learned, "positions": resize_positions(learned["positions"], GRID, (5, 3))}
    assert jax.eval_shape(encode_learned, resized, images).shape == (1, 16, 32)


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="one of sincos, learned, relative, rotary, none, not 'rotating'"):
        jax.eval_shape(ENCODER.clone(positions="rotating").init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_without_final_norm_tokens_are_those_it_would_have_normalised(params, images):
    raw = ENCODER.clone(final_norm=False)
    fresh = jax.eval_shape(raw.init, jax.random.key(0), images)["params"]
    assert params.keys() - fresh.keys() == {"norm"}
    tokens = jax.jit(raw.apply)({"params": {name: params[name] for name in fresh}}, images)
    got = LayerNorm().apply({"params": params["norm"]}, tokens)
    np.testing.assert_allclose(got, encode(params, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_drop_path_rises_linearly_from_0_in_the_first_block(depth):
    encoder, n = ViT(patch_size=4, width=8, depth=depth, heads=2, drop_path=0.3), 20_000
    paths = np.asarray(encoder.draw_paths(jax.random.key(0), n))
    assert paths.shape == (n, depth, 2) and paths.dtype == np.float32
    for i, rate in enumerate(np.linspace(0, 0.3, depth)):
        np.testing.assert_allclose(paths[:, i].max(), 1 / (1 - rate), rtol=1e-6)
        np.testing.assert_allclose((paths[:, i] == 0).mean(axis=0), rate, rtol=0, atol=4 * np.sqrt(0.25 / n))
    assert (paths[:, -1, 0] != paths[:, -1, 1]).any() == (depth > 1), "each branch by itself"


def test_drop_path_acts_only_where_paths_are_given(params, images):
    dropping = ENCODER.clone(drop_path=0.5)
    apply = jax.jit(lambda paths: dropping.apply({"params": params}, images, paths=paths))
    np.testing.assert_allclose(apply(None), encode(params, images), rtol=0, atol=1e-5)
    one, same, other = (apply(dropping.draw_paths(jax.random.key(seed), len(images))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    assert ENCODER.draw_paths(jax.random.key(0), 3) is None


def test_leaving_a_branch_out_is_doing_without_it(params, images):
    """Each sample by itself, in the block that its paths are of."""
    depth = ENCODER.depth
    paths = np.ones((len(images), depth, 2), np.float32)
    paths[0, depth - 1] = 0
    blocks = {name: leaf for name, leaf in params.items() if name != f"block_{depth - 1}"}
    shorter = ENCODER.clone(depth=depth - 1)
    got = jax.jit(lambda paths: ENCODER.apply({"params": params}, images, paths=paths))(paths)
    without = jax.jit(lambda: shorter.apply({"params": blocks}, images))()
    np.testing.assert_allclose(got[0], without[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1:], encode(params, images)[1:], rtol=0, atol=1e-5)
