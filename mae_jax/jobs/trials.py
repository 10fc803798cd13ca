"""The trials of a sweep: chains of jobs, each in a folder of its own, that are run once and kept."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax.errors import ConfigError, UserError, nearest
from mae_jax.files import write_json
from mae_jax.jobs import JOBS, model_checks, planned, pretrain

DONE = "done.json"  # in the folder of a job that has been run: its settings, and how long it took
LOG = "log.txt"  # in the folder of a trial: all that its jobs say
FLOPS = "flops.json"  # beside it: the arithmetic of a training step, `planned.flops`
SHARED = "shared"  # where jobs are that all trials have in common
LOGS = "submitit"  # the folder of what submitit notes
TAKEN = (SHARED, LOGS)  # in the workdir of a sweep, beside the folders of trials
OF_CHAINS = {"name", "job", "config", "init", "seeded", "shared", "set", "shows"}  # what a chain may say of a job
OF_TRIALS = ("name", "label", "at", "published")  # what a sweep may say of a trial, besides settings of its jobs


class Failed(Exception):
    """A job of a trial did not end well."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A job in the chain of a trial.

    Attributes:
      name: what the chain calls it.
      job: a row of `JOBS`.
      spec: PATH[:NAME] of its config.
      settings: what is changed in that, by dotted path.
      folder: its workdir.
      init: the workdir of the job that it starts from; None: it starts from nothing.
    """

    name: str
    job: str
    spec: str
    settings: dict
    folder: Path
    init: Path | None

    @property
    def identity(self) -> dict:
        """What its results depend on, apart from the jobs before it."""
        return json.loads(json.dumps({"job": self.job, "config": self.spec, "settings": self.settings}))

    @property
    def command(self) -> list[str]:
        """As `mae-jax` takes it."""
        settings = self.settings | ({"init": self.init} if self.init else {})
        changes = [f"--config.{key}={value}" for key, value in settings.items()]
        return [self.job, f"--config={self.spec}", f"--workdir={self.folder}", *changes]

    @property
    def done(self) -> dict | None:
        """What `DONE` holds, if it has been run.

        Raises:
          ConfigError: with other settings than these.
        """
        try:
            done = json.loads((self.folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        before, now = (configs.flatten({"settings": {}, **x}) for x in (done, self.identity))
        now["seconds"] = before.get("seconds")
        if changed := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
            told = ", ".join(
                f"{key.removeprefix('settings.')} {before.get(key)}, now {now.get(key)}" for key in changed
            )
            raise ConfigError(
                f"--workdir: {self.folder} was run with other settings ({told}); name another, or remove it"
            )
        return done

    def run(self) -> None:
        """Run it, unless that has been done.

        Raises:
          Failed: it did not end with exit code 0.
        """
        from mae_jax.__main__ import main

        with _locked(self.folder):
            if self.done:
                return
            print("mae-jax", *self.command, flush=True)
            began = time.time()
            code = main(self.command)
            if code:
                raise Failed(f"{self.job} ended with exit code {code}")
            write_json(self.folder / DONE, self.identity | {"seconds": round(time.time() - began, 1)})


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One setting of a sweep with one seed, to be called in a process of its own.

    Attributes:
      name: what the sweep calls the setting.
      label: what tables and plots call it.
      seed: of all that is random.
      folder: where its jobs and its log are.
      chain: its jobs, in order.
    """

    name: str
    label: str
    seed: int
    folder: Path
    chain: Sequence[Link]

    @property
    def done(self) -> bool:
        """Whether all of its jobs have been run, and counted."""
        counted = (self.folder / FLOPS).exists() or all(link.job != "pretrain" for link in self.chain)
        return all(link.done for link in self.chain) and counted

    def checkpoint(self):
        """What submitit asks for where a cluster stops it before its time: to be called again, and to go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        """Run what of the chain has not been, with all that it says in the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(self.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        for link in self.chain:
            link.run()
            if link.job == "pretrain" and not (self.folder / FLOPS).exists():
                needed, computed = planned.flops(configured(link))
                write_json(self.folder / FLOPS, {"needed": needed, "computed": computed})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is at work in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is at work in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def of_sweep(sweep: ConfigDict, chain: ConfigDict, workdir: Path) -> list[Trial]:
    """All trials of a sweep, each with each of the chain's seeds.

    Raises:
      ConfigError: with all that is wrong with either, or with the configs of the jobs as they are changed.
    """
    raise_if_misshapen(sweep, chain)
    trials = [_trial(given, seed, chain, workdir) for given in sweep.trials for seed in chain.seeds]
    first = [trial for trial in trials if trial.seed == trials[0].seed]  # the others differ in nothing else
    problems = [f"sweep.trials: {trial.name}: {line}" for trial in first for line in _setting_problems(trial)]
    if problems:
        raise ConfigError(problems)
    return trials


def _setting_problems(trial: Trial) -> list[str]:
    """What is wrong with the configs of its jobs, one line each; what depends on data is left to the jobs."""
    problems = []
    for link in trial.chain:
        try:
            config, wrong = load(link.spec, tuple(link.settings.items()))
            if link.job == "pretrain" and not wrong:
                config, wrong = configs.complete(config, pretrain.SCHEMA, pretrain.VALUES)
                wrong = wrong or model_checks.autoencoder_problems(config)
        except UserError as error:
            wrong = error.problems
        problems += wrong
    return list(dict.fromkeys(problems))


def load(spec: str, settings: Sequence[tuple[str, object]]) -> tuple[ConfigDict, list[str]]:
    """The config of a job of a trial, and what is wrong with its settings."""
    return configs.load(spec, [f"--config.{key}={value}" for key, value in settings])


def configured(link: Link) -> ConfigDict:
    """The config of a job of pre-training, with its defaults."""
    config, _ = load(link.spec, tuple(link.settings.items()))
    return configs.complete(config, pretrain.SCHEMA, pretrain.VALUES)[0]


def raise_if_misshapen(sweep: ConfigDict, chain: ConfigDict) -> None:
    """Raise a ConfigError of all that is wrong with the form of either."""
    if problems := _shape_problems(sweep, chain):
        raise ConfigError(problems)


def _shape_problems(sweep: ConfigDict, chain: ConfigDict) -> list[str]:
    """What is wrong with the form of a sweep and its chain, one line each."""
    problems = [f"sweep: has no {key}" for key in ("title", "axis", "trials") if key not in sweep]
    problems += [f"chain: has no {key}" for key in ("seeds", "jobs") if key not in chain]
    if problems:
        return problems
    before: list[str] = []
    for job in chain.jobs:
        where, kind = f"chain.jobs: {job.get('name')!r}", job.get("job", job.get("name"))
        problems += [f"{where} has no {key}" for key in ("name", "config") if key not in job]
        problems += [f"{where}: no setting {key!r}{nearest(key, OF_CHAINS)}" for key in job if key not in OF_CHAINS]
        if kind not in JOBS:
            problems.append(f"{where}: no job {kind!r} of mae-jax{nearest(str(kind), JOBS)}")
        if job.get("init") and job["init"] not in before:
            problems.append(f"{where}: its init {job['init']!r} is no job before it")
        before.append(job.get("name"))
    if not isinstance(sweep.trials, Sequence) or not all(isinstance(trial, Mapping) for trial in sweep.trials):
        return [*problems, "sweep.trials: is no sequence of dicts, one for each setting"]
    if not sweep.trials:
        return [*problems, "sweep.trials: is empty"]
    for trial in sweep.trials:
        problems += _trial_problems(trial, before)
    names = [trial.get("name") for trial in sweep.trials]
    problems += [f"sweep.trials: {name!r} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    return problems


def _trial_problems(trial: Mapping, jobs: Sequence[str]) -> list[str]:
    """What is wrong with the form of what a sweep says of one setting, one line each."""
    name, known = trial.get("name"), [*OF_TRIALS, *jobs]
    where = f"sweep.trials: {name!r}"
    problems = [f"{where}: no job {key!r} in the chain{nearest(key, known)}" for key in trial if key not in known]
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.,-]*", name) or name in TAKEN:
        problems.append(f"{where} is no name for a folder of its own")
    problems += [
        f"{where}: {job} is {trial[job]!r}, no dict of settings"
        for job in jobs
        if not isinstance(trial.get(job, {}), Mapping)
    ]
    published = trial.get("published") or {}
    if not isinstance(published, Mapping) or not all(isinstance(x, int | float) for x in published.values()):
        problems.append(f"{where}: published is no dict of numbers by column")
    if not isinstance(trial.get("at") or 0.0, int | float):
        problems.append(f"{where}: at is {trial['at']!r}, no number")
    return problems


def _trial(given: Mapping, seed: int, chain: ConfigDict, workdir: Path) -> Trial:
    folder = workdir / given["name"] / f"seed_{seed}"
    links: dict[str, Link] = {}
    for job in chain.jobs:
        name = job["name"]
        own = configs.flatten(given.get(name, {}))
        spec = own.pop("recipe", job["config"])
        settings = configs.flatten(job.get("set", {})) | own
        settings |= dict.fromkeys(job.get("seeded", ("seed",)), seed)
        place = workdir / SHARED / f"seed_{seed}" if job.get("shared") else folder
        init = links[job["init"]].folder if job.get("init") else None
        links[name] = Link(name, job.get("job", name), spec, settings, place / name, init)
    return Trial(given["name"], given.get("label", given["name"]), seed, folder, tuple(links.values()))
