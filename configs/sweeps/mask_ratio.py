"""How much to hide (paper, figure 5): between 40 and 80 %, and for a linear probe the ratio matters more.

mae-jax sweep --sweep=configs/sweeps/mask_ratio.py:fashion_mnist --workdir=runs/mask_ratio
"""

from ml_collections import ConfigDict

# percent hidden: fine-tuned, linear
PUBLISHED = {
    10: (83.2, 54.6),
    20: (83.4, 58.9),
    30: (83.4, 61.7),
    40: (84.7, 67.0),
    50: (84.9, 69.9),
    60: (85.0, 71.8),
    70: (84.9, 73.2),
    75: (84.9, 73.5),
    80: (84.5, 71.8),
    90: (83.0, 66.1),
}
FEWER = (10, 30, 50, 60, 75, 80, 90)  # where a laptop is to finish


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Mask ratio", "axis": "hidden, %", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "ratio_75"
    config.trials = tuple(
        {
            "name": f"ratio_{percent}",
            "label": str(percent),
            "at": float(percent),
            "pretrain": {"mask": {"ratio": percent / 100}},
            "published": {"fine-tuned": tuned, "linear": linear},
        }
        for percent, (tuned, linear) in PUBLISHED.items()
        if chain == "vit_l16" or percent in FEWER
    )
    return config
