"""The processes of one job: how they find each other, agree, and end together when one of them is lost.

Each drives the devices of a host, or a part of them, and runs the same command. What they compute together goes over
the mesh; process 0 alone prints and writes files, but for checkpoints, of which each writes its part.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.errors import ConfigError, Interrupted, Lost, UserError, report

WHERE = ("coordinator", "processes", "process")  # flags that are given together or not at all
PATIENCE = 300  # seconds in which all processes have to come
GRACE = 10.0  # seconds in which all processes of a job may find what one of them has found

hang = 1800.0  # seconds without a step after which a `Watchdog` ends the process; 0: never


def leads() -> bool:
    """Whether this is the process that prints, and writes what is not a checkpoint."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(flags: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """What runs in here runs together with the other processes of the job, if there are any.

    They are found by `flags`, or else by what Slurm's srun or a TPU VM says. What fails in here on one of several ends
    its process, at once and with its exit code, and those that then miss it end with that of `Lost`.

    Args:
      flags: as they are on the command line: `coordinator`, the host and port of process 0; `processes`, how
        many there are; `process`, which one this is; `heartbeat`, seconds after which one that is silent counts as
        lost, 60 if not given; `hang`, see there.

    Raises:
      ConfigError: the flags are no such things.
    """
    global hang
    before = hang
    found = _arguments(flags, environ)
    hang = _number(flags, "hang", hang, least=0)
    heartbeat = _number(flags, "heartbeat", 60, least=1)
    try:
        if found is None or not _initialize(found, heartbeat):
            yield
            return
        try:
            with failing_at_once():
                _refuse_uneven_hosts()
                yield
                jax.distributed.shutdown()
        except UserError as error:
            report(error, _name())
            _end(error.exit_code)
    finally:
        hang = before


def _initialize(found: Mapping, heartbeat: int) -> bool:
    """Wait for the other processes; False where a machine with TPUs knows of none."""
    waiting = [threading.Timer(PATIENCE / 30, _ask_for_patience), threading.Timer(PATIENCE, _give_up)]
    for timer in waiting:  # the last a moment before JAX gives up, in many more words
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(**found, initialization_timeout=PATIENCE + 10, heartbeat_timeout_seconds=heartbeat)
    except ValueError:
        if found:
            raise
        return False
    except RuntimeError as error:
        report(Lost(f"the processes of the job do not find each other: {_first_line(error)}"))
        _end(Lost.exit_code, 0)
    finally:
        for timer in waiting:
            timer.cancel()
    _abort_as_lost()
    _hear_sigterm(False)
    if not leads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _refuse_uneven_hosts() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{counts[process]} on process {process}" for process in sorted(counts))
        raise ConfigError(f"every process of a job has to have as many devices as the others, not {told}")


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """What fails in here, but for what all processes find, ends one of several at once: no other is waited for."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, KeyboardInterrupt):
            report(Interrupted(signal.SIGINT, "interrupted"), _name())
            _end(130, 0)
        # outside of a step JAX makes ValueErrors of what XLA says
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and re.search(LOST, str(error)):
            report(Lost(f"another process of the job is lost ({_first_line(error)}); run all of them again"), _name())
            _end(Lost.exit_code, 0)
        traceback.print_exc()
        _end(1, 0)


# what XLA says where a process does not answer any more
LOST = r"(?i)gloo|connection (closed|reset|refused)|UNAVAILABLE|heartbeat|coordination service|unhealthy|barrier"


def _ask_for_patience() -> None:
    print(f"mae-jax: waiting for the other processes of the job, up to {PATIENCE} s", file=sys.stderr, flush=True)


def _give_up() -> None:
    report(
        Lost(
            f"not all processes of the job have come in {PATIENCE} s; run the same command on every host, with "
            "numbers from 0 on for --process, each once"
        )
    )
    os._exit(Lost.exit_code)


def _name() -> str:
    return f"process {jax.process_index()}: " if jax.process_index() else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _end(code: int, grace: float = GRACE) -> None:
    """End the process, when the others do as well or after `grace` seconds; whatever threads there are."""
    sys.stdout.flush()
    sys.stderr.flush()
    if grace:
        parting = threading.Thread(target=_shut_down, daemon=True)
        parting.start()
        parting.join(grace)
    os._exit(code)


def _shut_down() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


_C = ctypes.CDLL(None)
_C.signal.argtypes, _C.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_jax_handler: int | None = None  # of SIGTERM: it has all processes learn of it, and nobody obey


def _abort_as_lost() -> None:
    """JAX aborts a process that misses another one; have any abort end it with the exit code of `Lost`, 6.

    That is the number of the signal too, so that C's own _exit can be its handler: Python's would come too late.
    """
    assert Lost.exit_code == signal.SIGABRT
    _C.signal(signal.SIGABRT, ctypes.cast(_C._exit, ctypes.c_void_p))


def _hear_sigterm(heard: bool) -> None:
    """Have JAX note SIGTERM, for a loop that asks for it; or else have it end the process, as usual."""
    global _jax_handler
    if heard:
        _C.signal(signal.SIGTERM, _jax_handler)
    else:
        found = _C.signal(signal.SIGTERM, None)  # SIG_DFL
        _jax_handler = _jax_handler or found


