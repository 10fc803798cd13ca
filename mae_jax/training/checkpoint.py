"""Checkpoints of the whole train state, written by Orbax; each carries the config that made it.

    WORKDIR/config.json
    WORKDIR/checkpoints/STEP/state/...           the State: step, params, opt_state
    WORKDIR/checkpoints/STEP/config/config.json
    WORKDIR/checkpoints/STEP/manifest/...        sums of all that, see `integrity`
    WORKDIR/checkpoints/damaged/STEP             what was found damaged, kept
    WORKDIR/saved.json                           that there has been a checkpoint

The step is also the position in the data, so nothing else needs saving.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from mae_jax.errors import CheckpointError, ConfigError, in_short
from mae_jax.files import absolute, if_possible, in_bucket, is_folder, to_path, write_json
from mae_jax.training import hosts, integrity

FOLDER = "checkpoints"
CONFIG = "config.json"
DAMAGED = "damaged"
RECORD = "saved.json"  # in the workdir from the first checkpoint on: one whose checkpoints are gone is no new one
STEP = "0|[1-9][0-9]*"  # names of folders
PATIENCE = 3  # saves in a row that may fail, before a run does


def _manager(folder: Path, state: ocp.PyTreeCheckpointHandler, **options) -> ocp.CheckpointManager:
    handlers = {"state": state, "config": ocp.JsonCheckpointHandler(CONFIG), integrity.ITEM: integrity.Handler()}
    return ocp.CheckpointManager(
        absolute(folder), item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def _contents(**items) -> ocp.args.Composite:
    """What Orbax is to save: these items, and last of all the sums."""
    return ocp.args.Composite(**items, **{integrity.ITEM: integrity.Args()})


class Checkpoints:
    """The checkpoints of one run. Saving goes on in the background while training does.

    What comes of a save is known at the next one. If it has failed that is told in a line, what is left of it is
    removed, and training goes on, until `PATIENCE` of them have failed in a row.

    The newest one is verified first. If it is damaged it is moved to checkpoints/damaged/STEP, which is told in a line,
    and so on until one is as it was written. Where there have been checkpoints and none is left, nothing begins anew.
    All processes have to come here together.

    Args:
      workdir: of the run.
      config: the run's config as plain JSON, stored with each checkpoint.
      every: steps between checkpoints; 0: only at the end. Read by the job.
      keep: how many of the latest to keep.
      keep_every: keep for good each that is at a multiple of this many steps; 0: none.
      minutes: save as well where so many have passed since the last save, which is looked at where metrics are logged;
        0: not by time.

    Raises:
      CheckpointError: there were checkpoints, but all are damaged or gone; or the newest is of a newer format.
    """

    def __init__(
        self,
        workdir: Path,
        config: dict,
        *,
        every: int = 0,
        keep: int = 3,
        keep_every: int = 0,
        minutes: float = 0.0,
    ):
        self.config, self.every, self.minutes = config, every, minutes
        self._saved = time.monotonic()
        hosts.meet("all have looked at the checkpoints, of which some may be moved now")
        told, problems = hosts.of_first(lambda: _set_damaged_aside(workdir))
        for line in told:
            print(line, flush=True)
        if problems:
            raise CheckpointError(problems)
        self._workdir, self._keep, self._keep_every = workdir, keep, keep_every
        self._saving, self._error, self._failures = None, "", 0
        self._open()
        if self.latest_step is not None:  # of an earlier version, or of a run killed before it said so
            self._record(self.latest_step)

    def _open(self) -> None:
        """Have Orbax look at what is there, and sweep away what was not written to the end."""
        policy = ocp.checkpoint_managers
        kept = [policy.LatestN(self._keep)] + ([policy.EveryNSteps(self._keep_every)] if self._keep_every else [])
        self._orbax = _manager(
            self._workdir / FOLDER,
            ocp.PyTreeCheckpointHandler(),
            preservation_policy=policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def _record(self, step: int) -> None:
        """Note that there has been a checkpoint, of `step`, unless that is noted."""
        path = self._workdir / RECORD
        if hosts.leads() and not path.exists():
            with if_possible(path):
                write_json(path, {"step": step})

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return max(steps_in(self._orbax.directory), default=None)

    def make_sure_of_space(self, abstract, steps: int) -> None:
        """See that all that a run of `steps` will save of `abstract`, a tree of shapes and dtypes, finds its place.

        Raises:
          ConfigError: the disk has less space than that. Of buckets nobody knows.
        """
        if in_bucket(self._workdir):
            return
        there, latest = steps_in(self._orbax.directory), self.latest_step or 0
        ahead = steps - latest
        due = ahead if self.minutes else -(-ahead // self.every) if self.every else 1
        for_good = steps // self._keep_every - latest // self._keep_every if self._keep_every else 0
        count = min(due, 1 + max(self._keep - len(there), 0) + for_good)  # one more, as the old goes after the new came
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        free = hosts.of_first(lambda: shutil.disk_usage(self._workdir).free)
        if free < count * size:
            raise ConfigError(
                f"--workdir={self._workdir}: {free / 1e9:.3g} GB are free there, and {count} checkpoints of "
                f"{size / 1e9:.3g} GB need {count * size / 1e9:.3g} GB; make room, or lower config.checkpoint.keep"
            )

    def save(self, state, step: int) -> None:
        """Start to write `state` as the checkpoint of `step`, unless there is one; step 0 is not worth keeping.

        Raises:
          CheckpointError: once more, the save before has failed.
        """
        self._settle(PATIENCE)
        if step and step not in self._orbax.all_steps():
            args = _contents(state=ocp.args.PyTreeSave(state), config=ocp.args.JsonSave(self.config))
            self._saving, self._saved = step, time.monotonic()
            self._error = hosts.of_first(lambda: _error_of(lambda: _try_folders(self._workdir / FOLDER)))
            if not self._error:
                self._error = _error_of(lambda: self._orbax.save(step, args=args, force=True))

    def _settle(self, patience: int) -> None:
        """Wait for the save that is under way, if one is, on all processes.

        Raises:
          CheckpointError: it has failed, as have `patience` in a row.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        where = absolute(self._workdir / FOLDER / str(step))
        reasons = hosts.gather(self._error or _error_of(self._orbax.wait_until_finished))
        if not any(reasons):
            self._failures = 0
            self._record(step)
            if hosts.leads():
                _error_of(lambda: integrity.seal_last(where))  # without which it is whole too
            return
        self._failures += 1
        _error_of(self._orbax.close)  # the same once more
        if hosts.leads():
            for path in where.parent.glob(f"{where.name}.*-tmp*"):
                _error_of(path.rmtree)
        self._open()
        lost = f"{where}: not saved ({next(filter(None, reasons))})"
        if self._failures >= patience:
            again = f", and {self._failures} in a row were not" * (self._failures > 1)
            raise CheckpointError(f"{lost}{again}; make sure that there is room, and run the same command again")
        print(f"{lost}; training goes on, and the next one is tried", flush=True)

    def is_time(self) -> bool:
        """Whether `minutes` have passed since the last save: by the clock of process 0, for all of them."""
        return hosts.of_first(lambda: time.monotonic() - self._saved >= 60 * self.minutes)

    def restore(self, abstract):
        """The newest state, laid out as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises:
          CheckpointError: names, shapes or dtypes differ, and all differences are listed; or it has no sums and cannot
            be read.
        """
        step = self.latest_step
        where = self._orbax.directory / str(step)
        try:
            _compare(self._orbax.item_metadata(step).state.tree, abstract, where)
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
            return self._orbax.restore(step, args=ocp.args.Composite(state=args)).state
        except CheckpointError:
            raise
        except Exception as error:
            if integrity.is_sealed(where):  # and so as it was written
                raise
            raise CheckpointError(
                f"{where}: not readable ({in_short(error)}); move it away to go on from another"
            ) from error

    def latest(self, abstract):
        """As `restore`, of what is saved or being saved; None where there is nothing."""
        self._settle(PATIENCE)
        return None if self.latest_step is None else self.restore(abstract)

    def close(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          CheckpointError: the last of it is not.
        """
        self._settle(1)
        self._orbax.close()


def _error_of(call: Callable[[], object]) -> str:
    """What goes wrong in `call`, in a short line; nothing if nothing does."""
    try:
        call()
    except Exception as error:  # Orbax and TensorStore have many for a full disk
        return in_short(error)
    return ""


def _try_folders(folder: Path) -> None:
    """Make as many folders as a checkpoint needs in `folder`, and remove them.

    Where that fails, as without room for names or without the right to, Orbax would not notice for five minutes: its
    threads wait for one that makes folders and has died.
    """
    if in_bucket(folder):  # which has none
        return
    trial = folder / "trial"
    try:
        shutil.rmtree(trial, ignore_errors=True)  # left by a kill
        for i in range(8 + 4 * jax.process_count()):
            (trial / str(i)).mkdir(parents=True)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _set_damaged_aside(workdir: Path) -> tuple[list[str], list[str]]:
    """Move damaged checkpoints to `DAMAGED`, beginning with the newest, until one is as it was written.

    Returns:
      A line for each; and why there is nothing to go on with, if there should be.
    """
    folder, record, lines = workdir / FOLDER, workdir / RECORD, []
    aside = absolute(folder) / DAMAGED
    try:
        steps = sorted(numbers_in(folder), reverse=True)
    except CheckpointError as error:
        return lines, error.problems
    for step in steps:
        where = absolute(folder) / str(step)
        try:
            reason = integrity.damage(where)
        except CheckpointError as error:
            return lines, error.problems
        if not reason:
            told = [] if integrity.is_sealed(where) else [f"{where} is of an earlier version, without sums to verify"]
            return lines + told, []
        try:
            aside.mkdir(parents=True, exist_ok=True)
            taken = {path.name for path in aside.iterdir()}
            name = next(name for i in range(len(taken) + 1) if (name := f"{step}" + f".{i}" * bool(i)) not in taken)
            where.rename(aside / name)
        except OSError as error:
            return lines, [
                f"{where}: damaged: {reason}; it cannot be moved to {aside} ({error.strerror or error}): make that "
                "possible, or move it away yourself, and run the same command again"
            ]
        lines.append(f"damaged: {where}: {reason}; moved to {aside / name}")
    if aside.exists():
        return lines, [
            f"{folder}: no checkpoint is left but damaged ones, in {aside}; use a new --workdir, or "
            f"remove {workdir} to train from the beginning"
        ]
    if record.exists() or (workdir / "summary.json").exists():
        return lines, [
            f"{folder}: no checkpoint is left of the run that is in {workdir}; bring them back, use a new --workdir, "
            f"or remove {workdir} to train from the beginning"
        ]
    return lines, []


def write(workdir: Path, config: dict, params: dict) -> None:
    """Write parameters that were not trained here, a tree of arrays, and a config as checkpoint 0 of a workdir.

    Few are written at a time, so that memory holds little more than them.
    """
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=0.05)
    with (
        _undisturbed(),
        contextlib.closing(_manager(workdir / FOLDER, handler, enable_async_checkpointing=False)) as manager,
    ):
        args = _contents(state=ocp.args.PyTreeSave({"params": params}), config=ocp.args.JsonSave(config))
        manager.save(0, args=args)
        integrity.seal_last(absolute(workdir / FOLDER / "0"))


@contextlib.contextmanager
def _undisturbed():
    """SIGTERM and Ctrl-C wait: Orbax's threads would go on writing after the exception, whatever is deleted then."""
    received = []
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def read(path: str | Path, trees: tuple[str, ...]) -> dict[str, dict]:
    """Some of the trees of a checkpoint, such as "params" and "ema", as NumPy arrays by name, "encoder/cls_token".

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = _verified(locate(path)) / "state"
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        stored = {key: tree for key, tree in handler.metadata(folder).tree.items() if key in trees and tree}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        args = ocp.args.PyTreeRestore(item=stored, restore_args=as_numpy, partial_restore=True)
        state = handler.restore(folder, args=args)
    return {key: flatten_dict(state.get(key, {}), sep="/") for key in trees}


def locate(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a workdir.

    Raises:
      CheckpointError: there is none.
    """
    path = to_path(path)
    if is_folder(path / "state"):
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    steps = steps_in(folder) if is_folder(folder) else []
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; name a workdir of a run, or one of its checkpoints/STEP; of a "
            "model made elsewhere, mae-jax import makes one"
        )
    return folder / str(max(steps))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, damaged or not; files and empty folders are none.

    Raises:
      CheckpointError: as `numbers_in`.
    """
    return [step for step in numbers_in(folder) if not _is_empty(folder / str(step))]


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return not folder.is_dir()  # one that cannot be read may hold something


def numbers_in(folder: Path) -> list[int]:
    """The numbers that are names of folders in `folder`; in a bucket, of those that were written to the end.

    Raises:
      CheckpointError: it is there but cannot be read, or leads nowhere.
    """
    if in_bucket(folder):
        found = [path for path in folder.glob("*") if re.fullmatch(STEP, path.name) and path.is_dir()]
        return [int(path.name) for path in found if (path / "commit_success.txt").exists()]
    try:
        with os.scandir(folder) as entries:
            return [int(entry.name) for entry in entries if re.fullmatch(STEP, entry.name) and entry.is_dir()]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(folder):
            return []
        raise CheckpointError(
            f"{folder}: cannot be read ({error.strerror}); make it a folder that can be, or use a new --workdir"
        ) from error


def _verified(where: Path, below: str = "") -> Path:
    """The checkpoint `where`, if what lies `below` in it is as it was written.

    Raises:
      CheckpointError: it is not.
    """
    reason = integrity.damage(absolute(where), below)
    if reason:
        raise CheckpointError(f"{where}: damaged: {reason}; use another checkpoint")
    return absolute(where)


def load_config(path: str | Path) -> dict:
    """The config of the run that wrote the workdir or checkpoint at `path`.

    Raises:
      CheckpointError: there is no checkpoint, or its config is damaged.
    """
    file = _verified(locate(path), "config/") / "config" / CONFIG
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable ({error}); use another checkpoint") from error


def load(path: str | Path, abstract: dict, whole: str | tuple[str, ...] = "params") -> dict:
    """A part of the state in the checkpoint at `path`, on the first local device.

    Args:
      path: a workdir or a checkpoint.
      abstract: the tree to read, as ShapeDtypeStructs: {"params": {"encoder": ...}}.
      whole: where the checkpoint may hold nothing but what is read, such as "params/encoder"; (): nowhere.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged, or names, shapes or dtypes differ; all that do are
        listed.
    """
    where = locate(path)
    folder = _verified(where) / "state"
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        _compare(handler.metadata(folder).tree, abstract, where, whole)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        return handler.restore(folder, args=args)


def names_in(path: str | Path) -> set[str]:
    """The names of all that the checkpoint at `path` holds, such as "params/encoder/cls_token"."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return set(_leaves(handler.metadata(absolute(locate(path)) / "state").tree))


def _leaves(tree) -> dict[str, tuple]:
    """Shape and dtype of each leaf, by its path."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for p, x in paths}


def _compare(stored, wanted, where, whole: str | tuple[str, ...] = "") -> None:
    """Raise a CheckpointError that lists every leaf that is missing, unused or of another shape or dtype.

    Orbax itself restores a missing leaf as a ShapeDtypeStruct without a word. Of what is stored but not wanted, only
    that below `whole` counts.
    """
    stored, wanted = _leaves(stored), _leaves(wanted)
    problems = [f"{where}: missing: {name} {wanted[name]}" for name in wanted if name not in stored]
    problems += [
        f"{where}: unused: {name} {stored[name]}" for name in stored if name not in wanted and name.startswith(whole)
    ]
    problems += [
        f"{where}: misshapen: {name} is {stored[name]}, not {wanted[name]}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if problems:
        raise CheckpointError(problems)
