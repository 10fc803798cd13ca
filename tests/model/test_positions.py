"""Where patches sit: every kind keeps to the mask, and is the formula it is named after."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mae_jax.model import masking, positions
from mae_jax.model.layers import attend
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.masking import Mask
from mae_jax.model.positions import POSITIONS, RESIZE, resize_biases, resize_positions, sincos_positions
from mae_jax.model.vit import ViT

pytestmark = pytest.mark.usefixtures("quick_compilation")
every_kind = pytest.mark.parametrize("kind", POSITIONS)
GRID = (3, 4)


def encoder_of(kind):
    return ViT(patch_size=2, width=16, depth=2, heads=2, positions=kind)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def mask():
    return masking.sample(jax.random.key(1), 8, GRID, ratio=0.5)


def initial(model, *inputs):
    """First parameters, but for what is learned of positions, which is drawn: it may begin with zeros."""
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), *inputs)["params"]
    draw = lambda path, x: jax.random.normal(jax.random.key(2), x.shape) if path[-1].key == "positions" else x  # noqa: E731
    return jax.tree.map_with_path(draw, params)


@every_kind
def test_the_encoder_keeps_to_the_order_of_the_visible_patches(kind, images, mask):
    encoder = encoder_of(kind)
    params = initial(encoder, images)
    encode = jax.jit(lambda visible=None: encoder.apply({"params": params}, images, visible))
    everything, order = jnp.tile(jnp.arange(12), (8, 1)), np.random.default_rng(0).permutation(6)
    whole, tokens = encode(), encode(mask.visible)
    np.testing.assert_allclose(encode(everything), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(everything[:, ::-1])[:, 1:], whole[:, :0:-1], rtol=0, atol=1e-5)
    permuted = encode(mask.visible[:, order])
    np.testing.assert_allclose(permuted[:, 0], tokens[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(permuted[:, 1:], tokens[:, 1:][:, order], rtol=0, atol=1e-5)


@every_kind
def test_the_encoder_tells_where_patches_are_unless_it_is_told_nothing(kind, images):
    encoder = encoder_of(kind)
    params = initial(encoder, images)
    cls = jax.jit(lambda images: encoder.apply({"params": params}, images)[:, 0])
    moved = jnp.concatenate([images[:, :, 4:], images[:, :, :4]], axis=2)  # the same patches, elsewhere
    assert (np.abs(cls(moved) - cls(images)).max() > 1e-3) == (kind != "none")


CASES = {  # decoders that work with any kind, but none where mask tokens would be alike
    **{kind: (kind, {"positions": kind}) for kind in POSITIONS if kind != "none"},
    "none": ("none", {"positions": "sincos"}),
    "none in the decoder": ("sincos", {"positions": "none", "mask_tokens": "encoder"}),
    **{f"{kind}, cross": (kind, {"positions": kind, "kind": "cross"}) for kind in ("relative", "rotary")},
}


QUICK = {"relative", "rotary, cross"}  # these take seconds
every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES]
)


@every_case
def test_order_within_the_mask_is_only_the_order_of_the_predictions(case, images, mask):
    kind, decoder = CASES[case]
    model = MAE(encoder_of(kind), Decoder(4, width=16, depth=2, heads=2, **decoder))
    params = initial(model, images, mask)
    predict = jax.jit(lambda mask, every: model.apply({"params": params}, images, mask, every), static_argnums=1)
    rng = np.random.default_rng(0)
    seen, unseen = rng.permutation(6), rng.permutation(6)
    other = Mask(mask.visible[:, seen], mask.hidden[:, unseen])
    hidden, every = predict(mask, False), predict(mask, True)
    np.testing.assert_allclose(predict(other, False), hidden[:, unseen], rtol=0, atol=1e-4)
    np.testing.assert_allclose(masking.take(every, mask.hidden), hidden, rtol=0, atol=1e-4)
    assert np.ptp(hidden, axis=1).min() > 1e-4, "no two hidden patches are alike"


@every_case
@pytest.mark.slow
def test_gradients_are_finite_and_the_same_on_1_and_8_devices(case, images, mask):
    kind, decoder = CASES[case]
    model = MAE(encoder_of(kind), Decoder(4, width=16, depth=1, heads=2, **decoder))
    params = initial(model, images, mask)

    @jax.jit
    def gradients(params, images, mask):
        def loss(params):
            masked = jnp.square(model.apply({"params": params}, images, mask) - 0.1).mean()
            return masked + jnp.square(model.encoder.apply({"params": params["encoder"]}, images) - 0.1).mean()

        return jax.grad(loss)(params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    split = jax.device_put((images, mask), NamedSharding(mesh, PartitionSpec("data")))
    want, got = gradients(params, images, mask), gradients(everywhere, *split)
    for (path, a), b in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert np.isfinite(a).all() and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + 1e-8, path
        assert a.any(), path


@pytest.mark.parametrize("kind", ["relative", "rotary"])
def test_scores_are_the_formula_for_any_queries_and_keys(kind):
    """Query by query: complex numbers turned by the difference of coordinates, or a bias by that difference."""
    rng = np.random.default_rng(0)
    heads, d, offsets = 3, 8, (2 * GRID[0] - 1, 2 * GRID[1] - 1)
    table = rng.standard_normal((1, 3 + math.prod(offsets), heads)).astype(np.float32)
    queries = np.stack([rng.permutation(13)[:5] for _ in range(2)])
    keys = np.stack([rng.permutation(13)[:7] for _ in range(2)])
    q = rng.standard_normal((2, 5, heads, d)).astype(np.float32)
    kv = rng.standard_normal((2, 7, 2, heads, d)).astype(np.float32)
    by_offset = table[0, 3:].reshape(*offsets, heads)
    omega = 10000.0 ** -(np.arange(d // 4) / (d // 4))

    def place(token):
        return np.array(divmod(token - 1, GRID[1])) if token else None

    def score(query, key, a, b, head):
        here, there = place(query), place(key)
        if kind == "relative":
            if here is None or there is None:
                return (
                    a @ b / math.sqrt(d)
                    + table[0, {(1, 0): 0, (0, 1): 1, (1, 1): 2}[here is None, there is None], head]
                )
            down, across = here - there
            return a @ b / math.sqrt(d) + by_offset[down + GRID[0] - 1, across + GRID[1] - 1, head]
        turn = (0 if here is None else here) - (np.zeros(2) if there is None else there)
        turned = (a[::2] + 1j * a[1::2]) * np.conj(b[::2] + 1j * b[1::2])
        return (turned * np.exp(1j * np.outer(turn, omega).ravel())).real.sum() / math.sqrt(d)

    want = np.zeros((2, 5, heads, d))
    for n, i, h in np.ndindex(2, 5, heads):
        scores = [score(queries[n, i], keys[n, j], q[n, i, h], kv[n, j, 0, h], h) for j in range(7)]
        weights = np.exp(scores) / np.exp(scores).sum()
        want[n, i, h] = weights @ kv[n, :, 1, h]
    where = positions.make(kind, lambda init: jnp.asarray(table), GRID, heads * d, heads)
    got = attend(q, kv, "auto", where.between(jnp.asarray(queries), jnp.asarray(keys)))
    np.testing.assert_allclose(got, want.reshape(2, 5, heads * d), rtol=0, atol=1e-5)


def test_learned_ones_can_be_resized_and_others_serve_any_size(images):
    larger = jnp.zeros((1, 10, 4, 1))
    for kind in POSITIONS:
        encoder = encoder_of(kind)
        params = initial(encoder, images)
        assert ("positions" in params) == (kind in RESIZE)
        if kind in RESIZE:
            params["positions"] = RESIZE[kind](params["positions"], GRID, (5, 2))
        assert jax.eval_shape(encoder.apply, {"params": params}, larger).shape == (1, 11, 16)


def test_resized_biases_keep_those_of_cls_and_of_no_offset():
    biases = np.random.default_rng(0).standard_normal((1, 3 + 5 * 7, 2)).astype(np.float32)
    larger = resize_biases(biases, (3, 4), (6, 5))
    assert larger.shape == (1, 3 + 11 * 9, 2)
    np.testing.assert_array_equal(larger[:, :3], biases[:, :3])
    np.testing.assert_allclose(larger[0, 3:].reshape(11, 9, 2)[5, 4], biases[0, 3:].reshape(5, 7, 2)[2, 3], atol=1e-6)
    np.testing.assert_array_equal(resize_biases(biases, (3, 4), (3, 4)), biases)


@pytest.mark.parametrize("kind", ["sincos", "rotary"])
def test_widths_that_do_not_divide_are_refused(kind):
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        positions.make(kind, None, GRID, 6, 1)


@pytest.mark.parametrize("grid", [(14, 14), (3, 20), (20, 3)])
def test_first_half_of_the_channels_is_the_column_and_the_second_the_row(grid):
    rows, cols = grid
    positions = sincos_positions(grid, 768)
    assert positions.shape == (rows * cols, 768)
    assert positions.dtype == np.float32
    for r in range(rows):
        for c in range(cols):
            golden = [math.sin(c), math.cos(c), math.sin(r), math.cos(r)]
            np.testing.assert_allclose(positions[r * cols + c, [0, 192, 384, 576]], golden, rtol=0, atol=6e-8)


def test_frequencies_fall_from_1_towards_1_in_10000_and_are_computed_in_float64():
    positions = sincos_positions((5, 1000), 32)
    r, c = 3, 997  # far out, a float32 angle would be off by 3e-5
    for k in range(8):
        omega = 10000 ** (-k / 8)
        golden = [math.sin(c * omega), math.cos(c * omega), math.sin(r * omega), math.cos(r * omega)]
        np.testing.assert_allclose(positions[r * 1000 + c, [k, 8 + k, 16 + k, 24 + k]], golden, rtol=0, atol=6e-8)


@pytest.mark.parametrize("width", [2, 6, 30])
def test_a_width_that_is_not_divisible_by_4_is_refused(width):
    with pytest.raises(ValueError, match=f"divisible by 4, not {width}"):
        sincos_positions((2, 2), width)


@pytest.mark.parametrize("grid, width", [((14, 14), 768), ((16, 16), 1280), ((4, 6), 16)])
def test_positions_are_those_of_hugging_face(grid, width):
    pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    rows, cols = grid
    theirs = modeling.build_2d_sinusoidal_position_embedding(rows, cols, width).numpy()
    theirs = np.roll(theirs, width // 2, axis=1)  # it begins with the row; ViTMAE itself swaps the halves like this
    np.testing.assert_allclose(sincos_positions(grid, width), theirs, rtol=0, atol=6e-8)


@pytest.mark.parametrize(
    "grid, new_grid", [((14, 14), (24, 24)), ((4, 6), (7, 5)), ((8, 8), (3, 4)), ((1, 2), (3, 3)), ((5, 3), (5, 9))]
)
def test_resized_positions_are_those_of_pytorch_and_cls_stays(grid, new_grid):
    torch = pytest.importorskip("torch")
    rows, cols = grid
    positions = np.random.default_rng(0).standard_normal((1, 1 + rows * cols, 8)).astype(np.float32)
    images = torch.tensor(positions[:, 1:]).reshape(1, rows, cols, 8).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(images, size=new_grid, mode="bicubic", align_corners=False)
    got = resize_positions(jnp.asarray(positions), grid, new_grid)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[:, 0], positions[:, 0])
    np.testing.assert_allclose(got[:, 1:], resized.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-5)


def test_positions_on_their_own_grid_are_not_touched():
    positions = np.random.default_rng(0).standard_normal((1, 25, 8)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(positions, (4, 6), (4, 6)), positions)


def test_positions_of_another_grid_than_said_are_refused():
    with pytest.raises(ValueError, match="reshape"):
        resize_positions(np.zeros((1, 25, 8), np.float32), (5, 5), (4, 4))
