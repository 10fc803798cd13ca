"""Data sets to prepare, by their TFDS name.

    mae-jax prepare --config=configs/prepare.py:NAME [--config.data.data_dir=DIR] [--config.data.manual_dir=DIR]

`fashion_mnist` is taken from Debian's package where that is installed (apt-get install dataset-fashion-mnist), so
no download is needed: about half a minute. `imagenet2012` needs ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar,
from image-net.org, in config.data.manual_dir, and 300 GB of disk. Anything else is downloaded.
"""

from pathlib import Path

from ml_collections import ConfigDict

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


def get_config(name: str = "fashion_mnist") -> ConfigDict:
    config = ConfigDict({"data": {"name": name, "data_dir": "", "manual_dir": ""}})
    if name == "fashion_mnist" and Path(DEBIAN_FASHION_MNIST).is_dir():
        config.data.manual_dir = DEBIAN_FASHION_MNIST
    return config
