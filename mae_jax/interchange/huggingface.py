"""What lies beside the tensors in a folder of Hugging Face's: config.json, preprocessor_config.json, the model card.

Which tensors there are says most of what a model is; these functions translate the rest, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

import numpy as np

from mae_jax.errors import CheckpointError
from mae_jax.interchange.names import BEIT, HUGGING_FACE, HUGGING_FACE_ENCODER

# architecture -> model_type, and what its tensors are called
ARCHITECTURES = {
    "ViTMAEForPreTraining": ("vit_mae", HUGGING_FACE),
    "ViTMAEModel": ("vit_mae", HUGGING_FACE_ENCODER),
    "ViTModel": ("vit", HUGGING_FACE_ENCODER),
    "ViTForImageClassification": ("vit", HUGGING_FACE),
    "BeitForImageClassification": ("beit", BEIT),
}
# what a config.json may leave out, in transformers 5.23
DEFAULTS = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    **{"decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16},
    **{"decoder_intermediate_size": 2048, "mask_ratio": 0.75, "norm_pix_loss": False},
}
MOST = 2**31  # of any of them: what is below can be multiplied and divided
COUNTS = ("_size", "_layers", "_heads", "_channels")  # how the names of whole numbers end
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,), "std": (0.5,)}  # what ViTImageProcessor does when nothing is said
BICUBIC = 3  # PIL.Image.Resampling


def describe(
    settings: Mapping, where: str, present: Container[str] = ()
) -> tuple[dict, dict[str, str | tuple[str, ...]]]:
    """A config.json as groups of a config here, and the table of names that goes with it.

    Args:
      settings: the object in config.json.
      where: its path, for messages.
      present: the names of the tensors, which tell the architecture where the settings do not.

    Returns:
      {"image_size", "channels", "encoder"} with, for what has them, "decoder", "target" and "mask", or "head" and
      "classes"; positions are "learned", as the tensors are given.

    Raises:
      CheckpointError: it is the config of another architecture.
    """
    architecture = _architecture(settings, present)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{where}: architecture {architecture}; what can be read is {', '.join(ARCHITECTURES)}")
    given = {**DEFAULTS, **settings}
    given["id2label"] = given.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    wrong = _wrong(given, where)
    if wrong:
        raise CheckpointError(wrong)
    patch = given["patch_size"]
    if given["hidden_act"] != "gelu":
        raise CheckpointError(f"{where}: hidden_act {given['hidden_act']!r}; only gelu can be read")
    if not isinstance(patch, int):
        if len({*patch}) > 1:
            raise CheckpointError(f"{where}: patches of {patch}; only square ones can be read")
        patch = patch[0]
    size = given["image_size"]

    def transformer(prefix: str) -> dict:
        width = given[f"{prefix}hidden_size"]
        return {
            "width": width,
            "depth": given[f"{prefix}num_hidden_layers"],
            "heads": given[f"{prefix}num_attention_heads"],
            "mlp_ratio": mlp_ratio(given[f"{prefix}intermediate_size"], width),
            "positions": "learned",
            "epsilon": given["layer_norm_eps"],
        }

    config = {
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "channels": given["num_channels"],
        "encoder": {"patch_size": patch, **transformer("")},
    }
    if architecture == "ViTMAEForPreTraining":
        config["decoder"] = transformer("decoder_")
        config["target"] = {"name": "normalized_pixels" if given["norm_pix_loss"] else "pixels"}
        config["mask"] = {"name": "random", "ratio": given["mask_ratio"]}
    if architecture.endswith("ForImageClassification"):
        names = sorted((int(i), name) for i, name in given["id2label"].items())
        config["classes"] = tuple(name for _, name in names)
        config["head"] = {"pool": "cls", "norm": "none"}
    if architecture.startswith("Beit"):
        config["head"] = {"pool": "mean", "norm": "layer"}
        config["encoder"]["final_norm"] = False
    return config, ARCHITECTURES[architecture][1]


def _wrong(given: Mapping, where: str) -> list[str]:
    """What no model here can have, one line each."""
    wrong = [
        f"{where}: {key} is {str(given[key])[:80]}, not a number above 0 and below {MOST}"
        for key in DEFAULTS
        if key.endswith(COUNTS) and not _counts(given[key], pair=key in ("image_size", "patch_size"))
    ]
    if not isinstance(given["layer_norm_eps"], float) or not 0 < given["layer_norm_eps"] < np.inf:
        wrong.append(f"{where}: layer_norm_eps is {given['layer_norm_eps']!r}, not a number above 0")
    if not isinstance(given["mask_ratio"], float) or not 0 < given["mask_ratio"] < 1:
        wrong.append(f"{where}: mask_ratio is {given['mask_ratio']!r}, not a number between 0 and 1")
    if given.get("qkv_bias", True) is not True:
        wrong.append(f"{where}: qkv_bias is {given['qkv_bias']!r}; only models with these biases can be read")
    names = given["id2label"]
    if not isinstance(names, dict) or not all(re.fullmatch("[0-9]{1,9}", str(key)) for key in names):
        wrong.append(f"{where}: id2label is no table from numbers to names")
    return wrong


def _architecture(settings: Mapping, present: Container[str]) -> str:
    """What settings say, or else the tensors: some files leave it out."""
    said = settings.get("architectures")
    if isinstance(said, list) and said and isinstance(said[0], str):
        return said[0]
    head = "classifier.weight" in present
    match settings.get("model_type"):
        case "vit_mae":
            return "ViTMAEForPreTraining" if "decoder.mask_token" in present else "ViTMAEModel"
        case "vit":
            return "ViTForImageClassification" if head else "ViTModel"
        case "beit":
            return "BeitForImageClassification"
    return "none"


def _counts(value, pair: bool) -> bool:
    """Whether this is a whole number above 0, or two where a `pair` may be."""
    values = value if pair and isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(isinstance(x, int) and not isinstance(x, bool) and 0 < x < MOST for x in values)


def mlp_ratio(hidden: int, width: int) -> float:
    """The r with int(width * r) == hidden.

    >>> int(49 * mlp_ratio(59, 49)), int(49 * (59 / 49))
    (59, 59)
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else float(np.nextafter(ratio, np.inf))


