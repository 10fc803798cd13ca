"""A model of this project from the files of another world, and what has to be changed for it to fit: explicitly."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.files import to_path
from mae_jax.interchange import huggingface, names, original, tensors
from mae_jax.model import masking
from mae_jax.model.classifier import Classifier
from mae_jax.model.extent import MOST_BLOCKS, MOST_NUMBERS, MOST_PARAMETERS, parameter_count, table_size
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.patches import grid_of
from mae_jax.model.positions import position_rows, resize_positions
from mae_jax.model.vit import ViT

# What a folder may hold its tensors in, the best first.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", *tensors.PYTORCH)


def is_foreign(path: str | Path) -> bool:
    """Whether `path` is a file of tensors or a folder with one, and no workdir or checkpoint."""
    path = to_path(path)
    return path.suffix in SUFFIXES or any(os.path.isfile(path / name) for name in FILES)


def read(
    path: str | Path,
    heads: int | Sequence[int] = (),
    image_size: Sequence[int] = (),
    target: str = "",
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    weights: bool = True,
) -> tuple[dict, dict, list[str]]:
    """The model in a folder of Hugging Face's, or in a file of the original code's or timm's tensors.

    Args:
      heads, image_size, target: as in `original.describe`, where there is no config.json; one number of heads is the
        encoder's.
      classes: names, in order; empty: those of config.json, or else numbers.
      mean, std: of pixels, as in `patches.normalize`; empty: what the files say, or else ImageNet's.
      weights: without them, no parameters are returned but positions.

    Returns:
      Its config, complete for all that looks at a trained model; its parameters, f32 in a tree as everywhere
      here, in the host's memory; and what was assumed, a line each.

    Raises:
      UserError: with everything that is missing, unused or of another shape.
    """
    file = _file_in(to_path(path))
    beside, heads = file.parent / "config.json", (heads,) if isinstance(heads, int) else tuple(heads)
    given = {names.as_in_files(name): tensor for name, tensor in tensors.tensors_in(file).items()}
    shapes = {name: tensor.shape for name, tensor in given.items()}
    assumed = []
    if "patch_embed.proj.weight" in shapes:
        settings = _settings_of_timm(beside)
        pool = {"avg": "mean", "token": "cls"}.get(str(settings.get("global_pool")), "")
        config, table = original.describe(shapes, str(file), heads, image_size, target, pool), names.ORIGINAL
        pixels, known = original.pixels_of(settings, config["channels"])
        if "head" in config and "fc_norm.weight" not in shapes and not pool:
            assumed.append("the classifier takes the cls token, not the mean of the patches")
    elif beside.is_file():
        for flag, value in {"heads": heads, "image_size": image_size, "target": target}.items():
            if value:
                raise ConfigError(f"--{flag}: {beside} says that; leave it out")
        settings = tensors.read_json(beside)
        config, table = huggingface.describe(settings, str(beside), shapes)
        preprocessor = file.parent / "preprocessor_config.json"
        said = tensors.read_json(preprocessor) if preprocessor.is_file() else None
        pixels, known = huggingface.pixels_of(said, config["channels"], settings.get("model_type", ""))
    else:
        some = ", ".join(sorted(shapes)[:4])
        raise CheckpointError(
            f"{file}: no ViT of the original code or of timm (it has {some}, ...), and no config.json beside it"
        )
    _check_extent(config, shapes, str(file))
    _check_unsaid(config, str(file), heads, target, classes)
    if mean or std:
        pixels, known = {"mean": tuple(mean), "std": tuple(std)}, True
        if not all(huggingface.are_numbers(value, config["channels"]) for value in pixels.values()) or 0 in std:
            raise ConfigError(f"--mean, --std: not {config['channels']} numbers each, above 0 in --std")
    if not known:
        assumed.append(
            f"pixels are normalised by mean {pixels['mean']} and std {pixels['std']}; --mean and --std say otherwise"
        )
    params = unflatten_dict(_read_all(given, config, table, str(file), weights), sep="/")
    for part in params.keys() & {"encoder", "decoder"}:
        _forget_fixed_positions(config, params, part)
    plain = "none" if table is not names.ORIGINAL else "centre_crop"  # as in the image processor, and in datasets.py
    return _complete(config, pixels, classes, plain), params, assumed


def _settings_of_timm(path: Path) -> dict:
    """What a config.json of timm's says, if that is what it is; files of the original code may lie beside any."""
    try:
        settings = tensors.read_json(path)
    except CheckpointError:
        return {}
    beside = settings.get("pretrained_cfg")
    return {**beside, **settings} if "architecture" in settings and isinstance(beside, dict) else settings


