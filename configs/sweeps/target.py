"""What is predicted (paper, table 1d): pixels do as well as tokens, normalised ones better.

    mae-jax sweep --sweep=configs/sweeps/target.py:fashion_mnist --workdir=runs/target

The paper's tokens are those of a discrete VAE; here they are a codebook of k-means. HOG is MaskFeat's.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    "pixels": (84.9, 73.5),
    "normalized_pixels": (85.4, 73.9),
    "pca": (84.6, 72.3),
    "tokens": (85.3, 71.6),
    "hog": None,
}
SIZES = {  # of what is fitted, where patches are smaller than the paper's
    "digits": {"pca": 2, "tokens": 64},
    "fashion_mnist": {"pca": 8, "tokens": 256},
}


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Target", "axis": "target", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "pixels"
    config.trials = tuple(
        {
            "name": name,
            "label": name.replace("_", " "),
            "pretrain": {"target": {"name": name} | sized(chain, name)},
            "published": dict(zip(("fine-tuned", "linear"), published or (), strict=False)),
        }
        for name, published in PUBLISHED.items()
    )
    return config


def sized(chain: str, name: str) -> dict:
    return {"size": SIZES[chain][name]} if name in SIZES.get(chain, {}) else {}
