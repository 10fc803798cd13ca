"""What is run for each trial of a sweep: pre-train, then judge the encoder.

digits          a minute of 2 cores for each trial and seed
fashion_mnist   two minutes; smaller and shorter than the recipes, so that a sweep is a matter of an hour
vit_l16         as published: plain pixels, 800 epochs of ImageNet-1k, then fine-tuning and a linear probe

config.jobs are run in order. Each has a `config`, and where it differs from that, settings in `set`; `init` is the job
whose encoder it takes, `seeded` are the settings that are the seed, and `shows` the columns of the table, from the
job's results. A job that is `shared` is run once for all trials.
"""

from ml_collections import ConfigDict

from mae_jax.errors import ConfigError, nearest

QUIET = {key: {"every": 0} for key in ("eval", "monitor", "pictures")}  # but at the end


def get_config(name: str = "digits") -> ConfigDict:
    base, _, variant = name.partition(",")
    if base not in CHAINS or variant not in ("", "partial"):
        raise ConfigError(f"chain: no {name!r}; there are {', '.join(CHAINS)}{nearest(base, CHAINS)}")
    config = CHAINS[base]()
    if variant:  # for sweeps of fine-tuning: pre-training is the same for all trials
        pretrain, *_, finetune = sorted(config.jobs, key=lambda job: job["name"] == "finetune")
        config.jobs = (pretrain | {"shared": True}, finetune)
    return config


def digits() -> ConfigDict:
    """1438 training images, 10 labels a class for fine-tuning; of 359 held-out images, one is 0.3 %."""
    config = ConfigDict({"seeds": (0, 1, 2)})
    few = {"data": {"per_class": 10, "batch_size": 50}, "train": {"epochs": 40.0}}
    config.jobs = (
        {"name": "pretrain", "config": "configs/pretrain.py:digits", "set": QUIET, "shows": SPEED},
        {"name": "knn", "config": "configs/knn.py", "init": "pretrain", "seeded": (), "shows": NEAREST},
        {"name": "probe", "config": "configs/probe.py:digits", "init": "pretrain", "shows": {"linear": "top1"}},
        {"name": "finetune", "config": "configs/finetune.py:digits", "init": "pretrain", "set": few, **TUNED},
    )
    return config


def fashion_mnist() -> ConfigDict:
    """Five epochs of 20,000 images; k-NN and probe have 10,000 of them, fine-tuning 10 labels a class."""
    config = ConfigDict({"seeds": (0, 1, 2)})
    kept = {"cache": "~/.cache/mae_jax/images"}  # decoded once for all trials
    small = {"encoder": {"width": 64, "depth": 4, "heads": 2}, "decoder": {"width": 32, "depth": 1}}
    part = {"data": {"split": "train[:20000]", "held_out": "test[:2000]", "batch_size": 128} | kept}
    short = {"optim": {"base_learning_rate": 3e-3}, "train": {"epochs": 5.0}, "checkpoint": {"every": 0}}
    some = {"data": {"per_class": 1000, "held_out": "test"}}
    config.jobs = (
        {
            "name": "pretrain",
            "config": "configs/pretrain.py:fashion_mnist",
            "set": QUIET | small | part | short,
            "shows": SPEED,
        },
        {
            "name": "knn",
            "config": "configs/knn.py",
            "init": "pretrain",
            "set": some | {"k": (20,)},
            "seeded": (),
            "shows": NEAREST,
        },
        {
            "name": "probe",
            "config": "configs/probe.py:fashion_mnist",
            "init": "pretrain",
            "set": some,
            "shows": {"linear": "top1"},
        },
        {
            "name": "finetune",
            "config": "configs/finetune.py:fashion_mnist_10",
            "init": "pretrain",
            "set": {"data": kept},
            **TUNED,
        },
    )
    return config


def vit_l16() -> ConfigDict:
    """ViT-L/16 after 800 epochs, as in the paper's table 1; one seed, as there."""
    config = ConfigDict({"seeds": (0,)})
    config.jobs = (
        {"name": "pretrain", "config": "configs/pretrain.py:vit_l16,ablation", "shows": SPEED},
        {"name": "finetune", "config": "configs/finetune.py:vit_l16", "init": "pretrain", "shows": {TOP: "top1"}},
        {"name": "probe", "config": "configs/probe.py:imagenet", "init": "pretrain", "shows": {"linear": "top1"}},
    )
    return config


TOP = "fine-tuned"
TUNED = {"seeded": ("seed", "data.subset_seed"), "shows": {TOP: "top1"}}
NEAREST = {"20-NN": "top1.20"}
SPEED = {"images/s": "metrics.train/images_per_second"}
CHAINS = {f.__name__: f for f in (digits, fashion_mnist, vit_l16)}
