"""The loop's order is a contract, its steps can be replayed, and signals stop it only after saving."""

import contextlib
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.errors import Interrupted
from mae_jax.training import optim
from mae_jax.training.loop import State, create_state, fit, in_turn, make_train_step, total_steps
from mae_jax.training.sharding import batch_sharding, make_mesh, microbatches

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Run:
    """A run of `fit` with nothing in it, that writes down all that happens in `events`."""

    def __init__(self, on_batch=lambda step: None, on_eval=lambda step: None):
        self.events, self.on_batch, self.on_eval, self.inside = [], on_batch, on_eval, []

    def fit(self, first, steps, *, every=1, eval_every=2, save_every=2):
        self.first, self.looked = first, []
        hooks = [(eval_every, self.hook("eval")), (save_every, self.hook("save"))]
        state = State(step=jnp.int32(first), params={}, opt_state=(), stats={}, ema={}, norm=jnp.float32(0))
        return fit(state, self.train_step, self.batches(first), steps, hooks, self.last_save, self, self, every=every)

    def batches(self, first):
        for step in range(first, 10**6):
            assert self.inside == ["waiting"], "the wait for data is measured"
            self.events.append(f"batch {step}")
            yield {"number": step}

    def train_step(self, state, batch):
        assert self.inside == []
        assert int(state.step) == batch["number"], "batch i goes to state i"
        self.on_batch(batch["number"])
        return state.replace(step=state.step + 1), {"loss": jnp.float32(batch["number"])}

    def hook(self, name):
        def call(state, step):
            assert self.inside == ["paused"], "hooks do not count as training"
            assert int(state.step) == step
            self.events.append(f"{name} {step}")
            if name == "eval":
                self.on_eval(step)

        return call

    def last_save(self, state, step):
        assert int(state.step) == step
        self.events.append(f"last save {step}")

    totals = {"skipped": 0, "data/unreadable": 0}  # noqa: RUF012  so far, and no step is

    def look(self, state, step, scalars):
        """As the guard does: each step is seen once, in order, at most one step late."""
        assert step == len(self.looked) + self.first and scalars["loss"] == step
        self.looked.append(step)
        return state

    def start(self, step):
        self.events.append(f"start {step}")

    def log(self, step, scalars):
        assert scalars == {"loss": step - 1, **self.totals}, "step i is logged with the loss of batch i-1"
        self.events.append(f"log {step}")

    @contextlib.contextmanager
    def _in(self, name):
        self.inside.append(name)
        yield
        self.inside.remove(name)

    def paused(self):
        return self._in("paused")

    def waiting(self):
        return self._in("waiting")

    def of(self, *kinds):
        return [event for event in self.events if event.rpartition(" ")[0] in kinds]


def test_state_i_is_evaluated_then_saved_and_only_then_batch_i_is_taken():
    run = Run()
    assert int(run.fit(0, 4).step) == 4
    assert run.events == [
        *("batch 0", "start 1", "log 1", "batch 1", "log 2"),
        *("eval 2", "save 2", "batch 2", "log 3", "batch 3", "log 4", "eval 4", "save 4"),
    ]


def test_no_batch_is_taken_that_no_step_uses():
    run = Run()
    run.fit(3, 7)
    assert run.of("batch") == [f"batch {step}" for step in (3, 4, 5, 6)]


def test_a_run_does_not_call_the_hooks_of_the_step_it_begins_with():
    run = Run()
    run.fit(2, 5)
    assert run.of("eval", "save") == ["eval 4", "save 4", "eval 5", "save 5"]
    assert run.events[:2] == ["batch 2", "start 3"]


def test_a_run_with_nothing_left_to_do_takes_its_last_look():
    run = Run()
    assert int(run.fit(5, 5).step) == 5
    assert run.events == ["eval 5", "save 5"]


def test_two_halves_do_what_the_whole_does():
    whole, first, second = Run(), Run(), Run()
    whole.fit(0, 8, every=3)
    first.fit(0, 4, every=3)
    second.fit(4, 8, every=3)
    kinds = ("eval", "save", "batch")
    assert first.of(*kinds) + second.of(*kinds) == whole.of(*kinds)
    assert second.of("log") == ["log 6", "log 8"]


@pytest.mark.parametrize(
    ("every", "due"), [(3, [3, 6, 7]), (7, [7]), (100, [7]), (0, [7])], ids=lambda x: str(x).replace(" ", "")
)
def test_hooks_are_due_at_multiples_and_always_at_the_last_step(every, due):
    run = Run()
    run.fit(0, 7, eval_every=every, save_every=0)
    assert run.of("eval") == [f"eval {step}" for step in due]
    assert run.of("save") == ["save 7"]


