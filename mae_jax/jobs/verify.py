"""Say of each checkpoint of a workdir whether it is as it was written.

    mae-jax verify --workdir=DIR

Reads a workdir of any training job or of import: every file of every checkpoint in it. Writes nothing. Prints a line
for each checkpoint, and ends with exit code 4 if any is damaged or of a newer format. (A run that goes on moves its
newest ones, if damaged, to checkpoints/damaged/STEP, and begins from the one before.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from mae_jax.errors import CheckpointError
from mae_jax.files import absolute, path_of
from mae_jax.training import checkpoint, integrity

REQUIRED = ("workdir",)
FLAGS = REQUIRED


def run(flags: Mapping[str, str]) -> None:
    """Verify as `flags` say."""
    folder = absolute(path_of("workdir", flags["workdir"])) / checkpoint.FOLDER
    steps = sorted(checkpoint.numbers_in(folder))
    if not steps:
        raise CheckpointError(f"{folder}: no checkpoint here; name the workdir of a run")
    wrong, newer = 0, 0
    for step in steps:
        try:
            found = _damage(folder, step)
        except CheckpointError as error:
            newer += 1
            print(f"{step:>9}  {error}")
            continue
        wrong += bool(found)
        if found:
            print(f"{step:>9}  damaged: {found}")
        elif not (folder / str(step)).is_dir():
            print(f"{step:>9}  removed meanwhile")
        elif integrity.is_sealed(folder / str(step)):
            print(f"{step:>9}  as it was written")
        else:
            print(f"{step:>9}  of an earlier version, without sums to verify")
    told = [
        f"{n} of {len(steps)} checkpoints {how}" for n, how in ((wrong, "damaged"), (newer, "of a newer format")) if n
    ]
    if told:
        raise CheckpointError(f"{folder}: {', '.join(told)}")


def _damage(folder: Path, step: int) -> str:
    """As `integrity.damage`; nothing where a run that is at work removes the checkpoint while it is read."""
    where = folder / str(step)
    found, files = integrity.damage(where), None
    while found and where.is_dir() and (folder.parent / "lock").exists():
        before, files = files, sum(len(names) for *_, names in os.walk(where))
        if files == before:
            return found  # nobody is removing it
        time.sleep(1.0)
        found = integrity.damage(where)
    return found if where.is_dir() else ""
