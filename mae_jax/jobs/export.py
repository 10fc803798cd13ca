"""Write a trained model for other worlds, or as a file that runs without this project.

    mae-jax export --checkpoint=PATH --format=FORMAT --out=PATH [--part=encoder]

Reads a workdir of any training job or of import, or one of its checkpoints. Writes the file or folder --out; of a model
with moving averages of its parameters, those. The formats:

    huggingface   a folder for transformers: config.json, model.safetensors, preprocessor_config.json, a model card.
                  ViTMAEForPreTraining, ViTModel (load it with add_pooling_layer=False), ViTForImageClassification, or
                  for a fine-tuned classifier, which takes the mean of the patches, BeitForImageClassification
    original      a .pth file with the names of the original code
    timm          a .safetensors file with the same names, for timm's VisionTransformer; no decoder
    npz           the parameters by the names they have here, such as encoder/block_0/mlp/in/kernel
    stablehlo     a file for jax.export.deserialize, on CPU, GPU and TPU, for any number of images; needs memory for the
                  parameters some seven times, and holds up to 2 GiB
    onnx          for onnxruntime and others (pip install "mae_jax[onnx]")

The last two compute what the model does: f32[N,H,W,C], normalised as in training, to the tokens f32[N,1+L,D] of the
encoder, or a classifier's logits. --part=encoder leaves out the decoder or the classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from mae_jax.data.pipeline import Dataset
from mae_jax.errors import CheckpointError, ConfigError, nearest
from mae_jax.files import path_of, write_json
from mae_jax.interchange import huggingface, names, portable, tensors
from mae_jax.jobs import classification, models
from mae_jax.model.classifier import EPSILON
from mae_jax.model.layers import EPSILON as ORIGINAL_EPSILON
from mae_jax.model.mae import Decoder
from mae_jax.model.patches import grid_of
from mae_jax.model.positions import position_rows
from mae_jax.model.vit import ViT
from mae_jax.training import checkpoint

REQUIRED = ("checkpoint", "format", "out")
FLAGS = (*REQUIRED, "part")
PORTABLE = {"stablehlo": portable.stablehlo, "onnx": portable.onnx}
FORMATS = ("huggingface", "original", "timm", "npz", *PORTABLE)
PARTS = ("all", "encoder")
WITH_A_TABLE = ("sincos", "learned")  # positions that every other world has
SAID = ("mask", "target", "optim", "mixup", "head")  # groups of a config that a model card repeats


def run(flags: Mapping[str, str]) -> None:
    """Export as `flags` say."""
    path, kind, part = flags["checkpoint"], flags["format"], flags.get("part", "all")
    out = path_of("out", flags["out"])
    check(kind, part)
    config = complete(models.stored_config(path))
    with tensors.whole(out) as unfinished:
        if kind in PORTABLE:
            forward = forward_of(path, config, part)
            PORTABLE[kind](forward, (*config["data"]["image_size"], config["data"]["channels"]), unfinished)
        else:
            check_target(path, config, kind, part)
            leaves = parameters(path, config, part, fold=kind != "npz")
            WRITERS[kind](path, config, leaves, part, unfinished)
    print(f"exported    {kind} of {checkpoint.locate(path)}\nwritten     {out}")


def check(kind: str, part: str) -> None:
    """Raise a ConfigError with all that is wrong with the flags."""
    problems = [
        f"--{flag}={word}: no such {flag}; use one of {', '.join(choices)}{nearest(word, choices)}"
        for flag, word, choices in (("format", kind, FORMATS), ("part", part, PARTS))
        if word not in choices
    ]
    if problems:
        raise ConfigError(problems)


def check_target(path: str, config: Mapping, kind: str, part: str) -> None:
    """Raise a CheckpointError where what would go along is something that nobody has there."""
    positions, decoder = config["encoder"]["positions"], config.get("decoder")
    if kind != "npz" and positions not in (*WITH_A_TABLE, "none"):  # none is a table of zeros
        raise CheckpointError(f"{path}: its encoder has {positions} positions; export as npz or stablehlo")
    if part != "all" or kind not in ("huggingface", "original") or not decoder:
        return
    target = config["target"]["name"]
    if target not in ("pixels", "normalized_pixels"):
        raise CheckpointError(f"{path}: its decoder predicts {target}, not pixels; export --part=encoder, or as npz")
    known = {"kind": ("self",), "mask_tokens": ("decoder",), "positions": WITH_A_TABLE}
    others = [f"{key} {decoder[key]}" for key, words in known.items() if decoder[key] not in words]
    others += ["depth 0"] * (decoder["depth"] == 0)
    if others:
        raise CheckpointError(f"{path}: its decoder has {', '.join(others)}; export --part=encoder, or as npz")


def complete(config: dict) -> dict:
    """A checkpoint's config with what it leaves out of the encoder and the decoder: the defaults."""
    for group, module in {"encoder": ViT, "decoder": Decoder}.items():
        if group in config:
            defaults = {f.name: f.default for f in dataclasses.fields(module) if f.default is not dataclasses.MISSING}
            config[group] = defaults | config[group]
    return config


