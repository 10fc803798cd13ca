"""Evaluate a probed or fine-tuned model; NAME says on what.

    mae-jax evaluate --config=configs/evaluate.py[:NAME] --config.init=WORKDIR --workdir=DIR

NAME               data
(none)             the held-out split of the training data, or what config.data names
imagenet_a         ImageNet-A: natural images that fool classifiers, 200 classes (paper, table 13)
imagenet_r         ImageNet-R: renditions, 200 classes
imagenet_sketch    ImageNet-Sketch, 1000 classes
imagenet_c         ImageNet-C: 15 corruptions in 5 severities, with mCE

The robustness sets are TFDS's, to be prepared first: mae-jax prepare --config=configs/prepare.py:imagenet_a. Results
to expect after fine-tuning at 224 pixels (paper, table 13), for ViT-B, L and H: mCE of ImageNet-C 51.7, 41.8, 33.8;
top-1 of -A 35.9, 57.1, 68.2; of -R 48.3, 59.9, 64.4; of -Sketch 34.5, 45.3, 49.6.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mae_jax.errors import ConfigError, nearest
from mae_jax.jobs.evaluate import ALEXNET, CORRUPTED

KEYS = ("source", "name", "data_dir", "path", "split", "held_out_augment")  # of config.data; open: as in training
SETS = {
    "": {},
    "imagenet_a": {"source": "tfds", "name": "imagenet_a", "split": "test"},
    "imagenet_r": {"source": "tfds", "name": "imagenet_r", "split": "test"},
    "imagenet_sketch": {"source": "tfds", "name": "imagenet_sketch", "split": "test"},
    # is cropped to 224 pixels already
    "imagenet_c": {"source": "tfds", "split": "validation", "held_out_augment": "none"},
}


def get_config(name: str = "") -> ConfigDict:
    if name not in SETS:
        raise ConfigError(f"--config: no recipe {name!r}; use one of {', '.join(SETS)}{nearest(name, SETS)}")
    config = ConfigDict({"init": "", "names": (), "occurring_only": name in ("imagenet_a", "imagenet_r")})
    config.data = {key: placeholder(str) for key in KEYS}
    config.data.batch_size = 256
    config.data.update(SETS[name])
    if name == "imagenet_c":
        config.names = tuple(
            f"{CORRUPTED}{corruption}_{severity}" for corruption in ALEXNET for severity in range(1, 6)
        )
    return config
