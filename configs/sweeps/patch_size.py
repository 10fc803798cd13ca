"""How large patches are: small ones cost more, and leave a finer task. The paper's models have 16, ViT-H 14.

mae-jax sweep --sweep=configs/sweeps/patch_size.py:fashion_mnist --workdir=runs/patch_size
"""

from ml_collections import ConfigDict

from mae_jax.errors import ConfigError

SIZES = {"digits": (1, 2, 4), "fashion_mnist": (2, 4, 7), "vit_l16": (14, 16, 28, 32)}
OWN = {"digits": 2, "fashion_mnist": 4, "vit_l16": 16}  # of the chains


def get_config(chain: str = "digits") -> ConfigDict:
    if chain not in SIZES:
        raise ConfigError(f"--sweep: no chain {chain!r} for patch_size; there are {', '.join(SIZES)}")
    config = ConfigDict({"title": "Patch size", "axis": "pixels a side", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = f"patch_{OWN[chain]}"
    config.trials = tuple(
        {
            "name": f"patch_{size}",
            "label": str(size),
            "at": float(size),
            "pretrain": {"encoder": {"patch_size": size}},
        }
        for size in SIZES[chain]
    )
    return config
