"""What is compiled once for this machine and kept: XLA's programs, and the C++ of this package.

The C++ needs nothing installed but the compiler of the machine (`$CXX` or `c++`; GCC 12, clang 13 or newer), which is
called when something is first used. Without one, the same is computed by slower means.

What is kept may be damaged: then it is compiled anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

from mae_jax.errors import in_short

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
        name = f"{source.stem}-{digest}"
        kept = folder("native")
        for path in kept.glob(f"{name}-*.so"):
            if path.stem == f"{name}-{_sum(path)}":
                return load(str(path))
            path.unlink(missing_ok=True)  # damaged: to load it could end the process
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as made:
            compiled = Path(made) / f"{name}.so"
            compile(str(source), "-o", str(compiled))
            path = kept / f"{name}-{_sum(compiled)}.so"
            os.replace(compiled, path)  # at once, so that nobody ever finds half of it
        return load(str(path))
    except Exception as error:  # of the file system, the compiler, or whatever loads
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = [line for line in told if "error" in line] + told  # compilers begin with where they are
        logging.warning("%s is not used, which is slower: %s", source.name, *reason[:1] or ["the compiler failed"])
        return None


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def replace_damaged(programs: Path) -> None:
    """Have those of XLA's `programs` replaced, and told in a line, that are damaged: JAX would leave them there."""
    show = warnings.showwarning

    def shown(message, *where, **options):
        if not str(message).startswith("Error reading persistent compilation cache entry"):
            show(message, *where, **options)
            return
        damaged = [path for path in programs.glob("*-cache") if not _is_whole(path)]
        for path in damaged:
            path.unlink(missing_ok=True)
        print(f"{programs}: {len(damaged)} damaged, compiled anew ({in_short(message)})", flush=True)

    warnings.showwarning = shown


def _is_whole(program: Path) -> bool:
    with contextlib.suppress(zlib.error, OSError):
        return bool(zlib.decompress(program.read_bytes()))
    return False
