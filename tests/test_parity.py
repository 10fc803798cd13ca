"""The same mask, predictions, loss and gradients as Hugging Face's ViTMAEForPreTraining in PyTorch.

`python tests/test_parity.py` writes the golden file, from which tests/model/test_mae.py shows the same without PyTorch.
"""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import numpy as np
import pytest

from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.masking import Mask
from mae_jax.model.patches import grid_of
from mae_jax.model.vit import SIZES, ViT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers.models.vit_mae import configuration_vit_mae, modeling_vit_mae  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "mae.npz"

RECTANGULAR = {
    "image_size": (16, 24),
    "channels": 3,
    "ratio": 0.75,
    "encoder": {"patch_size": 4, "width": 24, "depth": 2, "heads": 4, "mlp_ratio": 2.0},
    "decoder": {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 3.0},
}
CASES = {
    "tiny": {
        "image_size": (8, 8),
        "channels": 3,
        "ratio": 0.5,
        "encoder": {"patch_size": 2, "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 4.0},
        "decoder": {"width": 16, "depth": 1, "heads": 4, "mlp_ratio": 4.0},
    },
    "rectangular": RECTANGULAR,
    "one_channel": {
        "image_size": (40, 40),
        "channels": 1,
        "ratio": 0.9,  # of 100 patches 9 stay, not 10
        "encoder": {"patch_size": 4, "width": 16, "depth": 1, "heads": 1, "mlp_ratio": 4.0},
        "decoder": {"width": 24, "depth": 1, "heads": 3, "mlp_ratio": 4.0},
    },
    "vit_b16": {
        "image_size": (224, 224),
        "channels": 3,
        "ratio": 0.75,
        "encoder": {"patch_size": 16, "mlp_ratio": 4.0, **SIZES["B"]},
        "decoder": {"width": 512, "depth": 8, "heads": 16, "mlp_ratio": 4.0},
    },
}
SLOW = {"vit_b16"}
NORM_PIX_LOSS = {"pixels": False, "normalized_pixels": True}


class Reference(modeling_vit_mae.ViTMAEForPreTraining):
    """The model as it is, but for a check: images need not be square."""

    def patchify(self, pixel_values, interpolate_pos_encoding=False):
        # the check is left out where positions are interpolated; nothing else here depends on that
        return super().patchify(pixel_values, interpolate_pos_encoding=True)


def make_reference(case: dict, target: str) -> Reference:
    """Its own fixed positions, and all that is trained drawn at random, so that nothing is 0 or 1."""
    encoder, decoder = case["encoder"], case["decoder"]
    config = configuration_vit_mae.ViTMAEConfig(
        image_size=case["image_size"],
        num_channels=case["channels"],
        mask_ratio=case["ratio"],
        norm_pix_loss=NORM_PIX_LOSS[target],
        layer_norm_eps=1e-6,
        patch_size=encoder["patch_size"],
        hidden_size=encoder["width"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["heads"],
        intermediate_size=int(encoder["width"] * encoder["mlp_ratio"]),
        decoder_hidden_size=decoder["width"],
        decoder_num_hidden_layers=decoder["depth"],
        decoder_num_attention_heads=decoder["heads"],
        decoder_intermediate_size=int(decoder["width"] * decoder["mlp_ratio"]),
    )
    rows, cols = grid_of(case["image_size"], encoder["patch_size"])
    table = modeling_vit_mae.build_2d_sinusoidal_position_embedding

    def of_this_grid(height, width, **options):  # it would take the grid for a square of the same area
        return table(height=rows, width=cols, **options)

    with mock.patch.object(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", of_this_grid):
        model = Reference(config)
        # the generic initialisation comes after its own and leaves the positions zero, so its own runs once more
        model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
        model.vit.embeddings.initialize_weights()
        model.decoder.initialize_weights(rows * cols)
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert positions.shape[1] == 1 + rows * cols and np.all(positions[0, 1:].std(dim=1).numpy() > 0.1)

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            value = rng.standard_normal(parameter.shape)
            if parameter.ndim in (2, 4):
                value *= 1.5 * parameter[0].numel() ** -0.5  # of the order of 1 throughout, attention not uniform
            else:
                value = 0.3 * value + (parameter.numpy() == 1)  # scales of norms about 1, all else about 0
            value = value.astype(np.float16)  # half as many bytes in the golden file, exact in float32
            parameter.copy_(torch.from_numpy(value))
    return model.eval()


def trainable(model: Reference) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layout(case: dict) -> dict[str, list[str]]:
    """The tensors of Hugging Face's that each leaf of our parameters holds. Positions are fixed: no leaf holds them."""
    leaves = {
        "encoder/cls_token": ["vit.embeddings.cls_token"],
        "encoder/patch_embedding/kernel": ["vit.embeddings.patch_embeddings.projection.weight"],
        "encoder/patch_embedding/bias": ["vit.embeddings.patch_embeddings.projection.bias"],
        "encoder/norm/scale": ["vit.layernorm.weight"],
        "encoder/norm/bias": ["vit.layernorm.bias"],
        "decoder/mask_token": ["decoder.mask_token"],
        "decoder/embedding/kernel": ["decoder.decoder_embed.weight"],
        "decoder/embedding/bias": ["decoder.decoder_embed.bias"],
        "decoder/norm/scale": ["decoder.decoder_norm.weight"],
        "decoder/norm/bias": ["decoder.decoder_norm.bias"],
        "decoder/head/kernel": ["decoder.decoder_pred.weight"],
        "decoder/head/bias": ["decoder.decoder_pred.bias"],
    }
    for part, layers in {"encoder": "vit.layers", "decoder": "decoder.decoder_layers"}.items():
        for i in range(case[part]["depth"]):
            ours, theirs = f"{part}/block_{i}", f"{layers}.{i}"
            for norm, name in {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}.items():
                leaves[f"{ours}/{norm}/scale"] = [f"{theirs}.{name}.weight"]
                leaves[f"{ours}/{norm}/bias"] = [f"{theirs}.{name}.bias"]
            for kind, name in {"kernel": "weight", "bias": "bias"}.items():
                leaves[f"{ours}/attention/qkv/{kind}"] = [f"{theirs}.attention.{x}_proj.{name}" for x in "qkv"]
                leaves[f"{ours}/attention/out/{kind}"] = [f"{theirs}.attention.o_proj.{name}"]
                leaves[f"{ours}/mlp/in/{kind}"] = [f"{theirs}.mlp.fc1.{name}"]
                leaves[f"{ours}/mlp/out/{kind}"] = [f"{theirs}.mlp.fc2.{name}"]
    return leaves


def to_ours(tensor) -> np.ndarray:
    """Matrices are [out,in] there and [in,out] here; a convolution [D,C,P,P] is a matrix [P*P*C,D].

    Nothing but the order of the numbers changes, so gradients go the same way.
    """
    array = tensor.detach().numpy()
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
    return array.T if array.ndim == 2 else array


def gather(case: dict, tensors: dict) -> dict[str, np.ndarray]:
    """Our leaves by path, from Hugging Face's tensors by name: q, k and v side by side."""
    return {
        leaf: np.concatenate([to_ours(tensors[name]) for name in names], axis=-1)
        for leaf, names in layout(case).items()
    }


def make_inputs(case: dict, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Images f32[N,H,W,C] and noise f32[N,L]."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((num, *case["image_size"], case["channels"])).astype(np.float16)  # as for parameters
    rows, cols = grid_of(case["image_size"], case["encoder"]["patch_size"])
    return images.astype(np.float32), rng.random((num, rows * cols), dtype=np.float32)


def run_reference(model: Reference, images: np.ndarray, noise: np.ndarray) -> dict:
    out = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), noise=torch.from_numpy(noise))
    out.loss.backward()
    return {
        "loss": out.loss.detach().numpy(),
        "predictions": out.logits.detach().numpy(),
        "removed": out.mask.numpy(),
        "restore": out.ids_restore.numpy(),
        "gradients": {name: p.grad for name, p in trainable(model).items()},
    }


def make_model(case: dict) -> MAE:
    width = case["encoder"]["patch_size"] ** 2 * case["channels"]
    return MAE(ViT(**case["encoder"]), Decoder(width, **case["decoder"]))


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference, relative to that of `want`."""
    assert got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@partial(jax.jit, static_argnums=0)
def run_ours(model: MAE, params: dict, images: jax.Array, mask: Mask, want: jax.Array):
    """The loss on hidden patches, its gradients, and the predictions for all patches."""

    def loss_fn(params):
        pred = model.apply({"params": params}, images, mask)
        return losses.mse(pred, masking.take(want, mask.hidden)).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    return loss, gradients, model.apply({"params": params}, images, mask, every_patch=True)


@pytest.mark.parametrize("target", NORM_PIX_LOSS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_mask_predictions_loss_and_gradients_are_those_of_hugging_face(name, target):
    case = CASES[name]
    reference = make_reference(case, target)
    images, noise = make_inputs(case, num=2)
    want = run_reference(reference, images, noise)

    params = flax.traverse_util.unflatten_dict(gather(case, trainable(reference)), sep="/")
    mask = masking.from_scores(noise, case["ratio"])
    encoded = targets.make(case["encoder"]["patch_size"], name=target).encode(images)
    loss, gradients, predictions = run_ours(make_model(case), params, images, mask, encoded)

    np.testing.assert_array_equal(mask.removed, want["removed"])
    np.testing.assert_array_equal(mask.restore, want["restore"])
    assert abs(loss - want["loss"]) <= 1e-5 * want["loss"]
    assert distance(np.asarray(predictions), want["predictions"]) <= 1e-4
    gradients = jax.tree.map(np.asarray, flax.traverse_util.flatten_dict(gradients, sep="/"))
    for leaf, names in layout(case).items():
        parts = np.split(gradients[leaf], len(names), axis=-1)
        for part, tensor in zip(parts, names, strict=True):
            if tensor.endswith("k_proj.bias"):  # the softmax takes no notice of it: only rounding is left
                assert np.linalg.norm(part) <= 1e-4 * np.linalg.norm(gradients[leaf]), tensor
            else:
                assert distance(part, to_ours(want["gradients"][tensor])) <= 1e-4, tensor


@pytest.mark.parametrize("case", [RECTANGULAR, CASES["one_channel"]], ids=["rectangular", "one_channel"])
def test_every_tensor_and_every_leaf_is_mapped_once(case):
    reference, model = make_reference(case, "pixels"), make_model(case)
    images, noise = make_inputs(case, num=1)
    mask = masking.from_scores(noise, case["ratio"])
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), images, mask))["params"]
    ours = {leaf: x.shape for leaf, x in flax.traverse_util.flatten_dict(ours, sep="/").items()}
    assert {leaf: x.shape for leaf, x in gather(case, trainable(reference)).items()} == ours
    assert sorted(tensor for names in layout(case).values() for tensor in names) == sorted(trainable(reference))
    fixed = {name for name, p in reference.named_parameters() if not p.requires_grad}
    assert fixed == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}


def golden() -> dict[str, np.ndarray]:
    """What the golden file holds: the rectangular case, for both targets."""
    images, noise = make_inputs(RECTANGULAR, num=8)
    arrays = {"case": np.array(json.dumps(RECTANGULAR)), "images": images.astype(np.float16), "noise": noise}
    for target in NORM_PIX_LOSS:
        reference = make_reference(RECTANGULAR, target)
        want = run_reference(reference, images, noise)
        params, gradients = (gather(RECTANGULAR, x) for x in (trainable(reference), want["gradients"]))
        arrays |= {f"params/{leaf}": x.astype(np.float16) for leaf, x in params.items()}
        arrays |= {f"{target}/gradients/{leaf}": x for leaf, x in gradients.items()}
        arrays |= {f"{target}/loss": want["loss"]}
        arrays |= {key: want[key] for key in ("predictions", "removed", "restore")}
    return arrays


def test_golden_file_holds_what_hugging_face_computes():
    want = golden()
    with np.load(GOLDEN) as stored:
        assert sorted(stored) == sorted(want)
        for key, value in want.items():
            assert stored[key].dtype == value.dtype, key
            if value.dtype == np.float32 and not key.endswith("qkv/bias"):
                assert distance(stored[key], value) <= 1e-5, key
            elif value.dtype == np.float32:  # a third of it is rounding, see above
                np.testing.assert_allclose(stored[key], value, atol=1e-5 * np.abs(value).max())
            else:
                np.testing.assert_array_equal(stored[key], value)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
