"""The count of needed arithmetic against hand counts, and against what XLA says a whole training step does."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.model import losses, masking, targets
from mae_jax.model.flops import block_flops, forward_flops, training_flops
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.vit import SIZES, ViT
from mae_jax.training import optim
from mae_jax.training.loop import create_state, make_train_step
from mae_jax.training.sharding import make_mesh


def model_of(size, depth, patch=16):
    return MAE(ViT(patch_size=patch, **SIZES[size]), Decoder(patch**2 * 3, width=512, depth=depth, heads=16))


def test_a_block_counted_by_hand():
    """Five tokens of width 8: qkv 5*8*24, scores and values 2*5*5*8, out 5*8*8, MLP 2*5*8*32, two operations each."""
    assert block_flops(5, 5, 8, 4.0) == 2 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8 + 2 * 5 * 8 * 32)
    assert block_flops(5, 3, 8, 4.0) == 2 * (5 * 8 * 16 + 3 * 8 * 8 + 2 * 3 * 5 * 8 + 3 * 8 * 8 + 2 * 3 * 8 * 32)


def test_the_parts_of_vit_b():
    """The encoder alone, unmasked, is the 17.6 GFLOP of ViT-B/16 in multiply-adds (DeiT, table 5), to 1 %."""
    parts = forward_flops(model_of("B", 8), (224, 224), 3, 0.75)
    assert parts["patch_embedding"] == 2 * 49 * 768 * 768
    assert parts["head"] == 2 * 147 * 512 * 768
    whole = 12 * block_flops(197, 197, 768, 4.0) + 2 * 196 * 768 * 768
    assert whole / 2 == pytest.approx(17.6e9, rel=0.01)
    assert parts["encoder"] == 12 * block_flops(50, 50, 768, 4.0)


def test_no_decoder_block_is_a_head_on_the_hidden_patches():
    assert forward_flops(model_of("Ti", 0), (224, 224), 3, 0.75)["decoder"] == 0


def lowered(model, patch, batch):
    """The whole training step, as handed to the compiler; nothing is computed."""
    target = targets.make(patch, name="normalized_pixels")

    def loss_fn(params, images, key):
        mask = masking.sample(key, batch, (224 // patch, 224 // patch))
        pred = model.apply({"params": params}, images, mask)
        return losses.mse(pred, masking.take(target.encode(images), mask.hidden)).mean()

    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    mask = masking.sample(jax.random.key(0), 1, (224 // patch, 224 // patch))
    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask)["params"]  # noqa: E731
    tx, schedule = optim.make(batch, 100, 10)
    abstract, _ = create_state(init, tx, make_mesh(data=1))
    return make_train_step(loss_fn, tx, schedule, jax.random.key(0), make_mesh(data=1)).lower(abstract, images)


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("size", ["Ti", *(pytest.param(s, marks=pytest.mark.slow) for s in "BLH")])
def test_the_step_does_no_more_than_is_needed(size, depth):
    """At most 2 % beside the matrix products that are needed: norms, softmax, GELU, the optimizer, all of it."""
    patch, batch = 14 if size == "H" else 16, 64
    model = model_of(size, depth, patch)
    needed = batch * training_flops(model, (224, 224), 3, 0.75)
    step = lowered(model, patch, batch)
    assert 1 <= step.cost_analysis()["flops"] / needed <= 1.02
    if size == "Ti":
        assert 1 <= step.compile().cost_analysis()["flops"] / needed <= 1.02
