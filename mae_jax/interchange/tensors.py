"""Files of named tensors: safetensors, with NumPy alone, and PyTorch's own, with PyTorch but without running them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401, what NumPy has for bfloat16
import numpy as np
import safetensors
import safetensors.numpy

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.files import in_bucket

PYTORCH = (".pth", ".pt", ".bin")
OLD_PICKLES = 5  # in a file of PyTorch's before 1.6, one after the other; then come the numbers
HARMLESS = ("torch", "torch._utils", "collections", "argparse")  # modules of what is in files of tensors
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
WRAPPERS = ("model", "state_dict")  # what a file of PyTorch's may hold its tensors in


class Tensor(NamedTuple):
    """One that stays in its file until it is read."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, or of the several files that an index.json lists.

    Raises:
      CheckpointError: it is missing, damaged or something else.
      ConfigError: it needs PyTorch, which is not installed.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(part, str) for part in listed.values()):
            raise CheckpointError(f"{path}: has no weight_map from tensors to files")
        parts = sorted({*listed.values()})
        strange = [part for part in parts if Path(part).name != part or part.endswith(".json")]
        if strange:
            raise CheckpointError(f"{path}: {strange[0]!r} is no file of tensors beside it; not read")
        return {name: tensor for part in parts for name, tensor in tensors_in(path.parent / part).items()}
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix in PYTORCH:
        return _of_pytorch(path)
    raise CheckpointError(f"{path}: is neither .safetensors nor one of {', '.join(PYTORCH)}")


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: there is none.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no object")
    return value


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); get it again") from error

    def read(name: str) -> np.ndarray:
        if kinds[name] not in FLOATS:
            raise CheckpointError(f"{path}: {name} is of type {kinds[name]}; only {', '.join(FLOATS)} can be read")
        with safetensors.safe_open(path, "np") as file:  # anew, as what was read stays in memory while it is open
            return file.get_tensor(name)

    return {name: Tensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _of_pytorch(path: Path) -> dict[str, Tensor]:
    torch = _torch(f"{path}: is read")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # the settings, in files of the original code; and what PyTorch warns of is an error, told below
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # of a dozen types, for as many kinds of damage
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = named[1] if named else _code_in(path)
        if code:
            what = f"holds more than tensors: it would run {code}; not loaded"
        else:
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
            what = f"not a whole file of PyTorch's ({reason.splitlines()[0][:200]})"
            if "operand 149" in reason:  # that of protocol 4 for a name
                what = "a pickle of protocol 4 or 5, which PyTorch reads by running it alone; torch.save it anew"
        raise CheckpointError(f"{path}: {what}") from error
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    named = isinstance(held, dict) and all(isinstance(key, str) for key in held)
    if not named or not held or not all(isinstance(x, torch.Tensor) for x in held.values()):
        raise CheckpointError(f"{path}: holds no tensors by name, nor {' or '.join(WRAPPERS)} with such in it")

    def read(x):
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()

    return {name: Tensor(tuple(x.shape), functools.partial(read, x)) for name, x in held.items()}


def _code_in(path: Path) -> str:
    """The first function that a pickle in the file calls and files of tensors do not, or nothing; none is run.

    PyTorch names it in pickles of its own protocol, 2, alone.
    """
    with contextlib.suppress(Exception), contextlib.ExitStack() as held:  # damaged in one of many ways: no names
        if _is_zip(path):
            whole = held.enter_context(zipfile.ZipFile(path))
            file = held.enter_context(whole.open(next(n for n in whole.namelist() if n.endswith("data.pkl"))))
        else:
            file = held.enter_context(path.open("rb"))
        for _ in range(OLD_PICKLES):
            texts, kept = [], {}  # strings in a row, and those that are put aside by number
            for code, argument, _ in pickletools.genops(file):
                if "UNICODE" in code.name:
                    texts.append(argument)
                elif code.name.endswith("GET"):
                    texts.append(kept.get(argument, ""))
                elif code.name == "MEMOIZE" or code.name.endswith("PUT"):
                    kept[len(kept) if argument is None else argument] = texts[-1] if texts else ""
                elif code.name in ("GLOBAL", "STACK_GLOBAL"):
                    module, name = argument.split(" ", 1) if argument else texts[-2:]
                    if module not in HARMLESS:
                        return f"{module}.{name}"
    return ""


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _torch(what: str):
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f'{what} by PyTorch, which is not installed: pip install "mae_jax[torch]"') from error
    return torch


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as transformers and timm do."""
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})


def write_pytorch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as the original code does, in {"model": ...}.

    Raises:
      ConfigError: PyTorch is not installed.
    """
    torch = _torch(f"{path.name}: is written")
    torch.save({"model": {name: torch.from_numpy(value) for name, value in tensors.items()}}, path)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which becomes `path` when all is well and is deleted when not.

    Raises:
      ConfigError: there is something already, but for an empty folder, or it cannot be written there; or it is in a
        bucket, or among the checkpoints of a run, whose sums it would make wrong.
    """
    if in_bucket(path):
        raise ConfigError(f"{path}: is in a bucket, where this is not written; name a path here, and copy it there")
    path = Path(os.path.abspath(path))
    if path == Path.cwd() or path == path.parent:
        which = "current" if path == Path.cwd() else "root"
        raise ConfigError(f"{path}: is the {which} folder, which cannot be replaced; name another")
    runs = [parent for parent in Path(os.path.realpath(path)).parents if parent.name == "checkpoints"]
    if any(next(parent.glob("*/state"), None) for parent in runs):
        raise ConfigError(f"{path}: is among the checkpoints of a run, which it would damage; name another place")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    missing = [parent for parent in path.parents if not os.path.exists(parent)]  # the nearest first
    try:
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path}: is there already; name another, or delete it")
        unfinished.mkdir(parents=True)  # to see whether it can be
        unfinished.rmdir()
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        for parent in missing:
            with contextlib.suppress(OSError):  # as they are not empty when all went well
                parent.rmdir()
