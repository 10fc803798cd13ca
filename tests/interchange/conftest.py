"""Models of other worlds with random weights, as files that need no PyTorch, and the command line in this process.

What tensors these worlds have is written out here once more, not taken from `mae_jax.interchange.names`.
"""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from mae_jax.__main__ import main
from mae_jax.model import masking
from mae_jax.training import checkpoint

CASES = {
    "tiny": {
        "image_size": (8, 8),
        "channels": 3,
        "patch": 2,
        "encoder": {"width": 32, "depth": 2, "heads": 2, "hidden": 128},
        "decoder": {"width": 16, "depth": 1, "heads": 4, "hidden": 40},
    },
    "rectangular": {
        "image_size": (16, 24),
        "channels": 3,
        "patch": 4,
        "encoder": {"width": 24, "depth": 2, "heads": 4, "hidden": 50},
        "decoder": {"width": 16, "depth": 2, "heads": 2, "hidden": 48},
    },
    "one_channel": {
        "image_size": (20, 20),
        "channels": 1,
        "patch": 4,
        "encoder": {"width": 16, "depth": 1, "heads": 1, "hidden": 64},
        "decoder": {"width": 24, "depth": 1, "heads": 3, "hidden": 96},
    },
    "vit_b16": {
        "image_size": (224, 224),
        "channels": 3,
        "patch": 16,
        "encoder": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
        "decoder": {"width": 512, "depth": 8, "heads": 16, "hidden": 2048},
    },
    "vit_l16": {
        "image_size": (224, 224),
        "channels": 3,
        "patch": 16,
        "encoder": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
        "decoder": {"width": 512, "depth": 8, "heads": 16, "hidden": 2048},
    },
}
SHAPES = [*list(CASES)[:3], pytest.param("vit_b16", marks=pytest.mark.slow)]
MODEL_TYPES = {
    "ViTMAEForPreTraining": "vit_mae",
    "ViTMAEModel": "vit_mae",
    "ViTModel": "vit",
    "ViTForImageClassification": "vit",
    "BeitForImageClassification": "beit",
}
CLASSES = 5


def _linear(name, out, *inputs):
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def _block(name, width, hidden):
    shapes = _linear(f"{name}.layernorm_before", width) | _linear(f"{name}.layernorm_after", width)
    for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
        shapes |= _linear(f"{name}.{part}", width, width)
    shapes |= _linear(f"{name}.attention.output.dense", width, width)
    return (
        shapes | _linear(f"{name}.intermediate.dense", hidden, width) | _linear(f"{name}.output.dense", width, hidden)
    )


def hugging_face_shapes(case, architecture):
    """Tensors as in files of transformers: name -> shape."""
    width, hidden, depth = (case["encoder"][key] for key in ("width", "hidden", "depth"))
    patch, channels = case["patch"], case["channels"]
    patches = math.prod(case["image_size"]) // patch**2
    whole = architecture.partition("For")[1]
    at = {"BeitForImageClassification": "beit."}.get(architecture, "vit." if whole else "")
    shapes = {
        f"{at}embeddings.cls_token": (1, 1, width),
        f"{at}embeddings.position_embeddings": (1, 1 + patches, width),
        **_linear(f"{at}embeddings.patch_embeddings.projection", width, channels, patch, patch),
    }
    for i in range(depth):
        shapes |= _block(f"{at}encoder.layer.{i}", width, hidden)
    if architecture == "BeitForImageClassification":
        shapes |= _linear("beit.pooler.layernorm", width)
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("key.bias")}
    else:
        shapes |= _linear(f"{at}layernorm", width)
    if architecture == "ViTModel":
        shapes |= _linear("pooler.dense", width, width)
    if architecture.endswith("Classification"):
        shapes |= _linear("classifier", CLASSES, width)
    if architecture == "ViTMAEForPreTraining":
        inner = case["decoder"]
        shapes |= {"decoder.mask_token": (1, 1, inner["width"])}
        shapes |= {"decoder.decoder_pos_embed": (1, 1 + patches, inner["width"])}
        shapes |= _linear("decoder.decoder_embed", inner["width"], width)
        for i in range(inner["depth"]):
            shapes |= _block(f"decoder.decoder_encoder.layer.{i}", inner["width"], inner["hidden"])
        shapes |= _linear("decoder.decoder_norm", inner["width"])
        shapes |= _linear("decoder.decoder_pred", patch**2 * channels, inner["width"])
    return shapes


