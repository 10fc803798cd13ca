"""How much of the encoder to fine-tune (paper, figure 9): one block is most of the way from a linear probe.

    mae-jax sweep --sweep=configs/sweeps/partial_finetune.py:digits --workdir=runs/partial_finetune

Pre-training is the same for all trials, and run once for each seed. "0.5" is the MLP of the last block.
"""

from ml_collections import ConfigDict

DEPTHS = {"digits": 3, "fashion_mnist": 4, "vit_l16": 24}
PUBLISHED = {"head": 73.5, "0.5": 79.1, "1": 81.0, "all": 84.9}  # those that the text names


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Partial fine-tuning", "axis": "blocks fine-tuned"})
    config.chain = f"configs/sweeps/chains.py:{chain},partial"
    config.reference = "all"
    blocks = [n for n in (1, 2, 3, 4, 6, 12, 18, 24) if n <= DEPTHS.get(chain, 24)]
    config.trials = tuple(
        {
            "name": what if what in ("head", "all") else f"blocks_{what}",
            "label": what,
            "finetune": {"trainable": what},
            "published": {"fine-tuned": PUBLISHED[what]} if what in PUBLISHED else {},
        }
        for what in ("head", "0.5", *map(str, blocks), "all")
    )
    return config
