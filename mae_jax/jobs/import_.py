r"""Read a model that was trained elsewhere, and write it as a checkpoint of this project.

    mae-jax import --from=PATH --workdir=DIR [--resize=H,W] [--channels=N --adapt=sum] [...]

Reads, whatever it turns out to be:

    a folder of Hugging Face's    config.json and model.safetensors: ViTMAEForPreTraining, ViTMAEModel, ViTModel,
                                  ViTForImageClassification, and BEiT where it is a ViT, as `mae-jax export` writes it
    a file of the original code   mae_pretrain_vit_*.pth, with decoder or without, and fine-tuned classifiers
    a file of timm's ViT          .pth or .safetensors

Writes a checkpoint into the workdir, for reconstruct, probe, finetune, knn, evaluate and mae_jax.load_encoder. Files
of PyTorch's need PyTorch (pip install "mae_jax[torch]"); no code in them is run. What no file says is given:

    --heads=N[,M]           heads of the encoder and decoder, unless they are 192, 384, 768, 1024, 1280 and 512 wide
    --image_size=H,W        of images that were not square; one number is a square
    --target=NAME           what a decoder of the original code predicts: pixels or normalized_pixels
    --classes=NAME          the class names of that TFDS data set, in its order, such as imagenet2012
    --mean=X[,...] --std=X[,...]    of pixels between 0 and 1, by channel, where no preprocessor_config.json lies beside

And what is to be changed:

    --resize=H,W            for images of another size: learned positions are interpolated, fixed ones computed
    --positions=KIND        how: bicubic, as in fine-tuning by the original code, or sincos
    --channels=N            for images of another number of channels, with
    --adapt=HOW             sum (into one channel) or repeat, as timm does

Its data are taken for ImageNet's. Elsewhere they are named:

    mae-jax knn --config=configs/knn.py --config.init=DIR --workdir=runs/knn \
        --config.data.source=digits --config.data.split=train --config.data.held_out=test
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from etils import epy
from flax.traverse_util import flatten_dict

from mae_jax.errors import ConfigError, nearest
from mae_jax.files import path_of, write_json
from mae_jax.interchange.tensors import whole
from mae_jax.jobs import foreign
from mae_jax.training import checkpoint

with epy.lazy_imports():
    import tensorflow_datasets as tfds

REQUIRED = ("from", "workdir")
FLAGS = (
    *REQUIRED,
    "heads",
    "image_size",
    "target",
    "classes",
    "mean",
    "std",
    "resize",
    "positions",
    "channels",
    "adapt",
)
PIXELS = ("pixels", "normalized_pixels")  # the targets that there are elsewhere


def run(flags: Mapping[str, str]) -> None:
    """Import as `flags` say."""
    given = check(flags)
    workdir = path_of("workdir", flags["workdir"])
    unsaid = {key: given[key] for key in ("heads", "image_size", "target", "mean", "std")}
    config, params, notes = foreign.read(flags["from"], classes=class_names(given["classes"]), **unsaid)
    if given["resize"]:
        foreign.resize(config, params, given["resize"], given["positions"])
    if given["channels"] and given["channels"] != config["data"]["channels"]:
        notes += foreign.adapt(config, params, given["channels"], given["adapt"])
    count = sum(x.size for x in flatten_dict(params).values())
    config["imported"] = {key: value for key, value in flags.items() if key != "workdir"}
    with whole(workdir) as unfinished:
        checkpoint.write(unfinished, config, params)
        write_json(unfinished / "config.json", config)
    what = "autoencoder" if "decoder" in config else "classifier" if "head" in config else "encoder"
    for note in notes:
        print(f"note        {note}")
    print(f"imported    {what} of {count:,} parameters, from {flags['from']}\ncheckpoint  {workdir}/checkpoints/0")


def check(flags: Mapping[str, str]) -> dict:
    """The flags as values; those not given are empty.

    Raises:
      ConfigError: with all that is wrong.
    """
    problems = []

    def parse(flag: str, kind: Callable, empty, what: str):
        try:
            return kind(flags[flag]) if flag in flags else empty
        except ValueError:
            problems.append(f"--{flag}={flags[flag]}: is not {what}")
            return empty

    def numbers(text: str) -> tuple[int, ...]:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)?", text):
            raise ValueError
        return tuple(map(int, text.split(",")))

    def floats(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split(",")))

    def one_number(text: str) -> int:
        (number,) = numbers(text)
        return number

    def size(text: str) -> tuple[int, ...]:
        return (numbers(text) * 2)[:2]

    def one_of(*choices: str) -> Callable:
        def choose(text: str) -> str:
            if text not in choices:
                raise ValueError
            return text

        return choose

    ways, kinds = ("sum", "repeat"), ("bicubic", "sincos")
    given = {
        "heads": parse("heads", numbers, (), "a number above 0, or two"),
        "image_size": parse("image_size", size, (), "HEIGHT,WIDTH"),
        "resize": parse("resize", size, (), "HEIGHT,WIDTH"),
        "channels": parse("channels", one_number, 0, "a number above 0"),
        "mean": parse("mean", floats, (), "numbers, one for each channel"),
        "std": parse("std", floats, (), "numbers, one for each channel"),
        "target": parse("target", one_of(*PIXELS), "", f"one of {', '.join(PIXELS)}"),
        "positions": parse("positions", one_of(*kinds), "", f"one of {', '.join(kinds)}"),
        "adapt": parse("adapt", one_of(*ways), "", f"one of {', '.join(ways)}"),
        "classes": flags.get("classes", ""),
    }
    if ("channels" in flags) != ("adapt" in flags):
        problems.append(f"--channels and --adapt go together: say how, {' or '.join(ways)}, and how many")
    if ("mean" in flags) != ("std" in flags):
        problems.append("--mean and --std go together")
    if "positions" in flags and "resize" not in flags:
        problems.append("--positions says how to --resize, which is not given")
    if problems:
        raise ConfigError(problems)
    return given


def class_names(name: str) -> tuple[str, ...]:
    """Of a TFDS data set, which need not be prepared; none without a name."""
    if not name:
        return ()
    try:
        return tuple(tfds.builder(name).info.features["label"].names)
    except (tfds.core.DatasetNotFoundError, KeyError, AttributeError) as error:
        known = nearest(name, tfds.list_builders(with_community_datasets=False))
        raise ConfigError(f"--classes={name}: no data set of TFDS with classes{known}") from error
