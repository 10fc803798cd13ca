"""What other worlds call the parameters of a model, and in which order the numbers of each stand there.

A world is a table from a module here, or a parameter without one, to what holds it there: one name, or three where
queries, keys and values are apart. {i} is the number of a block. "kernel" and "scale" are "weight" there.

    ORIGINAL       the original MAE code, and timm's ViT
    HUGGING_FACE   transformers: ViTMAE and ViT, as their files have it (in memory, names are others)
    BEIT           transformers: BEiT, which is a ViT that takes the mean of the patches
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

ORIGINAL = {
    "encoder/cls_token": "cls_token",
    "encoder/positions": "pos_embed",
    "encoder/patch_embedding": "patch_embed.proj",
    "encoder/block_{i}/attention_norm": "blocks.{i}.norm1",
    "encoder/block_{i}/attention/qkv": "blocks.{i}.attn.qkv",
    "encoder/block_{i}/attention/out": "blocks.{i}.attn.proj",
    "encoder/block_{i}/mlp_norm": "blocks.{i}.norm2",
    "encoder/block_{i}/mlp/in": "blocks.{i}.mlp.fc1",
    "encoder/block_{i}/mlp/out": "blocks.{i}.mlp.fc2",
    "encoder/norm": "norm",
    "decoder/embedding": "decoder_embed",
    "decoder/mask_token": "mask_token",
    "decoder/positions": "decoder_pos_embed",
    "decoder/block_{i}/attention_norm": "decoder_blocks.{i}.norm1",
    "decoder/block_{i}/attention/qkv": "decoder_blocks.{i}.attn.qkv",
    "decoder/block_{i}/attention/out": "decoder_blocks.{i}.attn.proj",
    "decoder/block_{i}/mlp_norm": "decoder_blocks.{i}.norm2",
    "decoder/block_{i}/mlp/in": "decoder_blocks.{i}.mlp.fc1",
    "decoder/block_{i}/mlp/out": "decoder_blocks.{i}.mlp.fc2",
    "decoder/norm": "decoder_norm",
    "decoder/head": "decoder_pred",
    "norm": "fc_norm",
    "head": "head",
}


def _hugging_face_block(ours: str, theirs: str) -> dict:
    apart = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
    return {
        f"{ours}/attention_norm": f"{theirs}.layernorm_before",
        f"{ours}/attention/qkv": apart,
        f"{ours}/attention/out": f"{theirs}.attention.output.dense",
        f"{ours}/mlp_norm": f"{theirs}.layernorm_after",
        f"{ours}/mlp/in": f"{theirs}.intermediate.dense",
        f"{ours}/mlp/out": f"{theirs}.output.dense",
    }


def _hugging_face_encoder(prefix: str) -> dict:
    return {
        "encoder/cls_token": f"{prefix}embeddings.cls_token",
        "encoder/positions": f"{prefix}embeddings.position_embeddings",
        "encoder/patch_embedding": f"{prefix}embeddings.patch_embeddings.projection",
        **_hugging_face_block("encoder/block_{i}", prefix + "encoder.layer.{i}"),
        "encoder/norm": f"{prefix}layernorm",
    }


HUGGING_FACE = {
    **_hugging_face_encoder("vit."),
    "decoder/embedding": "decoder.decoder_embed",
    "decoder/mask_token": "decoder.mask_token",
    "decoder/positions": "decoder.decoder_pos_embed",
    **_hugging_face_block("decoder/block_{i}", "decoder.decoder_encoder.layer.{i}"),
    "decoder/norm": "decoder.decoder_norm",
    "decoder/head": "decoder.decoder_pred",
    "head": "classifier",
}
# ViTModel and ViTMAEModel, which are an encoder alone; the pooler is no part of the features, and only kept
HUGGING_FACE_ENCODER = {**_hugging_face_encoder(""), "pooler": "pooler.dense"}
BEIT = {**_hugging_face_encoder("beit."), "norm": "beit.pooler.layernorm", "head": "classifier"}


def is_absent(name: str, table: Mapping) -> bool:
    """Whether a world has no such tensor: BEiT's keys have no bias, which no softmax notices. It is zero."""
    return table is BEIT and name.endswith("attention.key.bias")


LAST = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def tensors_of(leaf: str, table: Mapping[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    """The tensors that hold a parameter.

    >>> tensors_of("encoder/block_3/mlp/in/kernel", ORIGINAL)
    ('blocks.3.mlp.fc1.weight',)

    Args:
      leaf: the path of the parameter.
      table: a world.

    Raises:
      KeyError: the world has no such parameter.
    """
    number = re.search(r"/block_(\d+)/", leaf)
    module = leaf.replace(number[0], "/block_{i}/") if number else leaf
    module, _, kind = (module, "", "") if module in table else module.rpartition("/")
    names = table[module]
    return tuple(
        (name.replace("{i}", number[1]) if number else name) + (f".{LAST[kind]}" if kind else "")
        for name in ((names,) if isinstance(names, str) else names)
    )


def to_theirs(leaf: str, value: np.ndarray, count: int, patch_size: int) -> list[np.ndarray]:
    """A parameter as the `count` tensors that hold it there; views, in whatever order of memory.

    A matrix is [in,out] here and [out,in] there; the patch embedding [P*P*C,D] is a convolution [D,C,P,P].
    """
    if leaf.endswith("patch_embedding/kernel"):
        value = value.reshape(patch_size, patch_size, -1, value.shape[-1]).transpose(3, 2, 0, 1)
    elif leaf.endswith("/kernel"):
        value = value.T
    return np.split(value, count)


def to_ours(leaf: str, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `to_theirs`: float32, in the order of memory."""
    value = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
    if leaf.endswith("patch_embedding/kernel"):
        value = value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    elif leaf.endswith("/kernel"):
        value = value.T
    return np.ascontiguousarray(value, np.float32)


def count_blocks(names: Iterable[str], table: Mapping[str, str | tuple[str, ...]], part: str) -> int:
    """How many blocks the `part`, encoder or decoder, has: one more than the highest number in `names`."""
    pattern = re.escape(table[part + "/block_{i}/mlp/in"]).replace(re.escape("{i}"), r"(\d{1,9})")
    numbers = [int(found[1]) for name in names if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


# transformers 5 calls parameters in memory by other names than in its files: some write those
MODERN = {
    r"^(vit\.|beit\.|)layers\.": r"\1encoder.layer.",
    r"^decoder\.decoder_layers\.": "decoder.decoder_encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


def as_in_files(name: str) -> str:
    """A name that transformers 5 has in memory, as its files have it; any other as it is.

    >>> as_in_files("vit.layers.0.attention.q_proj.weight")
    'vit.encoder.layer.0.attention.attention.query.weight'
    """
    if re.match(r"(vit\.|beit\.|)layers\.|decoder\.decoder_layers\.", name):
        for pattern, replacement in MODERN.items():
            name = re.sub(pattern, replacement, name)
    return name