def forward_of(path: str, config: Mapping, part: str) -> Callable[[jax.Array], jax.Array]:
    """What a portable file is to compute: f32[N,H,W,C], normalised, to f32[N,1+L,D] or logits f32[N,C]."""
    if "head" in config and part == "all":
        model, _, variables = classification.load(path)
    else:
        model, params = models.load_encoder(path)
        variables = {"params": params}
    return lambda images: model.apply(variables, images)


def parameters(path: str, config: Mapping, part: str, fold: bool) -> dict[str, np.ndarray]:
    """The parameters by name; with `fold`, as other worlds have them: positions are among them, BatchNorm is not.

    BatchNorm without scale and bias becomes a part of the linear layer behind it.
    """
    trees = checkpoint.read(path, ("params", "ema", "stats"))
    leaves = {**trees["params"], **trees["ema"]}
    if part == "encoder":
        leaves = {leaf: value for leaf, value in leaves.items() if leaf.startswith(("encoder/", "pooler/"))}
    elif not fold:
        leaves |= trees["stats"]
    elif trees["stats"]:
        mean, var = (trees["stats"][f"batch_stats/norm/{key}"] for key in ("mean", "var"))
        scaled = leaves["head/kernel"] / np.sqrt(var + np.float32(EPSILON))[:, None]
        leaves |= {"head/kernel": scaled, "head/bias": leaves["head/bias"] - mean @ scaled}
    grid = grid_of(config["data"]["image_size"], config["encoder"]["patch_size"])
    for group in ("encoder", "decoder") if fold else ():
        if group in config and any(leaf.startswith(f"{group}/") for leaf in leaves):
            fixed = position_rows(grid, config[group]["width"])
            leaves.setdefault(f"{group}/positions", fixed * np.float32(config[group]["positions"] != "none"))
    return leaves


def drop(leaves: dict[str, np.ndarray], prefix: str) -> None:
    """Leave out what other worlds have no place for."""
    for leaf in [leaf for leaf in leaves if leaf.startswith(prefix)]:
        del leaves[leaf]


def renamed(leaves: dict[str, np.ndarray], table: Mapping, patch_size: int) -> dict[str, np.ndarray]:
    """The tensors that hold these parameters in another world. Empties `leaves`, so that memory holds them once."""
    found = {}
    for leaf in list(leaves):
        held = names.tensors_of(leaf, table)
        parts = names.to_theirs(leaf, leaves.pop(leaf), len(held), patch_size)
        for name, value in zip(held, parts, strict=True):
            if not names.is_absent(name, table):
                found[name] = np.ascontiguousarray(value)
    return found


def write_huggingface(path: str, config: Mapping, leaves: dict, part: str, folder: Path) -> None:
    """A folder that transformers reads."""
    architecture = huggingface.architecture_of(config, part)
    table = huggingface.ARCHITECTURES[architecture][1]
    size, pooler = config["data"]["image_size"], any(leaf.startswith("pooler/") for leaf in leaves)
    if size[0] != size[1] and architecture in ("ViTMAEForPreTraining", "BeitForImageClassification"):
        print(f"note        transformers has this model for square images alone, not for {size[0]}x{size[1]}")
    folder.mkdir()
    tensors.write_safetensors(folder / "model.safetensors", renamed(leaves, table, config["encoder"]["patch_size"]))
    write_json(folder / "config.json", huggingface.settings_of(config, architecture))
    write_json(folder / "preprocessor_config.json", huggingface.preprocessor_of(config))
    (folder / "README.md").write_text(huggingface.card(config, architecture, pooler, results_of(path, config)))


