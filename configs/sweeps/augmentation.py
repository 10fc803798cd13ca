"""How images are augmented (paper, table 1e): crops of random size are enough, and none works as well.

mae-jax sweep --sweep=configs/sweeps/augmentation.py:fashion_mnist --workdir=runs/augmentation
"""

from ml_collections import ConfigDict

CROP = {"augment": "random_resized_crop", "flip": True}
TRIALS = {
    "none": ({"augment": "none", "flip": False}, 84.0, 65.7),
    "fixed_crop": ({"augment": "fixed_crop", "flip": True}, 84.7, 73.1),
    "random_crop": (CROP, 84.9, 73.5),
    "random_crop_and_jitter": (CROP | {"jitter": 0.4}, 84.3, 71.9),
}


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Augmentation", "axis": "augmentation", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "random_crop"
    config.trials = tuple(
        {
            "name": name,
            "label": name.replace("_", " "),
            "pretrain": {"data": data},
            "published": {"fine-tuned": tuned, "linear": linear},
        }
        for name, (data, tuned, linear) in TRIALS.items()
    )
    return config