@pytest.mark.parametrize(("first", "logged"), [(0, [3, 6, 7]), (2, [3, 6, 7]), (3, [6, 7]), (6, [7])], ids=str)
def test_scalars_are_logged_at_multiples_and_always_at_the_last_step(first, logged):
    run = Run()
    run.fit(first, 7, every=3)
    assert run.of("log") == [f"log {step}" for step in logged]


@pytest.fixture
def handlers():
    """What handled SIGTERM and SIGINT before; put back if a test fails half-way."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


def at(step, act):
    return lambda now: act() if now == step else None


@pytest.mark.parametrize(("signum", "code"), SIGNALS.items())
def test_a_signal_ends_the_run_after_the_step_is_finished_and_saved(signum, code, handlers):
    run = Run(on_batch=at(4, lambda: os.kill(os.getpid(), signum)))
    with pytest.raises(Interrupted, match="stopped at step 5; the same command goes on") as caught:
        run.fit(0, 100, eval_every=0, save_every=0)
    assert caught.value.exit_code == code
    assert run.events[-3:] == ["batch 4", "log 5", "last save 5"]
    assert {s: signal.getsignal(s) for s in SIGNALS} == handlers


def test_a_signal_at_a_step_with_hooks_still_evaluates_before_saving(handlers):
    run = Run(on_batch=at(3, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        run.fit(0, 100, eval_every=4, save_every=0)
    assert run.events[-2:] == ["eval 4", "last save 4"]


def test_a_signal_during_a_hook_lets_all_hooks_finish(handlers):
    run = Run(on_eval=at(2, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        run.fit(0, 100)
    assert run.events[-3:] == ["eval 2", "save 2", "last save 2"]


def test_a_signal_in_the_last_step_does_not_spoil_a_finished_run(handlers):
    run = Run(on_batch=at(5, lambda: signal.raise_signal(signal.SIGTERM)))
    assert int(run.fit(0, 6).step) == 6
    assert run.events[-2:] == ["eval 6", "save 6"]


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_acts_as_it_would_without_the_loop(first, signum, handlers):
    def impatient(*_):
        raise RuntimeError("at once")

    signal.signal(signum, impatient)

    def twice():
        signal.raise_signal(first)
        signal.raise_signal(signum)

    run = Run(on_batch=at(1, twice))
    with pytest.raises(RuntimeError, match="at once"):
        run.fit(0, 100, save_every=0)
    assert run.of("last save") == []
    assert signal.getsignal(signum) is impatient


def test_handlers_are_put_back_when_a_step_raises(handlers):
    def explode():
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        Run(on_batch=at(1, explode)).fit(0, 100)
    assert {s: signal.getsignal(s) for s in SIGNALS} == handlers


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": 7, "epochs": 100.0}, 7),
        ({"steps": None, "epochs": 1600.0}, 499_200),
        ({"epochs": 0.5}, 156),
        ({"epochs": 1.0}, 312),
    ],
    ids=str,
)
def test_total_steps_counts_steps_where_given_and_else_epochs(settings, steps):
    assert total_steps(312, **settings) == steps


rng_of = np.random.default_rng


@pytest.fixture(params=[1, 8], ids=["1 device", "8 devices"])
def regression(request):
    """Linear regression: a state, its train step, batches by number, and what they are made of."""
    mesh = make_mesh(data=request.param)
    tx, schedule = optim.make(256, 50, 50, base_learning_rate=0.05, warmup_epochs=0.1)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 2)).astype(np.float32)

    def init():
        return {"head": {"kernel": jax.random.normal(jax.random.key(1), (3, 2)), "bias": jnp.zeros(2)}}, {}

    def draw(batch, key):
        return batch | {"noise": 1e-3 * jax.random.normal(key, batch["y"].shape)}

    def loss_fn(params, stats, batch):
        head = params["head"]
        error = batch["x"] @ head["kernel"] + head["bias"][None] - batch["y"] + batch["noise"]
        return jnp.mean(jnp.square(error), axis=1), stats

    def batch(step):
        x = rng_of(step).normal(size=(16, 3)).astype(np.float32)
        examples = {"x": x, "y": x @ truth, "weight": np.float32(rng_of(step).random(16) < 0.8)}
        return jax.device_put(examples, batch_sharding(mesh))

    def mean_loss(params, batch, key):
        values, _ = loss_fn(params, {}, draw(batch, key))
        return jnp.sum(values * batch["weight"]) / jnp.sum(batch["weight"])

    key = jax.random.key(5)
    abstract, new_state = create_state(init, tx, mesh)
    train_step = make_train_step(draw, loss_fn, tx, schedule, key, mesh)
    return mesh, abstract, new_state, train_step, batch, mean_loss, schedule, key


def test_state_is_what_its_description_says(regression):
    mesh, abstract, new_state, *_ = regression
    state = new_state()
    assert int(state.step) == 0
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for described, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (described.shape, described.dtype, described.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
        assert leaf.is_fully_replicated
        assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_scalars_are_those_of_the_state_before_the_update_and_any_step_can_be_replayed(regression):
    *_, new_state, train_step, batch, mean_loss, schedule, key = regression
    state, replay = new_state(), jax.jit(jax.value_and_grad(mean_loss))
    for step in range(4):
        before = jax.device_get(state.params)
        state, scalars = train_step(state, batch(step))
        loss, grads = replay(before, jax.device_get(batch(step)), jax.random.fold_in(key, step))
        assert set(scalars) == {"loss", "grad_norm", "learning_rate", "skipped", "data/unreadable"}
        np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(scalars["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
        np.testing.assert_allclose(scalars["learning_rate"], schedule(step), rtol=1e-6)
        assert int(state.step) == step + 1


def test_training_lowers_the_loss_and_keeps_the_layout(regression):
    _, abstract, new_state, train_step, batch, *_ = regression
    state, first = train_step(new_state(), batch(0))
    for step in range(1, 50):
        state, last = train_step(state, batch(step))
    assert last["loss"] < 0.5 * first["loss"]
    for described, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (described.dtype, described.sharding) == (leaf.dtype, leaf.sharding)


def test_the_memory_of_the_old_state_is_reused(regression):
    _, _, new_state, train_step, batch, *_ = regression
    old = new_state()
    train_step(old, batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params) + jax.tree.leaves(old.opt_state))


def test_fit_trains_the_real_step(regression):
    _, _, new_state, train_step, batch, *_ = regression
    run = Run()
    run.log = lambda step, scalars: run.events.append(float(scalars["loss"]))
    run.look = lambda state, step, scalars: state
    state = fit(new_state(), train_step, map(batch, range(50)), 50, [], run.last_save, run, run, every=10)
    direct = new_state()
    for step in range(50):
        direct, scalars = train_step(direct, batch(step))
    assert run.events[1:][-1] == float(scalars["loss"])
    assert len(run.events) == 1 + 5
    jax.tree.map(np.testing.assert_array_equal, state.params, direct.params)
    assert optax.tree.norm(state.params) > 0


DEPTH, WIDTH, BATCH = 4, 32, 64


def layers(params):
    """The parameters of the layers, the lowest first, whatever is beside them."""
    return [params["layers"][f"layer_{i}"]["head"] for i in range(DEPTH)]


def init_network():
    """A network of four layers, and as its statistics the count of its steps and a mean of its inputs."""
    keys = jax.random.split(jax.random.key(2), DEPTH)
    made = {
        f"layer_{i}": {
            "head": {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) * WIDTH**-0.5, "bias": jnp.zeros(WIDTH)}
        }
        for i, key in enumerate(keys)
    }
    return {"layers": made}, {"mean": jnp.zeros(WIDTH), "count": jnp.float32(0)}


def network_loss(params, stats, batch):
    x = batch["x"]
    for layer in layers(params):
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    stats = {"mean": 0.75 * stats["mean"] + 0.25 * batch["x"].mean(axis=0), "count": stats["count"] + 1}
    return jnp.mean(jnp.square(x - batch["y"]), axis=1), stats


def as_it_is(batch, key):
    return batch


def network_batch(step):
    rng = np.random.default_rng(step)
    batch = {name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in ("x", "y")}
    return batch | {"weight": np.ones(BATCH, np.float32)}


def training_of(trained, ema=0.0, devices=1, accumulate=1, fsdp=1):
    """The network's first state as shapes, a function that makes it, and its step."""
    mesh = make_mesh(data=devices, fsdp=fsdp)
    tx, schedule = optim.make(256, 50, 50, base_learning_rate=0.02, warmup_epochs=0.0, weight_decay=0.1)
    abstract, new_state = create_state(init_network, tx, mesh, trained, ema)
    train_step = make_train_step(
        as_it_is, network_loss, tx, schedule, jax.random.key(0), mesh, trained, ema, accumulate
    )
    return abstract, new_state, train_step


