"""Where mask tokens come in (paper, table 1c): in the encoder they cost 3.3 times the arithmetic, and accuracy.

mae-jax sweep --sweep=configs/sweeps/mask_token.py:fashion_mnist --workdir=runs/mask_token
"""

from ml_collections import ConfigDict

PUBLISHED = {"encoder": (84.2, 59.6), "decoder": (84.9, 73.5)}


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Mask tokens", "axis": "mask tokens", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "decoder"
    config.trials = tuple(
        {
            "name": where,
            "label": f"with the {where}",
            "pretrain": {"decoder": {"mask_tokens": where}},
            "published": {"fine-tuned": tuned, "linear": linear},
        }
        for where, (tuned, linear) in PUBLISHED.items()
    )
    return config
