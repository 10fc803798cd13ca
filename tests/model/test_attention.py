"""What the cls token attends to, and masks that follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.model import masking, ops
from mae_jax.model.attention import attended
from mae_jax.model.masking import GUIDED, SAMPLERS, units_of, visible_count
from mae_jax.model.positions import POSITIONS
from mae_jax.model.vit import ViT

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("depth, kind", [(1, "sincos"), *((2, kind) for kind in POSITIONS if kind != "sincos")])
def test_attention_is_that_of_the_last_block_in_the_encoder_s_own_pass(depth, kind, monkeypatch):
    encoder = ViT(patch_size=2, width=16, depth=depth, heads=4, positions=kind, dtype="float32")
    images = jax.random.normal(jax.random.key(0), (3, 6, 8, 1))
    params = jax.jit(encoder.init)(jax.random.key(1), images)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)  # attention that is far from uniform
    if kind == "relative":
        params["positions"] = jax.random.normal(jax.random.key(2), params["positions"].shape)
    weights, plain = [], ops.attention

    def noted(q, kv, kind, bias):
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, kv[:, :, 0]) / 2 + (0 if bias is None else bias)
        weights.append(jax.nn.softmax(logits, axis=-1)[:, :, 0])
        return plain(q, kv, kind, bias)

    monkeypatch.setattr(ops, "attention", noted)
    encoder.apply({"params": params}, images)
    monkeypatch.undo()
    got = jax.jit(lambda p, x: attended(encoder, p, x))(params, images)
    assert got.shape == (3, 12)
    np.testing.assert_allclose(got, weights[depth - 1].mean(axis=1)[:, 1:], rtol=1e-4)


def guided(name, temperature, unit=1, ratio=0.5, grid=(3, 5), num=64):
    """Masks of samples whose patches are attended to by rising amounts, and these amounts."""
    amount = jax.nn.softmax(4 * jax.random.uniform(jax.random.key(1), (num, grid[0] * grid[1])), axis=-1)
    noise = SAMPLERS[name](jax.random.key(0), num, units_of(grid, unit))
    lots = masking.lots(jax.random.key(0), num, grid)
    mask = masking.guided(noise, lots, amount, grid, name=name, temperature=temperature, unit=unit, ratio=ratio)
    return mask, np.asarray(amount)


@pytest.mark.parametrize("name", GUIDED)
def test_a_low_temperature_hides_the_most_or_least_attended_and_a_high_one_is_random(name):
    def share(temperature):
        mask, amount = guided(name, temperature)
        return float(
            (np.take_along_axis(amount, np.asarray(mask.hidden), 1).sum(axis=1)).mean() / amount.sum(axis=1).mean()
        )

    mask, amount = guided(name, 1e-4)
    order = np.argsort(amount * GUIDED[name], axis=1)
    np.testing.assert_array_equal(np.sort(mask.hidden, axis=1), np.sort(order[:, visible_count(15, 0.5) :], axis=1))
    shares = [share(t) for t in (1e-4, 1.0, 1e6)]
    assert shares == sorted(shares, reverse=GUIDED[name] > 0)
    assert shares[2] == pytest.approx(8 / 15, abs=0.05)
    assert abs(shares[1] - shares[2]) > 0.05


@pytest.mark.parametrize("name", GUIDED)
def test_squares_are_hidden_by_what_their_patches_have_on_average(name):
    mask, amount = guided(name, 1e-4, unit=2, ratio=0.4)
    assert mask.visible.shape == (64, visible_count(15, 0.4))
    squares = [
        [r * 5 + c for r in range(top, min(top + 2, 3)) for c in range(left, min(left + 2, 5))]
        for top in (0, 2)
        for left in (0, 2, 4)
    ]
    means = np.stack([amount[:, square].mean(axis=1) for square in squares], axis=1) * GUIDED[name]
    removed = np.asarray(mask.removed)
    shares = np.stack([removed[:, square].mean(axis=1) for square in squares], axis=1)
    for mean, share in zip(means, shares, strict=True):
        assert (np.diff(share[np.argsort(mean)]) >= 0).all(), "hidden from one end on, the last one perhaps in part"


def test_drawn_without_replacement_in_proportion_at_temperature_1():
    amount = jnp.tile(jnp.array([[0.1, 0.2, 0.3, 0.4]]), (4000, 1))
    noise = SAMPLERS["most_attended"](jax.random.key(0), 4000, (2, 2))
    lots = masking.lots(jax.random.key(0), 4000, (2, 2))
    mask = masking.guided(noise, lots, amount, (2, 2), name="most_attended", ratio=0.25)  # hides one
    assert mask.hidden.shape == (4000, 1)
    np.testing.assert_allclose(np.bincount(mask.hidden.ravel()) / 4000, amount[0], atol=5 * 0.5 / 4000**0.5)