def above(lowest):
    """Train the layers from number `lowest` up."""
    return lambda path: int(path.split("/")[1].removeprefix("layer_")) >= lowest


def flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_what_is_not_trained_stays_bit_for_bit_and_has_no_moments():
    abstract, new_state, train_step = training_of(above(2))
    moments = {name for name in flat(abstract.opt_state) if "layers" in name}
    assert len(moments) == 2 * 2 * 2, "two moments of the kernel and the bias of two layers"
    assert not any(frozen in name for name in moments for frozen in ("layer_0", "layer_1"))
    assert flat(abstract.params).keys() == flat(init_network()[0]).keys(), "what is not trained is there all the same"
    state = new_state()
    before = jax.device_get(state.params)["layers"]
    for step in range(3):
        state, _ = train_step(state, network_batch(step))
    after = jax.device_get(state.params)["layers"]
    for name in before:
        for part in ("kernel", "bias"):
            unchanged = np.array_equal(before[name]["head"][part], after[name]["head"][part])
            assert unchanged == (name in ("layer_0", "layer_1")), (name, part)


def test_the_trained_part_goes_where_the_optimizer_takes_it_alone():
    """The rest is a constant to it: gradients, their norm, moments and decay are those of the trained part."""
    _, new_state, train_step = training_of(above(2))
    state = new_state()
    frozen, inside = (
        {name: layer for name, layer in jax.device_get(state.params)["layers"].items() if (name > "layer_1") == top}
        for top in (False, True)
    )
    tx, _ = optim.make(256, 50, 50, base_learning_rate=0.02, warmup_epochs=0.0, weight_decay=0.1)
    opt_state = tx.init(inside)

    @jax.jit
    def follow(inside, opt_state, batch):
        loss = lambda inside: network_loss({"layers": frozen | inside}, init_network()[1], batch)[0].mean()  # noqa: E731
        grads = jax.grad(loss)(inside)
        updates, opt_state = tx.update(grads, opt_state, inside)
        return optax.apply_updates(inside, updates), opt_state, optax.tree.norm(grads)

    for step in range(3):
        state, scalars = train_step(state, network_batch(step))
        inside, opt_state, norm = follow(inside, opt_state, network_batch(step))
        np.testing.assert_allclose(scalars["grad_norm"], norm, rtol=1e-5)
    trained = {name: state.params["layers"][name] for name in inside}
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-6), trained, inside)