def _arguments(flags: Mapping[str, str], environ: Mapping[str, str]) -> dict | None:
    """Those of `jax.distributed.initialize`, or None where this process is alone."""
    asked = [flag for flag in WHERE if flag in flags]
    if asked:
        missing = [f"--{flag}" for flag in WHERE if flag not in flags]
        if missing:
            raise ConfigError(f"--{asked[0]}: needs {' and '.join(missing)} beside it")
        processes = _number(flags, "processes", 1, least=1)
        process = _number(flags, "process", 0, least=0)
        if process >= processes:
            raise ConfigError(f"--process={process}: is not one of {processes}, which are numbered from 0")
        if not re.fullmatch(r"(\[.+\]|[^:]+):\d+", flags["coordinator"]):
            raise ConfigError(f"--coordinator={flags['coordinator']}: is not HOST:PORT")
        if process == 0:
            _try_port(flags["coordinator"])
        return {
            "coordinator_address": flags["coordinator"],
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        tasks, nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_NNODES", 1))
        # JAX would take one GPU a process, also where a process is to have all of a node
        every = range(int(environ.get("SLURM_GPUS_ON_NODE", 1)))
        return {"cluster_detection_method": "slurm"} | ({"local_device_ids": [*every]} if tasks == nodes else {})
    tpu = importlib.util.find_spec("libtpu") and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return {} if tpu else None


def _try_port(coordinator: str) -> None:
    """A ConfigError where process 0 cannot listen there, of which JAX would die."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", int(coordinator.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--coordinator={coordinator}: cannot listen there ({error}); use another port or, where process 0 "
                "of the job is here already, another number for --process"
            ) from error


def _number(flags: Mapping[str, str], flag: str, default: float, least: int) -> int:
    text = flags.get(flag, str(int(default)))
    if not re.fullmatch("[0-9]{1,7}", text) or int(text) < least:
        raise ConfigError(f"--{flag}={text}: is not a whole number from {least} on, of at most seven digits")
    return int(text)


def gather(text: str) -> list[str]:
    """The texts of all processes, by their numbers."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32)))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = data
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def of_first(find: Callable[[], object]):
    """What `find` returns on process 0, which alone calls it: JSON values. All processes have to call this."""
    if jax.process_count() == 1:
        return find()
    return json.loads(gather(json.dumps(find() if leads() else None))[0])


def agree(facts: Mapping[str, object]) -> None:
    """Make sure that `facts`, by what they are called, are the same on all processes; all of them have to call this.

    Raises:
      ConfigError: they are not; it names the processes that differ from most.
    """
    if jax.process_count() == 1:
        return
    everywhere = [json.loads(text) for text in gather(json.dumps({key: str(value) for key, value in facts.items()}))]
    problems = []
    for key in sorted({key for told in everywhere for key in told}):
        values = [told.get(key, "not there") for told in everywhere]
        ((usual, _),) = Counter(values).most_common(1)
        odd = [f"{value} on process {i}" for i, value in enumerate(values) if value != usual]
        if odd:
            most = f"process {values.index(usual)}" + " and others" * (values.count(usual) > 1)
            problems.append(f"{key}: {', '.join(odd)}, but {usual} on {most}; start all with the same")
    if problems:
        raise ConfigError(problems)


def meet(place: str) -> None:
    """Wait for all processes to come to the same `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def see_what_the_first_wrote(workdir: Path) -> None:
    """Make sure that all processes have the same folder `workdir`.

    Raises:
      ConfigError: some do not see a file that process 0 has written there; checkpoints would wait for them for ever.
    """
    if jax.process_count() == 1:
        return
    word = gather(uuid.uuid4().hex)[0]
    file = workdir / f"seen_{word}.tmp"
    if leads():
        file.write_text(word)
    meet("the file is there")
    deadline = time.monotonic() + PATIENCE / 10  # which some file systems of networks need
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [str(i) for i, told in enumerate(gather(str(seen))) if told != "True"]
    if leads():
        file.unlink()
    if blind:
        raise ConfigError(
            f"--workdir={workdir}: process {', '.join(blind)} does not see what process 0 writes there; name a folder "
            "that all hosts share, or gs://BUCKET/..."
        )


class Signals:
    """Within it, SIGTERM and Ctrl-C are noted instead of obeyed.

    A second one, of either kind, acts as usual; but of several processes only Ctrl-C does, as SIGTERM is JAX's there.
    """

    def __enter__(self):
        self.received, self.before, self.several = 0, {}, jax.process_count() > 1
        for signum in (signal.SIGINT,) if self.several else (signal.SIGTERM, signal.SIGINT):
            self.before[signum] = signal.signal(signum, self._note)
        if self.several:
            _hear_sigterm(True)
        return self

    def _note(self, signum, frame):
        self.received = signum
        for each, handler in self.before.items():
            signal.signal(each, handler)
        if self.several:
            signal.raise_signal(signal.SIGTERM)

    def at(self, step: int) -> int:
        """The signal that ends the run at this step, the same step on all processes; 0: none does.

        To be asked once before each step, on every process: that is how they agree.
        """
        if not self.several:
            return self.received
        return (self.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0

    def __exit__(self, *exc):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if self.several:
            _hear_sigterm(False)


class Watchdog:
    """Within it, the process ends with the exit code of `Lost` where `hang` seconds pass between two calls of `step`.

    What every thread was doing is printed then. While it is `paused`, time does not count.
    """

    def __enter__(self):
        self._deadline, self._over, self._seconds = None, threading.Event(), hang
        if hang:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def step(self) -> None:
        self._deadline = time.monotonic() + self._seconds

    def pause(self) -> None:
        self._deadline = None

    def _watch(self):
        while not self._over.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline and time.monotonic() > deadline:
                faulthandler.dump_traceback(all_threads=True)
                report(Lost(f"no step in {self._seconds:g} s (--hang); run the command again"), _name())
                _end(Lost.exit_code, 0)

    def __exit__(self, *exc):
        self._over.set()