def architecture_of(config: Mapping, part: str) -> str:
    """Which of `ARCHITECTURES` computes what the model of `config` does.

    Args:
      part: "all" of it, or its "encoder".

    Raises:
      CheckpointError: none does.
    """
    encoder, head = config["encoder"], config.get("head")
    final_norm = encoder.get("final_norm", True)
    if part == "encoder" or not ("decoder" in config or head):
        if not final_norm:
            raise CheckpointError(
                "Hugging Face has no encoder without a final norm; export the whole classifier, or as timm, npz or "
                "stablehlo"
            )
        return "ViTModel"
    if "decoder" in config:
        if encoder["epsilon"] != config["decoder"]["epsilon"]:
            raise CheckpointError("Hugging Face has one epsilon for encoder and decoder; export with --part=encoder")
        if not config["decoder"]["depth"]:
            raise CheckpointError("Hugging Face has no linear decoder; export with --part=encoder, or as original")
        return "ViTMAEForPreTraining"
    if head["pool"] == "cls" and head["norm"] != "layer" and final_norm:
        return "ViTForImageClassification"
    if head["pool"] == "mean" and head["norm"] == "layer" and not final_norm:
        return "BeitForImageClassification"
    raise CheckpointError(
        f"Hugging Face has no classifier with pool {head['pool']}, norm {head['norm']} and "
        f"{'a' if final_norm else 'no'} final norm of the encoder; export as timm, npz or stablehlo"
    )


