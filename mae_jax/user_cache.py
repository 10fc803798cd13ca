"""Where what was compiled for this machine is kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/mae_jax/<name>`, or `~/.cache/mae_jax/<name>`. Anything in it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_jax" / name
