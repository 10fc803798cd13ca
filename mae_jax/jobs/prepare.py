"""Prepare a TFDS data set as array_record files, which can be read by index.

    mae-jax prepare --config=configs/prepare.py:fashion_mnist

Downloads, or reads from config.data.manual_dir what must or can be fetched by hand, and writes into
config.data.data_dir (default: ~/tensorflow_datasets). A data set that is there already is left alone.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.prepare import prepare
from mae_jax.errors import ConfigError

WRITES_WORKDIR = False


def run(config: ConfigDict, workdir: Path) -> None:
    """Prepare the data set that `config` names."""
    print(f"prepared in {prepare(**check(config).data)}")


def check(config: ConfigDict) -> ConfigDict:
    """The config with its defaults.

    Raises:
      ConfigError: with all that is wrong.
    """
    config, problems = complete(config, {"data": prepare}, {})
    if problems:
        raise ConfigError(problems)
    return config