def settings_of(config: Mapping, architecture: str) -> dict:
    """The config.json of a model, from the complete config of its run; the inverse of `describe`."""
    size, encoder = config["data"]["image_size"], config["encoder"]

    def transformer(prefix: str, part: Mapping) -> dict:
        return {
            f"{prefix}hidden_size": part["width"],
            f"{prefix}num_hidden_layers": part["depth"],
            f"{prefix}num_attention_heads": part["heads"],
            f"{prefix}intermediate_size": int(part["width"] * part["mlp_ratio"]),
        }

    settings = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture][0],
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": encoder["patch_size"],
        "num_channels": config["data"]["channels"],
        **transformer("", encoder),
        "hidden_act": "gelu",
        "layer_norm_eps": encoder["epsilon"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "dtype": "float32",
    }
    if architecture == "BeitForImageClassification":
        settings |= {
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False,
            "use_mask_token": False,
            "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
        }
    else:
        settings["qkv_bias"] = True
    if architecture == "ViTMAEForPreTraining":
        settings |= transformer("decoder_", config["decoder"])
        settings |= {
            "mask_ratio": config["mask"]["ratio"],
            "norm_pix_loss": config["target"]["name"] == "normalized_pixels",
        }
    if architecture.endswith("ForImageClassification"):
        classes = config["classes"]
        settings["id2label"] = {str(i): name for i, name in enumerate(classes)}
        settings["label2id"] = {name: i for i, name in enumerate(classes)}
    return settings


def preprocessor_of(config: Mapping) -> dict:
    """The preprocessor_config.json that makes of an image what the model was trained on."""
    height, width = config["data"]["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["pixels"]["mean"]),
        "image_std": list(config["pixels"]["std"]),
    }


def pixels_of(preprocessor: Mapping | None, channels: int, model_type: str) -> tuple[dict, bool]:
    """The `pixels` group, {"mean", "std"}, and whether it is what a preprocessor_config.json says or an assumption."""
    said = preprocessor or {}
    mean, std = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    rescale = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1
    numbers = are_numbers(mean, channels) and are_numbers(std, channels) and are_numbers([rescale], 1)
    if numbers and 0 not in (*std, rescale):
        factor = 255 * rescale
        factor = 1.0 if abs(factor - 1) < 1e-9 else factor  # (x * rescale - mean) / std is (x / 255 - mean') / std'
        return {"mean": tuple(x / factor for x in mean), "std": tuple(x / factor for x in std)}, True
    assumed = IMAGENET if model_type == "vit_mae" else {key: value * 3 for key, value in HALF.items()}
    return assumed if channels == 3 else {key: value * channels for key, value in HALF.items()}, False


def are_numbers(values, count: int) -> bool:
    """Whether this is a list of so many numbers, none of them NaN or beyond all sense."""
    listed = isinstance(values, list | tuple) and len(values) == count
    return listed and all(isinstance(x, int | float) and abs(x) < MOST for x in values)


def card(config: Mapping, architecture: str, pooler: bool, results: Sequence[tuple[str, str]]) -> str:
    """The README.md of a model: what it is, what it was trained on and how, what came out, how to load it.

    Args:
      pooler: whether its file has one, as that of a ViTModel may.
      results: what to say of it, a name and a value each.
    """
    data, encoder, pixels = config["data"], config["encoder"], config["pixels"]
    use = "AutoModelForImageClassification" if architecture.endswith("ForImageClassification") else architecture
    extra = ", add_pooling_layer=False" if architecture == "ViTModel" and not pooler else ""
    about = [
        (
            "architecture",
            f"{architecture}, width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads",
        ),
        (
            "images",
            f"{data['image_size'][0]}x{data['image_size'][1]}, {data['channels']} channel(s), patches of "
            f"{encoder['patch_size']}",
        ),
        ("pixels", f"(x / 255 - {list(pixels['mean'])}) / {list(pixels['std'])}"),
        *results,
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in about)
    return f"""---
library_name: transformers
tags: [masked-autoencoder, vision-transformer, mae_jax]
---

# {architecture}, exported by mae_jax

A {"masked autoencoder" if architecture == "ViTMAEForPreTraining" else "vision transformer"} (He et al. 2021, arXiv
2111.06377), written for transformers by mae_jax.

| | |
|---|---|
{rows}

```python
from transformers import {use}

model = {use}.from_pretrained("PATH"{extra})
```
"""