def test_nothing_is_computed_backwards_below_what_is_trained():
    """Products of a layer: one forward; backward one for its kernel, and one for its input if that leads further."""

    def products(lowest):
        abstract, _, train_step = training_of(above(lowest))
        return train_step.lower(abstract, network_batch(0)).as_text().count("stablehlo.dot_general")

    assert [products(lowest) for lowest in (0, 1, 2, 3)] == [4 + 4 + 3, 4 + 3 + 2, 4 + 2 + 1, 4 + 1]


@pytest.mark.parametrize("lowest", [0, 2])
def test_moving_averages_are_the_formula(lowest):
    decay = 0.75
    abstract, new_state, train_step = training_of(above(lowest), ema=decay, devices=8)
    state = new_state()
    want = {name: np.asarray(leaf, np.float64) for name, leaf in flat(state.params).items() if above(lowest)(name)}
    assert flat(abstract.ema).keys() == want.keys(), "of the trained parameters alone"
    for name, leaf in flat(state.ema).items():
        np.testing.assert_array_equal(leaf, want[name], "they begin as the parameters")
    for step in range(5):
        state, _ = train_step(state, network_batch(step))
        now = flat(jax.device_get(state.params))
        want = {name: decay * mean + (1 - decay) * now[name] for name, mean in want.items()}
        for name, leaf in flat(state.ema).items():
            np.testing.assert_allclose(leaf, want[name], rtol=1e-5, atol=1e-7, err_msg=f"{name}, step {step}")
    evaluated = flat(state.averaged)
    assert evaluated.keys() == flat(state.params).keys()
    for name, leaf in evaluated.items():
        np.testing.assert_array_equal(leaf, flat(state.ema).get(name, flat(state.params)[name]))
    moved = np.abs(
        np.asarray(evaluated["layers/layer_3/head/kernel"] - state.params["layers"]["layer_3"]["head"]["kernel"])
    )
    assert moved.max() > 1e-3, "and these are others"


def test_averages_do_not_change_what_is_trained_and_without_them_parameters_are_evaluated():
    (_, plain, step), (_, averaging, averaging_step) = training_of(above(0)), training_of(above(0), ema=0.9)
    a, b = plain(), averaging()
    for i in range(3):
        (a, _), (b, _) = step(a, network_batch(i)), averaging_step(b, network_batch(i))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.ema == {}
    jax.tree.map(np.testing.assert_array_equal, a.averaged, a.params)


