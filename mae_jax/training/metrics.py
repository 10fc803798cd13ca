"""Where numbers and pictures go: metrics.jsonl, TensorBoard, and a line of progress on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epy

from mae_jax.errors import in_short
from mae_jax.files import if_possible, in_bucket, json_of, read_lines, set_aside, write_lines, write_picture
from mae_jax.training import hosts

with epy.lazy_imports():
    from clu import metric_writers  # imports TensorFlow, which takes seconds


class Writer:
    """Scalars to WORKDIR/metrics.jsonl and TensorBoard, pictures to WORKDIR/reconstructions and TensorBoard.

    A resumed run goes on after the step it resumes from: lines of later steps, written by a run that died before
    its next checkpoint, are dropped, so that the file has neither gaps nor duplicates. Of several hosts, one writes.

    What cannot be written does not end a run. Lines for which the disk has no room are written once there is some;
    TensorBoard is done without from its first error on.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        self.workdir = workdir
        self.path = workdir / "metrics.jsonl"
        self._file = self._tensorboard = None
        if not hosts.leads():
            return
        kept = [line for line in recover(self.path) if resume_step and line["step"] <= resume_step]
        write_lines(self.path, kept)
        self._there = {(line["step"], *sorted(line.keys() - {"step"})) for line in kept if line["step"] == resume_step}
        self._file = self.path.open("ab") if in_bucket(self.path) else self.path.open("ab", buffering=0)
        self._waiting, self._late = b"", False
        with self._as_long_as_it_works():
            self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line {"step": step, name: number, ...}, on disk when this returns; of what is there already, none."""
        if self._file is None or (step, *sorted(scalars)) in self._there:
            return
        numbers = {name: float(value) for name, value in scalars.items()}
        self._waiting += (json_of({"step": step, **numbers}) + "\n").encode()
        self._write()
        with self._as_long_as_it_works():
            self._tensorboard and self._tensorboard.write_scalars(step, numbers)

    def _write(self) -> None:
        try:
            while self._waiting:
                written = self._file.write(self._waiting)  # maybe a part, where the disk fills up
                self._waiting = self._waiting[written or len(self._waiting) :]
            self._file.flush()
            self._late = False
        except OSError as error:
            if not self._late:
                print(f"{self.path}: not written for now ({error.strerror}); training goes on", flush=True)
            self._late = True

    @contextlib.contextmanager
    def _as_long_as_it_works(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of TensorFlow
            self._tensorboard = None
            where, reason = self.workdir / "tensorboard", in_short(error.__cause__ or error)
            print(f"{where}: not written any more ({reason}); training goes on", flush=True)

    def picture(self, step: int, name: str, image: np.ndarray) -> Path:
        """WORKDIR/`name`/step_N.png and TensorBoard, from uint8[H,W,3]."""
        path = self.workdir / name / f"step_{step}.png"
        if self._file is not None:
            with if_possible(path):
                write_picture(path, image)
            with self._as_long_as_it_works():
                self._tensorboard and self._tensorboard.write_images(step, {name: image[None]})
        return path

    def close(self) -> None:
        if self._file is not None:
            self._write()
            self._file.close()
            with self._as_long_as_it_works():
                self._tensorboard and self._tensorboard.close()


def read(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; none if there is no file. What is damaged is left out."""
    return read_lines(path, ["step"])[0]


def recover(path: Path, numbers: Sequence[str] = ("step",)) -> list[dict]:
    """The lines of a file that is to be written anew with them. One that is damaged is kept aside, and that is told."""
    lines, wrong = read_lines(path, numbers)
    if wrong:
        set_aside(path, wrong)
    return lines


class Progress:
    """Tells how training goes: scalars with the speed beside them, and one line on the terminal.

    Speed counts training steps alone: not compilation, not evaluation, not saving.
    """

    def __init__(self, writer: Writer, steps: int, batch_size: int):
        self.writer, self.steps, self.batch_size = writer, steps, batch_size
        self.began = time.perf_counter()
        self.step = None

    def start(self, step: int) -> None:
        """The first step is done, so all is compiled: time from here."""
        print(f"first step after {time.perf_counter() - self.began:.1f} s", flush=True)
        self._mark(step)

    def _mark(self, step: int) -> None:
        self.step, self.since, self.excluded, self.waited = step, time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in here is not training."""
        before = time.perf_counter()
        yield
        if self.step is not None:
            self.excluded += time.perf_counter() - before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs in here waits for data."""
        before = time.perf_counter()
        yield
        if self.step is not None:
            self.waited += time.perf_counter() - before

    def log(self, step: int, scalars: Mapping) -> None:
        """Write train/NAME for each scalar whose name has no group of its own, and the speed since the last call.

        All processes have to call this.
        """
        numbers = {name if "/" in name else f"train/{name}": value for name, value in scalars.items()}
        line = f"step {step:>{len(str(self.steps))}}/{self.steps} {step / self.steps:4.0%}"
        line += f"  loss {float(scalars['loss']):.4f}"
        seconds = time.perf_counter() - self.since - self.excluded
        if step > self.step:
            rate = (step - self.step) / seconds
            numbers["train/images_per_second"] = rate * self.batch_size
            numbers["perf/data_wait_fraction"] = self.waited / seconds
            waits = [float(wait) for wait in hosts.gather(str(self.waited / seconds))]
            if len(waits) > 1:  # in all else they wait for one another, and take the same time
                numbers["perf/slowest_host"] = waits.index(max(waits))
                numbers["perf/slowest_host_data_wait_fraction"] = max(waits)
            left = int((self.steps - step) / rate)
            line += f"  {rate * self.batch_size:,.0f} images/s"
            line += f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(line, flush=True)
        self.writer.scalars(step, numbers)
        self._mark(step)
