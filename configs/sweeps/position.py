"""How the encoder is told where patches are; the paper has fixed sines and cosines, and no numbers for the others.

    mae-jax sweep --sweep=configs/sweeps/position.py:fashion_mnist --workdir=runs/position

The decoder has fixed ones throughout: without any, it could not tell hidden patches apart.
"""

from ml_collections import ConfigDict

KINDS = ("sincos", "learned", "relative", "rotary", "none")


def get_config(chain: str = "digits") -> ConfigDict:
    config = ConfigDict({"title": "Positions", "axis": "positions", "chain": f"configs/sweeps/chains.py:{chain}"})
    config.reference = "sincos"
    config.trials = tuple(
        {"name": kind, "pretrain": {"encoder": {"positions": kind}}} | ({} if kind == "sincos" else tuned(kind))
        for kind in KINDS
    )
    return config


def tuned(kind: str) -> dict:
    """Fine-tuning keeps positions as they are, but for fixed ones, which it trains."""
    return {"finetune": {"encoder": {"positions": kind}}}
