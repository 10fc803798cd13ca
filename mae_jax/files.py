"""Where jobs read and write: folders on a disk or in a bucket ("gs://..."), and the files in them.

Of several hosts, the first one writes. A file is there whole or not at all, so that a crash leaves no half of one.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from etils import epath, epy

from mae_jax.errors import ConfigError

with epy.lazy_imports():
    from PIL import Image

    from mae_jax.training import hosts  # and with it JAX, which a mistake in a config need not wait for


def to_path(text: str | os.PathLike) -> Path:
    """The path that `text` means: "~" is the user's home, "gs://" begins one in a bucket."""
    text = os.fspath(text)
    return epath.Path(text) if in_bucket(text) else Path(os.path.expanduser(text))


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether `path` is one of another file system than this machine's."""
    return "://" in os.fspath(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder `path`; of a name that cannot be, there is none."""
    return path.is_dir() if in_bucket(path) else os.path.isdir(path)


def absolute(path: Path) -> epath.Path:
    """`path` from the root on, as Orbax wants it."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path.absolute())


def path_of(flag: str, text: str) -> Path:
    """The path that a flag names.

    Raises:
      ConfigError: there is no such user, or a bucket of a kind that cannot be used.
    """
    if in_bucket(text) and not text.startswith("gs://"):
        raise ConfigError(f"--{flag}={text}: of buckets only gs://... can be used; or name a folder")
    path = to_path(text)
    if str(path).startswith("~"):
        raise ConfigError(f"--{flag}={text}: no such user")
    return path


def make_workdir(workdir: Path) -> None:
    """Make the folder `workdir` unless it is there.

    Raises:
      ConfigError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        writable = in_bucket(workdir) or os.access(workdir, os.W_OK | os.X_OK)
        reason = "it is not writable"
    except OSError as error:
        writable, reason = False, error.strerror
    except Exception as error:  # of TensorFlow, which reads and writes buckets
        if not in_bucket(workdir):
            raise
        writable, reason = False, str(error).partition("\n")[0]
    if not writable:
        raise ConfigError(f"--workdir={workdir}: {reason}; name a folder that can be made and written to")


def write(path: Path, data: bytes) -> None:
    """Write a file, with the folders that it needs."""
    if not hosts.leads():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8[h,w,3] as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    write(path, data.getvalue())
