"""Pictures of what a trained autoencoder makes of images: He et al. 2021, figures 2 to 4.

    mae-jax reconstruct --config=configs/reconstruct.py --config.init=WORKDIR --workdir=DIR

config.init is the workdir of a pretrain run, or one of its checkpoints. config.images names image files
("cat.jpg,photos/*.png"); when empty, the first config.count images of config.split are taken, of the held-out split
when that is empty too. config.mask.ratio may be another than in training: 0.85 and 0.95 in figure 4. Takes seconds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "init": "",
            "images": "",
            "split": "",
            "count": 16,
            "mask": {"name": "random", "ratio": 0.75, "unit": 1, "temperature": 1.0},
            "seed": 0,
        }
    )
