"""Recipes for linear probing (He et al. 2021, section 4 and table 10).

    mae-jax probe --config=configs/probe.py:NAME --config.init=WORKDIR --workdir=DIR [--config.GROUP.KEY=VALUE ...]

NAME          data                                encoder           cost
digits        scikit-learn, 8x8                   of config.init    seconds
fashion_mnist TFDS, 28x28; all labels             of config.init    a minute or two on 2 cores
imagenet      ImageNet-1k (TFDS), 224             of config.init    90 epochs of batch 16384

NAME,tiny is the same recipe in seconds. config.data.per_class=N trains on N labels a class (fashion_mnist).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mae_jax.errors import ConfigError, nearest

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def get_config(spec: str = "digits") -> ConfigDict:
    name, _, variant = spec.partition(",")
    if name not in RECIPES:
        raise ConfigError(f"--config: no recipe {name!r}; use one of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    config = RECIPES[name]()
    if variant == "tiny":
        if name != "digits":
            side = 16 if config.data.channels == 1 else 112  # of whole patches of 14 and 16
            config.data.update(source="synthetic", split="train", held_out="validation", image_size=(side, side))
        config.data.batch_size = 8
        config.train.steps = 2
        config.log.every = 1
    elif variant:
        raise ConfigError(f"--config: no variant {variant!r} of {name}; there is only {name},tiny")
    return config


def imagenet() -> ConfigDict:
    """Table 10 and main_linprobe.py: LARS, no weight decay, the cls token, BatchNorm.

    Results to expect (paper): 68.0 % for ViT-B, 75.8 % for ViT-L, 76.6 % for ViT-H.
    """
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.init = ""
    config.accumulate = 1  # parts of a batch that are computed one after the other
    config.data = {
        "source": "tfds",
        "name": "imagenet2012",
        "data_dir": "",
        "path": "",
        "split": "train",
        "held_out": "validation",
        "image_size": (224, 224),
        "channels": 3,
        "batch_size": 16384,
        "augment": "random_resized_crop",
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "flip": True,
        "held_out_augment": "centre_crop",
        "per_class": 0,
        "subset_seed": 0,
        "cache": "",
    }
    config.pixels = IMAGENET
    config.encoder = {}  # as in config.init
    config.head = {"pool": "cls", "norm": "batch", "head_std": 0.01}
    config.optim = {
        "name": "lars",
        "base_learning_rate": 0.1,  # times batch_size / 256
        "min_learning_rate": 0.0,
        "warmup_epochs": 10.0,
        "weight_decay": 0.0,
        "b1": 0.9,
    }
    config.train = {"steps": placeholder(int), "epochs": 90.0}
    config.log = {"every": 20}
    config.eval = {"every": 780, "images": placeholder(int)}
    config.checkpoint = {"every": 780, "keep": 1, "keep_every": 0, "minutes": 0.0}
    # steps in a row that are not finite, or so many times too large; the share of samples that may be unreadable
    config.guard = {"patience": 5, "spike": 0.0, "unreadable": 0.1}
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # -1: all devices that the others leave
    return config


def fashion_mnist() -> ConfigDict:
    """Ten kinds of clothing, without augmentation, so that features are computed once.

    Measured on the encoder of configs/pretrain.py:fashion_mnist: 86.9 % (docs/evaluation.md).
    """
    config = imagenet()
    config.data.update(name="fashion_mnist", held_out="test", image_size=(28, 28), channels=1, batch_size=512)
    config.data.update(augment="none", held_out_augment="none", flip=False)
    config.pixels = {"mean": (0.2860,), "std": (0.3530,)}
    config.head.pool = "mean"
    config.optim.base_learning_rate = 1.0  # LARS takes small steps, and there are few; 4.0 diverges
    config.log.every = 117
    config.eval.every = 1170
    config.checkpoint.every = 0
    return config


def digits() -> ConfigDict:
    """1438 handwritten digits of 8x8 pixels, 359 held out."""
    config = fashion_mnist()
    config.data.update(source="digits", name="", held_out="test", image_size=(8, 8), batch_size=128, cache="")
    config.pixels = {"mean": (0.3053,), "std": (0.3760,)}
    config.head.pool = "cls"
    config.optim.base_learning_rate = 20.0
    config.log.every = 110
    config.eval.every = 110
    return config


RECIPES = {f.__name__: f for f in (digits, fashion_mnist, imagenet)}
