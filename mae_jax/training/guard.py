"""What to do about steps that would spoil the model: loss or gradients that are not finite, or far too large.

The step itself leaves the state as it was (`loop.make_train_step`); here such steps are counted, told and written down,
and a run in which nothing else comes goes back, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mae_jax.errors import NumericsError
from mae_jax.files import if_possible, write
from mae_jax.training import metrics

SKIPPED = "skipped.jsonl"


class Guard:
    """Looks at every step, in order. In WORKDIR/skipped.jsonl is a line for each one that was skipped.

    Args:
      workdir: of the run.
      first: the step that it begins or goes on with.
      examples_of: the indexes, in the data set, of the images of a step's batch.
      go_back: `f(state) -> state`: the one of the newest checkpoint, to go on with where `state` is; None where there
        is no checkpoint.
      patience: how many steps may be skipped in a row, before the run goes back; before it gives up, the next time.
      spike: a step is skipped as well if its gradient is so many times as large as usual; 0: however large it is. Read
        by the job.
    """

    def __init__(
        self,
        workdir: Path,
        first: int,
        examples_of: Callable[[int], Sequence[int]],
        go_back: Callable,
        *,
        patience: int = 5,
        spike: float = 0.0,
    ):
        self.path, self.examples_of, self.go_back, self.patience = workdir / SKIPPED, examples_of, go_back, patience
        self.lines = [line for line in metrics.read(self.path) if line["step"] < first]
        self.in_row, self.went_back = 0, False
        if self.path.exists():
            self._write()

    @property
    def skipped(self) -> int:
        """How many steps were, in the whole run."""
        return len(self.lines)

    def look(self, state, step: int, scalars: Mapping):
        """What `step` has come to, by its `scalars`; returns the state to go on with, which may be an earlier one.

        Raises:
          NumericsError: nothing but skipped steps, and going back has not helped or is not possible.
        """
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

    def _write(self) -> None:
        with if_possible(self.path):
            write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
