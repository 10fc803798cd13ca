"""Run the same chain of jobs with one setting after another, and put the results into a table and a plot.

    mae-jax sweep --sweep=configs/sweeps/mask_ratio.py:digits --workdir=runs/mask_ratio [--parallel=N]

Reads a sweep, PATH:CHAIN, and the chain of jobs that it names (configs/sweeps/chains.py). Each trial is that chain with
one setting and one seed. What is finished is kept: the same command again runs what is missing or has failed. Writes:

    TRIAL/seed_N/JOB/              the workdirs of the jobs
    TRIAL/seed_N/log.txt           what they said
    TRIAL/seed_N/flops.json        of one image in a training step: needed, and computed by the compiled program
    sweep.csv                      a line for each trial and seed
    sweep.md, sweep.png            means over seeds, and their spread, beside the numbers of the paper

    --parallel=N           so many trials at a time, on this machine or on a cluster; 1 if not given
    --slurm=KEY=VALUE,...  as an array of Slurm jobs, as in --slurm=partition=gpu,gpus_per_node=8,timeout_min=600: each
                           trial is one process, with all devices that it finds. Does not wait for them
    --dry-run              list the trials, with parameters, FLOPs and a guess of the time, and run nothing
    --collect              make the table and the plot from what is there, and run nothing
    --seeds=0,1,2          seeds, in place of those of the chain
    --trials=A,B           only those
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epy
from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax.errors import ConfigError, Interrupted, UserError, nearest
from mae_jax.files import in_bucket, make_workdir, path_of
from mae_jax.jobs import forecast, tables, trials
from mae_jax.jobs.trials import LOG, LOGS, Trial

os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # or it takes over all logging of this process
with epy.lazy_imports():
    import submitit

REQUIRED = ("sweep", "workdir")
FLAGS = (*REQUIRED, "parallel", "slurm", "seeds", "trials")
SWITCHES = ("dry-run", "collect")
YEAR = 365 * 24 * 60  # minutes: on this machine, a trial has all the time that it needs


class Unfinished(UserError):
    """Some trials failed; the others are done. The same command tries them again."""


def run(flags: Mapping[str, str]) -> None:
    """Sweep as `flags` say."""
    sweep, chain, found, parallel, parameters = check(flags)
    workdir = path_of("workdir", flags["workdir"])
    if "dry-run" in flags:
        for line in forecast.lines(found, sweep.get("reference", "")):
            print(line, flush=True)
        return
    make_workdir(workdir)
    if "collect" not in flags:
        left = [trial for trial in found if not trial.done]
        print(f"{len(found) - len(left)} of {len(found)} trials are done", flush=True)
        if parameters is not None:
            submit(left, workdir, parallel, parameters, flags)
            return
        run_here(left, workdir, parallel)
    for line in tables.collect(sweep, chain, found, workdir):
        print(line)
    unfinished = [f"{trial.folder}: not finished; see {trial.folder / LOG}" for trial in found if not trial.done]
    if unfinished and "collect" not in flags:
        raise Unfinished([*unfinished, "run the same command again to go on with these"])


def check(flags: Mapping[str, str]) -> tuple[ConfigDict, ConfigDict, list[Trial], int, dict | None]:
    """The sweep, its chain, its trials, how many at a time, and what Slurm is told; None on this machine.

    Raises:
      ConfigError: with all that is wrong.
    """
    problems = []
    parallel = flags.get("parallel", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", parallel):
        problems.append(f"--parallel={parallel}: is not a number above 0")
    seeds = flags.get("seeds", "0")
    if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", seeds):
        problems.append(f"--seeds={seeds}: are not numbers, as in --seeds=0,1,2")
    workdir = path_of("workdir", flags["workdir"])
    if in_bucket(workdir):
        problems.append(f"--workdir={workdir}: a sweep needs a folder, on a disk that all its jobs see")
    parameters, wrong = slurm_parameters(flags["slurm"]) if "slurm" in flags else (None, [])
    problems += wrong
    if problems:
        raise ConfigError(problems)
    try:
        sweep, _ = configs.load(flags["sweep"])
        if "chain" not in sweep:
            raise ConfigError(f"--sweep={flags['sweep']}: is no sweep, as it names no chain; see configs/sweeps/")
        chain, _ = configs.load(sweep.chain)
    except ConfigError as error:
        raise ConfigError([problem.replace("--config", "--sweep", 1) for problem in error.problems]) from error
    trials.raise_if_misshapen(sweep, chain)
    names = [trial["name"] for trial in sweep.trials]
    if sweep.get("reference") and sweep.reference not in names:
        raise ConfigError(f"sweep.reference: no trial {sweep.reference!r}{nearest(str(sweep.reference), names)}")
    if "seeds" in flags:
        chain.seeds = tuple(dict.fromkeys(map(int, seeds.split(","))))
    if "trials" in flags:
        there = {trial["name"]: trial for trial in sweep.get("trials", ())}
        names = dict.fromkeys(flags["trials"].split(","))
        if unknown := [name for name in names if name not in there]:
            raise ConfigError([f"--trials: no {name!r}{nearest(name, there)}" for name in unknown])
        sweep.trials = tuple(there[name] for name in names)
    return sweep, chain, trials.of_sweep(sweep, chain, workdir.absolute()), int(parallel), parameters


def slurm_parameters(text: str) -> tuple[dict, list[str]]:
    """What --slurm=KEY=VALUE,... says, and what is wrong with it."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    problems = [f"--slurm: {key!r} is not KEY=VALUE" for key, _, value in pairs if not key or not value]
    return {key: int(value) if value.isdigit() else value for key, _, value in pairs}, problems


