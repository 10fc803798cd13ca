"""The one training loop, and the state it carries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from mae_jax.errors import Interrupted
from mae_jax.training.guard import Guard
from mae_jax.training.hosts import Signals, Watchdog
from mae_jax.training.metrics import Progress
from mae_jax.training.optim import join, split
from mae_jax.training.sharding import microbatches, state_sharding


@struct.dataclass
class State:
    """All that a run carries from step to step. `step` counts the batches taken."""

    step: jax.Array  # i32[]
    params: dict
    opt_state: optax.OptState  # of the trained parameters
    stats: dict  # what a step moves without a gradient: running means of batch norms
    ema: dict  # moving averages of the trained parameters; {} where none are kept
    norm: jax.Array  # f32[], a moving average of the gradient's norm; 0 before the first step

    @property
    def averaged(self) -> dict:
        """The parameters to evaluate: the moving averages of those that have one, the others as they are."""
        return join(self.params, self.ema)


def all_of(path: str) -> bool:
    """Every parameter is trained."""
    return True


def total_steps(steps_per_epoch: int, *, steps: int | None = None, epochs: float | None = None) -> int:
    """Length of a run: `steps` where given, else `epochs` of `steps_per_epoch`."""
    return steps if steps is not None else round((epochs or 0) * steps_per_epoch)


def create_state(
    init: Callable,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    trained: Callable[[str], bool] = all_of,
    ema: float = 0.0,
) -> tuple[State, Callable[[], State]]:
    """Describe the first state, and how to make it.

    Shapes first, then shardings, then arrays: nothing is ever whole on one device that the mesh says is split.

    Args:
      init: `f() -> (params, stats)`.
      trained, ema: as in `make_train_step`.

    Returns:
      The state as `ShapeDtypeStruct`s that carry shardings, and a function that computes it.
    """

    def create():
        params, stats = init()
        inside, _ = split(params, trained)
        averages = jax.tree.map(jnp.copy, inside) if ema else {}  # donated, so no two may be one array
        return State(jnp.zeros((), jnp.int32), params, tx.init(inside), stats, averages, jnp.zeros(()))

    shapes = jax.eval_shape(create)
    shardings = state_sharding(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return abstract, jax.jit(create, out_shardings=shardings)


# Rematerialisation puts barriers around what is to be computed a second time. XLA's CPU compiler drops them before it
# decides on the order of operations, and so computes everything twice at once and keeps all of it.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


USUAL = 100  # steps over which the gradient's norm is averaged


def make_train_step(
    draw: Callable,
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    mesh: Mesh,
    trained: Callable[[str], bool] = all_of,
    ema: float = 0.0,
    accumulate: int = 1,
    spike: float = 0.0,
) -> Callable[[State, dict], tuple[State, dict]]:
    """The jitted update: (state, batch) -> (new state, scalars). The old state's memory is reused.

    Where the loss or the gradient is not finite, the new state is the old one but for its number: no parameter, moment
    or average is touched, and `skipped` is true among the scalars.

    What is random is drawn for the whole batch, and the loss is its mean by weight, so that neither the mesh nor
    `accumulate` changes anything but the order of summation.

    Args:
      draw: `f(batch, key) -> examples`: all that is random in a step, and what needs to see the batch whole. Examples
        are a dict whose arrays have N as their first axis, with `weight` f32[N], what each one counts. `key` is `key`
        folded with the step, so that any step can be replayed from its number and no key is ever stored.
      loss_fn: `f(params, stats, examples) -> (losses f32[N], new stats)`, of some or all of the examples.
      trained: whether the parameter of a path such as "encoder/block_0/mlp/in/kernel" is trained. The others have no
        gradient and no moments, and nothing is computed for what lies before the first that is.
      ema: how much of their moving average the trained parameters keep at each step; 0: there is none.
      accumulate: so many parts of the batch are computed one after the other, in the memory of one. Each part begins
        with the statistics before the step, and what they become is averaged over the parts.
      spike: steps whose gradient is more than so many times as large as usual are skipped too, once there have been
        some; 0: none of them is.
    """

    options = KEEP_BARRIERS if jax.default_backend() == "cpu" else None

    @partial(jax.jit, donate_argnums=0, compiler_options=options)
    def train_step(state: State, batch: dict):
        inside, outside = split(state.params, trained)
        examples = draw(batch, jax.random.fold_in(key, state.step))
        total = jnp.sum(examples["weight"])
        share = examples["weight"] / jnp.where(total > 0, total, 1.0)  # a batch of unreadable images teaches nothing

        def loss_of(inside, examples, share):
            values, stats = loss_fn(join(inside, outside), state.stats, examples)
            return jnp.sum(values * share), stats

        def loss_and_grads(examples, share):
            found, grads = jax.value_and_grad(loss_of, has_aux=True)(inside, examples, share)
            return found, jax.lax.with_sharding_constraint(grads, state_sharding(grads, mesh))

        if accumulate == 1:
            (loss, stats), grads = loss_and_grads(examples, share)
        else:
            parts = microbatches((examples, share), accumulate, mesh)
            nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss_and_grads, examples, share))
            (loss, stats), grads = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, loss_and_grads(*part)), None), nothing, parts
            )[0]
            stats = jax.tree.map(lambda x: x / accumulate, stats)
        updates, opt_state = tx.update(grads, state.opt_state, inside)
        inside = optax.apply_updates(inside, updates)
        averages = optax.incremental_update(inside, state.ema, 1 - ema) if ema else {}
        # of halves, so that the squares are not Adam's: XLA would write down what two places need
        norm = 2 * optax.tree.norm(jax.tree.map(lambda g: 0.5 * g, grads))
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if spike:
            good &= (norm <= spike * state.norm) | (state.step < USUAL)
        usual = state.norm + (norm - state.norm) / jnp.minimum(state.step + 1, USUAL)
        new_state = State(state.step + 1, join(inside, outside), opt_state, stats, averages, usual)
        new_state = jax.tree.map(partial(jnp.where, good), new_state, state).replace(step=new_state.step)
        scalars = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step), "skipped": ~good}
        scalars["data/unreadable"] = jnp.sum(batch["weight"] == 0)
        return jax.lax.with_sharding_constraint(new_state, state_sharding(new_state, mesh)), scalars

    return train_step


def in_turn(stages: Sequence[tuple[int, Callable]], first: int) -> Callable[[State, dict], tuple[State, dict]]:
    """One train step made of several, to be called for step `first` and those after it.

    Args:
      stages: from which step on each is the one, ascending from 0.
    """
    numbers = itertools.count(first)  # the state's own step would have to be waited for

    def train_step(state, batch):
        number = next(numbers)
        return [step for begins, step in stages if begins <= number][-1](state, batch)

    return train_step


# A hook is (every, f(state, step)): called at every multiple of `every` and at the last step; 0 is the last only.
Hook = tuple[int, Callable[[State, int], None]]


def fit(
    state: State,
    train_step: Callable[[State, dict], tuple[State, dict]],
    batches: Iterator[dict],
    steps: int,
    hooks: Sequence[Hook],
    save: Callable[[State, int], None],
    progress: Progress,
    guard: Guard,
    *,
    every: int = 10,
) -> State:
    """Train from `state.step` to `steps`.

    The order is a contract: hooks see the state of step i, evaluation before saving; *then* batch i is taken. So a
    checkpoint of step i has all metrics up to i before it, and the batch it goes on with is number i. The state that
    a run begins with is not news: a new run has learnt nothing, a resumed one has been looked at. (One that has
    nothing left to do may have been stopped before its last look.)

    Args:
      batches: batch number `state.step`, and those after it.
      save: called with the last state when a signal ends the run early.
      progress: gets the scalars of every `every`-th step.
      guard: sees the scalars of each step, and may put another state in place of what came of it.

    Raises:
      Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
      NumericsError, DataError: of the guard.
    """
    first, unseen = int(state.step), []
    with Signals() as signals, Watchdog() as watchdog:
        for step in range(first, steps + 1):
            due = [hook for period, hook in hooks if step == steps or (period and step % period == 0)]
            if due and (step > first or step == steps):
                while unseen:
                    state = guard.look(state, *unseen.pop(0))
                jax.block_until_ready(state)
                watchdog.pause()
                with progress.paused():
                    for hook in due:
                        hook(state, step)
            if step == steps:
                break
            if signum := signals.at(step):
                save(state, step)
                raise Interrupted(signum, f"stopped at step {step}; the same command goes on from there")
            with progress.waiting():
                batch = next(batches)
            state, scalars = train_step(state, batch)
            unseen.append((step, scalars))
            if step == first:
                jax.block_until_ready(scalars)
                progress.start(step + 1)
            while len(unseen) > 1:  # no more than one step ahead, so that a signal need not wait for many
                state = guard.look(state, *unseen.pop(0))
            watchdog.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                progress.log(step + 1, jax.device_get(scalars) | guard.totals)
    return state
