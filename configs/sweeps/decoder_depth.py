"""How many blocks the decoder has (paper, table 1a): a linear probe wants a deep one, fine-tuning does not care.

mae-jax sweep --sweep=configs/sweeps/decoder_depth.py:fashion_mnist --workdir=runs/decoder_depth
"""

from ml_collections import ConfigDict

PUBLISHED = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
OWN = {"digits": 1, "fashion_mnist": 1, "vit_l16": 8}  # of the chains


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Decoder depth", "axis": "blocks", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = f"depth_{OWN.get(chain, 8)}"
    config.trials = tuple(
        {
            "name": f"depth_{depth}",
            "label": str(depth),
            "at": float(depth),
            "pretrain": {"decoder": {"depth": depth}},
            "published": {"fine-tuned": tuned, "linear": linear},
        }
        for depth, (tuned, linear) in PUBLISHED.items()
        if chain == "vit_l16" or depth <= 8
    )
    return config