def draw(shapes, seed=0):
    """Random tensors, all of them of the order of 1: scales of norms about 1, positions not the fixed ones."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, np.float32)
        if len(shape) in (2, 4):
            value *= np.float32(1.5 * math.prod(shape[1:]) ** -0.5)
        else:
            value = np.float32(0.3) * value + np.float32("norm" in name and name.endswith("weight"))
        tensors[name] = value
    return tensors


def fixed_positions(case, width):
    """The sine-cosine table of the original code, util/pos_embed.py, number by number: f32[1,1+L,D], zeros for cls."""
    rows, cols = (side // case["patch"] for side in case["image_size"])
    table = np.zeros((1, 1 + rows * cols, width), np.float32)
    quarter = width // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    for i in range(rows):
        for j in range(cols):
            parts = [np.sin(j * omega), np.cos(j * omega), np.sin(i * omega), np.cos(i * omega)]
            table[0, 1 + i * cols + j] = np.concatenate(parts)
    return table


def settings(case, architecture, **others):
    """A config.json."""
    size, encoder, decoder = case["image_size"], case["encoder"], case["decoder"]
    found = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": case["patch"],
        "num_channels": case["channels"],
        "hidden_size": encoder["width"],
        "num_hidden_layers": encoder["depth"],
        "num_attention_heads": encoder["heads"],
        "intermediate_size": encoder["hidden"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    if architecture == "ViTMAEForPreTraining":
        found |= {
            "decoder_hidden_size": decoder["width"],
            "decoder_num_hidden_layers": decoder["depth"],
            "decoder_num_attention_heads": decoder["heads"],
            "decoder_intermediate_size": decoder["hidden"],
            "mask_ratio": 0.75,
            "norm_pix_loss": False,
        }
    if architecture.startswith("Beit"):
        found |= {"use_mean_pooling": True, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
    if architecture.endswith("Classification"):
        names = [f"class {c}" for c in "edcba"]
        found |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return found | others


def write_hugging_face(folder, case, architecture, tensors=None, **others):
    """A folder of Hugging Face's with these tensors, or random ones; the tensors."""
    tensors = draw(hugging_face_shapes(case, architecture)) if tensors is None else tensors
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings(case, architecture, **others)))
    return tensors


RENAMED = {
    r"^(vit|beit)\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^(vit|beit)\.embeddings\.position_embeddings": "pos_embed",
    r"^(vit|beit)\.embeddings\.cls_token": "cls_token",
    r"^(vit|beit)\.encoder\.layer": "blocks",
    r"^vit\.layernorm": "norm",
    r"^beit\.pooler\.layernorm": "fc_norm",
    r"^decoder\.decoder_encoder\.layer": "decoder_blocks",
    r"^decoder\.": "",
    r"^classifier": "head",
    r"\.attention\.output\.dense": ".attn.proj",
    r"\.layernorm_before": ".norm1",
    r"\.layernorm_after": ".norm2",
    r"\.intermediate\.dense": ".mlp.fc1",
    r"\.output\.dense": ".mlp.fc2",
}


def as_original(tensors):
    """Tensors of Hugging Face's as the original code has them, the inverse of transformers' convert_vit_mae."""
    found = {}
    for name, value in tensors.items():
        part = re.search(r"\.attention\.attention\.(query|key|value)\.", name)
        if part and part[1] != "query":
            continue
        if part:
            others = (name.replace(".query.", f".{other}.") for other in ("key", "value"))
            value = np.concatenate([value, *(tensors.get(n, np.zeros(len(value), np.float32)) for n in others)])
            name = name.replace(part[0], ".attn.qkv.")
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def original_shapes(case, architecture="ViTMAEForPreTraining"):
    tensors = {n: np.zeros(s, np.int8) for n, s in hugging_face_shapes(case, architecture).items()}
    return {name: value.shape for name, value in as_original(tensors).items()}


def flags_for(case, decoder=True):
    """What no tensor of the original code says of a model that has none of ViT's sizes."""
    heads = [case["encoder"]["heads"]] + [case["decoder"]["heads"]] * decoder
    flags = [f"--heads={','.join(map(str, heads))}"]
    if len({*case["image_size"]}) > 1:
        flags.append("--image_size={},{}".format(*case["image_size"]))
    return flags


def noise_and_images(case, num):
    """Images f32[N,H,W,C], and noise f32[N,L] for their masks."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((num, *case["image_size"], case["channels"]), np.float32)
    return rng.random((num, math.prod(case["image_size"]) // case["patch"] ** 2), np.float32), images


def mask_of(noise, ratio=0.75):
    return masking.from_scores(noise, ratio)


def import_(source, workdir, *flags):
    assert main(["import", f"--from={source}", f"--workdir={workdir}", *flags]) == 0
    return workdir


def names_in(workdir):
    """The parameters that a checkpoint holds."""
    return {name.removeprefix("params/") for name in checkpoint.names_in(workdir)}


def assert_bits(got, want):
    """The same names with the same shapes, dtypes and bits."""
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.fixture(scope="session")
def worlds(refused):
    """The functions above; test modules cannot import a conftest."""
    functions = (hugging_face_shapes, draw, fixed_positions, settings, write_hugging_face, as_original, original_shapes)
    functions += (flags_for, noise_and_images, mask_of, import_, names_in, assert_bits, refused)
    return SimpleNamespace(cases=CASES, main=main, **{f.__name__: f for f in functions})


@pytest.fixture(params=SHAPES)
def case(request):
    """Each of the shapes that have to come through unchanged."""
    return CASES[request.param]


@pytest.fixture(params=list(MODEL_TYPES))
def architecture(request):
    return request.param


@pytest.fixture
def no_torch(monkeypatch):
    """As in an environment without PyTorch."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