def test_statistics_are_carried_from_step_to_step():
    abstract, new_state, train_step = training_of(above(0), devices=8)
    assert "mean" not in "".join(flat(abstract.opt_state)), "they have no gradient"
    state, mean = new_state(), np.zeros(WIDTH)
    for step in range(4):
        batch = network_batch(step)
        state, _ = train_step(state, jax.device_put(batch, batch_sharding(make_mesh())))
        mean = 0.75 * mean + 0.25 * batch["x"].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(state.stats["mean"], mean, rtol=0, atol=1e-6)
    assert state.stats["count"] == 4
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.stats))


def unread(batch, *rows):
    """The batch with some images that could not be read."""
    weight = batch["weight"].copy()
    weight[list(rows)] = 0
    return batch | {"weight": weight}


@pytest.mark.parametrize("lowest", [0, 2])
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 1), (2, 4)], ids=["1 device", "data8", "data2-fsdp4"])
def test_accumulating_equals_the_large_batch(devices, fsdp, lowest):
    """Loss, gradients, moments, parameters and statistics, also where some parts have more unreadable images."""
    sharding = batch_sharding(make_mesh(data=devices, fsdp=fsdp))
    runs = [training_of(above(lowest), devices=devices, fsdp=fsdp, accumulate=n) for n in (1, 4)]
    (whole, step), (parts, accumulating) = ((new_state(), train_step) for _, new_state, train_step in runs)
    for i in range(5):
        batch = jax.device_put(unread(network_batch(i), 0, 1, 2, 3, 9, 40), sharding)
        (whole, one), (parts, four) = step(whole, batch), accumulating(parts, batch)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(four[name], one[name], rtol=1e-6)
        if i == 0:  # later AdamW has divided rounding errors by their own size
            for name, moment in flat(whole.opt_state).items():
                np.testing.assert_allclose(flat(parts.opt_state)[name], moment, rtol=1e-5, atol=1e-8, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), parts, whole)
    assert [x.sharding for x in jax.tree.leaves(parts)] == [x.sharding for x in jax.tree.leaves(whole)]


def test_accumulating_needs_the_memory_of_a_part():
    def temporary(accumulate):
        abstract, _, train_step = training_of(above(0), accumulate=accumulate)
        batch = {name: np.zeros((2**15, *x.shape[1:]), np.float32) for name, x in network_batch(0).items()}
        return train_step.lower(abstract, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < 0.6 * temporary(1), "inputs in parts are a copy of the batch"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_of_unreadable_images_teaches_nothing(accumulate):
    _, new_state, train_step = training_of(above(0), accumulate=accumulate)
    _, scalars = train_step(new_state(), unread(network_batch(0), *range(BATCH)))
    assert scalars["loss"] == scalars["grad_norm"] == 0


def test_parts_of_a_batch_are_parts_of_what_each_device_has():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = np.arange(24 * 3).reshape(24, 3)
    cut = jax.jit(lambda x: microbatches({"x": x}, 3, mesh)["x"])
    placed = jax.device_put(x, batch_sharding(mesh))
    parts = cut(placed)
    assert parts.shape == (3, 8, 3)
    assert sorted(parts.ravel().tolist()) == list(range(72))
    held = {shard.device: set(np.asarray(shard.data).ravel().tolist()) for shard in placed.addressable_shards}
    for shard in parts.addressable_shards:
        assert set(np.asarray(shard.data).ravel().tolist()) == held[shard.device]
    assert not re.search("all-|collective", cut.lower(placed).compile().as_text()), "nothing is sent"


def test_a_step_is_compiled_once_on_any_mesh():
    for sizes in ({"devices": 1}, {"devices": 8}, {"devices": 2, "fsdp": 4}):
        _, new_state, train_step = training_of(above(0), ema=0.5, **sizes)
        state = new_state()
        for i in range(3):
            state, _ = train_step(state, network_batch(i))
        assert train_step._cache_size() == 1


@pytest.mark.parametrize("first", [0, 3, 5])
def test_stages_follow_each_other_by_the_number_of_the_step(first):
    stages = [(begins, lambda state, batch, begins=begins: ([*state, begins], batch)) for begins in (0, 2, 5)]
    step, taken = in_turn(stages, first), []
    for number in range(first, 8):
        taken, batch = step(taken, number)
        assert batch == number
    assert taken == [0, 0, 2, 2, 2, 5, 5, 5][first:]
