"""How long to pre-train (paper, figure 7): no end of the gain at 1600 epochs.

mae-jax sweep --sweep=configs/sweeps/schedule_length.py:digits --workdir=runs/schedule_length
"""

from ml_collections import ConfigDict

PUBLISHED = {100: (82.3, 57.3), 200: (83.3, 64.4), 400: (84.3, 69.7), 800: (84.9, 73.5), 1600: (85.1, 75.1)}
OWN = {"digits": 136.0, "fashion_mnist": 3.0}  # epochs that stand for the paper's 800


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Length of training", "axis": "epochs", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "epochs_800"
    lengths = {paper: paper / 800 * OWN.get(chain, 800.0) for paper in PUBLISHED}
    config.trials = tuple(
        {
            "name": f"epochs_{paper}",
            "label": f"{length:g}",
            "at": length,
            "pretrain": {"train": {"epochs": length}},
            "published": dict(zip(("fine-tuned", "linear"), PUBLISHED[paper], strict=True)),
        }
        for paper, length in lengths.items()
    )
    return config
