"""What to do about steps that would spoil the model: loss or gradients that are not finite, or far too large.

The step itself leaves the state as it was (`loop.make_train_step`); here such steps are counted, told and written down,
and a run in which nothing else comes goes back, once. So are samples that cannot be read, which weigh nothing: of too
many, a run ends.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from mae_jax.errors import DataError, NumericsError
from mae_jax.files import if_possible, write_lines
from mae_jax.training import hosts, metrics

SKIPPED = "skipped.jsonl"
UNREADABLE = "unreadable.jsonl"
ENOUGH = 1000  # samples after which it is judged how many of them cannot be read


class Guard:
    """Looks at every step, in order. In WORKDIR/skipped.jsonl is a line for each one that was skipped.

    In WORKDIR/unreadable.jsonl is one for each that had samples that could not be read, and how many.

    Args:
      workdir: of the run.
      first: the step that it begins or goes on with.
      examples_of: the indexes, in the data set, of the images of a step's batch.
      go_back: `f(state) -> state`: the one of the newest checkpoint, to go on with where `state` is; None where there
        is no checkpoint.
      batch_size: samples of a step.
      epoch: steps of one.
      patience: how many steps may be skipped in a row, before the run goes back; before it gives up, the next time.
      spike: a step is skipped as well if its gradient is so many times as large as usual; 0: however large it is. Read
        by the job.
      unreadable: the run ends when more than this share of the samples cannot be read, of those of the last `epoch`
        steps: not before there have been so many, or a thousand samples.
    """

    def __init__(
        self,
        workdir: Path,
        first: int,
        examples_of: Callable[[int], Sequence[int]],
        go_back: Callable,
        batch_size: int,
        epoch: int,
        *,
        patience: int = 5,
        spike: float = 0.0,
        unreadable: float = 0.1,
    ):
        self.path, self.examples_of, self.go_back, self.patience = workdir / SKIPPED, examples_of, go_back, patience
        self.lines = [line for line in _lines(self.path) if line["step"] < first]
        self.in_row, self.went_back = 0, False
        if self.lines or self.path.exists():
            self._write()
        self.share, self.batch_size, self.epoch = unreadable, batch_size, epoch
        self.unreadable_path = workdir / UNREADABLE
        before = [line for line in _lines(self.unreadable_path, "unreadable") if line["step"] < first]
        self.unreadable = sum(line["unreadable"] for line in before)
        self.recent = deque(line for line in before if line["step"] > first - epoch)
        if hosts.leads() and (before or self.unreadable_path.exists()):
            with if_possible(self.unreadable_path):
                write_lines(self.unreadable_path, before)

    @property
    def totals(self) -> dict[str, int]:
        """How many steps were skipped and how many samples could not be read, in the whole run and on all hosts."""
        return {"skipped": len(self.lines), "data/unreadable": self.unreadable}

    def look(self, state, step: int, scalars: Mapping):
        """What `step` has come to, by its `scalars`; returns the state to go on with, which may be an earlier one.

        Raises:
          NumericsError: nothing but skipped steps, and going back has not helped or is not possible.
          DataError: too many samples cannot be read.
        """
        self._count(step, int(scalars["data/unreadable"]))
        if not scalars["skipped"]:
            self.in_row = 0
            return state
        self.in_row += 1
        numbers = {key: float(scalars[key]) for key in ("loss", "grad_norm")}
        told = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        images = [int(i) for i in self.examples_of(step)]
        self.lines.append({"step": step, **{key: f"{value:g}" for key, value in numbers.items()}, "images": images})
        self._write()
        print(f"step {step}: {told}: skipped, the {self.in_row}. in a row; its images are in {self.path}", flush=True)
        if self.in_row < self.patience:
            return state
        why = f"{self.in_row} steps in a row had loss or gradients that are not finite, or too large, up to step {step}"
        help_ = f"lower config.optim.base_learning_rate, or look at the images in {self.path}"
        earlier = None if self.went_back else self.go_back(state)
        if earlier is None:
            again = ", again" if self.went_back else ", and there is no checkpoint to go back to"
            raise NumericsError(f"{why}{again}; {help_}")
        self.in_row, self.went_back = 0, True
        print(f"{why}: going on from the newest checkpoint, after these images", flush=True)
        return earlier

    def keeps(self, params, step: int, last: bool) -> bool:
        """Whether the state of `step`, with these parameters, is worth a checkpoint.

        While steps are skipped none is but the last: the state stays the same and may be what spoils them, and new
        checkpoints would push out those of before. Nor is one that a finite step has thrown out of all bounds.

        Raises:
          NumericsError: the last state is such a one.
        """
        if self.in_row and not last:
            return False
        if self.can_compute_with(params, step):
            return True
        if last:
            raise NumericsError(f"step {step} left nothing to compute with; lower config.optim.base_learning_rate")
        return False

    def can_compute_with(self, params, step: int) -> bool:
        """Whether the parameters of `step` are within bounds; if not, a line says so."""
        if _in_bounds(params):
            return True
        print(f"the parameters of step {step} are not finite, or too large to compute with: not saved", flush=True)
        return False

    def _count(self, step: int, unreadable: int) -> None:
        """Take note of how many samples of `step` could not be read."""
        while self.recent and self.recent[0]["step"] <= step - self.epoch:
            self.recent.popleft()
        if not unreadable:
            return
        line = {"step": step, "unreadable": unreadable}
        self.unreadable += unreadable
        self.recent.append(line)
        if hosts.leads():
            with if_possible(self.unreadable_path), self.unreadable_path.open("a") as file:  # not all of them again
                file.write(json.dumps(line) + "\n")
        read = min(step + 1, self.epoch) * self.batch_size
        lost = sum(line["unreadable"] for line in self.recent)
        if lost > self.share * read and read >= min(ENOUGH, self.epoch * self.batch_size):
            raise DataError(
                f"{lost} of the last {read} samples cannot be read, up to step {step}, more than "
                f"config.guard.unreadable {self.share:g}; mae-jax check-data names the files"
            )

    def _write(self) -> None:
        with if_possible(self.path):
            write_lines(self.path, self.lines)


def _lines(path: Path, *numbers: str) -> list[dict]:
    """Those of a file of an earlier part of the run: on all hosts what the first one finds, which may set it aside."""
    return hosts.of_first(lambda: metrics.recover(path, ("step", *numbers)))


@jax.jit
def _in_bounds(params) -> jax.Array:
    """Whether squares of the parameters can be summed; asked only before saving, as each step has no time for it."""
    return jnp.isfinite(optax.tree.norm(params))