def write_original(path: str, config: Mapping, leaves: dict, part: str, file: Path) -> None:
    """A file that the original code reads."""
    check_norms(path, config, leaves, [("mean", True), ("cls", False)])
    drop(leaves, "pooler/")
    tensors.write_pytorch(file, renamed(leaves, names.ORIGINAL, config["encoder"]["patch_size"]))
    say_epsilon(config)


def check_norms(path: str, config: Mapping, leaves: Mapping, known: list[tuple[str, bool]]) -> None:
    """Raise a CheckpointError where the names of the original code would say another function than this.

    Args:
      known: poolings of a classifier, and whether a norm comes after it, in place of the encoder's own.
    """
    inside, after = "encoder/norm/scale" in leaves, "norm/scale" in leaves
    if "head/kernel" not in leaves:
        if not inside:
            raise CheckpointError(f"{path}: its encoder has no final norm; export all of it, or as npz or stablehlo")
    elif inside == after or (config["head"]["pool"], after) not in known:
        raise CheckpointError(
            f"{path}: no classifier there has pool {config['head']['pool']}, {'a' if after else 'no'} norm after it "
            f"and {'a' if inside else 'no'} final norm of the encoder; export as npz or stablehlo"
        )


def write_timm(path: str, config: Mapping, leaves: dict, part: str, file: Path) -> None:
    """A file that timm reads, and a line that says into which model."""
    check_norms(path, config, leaves, [("mean", True), ("cls", False), ("mean", False)])
    for kept_here in ("decoder/", "mask_token", "target/", "pooler/"):
        drop(leaves, kept_here)
    encoder, head = config["encoder"], config.get("head") if part == "all" else None
    size = config["data"]["image_size"]
    options = {
        "img_size": tuple(size),
        "patch_size": encoder["patch_size"],
        "in_chans": config["data"]["channels"],
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": encoder["mlp_ratio"],
        "num_classes": len(config["classes"]) if head else 0,
        "global_pool": {"mean": "avg", "cls": "token"}[head["pool"]] if head else "token",
        "fc_norm": "norm/scale" in leaves,
    }
    tensors.write_safetensors(file, renamed(leaves, names.ORIGINAL, encoder["patch_size"]))
    say_epsilon(config)
    print(f"for         VisionTransformer({', '.join(f'{key}={value!r}' for key, value in options.items())})")


def say_epsilon(config: Mapping) -> None:
    """Print which epsilon the LayerNorms need, where it is not the one that is in the code of these worlds."""
    epsilon = config["encoder"]["epsilon"]
    if epsilon != ORIGINAL_EPSILON:
        print(f"note        its LayerNorms have epsilon {epsilon:g}, not {ORIGINAL_EPSILON:g}, which no file says")


def write_npz(path: str, config: Mapping, leaves: dict, part: str, file: Path) -> None:
    """A file that NumPy reads."""
    portable.npz(leaves, file)


WRITERS = {"huggingface": write_huggingface, "original": write_original, "timm": write_timm, "npz": write_npz}


def results_of(path: str, config: Mapping) -> list[tuple[str, str]]:
    """What the run that wrote a checkpoint says of itself, a name and a value each, for a model card."""
    workdir, step = checkpoint.locate(path).parent.parent, int(checkpoint.locate(path).name)
    said = [(group, ", ".join(f"{k} {v}" for k, v in config[group].items())) for group in SAID if group in config]
    if "imported" in config:
        return [*said, ("weights", f"imported from {Path(config['imported']['from']).name}")]
    said.append(("data", " ".join(str(v) for v in classification.description(Dataset(**config["data"])).values())))
    said.append(("training", f"{step} steps of {config['data']['batch_size']} images"))
    if config.get("init"):
        said.append(("encoder from", Path(config["init"]).name))
    file = workdir / "summary.json"
    found = tensors.read_json(file) if file.is_file() else {}
    if found.get("steps") == step:
        said += [(key, f"{x:.4g}") for key, x in found["metrics"].items() if key.startswith("eval/") and x is not None]
    return said
