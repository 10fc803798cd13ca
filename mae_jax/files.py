"""Where jobs read and write: folders on a disk or in a bucket ("gs://..."), and the files in them.

Of several hosts, the first one writes. A file is there whole or not at all, so that a crash leaves no half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
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
      ConfigError: there is no such user, or a bucket of a kind that cannot be used; or its name is not UTF-8.
    """
    try:
        os.path.abspath(text).encode()
    except UnicodeEncodeError:  # Python takes such names; TensorFlow and TensorStore, which write there, do not
        raise ConfigError(f"--{flag}={ascii(text)[1:-1]}: not UTF-8; use another name") from None
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


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Within it no other run is in the folder `workdir`, which is made unless it is there.

    WORKDIR/lock says which process of which host is at work. What counts is not that file but the operating system's
    lock on it, which ends with the process whatever ends that: what a killed one leaves behind keeps nobody out. Of
    several processes of a job the first one has it. Buckets have no locks: there it is up to who starts jobs.

    Raises:
      ConfigError: another run is there; or the folder cannot be made or written to.
    """
    make_workdir(workdir)
    with contextlib.ExitStack() as held:
        refused = hosts.of_first(lambda: "" if in_bucket(workdir) else _lock(workdir, held))
        if refused:
            raise ConfigError(refused)
        yield


def _lock(workdir: Path, held: contextlib.ExitStack) -> str:
    """Lock `workdir` until `held` is closed; why that cannot be, or nothing."""
    path = workdir / "lock"
    try:
        while True:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            file = held.enter_context(os.fdopen(number, "a+", errors="replace"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"--workdir={workdir}: {_owner(file)} is at work there; wait for it, or use a new --workdir"
            except OSError as error:  # such as Lustre, if it is mounted so
                print(f"{path}: no locks here ({error.strerror}): nothing keeps a second run out", flush=True)
                return ""
            if _is_at(file, path):
                break  # and not one that was removed meanwhile
        if owner := _owner(file, ""):
            print(f"{path}: left behind by {owner}, which is gone; taken over", flush=True)
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())  # once, however that ends
        os.fsync(file.fileno())  # for other hosts to read
    except OSError as error:
        if path.is_symlink():
            return f"--workdir={workdir}: {path.name} is a link, and what it leads to is not written to; remove it"
        return f"--workdir={workdir}: {path.name} cannot be written there ({error.strerror})"
    held.callback(lambda: path.unlink() if _is_at(file, path) else None)
    return ""


def _owner(file, unknown: str = "another process") -> str:
    file.seek(0)
    return file.read(200) or unknown


def _is_at(file, path: Path) -> bool:
    """Whether what is open is what is at `path` now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextlib.contextmanager
def if_possible(path: Path) -> Iterator[None]:
    """Within it `path` is written, which training does not depend on: where that fails, a line says so and no more."""
    try:
        yield
    except OSError as error:
        print(f"{path}: not written ({error.strerror or error}); training goes on", flush=True)


def read_lines(path: Path, numbers: Sequence[str]) -> tuple[list[dict], str]:
    """The lines of JSON of a file, none if there is no file; and what is wrong with it, or nothing.

    A last line that a crash has cut short is left out. So is, and is told, what is no object with integers for
    `numbers`.
    """
    try:
        *whole, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        return [], f"not readable ({error.strerror})"
    lines, wrong = [], []
    for number, text in enumerate([*whole, rest], 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or any(type(line.get(key)) is not int for key in numbers):
                raise ValueError
            lines.append(line)
        except (ValueError, RecursionError):
            wrong += [str(number)] if number <= len(whole) else []
    return lines, f"damaged in line {', '.join(wrong[:5])}{', ...' * (len(wrong) > 5)}" if wrong else ""


def set_aside(path: Path, reason: str) -> None:
    """Keep what is wrong with `reason`, and in the way, as PATH.damaged."""
    taken = {there.name for there in path.parent.iterdir()}
    names = (f"{path.name}.damaged" + f".{i}" * bool(i) for i in range(len(taken) + 1))
    aside = path.parent / next(name for name in names if name not in taken)
    path.rename(aside)
    print(f"{path}: {reason}; kept as {aside}, and gone on without", flush=True)


@contextlib.contextmanager
def needed(workdir: Path) -> Iterator[None]:
    """Within it files are written that a run in `workdir` cannot do without.

    Raises:
      ConfigError: one cannot be, as there is no room for it.
    """
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise ConfigError(
            f"--workdir={workdir}: {file}not written ({error.strerror or error}); make room, or see that it can be "
            "written to, and run the same command again"
        ) from error


def write(path: Path, data: bytes) -> None:
    """Write a file, with the folders that it needs."""
    if not hosts.leads():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # which takes room that others need
        error.filename = error.filename or str(path)
        raise


def json_of(value, indent: int | None = None) -> str:
    """`value` as JSON, which has no NaN and no infinity: they become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value) -> None:
    """Write a JSON file."""
    write(path, (json_of(value, indent=2) + "\n").encode())


def write_lines(path: Path, lines: Iterable) -> None:
    """Write a file with a line of JSON for each of `lines`."""
    write(path, "".join(json_of(line) + "\n" for line in lines).encode())


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8[h,w,3] as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    write(path, data.getvalue())
