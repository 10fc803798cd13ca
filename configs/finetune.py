"""Recipes for fine-tuning and for training from nothing (He et al. 2021, section 4, appendix A.1 and A.2).

    mae-jax finetune --config=configs/finetune.py:NAME --config.init=WORKDIR --workdir=DIR [--config.GROUP.KEY=...]

NAME                    data                  encoder                 cost
digits                  scikit-learn, 8x8     of config.init          half a minute on 2 cores
fashion_mnist           TFDS, 28x28           of config.init          minutes on 2 cores
fashion_mnist_10        10 labels a class     of config.init          a minute or two on 2 cores
fashion_mnist_60        60 labels a class     of config.init          a few minutes on 2 cores
fashion_mnist_partial   600 labels a class    of config.init          a few minutes on 2 cores
vit_b16, l16, h14       ImageNet-1k, 224      ViT-B, L, H             100, 50, 50 epochs of batch 1024
vit_h14_448             ImageNet-1k, 448      ViT-H                   50 epochs of batch 1024
vit_b16_scratch, l16, h14    the same, 224    from nothing            300, 200, 200 epochs of batch 4096

NAME,scratch trains the same network in the same way from nothing, for the first five. NAME,tiny is the same recipe in
seconds. config.trainable is "all", "head", "norms", or so many of the last blocks: "0.5" (the last MLP), "1", ...
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mae_jax.errors import ConfigError, nearest
from mae_jax.model.vit import SIZES

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def get_config(spec: str = "digits") -> ConfigDict:
    name, *variants = spec.split(",")
    if name not in RECIPES:
        raise ConfigError(f"--config: no recipe {name!r}; use one of {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    config = RECIPES[name]()
    for variant in variants:
        if variant == "tiny":
            shrink(config)
        elif variant == "scratch" and name in SMALL:
            from_nothing(config, SMALL[name])
        else:
            known = f"{name},tiny" + f" and {name},scratch" * (name in SMALL)
            raise ConfigError(f"--config: no variant {variant!r} of {name}; there is {known}")
    return config


def imagenet() -> ConfigDict:
    """What the ImageNet recipes start from: table 9 and main_finetune.py."""
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.init = ""
    config.trainable = "all"
    config.ema = 0.0
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
        "batch_size": 1024,
        "augment": "random_resized_crop",
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "flip": True,
        "randaugment": 9.0,
        "repeats": 1,
        "held_out_augment": "centre_crop",
        "per_class": 0,
        "subset_seed": 0,
        "cache": "",
    }
    config.pixels = IMAGENET
    config.erasing = {"probability": 0.25}
    config.mixup = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "label_smoothing": 0.1}
    config.encoder = {  # the rest of it is as in config.init
        "positions": "learned",
        "drop_path": 0.1,
        "final_norm": False,
        "remat": "none",
        "attention": "auto",
    }
    config.head = {"pool": "mean", "norm": "layer", "head_std": 2e-5}
    config.optim = {
        "name": "adamw",
        "base_learning_rate": 5e-4,  # times batch_size / 256
        "min_learning_rate": 1e-6,
        "warmup_epochs": 5.0,
        "weight_decay": 0.05,
        "b1": 0.9,
        "b2": 0.999,
        "layer_decay": 0.65,
    }
    config.train = {"steps": placeholder(int), "epochs": 100.0}
    config.log = {"every": 100}
    config.eval = {"every": 6255, "images": placeholder(int)}  # 1251 steps an epoch
    config.checkpoint = {"every": 1251, "keep": 1, "keep_every": 0, "minutes": 0.0}
    # steps in a row that are not finite, or so many times too large; the share of samples that may be unreadable
    config.guard = {"patience": 5, "spike": 0.0, "unreadable": 0.1}
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # -1: all devices that the others leave
    return config


def vit_b16() -> ConfigDict:
    """Result to expect (paper, table 3): 83.6 %."""
    return imagenet()


def vit_l16() -> ConfigDict:
    """Result to expect (paper, table 3): 85.9 %."""
    config = imagenet()
    config.encoder.drop_path = 0.2
    config.optim.update(base_learning_rate=1e-3, layer_decay=0.75)
    config.train.epochs = 50.0
    return config


def vit_h14() -> ConfigDict:
    """Result to expect (paper, table 3): 86.9 %."""
    config = vit_l16()
    config.encoder.drop_path = 0.3
    return config


def vit_h14_448() -> ConfigDict:
    """At 448 pixels, the positions resized; result to expect (paper, table 3): 87.8 %."""
    config = vit_h14()
    config.data.image_size = (448, 448)
    config.data.held_out_augment = "none"  # no margin above 224, as in util/datasets.py of the original code
    return config


def scratch(size: str, patch_size: int, epochs: float, drop_path: float) -> ConfigDict:
    """Supervised training from nothing (paper, appendix A.2, table 11)."""
    config = imagenet()
    config.encoder.update(patch_size=patch_size, mlp_ratio=4.0, drop_path=drop_path, positions="sincos", **SIZES[size])
    config.head.head_std = 0.01
    config.data.batch_size = 4096
    config.erasing.probability = 0.0
    config.optim.update(base_learning_rate=1e-4, warmup_epochs=20.0, weight_decay=0.3, b2=0.95, layer_decay=1.0)
    config.optim.min_learning_rate = 0.0
    config.train.epochs = epochs
    config.ema = 0.9999
    config.eval.every = 1560  # 312 steps an epoch
    config.checkpoint.every = 312
    return config


def vit_b16_scratch() -> ConfigDict:
    """Result to expect (paper, table 3): 82.3 %."""
    return scratch("B", 16, 300.0, 0.1)


def vit_l16_scratch() -> ConfigDict:
    """Result to expect (paper, table 3): 82.6 %."""
    return scratch("L", 16, 200.0, 0.2)


def vit_h14_scratch() -> ConfigDict:
    """Result to expect (paper, table 3): 83.1 %."""
    return scratch("H", 14, 200.0, 0.2)


def fashion_mnist() -> ConfigDict:
    """Ten kinds of clothing, all 60,000 labels."""
    config = imagenet()
    config.data.update(name="fashion_mnist", held_out="test", image_size=(28, 28), channels=1, batch_size=256)
    config.data.update(augment="pad_crop", flip=True, randaugment=0.0, held_out_augment="none", cache="memory")
    config.pixels = {"mean": (0.2860,), "std": (0.3530,)}
    config.erasing.probability = 0.0
    config.mixup.update(mixup=0.0, cutmix=0.0)
    config.encoder.drop_path = 0.0
    config.optim.update(base_learning_rate=1e-3, warmup_epochs=1.0, layer_decay=0.75)
    config.train.epochs = 3.0
    config.log.every = 39
    config.eval.every = 468
    config.checkpoint.every = 468
    return config


def few(per_class: int, epochs: float) -> ConfigDict:
    """Fashion-MNIST with so many labels a class; config.data.subset_seed says which."""
    config = fashion_mnist()
    config.data.update(per_class=per_class, batch_size=50)
    config.optim.update(base_learning_rate=4e-3, warmup_epochs=epochs / 10)
    config.train.epochs = epochs
    config.eval.every = 0
    config.checkpoint.every = 0
    config.log.every = 10
    return config


def fashion_mnist_10() -> ConfigDict:
    """100 labels in all."""
    return few(10, 100.0)


def fashion_mnist_60() -> ConfigDict:
    """600 labels in all."""
    return few(60, 50.0)


def fashion_mnist_partial() -> ConfigDict:
    """A tenth of the labels, to compare what config.trainable may be (paper, figure 9)."""
    return few(600, 5.0)


def digits() -> ConfigDict:
    """1438 handwritten digits of 8x8 pixels, 359 held out."""
    config = fashion_mnist()
    config.data.update(source="digits", name="", image_size=(8, 8), batch_size=128, cache="")
    config.data.update(augment="none", flip=False)
    config.pixels = {"mean": (0.3053,), "std": (0.3760,)}
    config.train.epochs = 20.0
    config.log.every = 11
    config.eval.every = 55
    config.checkpoint.every = 0
    return config


OF_FASHION_MNIST = {"patch_size": 4, "width": 192, "depth": 4, "heads": 3}
SMALL = {  # recipes with a variant from nothing, and the encoders of the pre-training recipes that they follow
    "digits": {"patch_size": 2, "width": 128, "depth": 3, "heads": 4},
    "fashion_mnist": OF_FASHION_MNIST,
    "fashion_mnist_10": OF_FASHION_MNIST,
    "fashion_mnist_60": OF_FASHION_MNIST,
    "fashion_mnist_partial": OF_FASHION_MNIST,
}
RECIPES = {
    f.__name__: f
    for f in (
        *(digits, fashion_mnist, fashion_mnist_10, fashion_mnist_60, fashion_mnist_partial),
        *(vit_b16, vit_l16, vit_h14, vit_h14_448),
        *(vit_b16_scratch, vit_l16_scratch, vit_h14_scratch),
    )
}


def from_nothing(config: ConfigDict, encoder: dict) -> None:
    """The same training without pre-training; all layers learn alike then."""
    config.encoder.update(mlp_ratio=4.0, **encoder)
    config.head.head_std = 0.01
    config.optim.layer_decay = 1.0


def shrink(config: ConfigDict) -> None:
    """Make a recipe small enough to run in seconds, with every part of it still there."""
    if config.data.source != "digits":
        side = 16 if config.data.channels == 1 else config.data.image_size[0] // 2  # of whole patches of 14 and 16
        config.data.update(source="synthetic", split="train", held_out="validation", image_size=(side, side))
    config.data.update(batch_size=8, per_class=min(config.data.per_class, 8))
    if "width" in config.encoder:
        config.encoder.update(width=32, depth=2, heads=2)
    config.train.steps = 2
    config.log.every = 1
