"""How wide the decoder is (paper, table 1b): half as wide as the encoder is enough.

mae-jax sweep --sweep=configs/sweeps/decoder_width.py:fashion_mnist --workdir=runs/decoder_width
"""

from ml_collections import ConfigDict

PUBLISHED = {128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)}
SMALLER = {"digits": 16, "fashion_mnist": 8}  # times smaller, as are their encoders
OWN = {"digits": 64, "fashion_mnist": 64}  # of the chains


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Decoder width", "axis": "width", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = f"width_{OWN.get(chain, 512)}"
    config.trials = tuple(
        {
            "name": f"width_{paper // SMALLER.get(chain, 1)}",
            "label": str(paper // SMALLER.get(chain, 1)),
            "at": float(paper // SMALLER.get(chain, 1)),
            "pretrain": {"decoder": {"width": paper // SMALLER.get(chain, 1)}},
            "published": {"fine-tuned": tuned, "linear": linear},
        }
        for paper, (tuned, linear) in PUBLISHED.items()
    )
    return config
