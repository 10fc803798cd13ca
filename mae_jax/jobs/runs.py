"""What every training job does around its loss: go on with what is there, train, look, save, sum up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.config import flatten, to_json
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import CheckpointError, ConfigError, in_short
from mae_jax.files import needed, set_aside, write_json
from mae_jax.training import hosts, metrics, optim
from mae_jax.training.checkpoint import CONFIG, Checkpoints, load_config, steps_in
from mae_jax.training.guard import Guard
from mae_jax.training.loop import Hook, State, all_of, create_state, fit, in_turn, make_train_step, total_steps
from mae_jax.training.sharding import batch_sharding, make_mesh, place, undivided

# of the model, but nothing it learns depends on them
FREE = tuple(f"{part}.{key}" for part in ("encoder", "decoder") for key in ("remat", "attention"))


class Run:
    """One training run in its workdir.

    Attributes:
      complete: whether the workdir has been trained to the end; there is nothing left to do then.
      steps: the length of the run.
      mesh: of devices.
      eval_key: what evaluation may draw from; the same at every look.
      writer: of metrics and pictures.
      last_look: what the last evaluation of a classifier summed up.
    """

    def __init__(self, job: str, config: ConfigDict, workdir: Path, data: Dataset, fixed: Sequence[str]):
        """Look at what is in the workdir.

        Args:
          job: the name of the job.
          workdir: a folder that is there, with no other run in it.
          data: what to train on.
          fixed: beginnings of the settings that may not change when a run goes on.

        Raises:
          ConfigError: what is there cannot go on as `config` says.
        """
        self.began = time.time()
        self.job, self.config, self.workdir, self.data = job, config, workdir, data
        self.steps_per_epoch = data.opened.size // data.batch_size
        self.steps = total_steps(self.steps_per_epoch, **config.train)
        _compare_with_earlier_run(config, workdir, fixed)
        with needed(workdir):
            self.checkpoints = Checkpoints(workdir, to_json(config), **config.checkpoint)
        hosts.agree(
            {f"the newest checkpoint in {workdir}": self.checkpoints.latest_step}
            | {"the number of training images": data.opened.size}
        )
        if (self.checkpoints.latest_step or 0) > self.steps:
            raise ConfigError(
                f"config.train: {self.steps} steps, but {workdir} has trained {self.checkpoints.latest_step}; "
                "give more, or a new --workdir"
            )
        self.complete = self.checkpoints.latest_step == self.steps and (workdir / "summary.json").exists()
        if self.complete:
            print(f"already complete: {workdir} has trained {self.steps} steps")
            return
        hosts.meet("all have seen what is in the workdir")
        with needed(workdir):
            if hosts.leads():
                if (wrong := _read_config(workdir / CONFIG)[1]) and (workdir / CONFIG).exists():
                    set_aside(workdir / CONFIG, wrong)
                write_json(workdir / CONFIG, to_json(config))
                (workdir / "summary.json").unlink(missing_ok=True)  # of a shorter run, now made longer
        hosts.see_what_the_first_wrote(workdir)
        self.mesh = make_mesh(**config.mesh)
        self.init_key, self.train_key, self.eval_key = jax.random.split(jax.random.key(config.seed), 3)
        self.last_look = {}
        with needed(workdir):
            self.writer = metrics.Writer(workdir, self.checkpoints.latest_step or 0)

    def train(
        self,
        init: Callable,
        draw: Callable,
        loss_fn: Callable,
        hooks: Sequence[Hook],
        batches: Dataset | None = None,
        later: Sequence[tuple[int, Callable, Callable]] = (),
        start: dict | None = None,
        trained: Callable[[str], bool] = all_of,
        layer_of: Callable[[str], int] | None = None,
        exempt: Sequence[str] = (),
        ema: float = 0.0,
    ) -> State:
        """Train to the end, and leave summary.json.

        Args:
          init: `f(key) -> (params, stats)`, jittable: what a new run begins with.
          draw, loss_fn, trained, ema: as in `make_train_step`.
          hooks: to call besides saving.
          batches: what to take batches from, if not from `data`.
          later: what comes in place of `draw` and `loss_fn`, and from which step on.
          start: parameters for a new run to begin with in place of those of `init`; a part of the tree.
          layer_of, exempt: as in `optim.make`.
        """
        config, data = self.config, self.data
        lengths, keys = (self.steps, self.steps_per_epoch), (self.init_key, self.train_key)
        step_of, abstract, new_state = set_up(config, self.mesh, *lengths, *keys, init, trained, layer_of, exempt, ema)
        try:
            self.checkpoints.make_sure_of_space(abstract, self.steps)
        except ConfigError:
            self.writer.close()
            raise
        print(parameter_overview.get_parameter_overview(abstract.params, include_stats=False))
        if whole := undivided(abstract.params, self.mesh):  # which costs the memory that the mesh is there to save
            more = f" and {len(whole) - 1} more" * (len(whole) > 1)
            print(f"note: whole on each device, as config.mesh does not divide their widths: {whole[0]}{more}")
        if self.checkpoints.latest_step is None:
            state = _begin_with(start or {}, new_state())
        else:
            state = self.checkpoints.restore(abstract)
        first = int(state.step)
        print(
            f"{'resuming' if first else 'training'} from step {first} of {self.steps} on {self.mesh.size} device(s)"
            + f" of {jax.process_count()} processes" * (jax.process_count() > 1)
            + "; compiling",
            flush=True,
        )
        stages = [(step, step_of(*pair)) for step, *pair in [(0, draw, loss_fn), *later]]
        train_step = in_turn(stages, first) if later else stages[0][1]
        progress, batches = metrics.Progress(self.writer, self.steps, data.batch_size), batches or data

        def go_back(state):
            earlier = self.checkpoints.latest(abstract)
            return earlier and earlier.replace(step=state.step)

        examples_of = partial(batches.indexes, config.seed)
        size = (data.batch_size, self.steps_per_epoch)
        limits = {**config.guard, "patience": min(config.guard.patience, self.steps)}  # a run of nothing else fails too
        with needed(self.workdir):
            guard = Guard(self.workdir, first, examples_of, go_back, *size, **limits)

        def keep(state, step):
            if guard.keeps(state.params, step, step == self.steps):
                self.checkpoints.save(state, step)

        def keep_if_time(state, step):
            if self.checkpoints.is_time():
                keep(state, step)

        def keep_at_once(state, step):
            """Before an interrupted run ends, also while steps are skipped."""
            if guard.can_compute_with(state.params, step):
                self.checkpoints.save(state, step)

        hooks = [*hooks, (self.checkpoints.every, keep)]
        if self.checkpoints.minutes:
            hooks.append((config.log.every, keep_if_time))
        examples = batches.shuffled(config.seed, first, batch_sharding(self.mesh))
        try:
            with hosts.failing_at_once():
                state = fit(state, train_step, examples, self.steps, hooks, keep_at_once, progress, guard, **config.log)
        finally:
            self.checkpoints.close()
            self.writer.close()
        self._summarize()
        return state

    @property
    def final_metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        final = {}
        for line in metrics.read(self.workdir / "metrics.jsonl"):
            final.update(line)
        final.pop("step", None)
        return final

    def _summarize(self) -> None:
        summary = {
            "job": self.job,
            "steps": self.steps,
            "images_seen": self.steps * self.data.batch_size,
            "wall_time_seconds": round(time.time() - self.began, 1),
            "device": jax.devices()[0].device_kind,
            "device_count": self.mesh.size,
            "process_count": jax.process_count(),
            "versions": {name: version(name) for name in ("mae_jax", "jax", "flax", "optax", "orbax-checkpoint")},
            "metrics": self.final_metrics,
        }
        with needed(self.workdir):
            write_json(self.workdir / "summary.json", summary)
        where = self.workdir
        print(f"metrics     {where}/metrics.jsonl, {where}/summary.json; tensorboard --logdir {where}")
        print(f"checkpoint  {where}/checkpoints/{self.steps}")


def set_up(
    config: ConfigDict,
    mesh: Mesh,
    steps: int,
    steps_per_epoch: int,
    init_key: jax.Array,
    train_key: jax.Array,
    init: Callable,
    trained: Callable[[str], bool] = all_of,
    layer_of: Callable[[str], int] | None = None,
    exempt: Sequence[str] = (),
    ema: float = 0.0,
) -> tuple[Callable, State, Callable[[], State]]:
    """What a run begins with and what it repeats: the one place where they are put together.

    Args:
      init: `f(key) -> (params, stats)`.
      trained, ema: as in `make_train_step`.
      layer_of, exempt: as in `optim.make`.

    Returns:
      `f(draw, loss_fn) -> train step`, the arguments as in `make_train_step`; the state as `ShapeDtypeStruct`s that
      carry shardings; and a function that computes it.
    """
    tx, schedule = optim.make(config.data.batch_size, steps, steps_per_epoch, layer_of, exempt, **config.optim)
    abstract, new_state = create_state(lambda: init(init_key), tx, mesh, trained, ema)

    def step_of(draw, loss_fn):
        return make_train_step(
            draw, loss_fn, tx, schedule, train_key, mesh, trained, ema, config.accumulate, config.guard.spike
        )

    return step_of, abstract, new_state


def _begin_with(params: dict, state: State) -> State:
    """`state` with some parameters in place of its own, and of their moving averages."""
    given = flatten_dict(params, sep="/")

    def begin(tree):
        leaves = flatten_dict(tree, sep="/")
        for name in given.keys() & leaves.keys():  # copied, as both trees are donated and may share no memory
            leaves[name] = jnp.copy(place(given[name], leaves[name].sharding))
        return unflatten_dict(leaves, sep="/")

    return state.replace(params=begin(state.params), ema=begin(state.ema))


def _compare_with_earlier_run(config: ConfigDict, workdir: Path, fixed: Sequence[str]) -> None:
    """Make sure that what is in `workdir` can go on as `config` says; print what is different but may be."""
    before, path, wrong = earlier_config(workdir)
    if path is None:
        return
    if wrong:
        print(f"{workdir / CONFIG}: {wrong}; compared with the config in {path} instead", flush=True)
    before, now = flatten(before), flatten(to_json(config))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    told = {key: f"config.{key}: {before.get(key)} in {path}, now {now.get(key)}" for key in changed}
    refused = [
        f"{told[key]}; use a new --workdir" for key in changed if key.startswith(tuple(fixed)) and key not in FREE
    ]
    if refused:
        raise ConfigError(refused)
    for line in told.values():
        print(f"changed: {line}")


def earlier_config(workdir: Path) -> tuple[dict, Path | None, str]:
    """The config of the run in `workdir`: of config.json, or where that is lost of the newest checkpoint that has one.

    Returns:
      It, and where it was found, {} and None where there are no checkpoints; and what is wrong with config.json.

    Raises:
      CheckpointError: there are checkpoints, but none has a config either.
    """
    steps = sorted(steps_in(workdir / "checkpoints"), reverse=True)
    if not steps:
        return {}, None, ""
    config, wrong = _read_config(workdir / CONFIG)
    if not wrong:
        return config, workdir / CONFIG, ""
    for step in steps:
        path = workdir / "checkpoints" / str(step)
        with contextlib.suppress(CheckpointError, OSError):  # a damaged one is set aside later
            if isinstance(config := load_config(path), dict):
                return config, path, wrong
    raise CheckpointError(f"{workdir / CONFIG}: {wrong}, nor is that of any checkpoint; use a new --workdir")


def _read_config(path: Path) -> tuple[dict, str]:
    """What a config.json holds; and why that is nothing, if so."""
    if not path.exists():
        return {}, "not there"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"not readable ({in_short(error)})"
    return (found, "") if isinstance(found, dict) else ({}, "not readable (no object)")