def run_here(left: Sequence[Trial], workdir: Path, parallel: int) -> None:
    """Run trials on this machine, `parallel` at a time, each in a process of its own; some may fail."""
    executor = submitit.AutoExecutor(workdir / LOGS, cluster="local")
    executor.update_parameters(timeout_min=YEAR)
    waiting, running, total = list(left), {}, len(left)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                trial = waiting.pop(0)
                running[trial] = executor.submit(trial)
            time.sleep(0.2)
            for trial in [trial for trial, job in running.items() if job.done()]:
                del running[trial]
                number = total - len(waiting) - len(running)
                told = "done" if trial.done else f"failed; see {trial.folder / LOG}"
                print(f"{number} of {total}  {trial.label}, seed {trial.seed}: {told}", flush=True)
    except Interrupted as stop:
        raise Interrupted(stop.exit_code - 128, "interrupted; the same command goes on from there") from stop
    finally:
        for job in running.values():  # stopped in between: each saves where it is
            os.kill(int(job.job_id), signal.SIGTERM)
        for job in running.values():
            job._process.wait()


def submit(left: Sequence[Trial], workdir: Path, parallel: int, parameters: dict, flags: Mapping[str, str]) -> None:
    """Submit trials as an array of Slurm jobs.

    Raises:
      ConfigError: there is no Slurm here, or it has no such parameters.
    """
    if not left:
        return
    try:
        executor = submitit.AutoExecutor(workdir / LOGS, cluster="slurm")
        shared = {key: parameters.pop(key) for key in [*parameters] if key in AUTO}
        own = {f"slurm_{key}": value for key, value in parameters.items()}
        executor.update_parameters(name="mae_jax", slurm_array_parallelism=parallel, **shared, **own)
        with executor.batch():
            jobs = [executor.submit(trial) for trial in left]
    except (RuntimeError, ValueError, TypeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"--slurm: {' '.join(str(error).split())[:300]}") from error
    print(f"submitted {jobs[0].job_id.partition('_')[0]}: {len(jobs)} trials, {parallel} at a time")
    same = [f"--{flag}={flags[flag]}" for flag in ("sweep", "workdir", "seeds", "trials") if flag in flags]
    print(f"when they are done: {shlex.join(['mae-jax', 'sweep', *same, '--collect'])}")


# of --slurm, what submitit calls the same on any cluster; all else it hands to Slurm
AUTO = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
