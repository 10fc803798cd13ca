"""Names and orders of numbers in other worlds, against transformers' own and against a list written out by hand."""

import numpy as np
import pytest

from mae_jax.interchange import names
from mae_jax.interchange.huggingface import ARCHITECTURES

BLOCK = {
    "attention_norm/scale": (["norm1.weight"], ["layernorm_before.weight"]),
    "attention_norm/bias": (["norm1.bias"], ["layernorm_before.bias"]),
    "attention/qkv/kernel": (
        ["attn.qkv.weight"],
        [f"attention.attention.{part}.weight" for part in ("query", "key", "value")],
    ),
    "attention/qkv/bias": (
        ["attn.qkv.bias"],
        [f"attention.attention.{part}.bias" for part in ("query", "key", "value")],
    ),
    "attention/out/kernel": (["attn.proj.weight"], ["attention.output.dense.weight"]),
    "attention/out/bias": (["attn.proj.bias"], ["attention.output.dense.bias"]),
    "mlp_norm/scale": (["norm2.weight"], ["layernorm_after.weight"]),
    "mlp_norm/bias": (["norm2.bias"], ["layernorm_after.bias"]),
    "mlp/in/kernel": (["mlp.fc1.weight"], ["intermediate.dense.weight"]),
    "mlp/in/bias": (["mlp.fc1.bias"], ["intermediate.dense.bias"]),
    "mlp/out/kernel": (["mlp.fc2.weight"], ["output.dense.weight"]),
    "mlp/out/bias": (["mlp.fc2.bias"], ["output.dense.bias"]),
}
AROUND = {
    "encoder/cls_token": ("cls_token", "vit.embeddings.cls_token"),
    "encoder/positions": ("pos_embed", "vit.embeddings.position_embeddings"),
    "encoder/patch_embedding/kernel": (
        "patch_embed.proj.weight",
        "vit.embeddings.patch_embeddings.projection.weight",
    ),
    "encoder/patch_embedding/bias": ("patch_embed.proj.bias", "vit.embeddings.patch_embeddings.projection.bias"),
    "encoder/norm/scale": ("norm.weight", "vit.layernorm.weight"),
    "encoder/norm/bias": ("norm.bias", "vit.layernorm.bias"),
    "decoder/embedding/kernel": ("decoder_embed.weight", "decoder.decoder_embed.weight"),
    "decoder/embedding/bias": ("decoder_embed.bias", "decoder.decoder_embed.bias"),
    "decoder/mask_token": ("mask_token", "decoder.mask_token"),
    "decoder/positions": ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    "decoder/norm/scale": ("decoder_norm.weight", "decoder.decoder_norm.weight"),
    "decoder/norm/bias": ("decoder_norm.bias", "decoder.decoder_norm.bias"),
    "decoder/head/kernel": ("decoder_pred.weight", "decoder.decoder_pred.weight"),
    "decoder/head/bias": ("decoder_pred.bias", "decoder.decoder_pred.bias"),
    "head/kernel": ("head.weight", "classifier.weight"),
    "head/bias": ("head.bias", "classifier.bias"),
}


@pytest.mark.parametrize("leaf", AROUND)
def test_what_is_not_in_a_block(leaf):
    original, hugging_face = AROUND[leaf]
    assert names.tensors_of(leaf, names.ORIGINAL) == (original,)
    assert names.tensors_of(leaf, names.HUGGING_FACE) == (hugging_face,)


@pytest.mark.parametrize("leaf", BLOCK)
def test_what_is_in_a_block(leaf):
    original, hugging_face = BLOCK[leaf]
    found = names.tensors_of(f"encoder/block_11/{leaf}", names.ORIGINAL)
    assert list(found) == [f"blocks.11.{name}" for name in original]
    found = names.tensors_of(f"decoder/block_0/{leaf}", names.ORIGINAL)
    assert list(found) == [f"decoder_blocks.0.{name}" for name in original]
    found = names.tensors_of(f"encoder/block_11/{leaf}", names.HUGGING_FACE)
    assert list(found) == [f"vit.encoder.layer.11.{name}" for name in hugging_face]
    found = names.tensors_of(f"decoder/block_0/{leaf}", names.HUGGING_FACE)
    assert list(found) == [f"decoder.decoder_encoder.layer.0.{name}" for name in hugging_face]
    found = names.tensors_of(f"encoder/block_3/{leaf}", names.BEIT)
    assert list(found) == [f"beit.encoder.layer.3.{name}" for name in hugging_face]
    found = names.tensors_of(f"encoder/block_3/{leaf}", names.HUGGING_FACE_ENCODER)
    assert list(found) == [f"encoder.layer.3.{name}" for name in hugging_face]


