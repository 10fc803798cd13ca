"""Masked Autoencoders in JAX and Flax (He et al. 2021, arXiv 2111.06377).

From Python: `load` and `load_encoder` give trained models, `load_config` the config of their run, `normalize` the
images they take. Everything else is a job: `mae-jax` on the command line.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load": "mae_jax.jobs.models",
    "load_config": "mae_jax.jobs.models",
    "load_encoder": "mae_jax.jobs.models",
    "normalize": "mae_jax.model.patches",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import on first use: the command line must not wait for JAX to say that a flag is misspelt."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mae_jax' has no attribute {name!r}")
