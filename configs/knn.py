"""Nearest neighbours among an encoder's features, on the data it was trained on or on another data set.

    mae-jax knn --config=configs/knn.py --config.init=WORKDIR --workdir=DIR

config.features is "mean" of the patch tokens, the "cls" token, or "pixels", what any encoder has to beat. What
config.data leaves open is as in training; of its held-out split the top-1 is told for each k. Takes a minute.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "init": "",
            "features": "mean",
            "k": (10, 20, 100, 200),
            "temperature": 0.07,
            "data": {
                "source": placeholder(str),
                "name": placeholder(str),
                "data_dir": placeholder(str),
                "path": placeholder(str),
                "split": placeholder(str),
                "held_out": placeholder(str),
                "batch_size": 256,
                "per_class": placeholder(int),
                "subset_seed": placeholder(int),
            },
        }
    )