def test_norms_before_a_head():
    assert names.tensors_of("norm/scale", names.ORIGINAL) == ("fc_norm.weight",)
    assert names.tensors_of("norm/bias", names.BEIT) == ("beit.pooler.layernorm.bias",)
    with pytest.raises(KeyError):
        names.tensors_of("norm/scale", names.HUGGING_FACE)


def test_beit_has_no_bias_of_keys():
    absent = [
        name
        for leaf in (f"encoder/block_0/{leaf}" for leaf in BLOCK)
        for name in names.tensors_of(leaf, names.BEIT)
        if names.is_absent(name, names.BEIT)
    ]
    assert absent == ["beit.encoder.layer.0.attention.attention.key.bias"]
    assert not names.is_absent("vit.encoder.layer.0.attention.attention.key.bias", names.HUGGING_FACE)


def test_a_matrix_maps_rows_there_to_columns_here():
    theirs = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours = names.to_ours("encoder/block_0/mlp/in/kernel", [theirs])
    np.testing.assert_array_equal(ours, [[0, 3], [1, 4], [2, 5]])


def test_a_convolution_is_a_matrix_of_patches_row_by_row_and_channels_innermost():
    weight = np.random.default_rng(0).standard_normal((5, 3, 2, 2), np.float32)
    patch = np.random.default_rng(1).standard_normal((2, 2, 3), np.float32)  # of a row of an image, [P,P,C]
    kernel = names.to_ours("encoder/patch_embedding/kernel", [weight])
    want = [
        sum(weight[d, c, i, j] * patch[i, j, c] for c in range(3) for i in (0, 1) for j in (0, 1)) for d in range(5)
    ]
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, want, rtol=1e-5)


def test_queries_keys_and_values_stand_side_by_side():
    parts = [np.full((4, 4), i, np.float32) for i in range(3)]
    kernel = names.to_ours("encoder/block_0/attention/qkv/kernel", parts)
    np.testing.assert_array_equal(kernel, np.repeat([[0, 1, 2]], 4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(
    ("leaf", "shape", "count"),
    [
        ("encoder/cls_token", (1, 1, 8), 1),
        ("encoder/patch_embedding/kernel", (12, 8), 1),
        ("encoder/block_0/attention/qkv/kernel", (8, 24), 3),
        ("encoder/block_0/attention/qkv/bias", (24,), 3),
        ("encoder/block_0/mlp/in/kernel", (8, 20), 1),
        ("encoder/norm/scale", (8,), 1),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(leaf, shape, count):
    bits = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)  # among them NaNs, infinities and zeros
    value = bits.view(np.float32)
    back = names.to_ours(leaf, names.to_theirs(leaf, value, count, 2))
    assert back.flags.c_contiguous and back.shape == shape
    np.testing.assert_array_equal(back.view(np.uint32), bits)


def test_blocks_are_counted_by_the_highest_number():
    found = [f"blocks.{i}.mlp.fc1.weight" for i in (0, 11, 2)] + ["decoder_blocks.3.mlp.fc1.bias", "head.weight"]
    assert names.count_blocks(found, names.ORIGINAL, "encoder") == 12
    assert names.count_blocks(found, names.ORIGINAL, "decoder") == 4
    assert names.count_blocks(["head.weight"], names.ORIGINAL, "decoder") == 0


@pytest.mark.parametrize(
    "name",
    [
        "vit.encoder.layer.0.attention.attention.query.weight",
        "blocks.0.attn.qkv.weight",
        "layers.0.blocks.1.attn.qkv.weight",
        "decoder.decoder_pred.bias",
    ],
)
def test_names_as_in_files_stay_as_they_are(name):
    assert names.as_in_files(name).endswith(name.removeprefix("layers."))


def test_names_in_memory_become_those_of_the_files_that_transformers_writes(architecture, tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    small = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 12, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1}
    small |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 12, "use_mean_pooling": True}
    small |= {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**small))
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        written = sorted(file.keys())
    assert sorted(map(names.as_in_files, model.state_dict())) == written
    assert ARCHITECTURES[architecture][0] == model.config.model_type
