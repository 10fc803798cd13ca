"""Which patches to hide (paper, table 1f): at random, and more of them than in blocks.

    mae-jax sweep --sweep=configs/sweeps/mask_sampling.py:fashion_mnist --workdir=runs/mask_sampling

Centre masks are the Context Encoder's; those by attention are here to be compared.
"""

from ml_collections import ConfigDict

TRIALS = {  # sampler, percent hidden: fine-tuned, linear
    ("random", 75): (84.9, 73.5),
    ("block", 50): (83.9, 72.3),
    ("block", 75): (82.8, 63.9),
    ("grid", 75): (84.0, 66.0),
    ("centre", 75): None,
    ("most_attended", 75): None,
    ("least_attended", 75): None,
}


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Mask sampling", "axis": "mask", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "random_75"
    config.trials = tuple(
        {
            "name": f"{name}_{percent}",
            "label": f"{name.replace('_', ' ')}, {percent} %",
            "pretrain": {"mask": {"name": name, "ratio": percent / 100}},
            "published": dict(zip(("fine-tuned", "linear"), published or (), strict=False)),
        }
        for (name, percent), published in TRIALS.items()
    )
    return config