def _check_extent(config: dict, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise a CheckpointError where a model would be of a size that no file has, and this one has not.

    What is merely missing is listed later, name by name; for that all blocks are traced and positions are computed.
    """
    held, patch, size = sum(map(math.prod, shapes.values())), config["encoder"]["patch_size"], config["image_size"]
    for part in config.keys() & {"encoder", "decoder"}:
        width, depth = config[part]["width"], config[part]["depth"]
        table = table_size(size, patch, width)
        weights = parameter_count(depth, width, config[part]["mlp_ratio"], patch**2 * config["channels"])
        bounds = (depth, len(shapes), MOST_BLOCKS), (table, held, MOST_NUMBERS), (weights, held, MOST_PARAMETERS)
        if any(number > max(there, most) for number, there, most in bounds):
            raise CheckpointError(
                f"{where}: its {part} would be {depth} blocks of width {width}, for {size[0]}x{size[1]} pixels in "
                f"patches of {patch}: too many for a file of {held} numbers in {len(shapes)} tensors"
            )


def _check_unsaid(config: dict, where: str, heads: Sequence[int], target: str, classes: Sequence[str]) -> None:
    """Raise a ConfigError with what was said of something that the model has not."""
    problems = []
    if classes and "classes" not in config:
        problems.append(f"--classes: {where} holds no classifier")
    elif classes and len(classes) != len(config["classes"]):
        problems.append(f"{where}: has {len(config['classes'])} classes, not {len(classes)}")
    if target and "decoder" not in config:
        problems.append(f"--target: {where} holds no decoder")
    if len(heads) > 1 and "decoder" not in config:
        problems.append(f"--heads: {where} holds no decoder; give one number")
    if problems:
        raise ConfigError(problems)


def _file_in(path: Path) -> Path:
    """The file of tensors that `path` means: itself, or the one in a folder."""
    if path.suffix in SUFFIXES or os.path.isfile(path):
        return path
    found = [path / name for name in FILES if os.path.isfile(path / name)]
    if not found:
        raise CheckpointError(f"{path}: no {', '.join(FILES)} here, and no file of {', '.join(SUFFIXES)}")
    return found[0]


def shapes_of(config: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of a model by path, from the groups that `huggingface.describe` gives."""
    encoder = ViT(**config["encoder"])
    patch, channels = encoder.patch_size, config["channels"]
    images = jax.ShapeDtypeStruct((1, *config["image_size"], channels), jnp.float32)
    if "decoder" in config:
        patches = int(np.prod(grid_of(config["image_size"], patch)))
        mask = jax.eval_shape(lambda: masking.from_scores(jnp.zeros((1, patches)), 0.5))
        model, args = MAE(encoder, Decoder(patch**2 * channels, **config["decoder"])), (images, mask)
    elif "head" in config:
        model, args = Classifier(encoder, len(config["classes"]), **config["head"]), (images,)
    else:
        model, args = encoder, (images,)
    params = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    return {
        leaf: x.shape for leaf, x in flatten_dict({"encoder": params} if model is encoder else params, sep="/").items()
    }


def _read_all(
    given: Mapping[str, tensors.Tensor], config: dict, table: Mapping, where: str, weights: bool
) -> dict[str, jax.Array]:
    """All parameters by path, or only positions; a CheckpointError lists what is missing, unused or misshapen."""
    patch = config["encoder"]["patch_size"]
    try:
        shapes = shapes_of(config)
    except (ValueError, TypeError) as error:  # sizes that do not divide
        raise CheckpointError(f"{where}: its sizes do not fit together: {error}") from error
    if table is names.HUGGING_FACE_ENCODER and "pooler.dense.weight" in given:  # kept for the way back
        width = config["encoder"]["width"]
        shapes |= {"pooler/kernel": (width, width), "pooler/bias": (width,)}
    holders = {leaf: names.tensors_of(leaf, table) for leaf in shapes}
    wanted = {}
    for leaf, held in holders.items():
        parts = names.to_theirs(leaf, np.broadcast_to(np.float32(0), shapes[leaf]), len(held), patch)
        wanted |= {name: part.shape for name, part in zip(held, parts, strict=True)}
    wanted = {name: shape for name, shape in wanted.items() if not names.is_absent(name, table)}
    problems = [f"{where}: missing: {name} {shape}" for name, shape in wanted.items() if name not in given]
    problems += [f"{where}: unused: {name} {tensor.shape}" for name, tensor in given.items() if name not in wanted]
    problems += [
        f"{where}: misshapen: {name} is {given[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    if problems:
        raise CheckpointError(problems)

    def value(name: str, width: int) -> np.ndarray:
        return given[name].read() if name in given else np.zeros(width, np.float32)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return {
            leaf: jnp.asarray(names.to_ours(leaf, [value(name, shapes[leaf][-1] // len(held)) for name in held]))
            for leaf, held in holders.items()
            if weights or leaf.endswith("/positions")
        }


def _forget_fixed_positions(config: dict, params: dict, part: str) -> None:
    """Where the positions in a file are the fixed ones, bit for bit, no parameter holds them here."""
    grid = grid_of(config["image_size"], config["encoder"]["patch_size"])
    if np.array_equal(params[part]["positions"], position_rows(grid, config[part]["width"])):
        del params[part]["positions"]
        config[part]["positions"] = "sincos"


def _complete(config: dict, pixels: dict, classes: Sequence[str], held_out_augment: str) -> dict:
    """The config of a run, as far as what looks at a trained model reads it; its data are ImageNet's."""
    data = {
        "source": "tfds",
        "name": "imagenet2012",
        "split": "train",
        "held_out": "validation",
        "image_size": config.pop("image_size"),
        "channels": config.pop("channels"),
        "batch_size": 256,
        "held_out_augment": held_out_augment,
    }
    if classes:
        config["classes"] = tuple(classes)
    return {"data": data, "pixels": pixels, "dtype": "float32", "seed": 0, "init": "", **config}


def resize(config: dict, params: dict, image_size: Sequence[int], positions: str = "") -> None:
    """Make a model one for images of another size, in place.

    Args:
      image_size: (H, W), divisible by the patches.
      positions: "bicubic" interpolates them (`resize_positions`) and "sincos" computes fixed ones anew; empty: the
        first where they are learned, the second where they are fixed.

    Raises:
      ConfigError: it does not divide.
    """
    patch = config["encoder"]["patch_size"]
    if len(image_size) != 2 or min(image_size) < 1 or any(side % patch for side in image_size):
        raise ConfigError(f"--resize={','.join(map(str, image_size))}: is not divisible into patches of {patch}")
    width = max(config[part]["width"] for part in params.keys() & {"encoder", "decoder"})
    if math.prod(image_size) * max(width / patch**2, config["data"]["channels"]) > MOST_NUMBERS:
        raise ConfigError(f"--resize={','.join(map(str, image_size))}: is larger than any image may be")
    grids = [grid_of(size, patch) for size in (config["data"]["image_size"], image_size)]
    for part in params.keys() & {"encoder", "decoder"}:
        width, learned = config[part]["width"], config[part]["positions"] == "learned"
        if positions == "bicubic" or (learned and not positions):
            before = params[part]["positions"] if learned else position_rows(grids[0], width)
            params[part]["positions"] = resize_positions(before, *grids)
            config[part]["positions"] = "learned"
        elif learned:
            del params[part]["positions"]
            config[part]["positions"] = "sincos"
    config["data"]["image_size"] = tuple(image_size)


def adapt(config: dict, params: dict, channels: int, how: str) -> list[str]:
    """Make a model one for images of so many channels, in place, as timm.models.adapt_input_conv does.

    Args:
      how: "sum" the weights of all channels into the one that is wanted, which then gives for a grey image what they
        gave for three equal channels; "repeat" the channels there are, divided so that the sums stay of one size.

    Returns:
      What was done besides: an autoencoder loses its decoder, which predicts other channels.

    Raises:
      ConfigError: "sum" into more than one channel.
    """
    if how == "sum" and channels != 1:
        raise ConfigError(f"--adapt=sum: is for one channel, not {channels}; use repeat")
    before, embedding, pixels = config["data"]["channels"], params["encoder"]["patch_embedding"], config["pixels"]
    if embedding["kernel"].size // before * channels > MOST_NUMBERS:
        raise ConfigError(f"--channels={channels}: are more than any image may have")
    kernel = embedding["kernel"].reshape(-1, before, config["encoder"]["width"])  # [P*P,C,D]
    if how == "sum":
        kernel = kernel.sum(axis=1, keepdims=True)
        pixels = {key: (float(np.mean(value)),) for key, value in pixels.items()}
    else:
        order = np.arange(channels) % before
        kernel = kernel[:, order] * np.float32(before / channels)
        pixels = {key: tuple(value[i] for i in order) for key, value in pixels.items()}
    embedding["kernel"] = np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]))
    config["pixels"] = pixels
    config["data"]["channels"] = channels
    if "decoder" not in params:
        return []
    del params["decoder"]
    for group in ("decoder", "target", "mask"):
        del config[group]
    return [f"the decoder, which predicts {before} channels, is left out"]
