"""What is compiled once for this machine and kept: XLA's programs, and the C++ of this package.

The C++ needs nothing installed but the compiler of the machine (`$CXX` or `c++`; GCC 12, clang 13 or newer), which is
called when something is first used. Without one, the same is computed by slower means.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -shared -DNDEBUG -w"


def folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/mae_jax/<name>`, or `~/.cache/mae_jax/<name>`. Anything in it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_jax" / name


@functools.cache
def library(source: Path, load: Callable, *options: str):
    """The shared library of one C++ file; None where it cannot be compiled or loaded.

    Args:
      load: of the library's path, what to return.
      options: for the compiler. Whatever changes with them is compiled anew, so they should name versions of headers.
    """
    compiler = (os.environ.get("CXX") or "c++").split()
    flags = FLAGS.split()

    def compile(*arguments) -> str:
        # libraries come after what needs them, or some linkers leave them out
        command = [*compiler, *flags, *arguments, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        about = compile("-dM", "-E", "-x", "c++", os.devnull)  # what the compiler knows of itself and the processor
        digest = hashlib.sha256((about + " ".join([*flags, *options])).encode() + source.read_bytes()).hexdigest()[:16]
        kept = folder("native") / f"{source.stem}-{digest}.so"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as made:
                compile(str(source), "-o", f"{made}/{kept.name}")
                os.replace(f"{made}/{kept.name}", kept)  # at once, so that nobody ever finds half of it
        return load(str(kept))
    except Exception as error:  # of the file system, the compiler, or whatever loads
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        logging.warning("%s is not used, which is slower: %s", source.name, *reason or ["the compiler failed"])
        return None
