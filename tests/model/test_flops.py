"""The count of needed arithmetic against hand counts, and against what XLA says a whole training step does."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.model import losses, masking, targets
from mae_jax.model.classifier import Classifier, trainable
from mae_jax.model.flops import block_flops, cross_block_flops, forward_flops, training_flops
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.vit import SIZES, ViT
from mae_jax.training import optim
from mae_jax.training.loop import all_of, create_state, make_train_step
from mae_jax.training.sharding import make_mesh


def model_of(size, depth, patch=16, **options):
    decoder = Decoder(patch**2 * 3, width=512, depth=depth, heads=16, **options)
    return MAE(ViT(patch_size=patch, **SIZES[size]), decoder)


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


def test_mask_tokens_in_the_encoder_cost_what_the_paper_says():
    """Table 1c: 3.3 times the FLOPs, of ViT-L with the decoder of 8 blocks."""
    size = (224, 224), 3, 0.75
    mae, tokens = (training_flops(model_of("L", 8, mask_tokens=word), *size) for word in ("decoder", "encoder"))
    assert tokens / mae == pytest.approx(3.3, abs=0.05)


def test_no_decoder_block_is_a_head_on_the_latents_of_hidden_patches():
    parts = forward_flops(model_of("Ti", 0, mask_tokens="encoder"), (224, 224), 3, 0.75)
    assert parts["decoder"] == parts["decoder_embedding"] == 0
    assert parts["head"] == 2 * 147 * 192 * 768


def test_a_block_of_cross_attention_counted_by_hand():
    """Three queries of width 8, five tokens of width 6."""
    products = 3 * 8 * 8 + 5 * 6 * 16 + 2 * 3 * 5 * 8 + 3 * 8 * 8 + 2 * 3 * 8 * 32
    assert cross_block_flops(3, 5, 8, 6, 4.0) == 2 * products


def lowered(model, patch, batch, every_patch=False, decoded=1.0):
    """The whole training step, as handed to the compiler; nothing is computed."""
    target = targets.make(patch, name="normalized_pixels")

    grid = (224 // patch, 224 // patch)

    def draw(images, key):
        return images | {"mask": masking.sample(key, batch, grid, decoded=decoded)}

    def loss_fn(params, stats, masked):
        images, mask = masked["image"], masked["mask"]
        pred, want = model.apply({"params": params}, images, mask, every_patch), target.encode(images)
        return losses.mse(pred, want if every_patch else masking.take(want, mask.decoded)), stats

    mask = masking.sample(jax.random.key(0), 1, grid)
    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask)["params"]  # noqa: E731
    return step_of(init, draw, loss_fn, batch)


def step_of(init, draw, loss_fn, batch, trained=all_of):
    """A training step on images of 224 pixels, lowered."""
    images = {"image": jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)}
    images |= {"weight": jax.ShapeDtypeStruct((batch,), jnp.float32)}
    tx, schedule = optim.make(batch, 100, 10)
    mesh = make_mesh(data=1)
    abstract, _ = create_state(lambda: (init(), {}), tx, mesh, trained)
    return make_train_step(draw, loss_fn, tx, schedule, jax.random.key(0), mesh, trained).lower(abstract, images)


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("size", ["Ti", *(pytest.param(s, marks=pytest.mark.slow) for s in "BLH")])
def test_the_step_does_no_more_than_is_needed(size, depth):
    """At most 2 % beside the matrix products that are needed: norms, softmax, GELU, the optimizer, all of it."""
    patch, batch = 14 if size == "H" else 16, 64
    model = model_of(size, depth, patch)
    needed = batch * training_flops(model, (224, 224), 3, 0.75)
    step = lowered(model, patch, batch)
    assert 1 <= step.cost_analysis()["flops"] / needed <= 1.02
    if (size, depth) == ("B", 1):
        assert 1 <= step.compile().cost_analysis()["flops"] / needed <= 1.02


def test_a_loss_of_all_patches_needs_them_from_the_last_block_and_the_head():
    model = model_of("Ti", 1)
    needed = 64 * training_flops(model, (224, 224), 3, 0.75, every_patch=True)
    assert 1 <= lowered(model, 16, 64, every_patch=True).cost_analysis()["flops"] / needed <= 1.02
    assert needed > 1.05 * 64 * training_flops(model, (224, 224), 3, 0.75)


@pytest.mark.parametrize(
    "options, decoded",
    [
        ({"mask_tokens": "encoder"}, 1.0),
        ({"depth": 0, "mask_tokens": "encoder"}, 1.0),
        ({"kind": "cross"}, 1.0),
        ({"kind": "cross"}, 0.25),
        ({}, 0.25),
    ],
    ids=str,
)
def test_other_decoders_do_no_more_than_they_need(options, decoded):
    model = model_of("Ti", **{"depth": 2, **options})
    needed = 64 * training_flops(model, (224, 224), 3, 0.75, decoded=decoded)
    assert 1 <= lowered(model, 16, 64, decoded=decoded).cost_analysis()["flops"] / needed <= 1.02


@pytest.mark.parametrize("what", ["head", "0.5", "1", "3", "all"])
def test_partial_fine_tuning_goes_back_no_further_than_it_must(what):
    """Each product costs two more backwards, from the head down to the first block that is trained; none below it."""
    batch, depth = 16, 4
    model = Classifier(ViT(patch_size=16, width=192, depth=depth, heads=3), 1000)

    def loss_fn(params, stats, images):
        logits = model.apply({"params": params}, images["image"])
        return losses.cross_entropy(logits, jnp.zeros((batch, 1000))), stats

    block, embedding, head = block_flops(197, 197, 192, 4.0), 2 * 196 * 768 * 192, 2 * 192 * 1000
    mlp = 2 * 2 * 197 * 192 * 768
    blocks = {"head": 0, "0.5": mlp, "1": block, "3": 3 * block, "all": 4 * block}[what]
    needed = embedding + depth * block + 3 * head + 2 * blocks + embedding * (what == "all")
    init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]  # noqa: E731
    step = step_of(init, lambda images, key: images, loss_fn, batch, lambda path: trainable(path, depth, what))
    assert 1 <= step.cost_analysis()["flops"] / (batch * needed) <= 1.02
