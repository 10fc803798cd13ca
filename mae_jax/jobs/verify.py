"""Say of each checkpoint of a workdir whether it is as it was written.

    mae-jax verify --workdir=DIR

Reads a workdir of any training job or of import: every file of every checkpoint in it. Writes nothing. Prints a line
for each checkpoint, and ends with exit code 4 if any is damaged. (A run that goes on moves its newest ones to
checkpoints/damaged/STEP where they are, and begins from the one before.)
"""

from __future__ import annotations

from collections.abc import Mapping

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
    wrong = 0
    for step in steps:
        try:
            found = integrity.damage(folder / str(step))
        except CheckpointError as error:
            found = str(error)
        wrong += bool(found)
        if found:
            print(f"{step:>9}  damaged: {found}")
        elif integrity.is_sealed(folder / str(step)):
            print(f"{step:>9}  as it was written")
        else:
            print(f"{step:>9}  of an earlier version, without sums to verify")
    if wrong:
        raise CheckpointError(f"{folder}: {wrong} of {len(steps)} checkpoints damaged")
