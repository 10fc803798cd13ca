"""The optimizers, what is decayed and the schedule, against PyTorch and against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.jobs import models
from mae_jax.training import optim

STEPS, WARMUP, BATCH = 24, 6, 512
SETTINGS = {"base_learning_rate": 5e-3, "warmup_epochs": 2.0, "weight_decay": 0.3, "b1": 0.9, "b2": 0.95}
PEAK = 5e-3 * BATCH / 256
SHAPES = {
    "embedding": {"kernel": (5, 4), "bias": (4,)},
    "norm": {"scale": (4,), "bias": (4,)},
    "cls_token": (1, 1, 4),
    "head": {"kernel": (4, 3), "bias": (3,)},
}
DECAYED = {"embedding/kernel", "head/kernel", "cls_token"}


def formula(step, *, peak, warmup, steps, least=0.0):
    """The paper's schedule in float64, as util/lr_sched.py of the original states it."""
    if step < warmup:
        return peak * step / warmup
    return least + (peak - least) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))


def by_name(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def draw(rng, shapes, scale=1.0):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: (rng.normal(size=s) * scale).astype(np.float32), shapes, is_leaf=is_shape)


def follow(tx, params, grads):
    """Where `tx` takes the parameters, step by step, given these gradients."""

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, trajectory = tx.init(params), []
    for grad in grads:
        params, opt_state = update(params, opt_state, grad)
        trajectory.append({name: np.asarray(leaf) for name, leaf in by_name(params).items()})
    return trajectory


@pytest.fixture(scope="module")
def problem():
    """Parameters, a gradient for each step (of very different sizes), and where AdamW takes the parameters."""
    rng = np.random.default_rng(0)
    params = draw(rng, SHAPES)
    grads = [draw(rng, SHAPES, 10.0 ** (i % 5 - 3)) for i in range(STEPS)]
    tx, _ = optim.make(BATCH, STEPS, 3, **SETTINGS)
    return by_name(params), [by_name(g) for g in grads], follow(tx, params, grads)


def test_adamw_is_that_of_pytorch_with_two_groups_under_a_changing_schedule(problem):
    torch = pytest.importorskip("torch")
    params, grads, trajectory = problem
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    groups = [
        {"params": [t for name, t in tensors.items() if name in DECAYED], "weight_decay": 0.3},
        {"params": [t for name, t in tensors.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = formula(step, peak=PEAK, warmup=WARMUP, steps=STEPS)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[step][name])
        adamw.step()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(trajectory[step][name], tensor.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_adamw_is_the_textbook_formula(problem):
    params, grads, trajectory = problem
    for name, first in params.items():
        p, m, v = first.astype(np.float64), 0.0, 0.0
        for step in range(STEPS):
            g = grads[step][name].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            adam = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
            p = p - formula(step, peak=PEAK, warmup=WARMUP, steps=STEPS) * (adam + 0.3 * (name in DECAYED) * p)
            np.testing.assert_allclose(trajectory[step][name], p, rtol=0, atol=1e-6, err_msg=f"{name}, step {step}")
        assert np.abs(p - first).max() > 0.01, "the test must move what it compares"


LARS = {"name": "lars", "base_learning_rate": 2.0, "warmup_epochs": 2.0, "b1": 0.9}
LARS_PEAK = 2.0 * BATCH / 256


@pytest.fixture(scope="module")
def lars_problem():
    """Parameters and 24 gradients; one kernel starts at zero and once has no gradient, as trust ratios fear."""
    rng = np.random.default_rng(1)
    shapes = SHAPES | {"zero": {"kernel": (3, 2)}}
    params = draw(rng, shapes)
    params["zero"]["kernel"] *= 0
    grads = [draw(rng, shapes, 10.0 ** (i % 3 - 3)) for i in range(STEPS)]
    grads[10]["zero"]["kernel"] *= 0
    return params, grads


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_the_formulas_of_the_original_in_pytorch(lars_problem, weight_decay):
    torch = pytest.importorskip("torch")
    params, grads = lars_problem
    tx, _ = optim.make(BATCH, STEPS, 3, **LARS, weight_decay=weight_decay)
    trajectory = follow(tx, params, grads)
    for name, first in by_name(params).items():
        p = torch.tensor(first, dtype=torch.float64)
        momentum = torch.zeros_like(p)
        for step in range(STEPS):
            g = torch.tensor(by_name(grads[step])[name], dtype=torch.float64)
            if p.ndim > 1:
                g = g + weight_decay * p
                if p.norm() > 0 and g.norm() > 0:
                    g = g * (0.001 * p.norm() / g.norm())
            momentum = 0.9 * momentum + g
            p = p - formula(step, peak=LARS_PEAK, warmup=WARMUP, steps=STEPS) * momentum
            np.testing.assert_allclose(trajectory[step][name], p, rtol=1e-6, atol=1e-6, err_msg=f"{name}, step {step}")
        assert np.abs(p.numpy() - first).max() > 0.01, "the test must move what it compares"


def test_lars_of_optax_is_another_optimizer_once_the_rate_changes(lars_problem):
    params, grads = lars_problem

    def difference(schedule):
        """Between ours and optax.lars, whose momentum is of updates, with the same masks."""
        theirs = optax.lars(schedule, 0.1, optim.decayed, optim.TRUST, 0.0, optim.decayed, momentum=0.9)
        ours = optim.lars(schedule, 0.1, b1=0.9, b2=0.0, mask=optim.decayed)
        ends = follow(ours, params, grads)[-1], follow(theirs, params, grads)[-1]
        return max(np.abs(ends[0][name] - ends[1][name]).max() for name in ends[0])

    _, schedule = optim.make(BATCH, STEPS, 3, **LARS)
    assert difference(optax.constant_schedule(0.1)) < 1e-6
    assert difference(schedule) > 0.01


LAYERS = {
    "encoder": {
        "cls_token": (1, 1, 4),
        "patch_embedding": {"kernel": (5, 4), "bias": (4,)},
        "block_0": {"mlp": {"in": {"kernel": (4, 6), "bias": (6,)}}},
        "block_1": {"mlp": {"in": {"kernel": (4, 6), "bias": (6,)}}},
        "norm": {"scale": (4,)},
    },
    "head": {"kernel": (4, 3), "bias": (3,)},
}
PARTS = {"encoder/cls_token": 3, "encoder/patch_embedding": 3, "encoder/block_0": 2, "encoder/block_1": 1}


def layer_of(path):
    return next((layer for part, layer in PARTS.items() if path.startswith(part)), 0)


def test_layer_decay_is_a_rate_per_layer_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    params = draw(rng, LAYERS)
    grads = [draw(rng, LAYERS, 10.0 ** (i % 5 - 3)) for i in range(STEPS)]
    tx, schedule = optim.make(BATCH, STEPS, 3, layer_of, **SETTINGS, layer_decay=0.65)
    trajectory = follow(tx, params, grads)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in by_name(params).items()}
    groups = [
        {"params": [tensor], "weight_decay": 0.3 * (tensor.ndim > 1), "scale": 0.65 ** layer_of(name)}
        for name, tensor in tensors.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = group["scale"] * formula(step, peak=PEAK, warmup=WARMUP, steps=STEPS)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(by_name(grads[step])[name])
        adamw.step()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(trajectory[step][name], tensor.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert max(float(schedule(step)) for step in range(STEPS)) == pytest.approx(PEAK), "the schedule is of the head"


def test_layer_decay_without_layers_is_an_error():
    with pytest.raises(ValueError, match=r"0\.75 needs to know the layer"):
        optim.make(BATCH, STEPS, 3, layer_decay=0.75)


def test_without_gradients_decay_shrinks_by_rate_times_decay_and_leaves_biases_alone(problem):
    params, *_ = problem
    tx, schedule = optim.make(BATCH, STEPS, 3, **SETTINGS)
    opt_state, shrunk, update = tx.init(params), params, jax.jit(tx.update)
    nothing = jax.tree.map(np.zeros_like, params)
    for step in range(WARMUP + 1):
        updates, opt_state = update(nothing, opt_state, shrunk)
        before, shrunk = shrunk, jax.tree.map(np.add, shrunk, updates)
        for name in params:
            factor = 1 - float(schedule(step)) * 0.3 * (name in DECAYED)
            np.testing.assert_allclose(shrunk[name], before[name] * np.float32(factor), rtol=1e-6, err_msg=name)


def test_decay_touches_kernels_and_tokens_not_biases_and_norms():
    config = {
        "dtype": "float32",
        "data": {"source": "digits", "batch_size": 1, "image_size": (8, 8), "channels": 3},
        "encoder": {"patch_size": 4, "width": 8, "depth": 2, "heads": 2},
        "decoder": {"width": 8, "depth": 1, "heads": 2},
        "target": {"name": "pixels"},
        "mask": {"ratio": 0.5},
    }
    model, _ = models.build(config)
    params = jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))
    decayed = by_name(optim.decayed(params))
    ends = {name: name.rpartition("/")[2] for name in decayed}
    assert set(ends.values()) == {"kernel", "bias", "scale", "cls_token", "mask_token"}
    for name, end in ends.items():
        assert decayed[name] is (end in ("kernel", "cls_token", "mask_token")), name


@pytest.mark.parametrize(
    ("steps", "warmup_epochs", "warmup"), [(200, 4.0, 40), (200, 0.0, 0), (7, 0.3, 3), (1, 0.0, 0)]
)
def test_schedule_is_the_formula_at_every_step(steps, warmup_epochs, warmup):
    _, schedule = optim.make(4096, steps, 10, base_learning_rate=1.5e-4, warmup_epochs=warmup_epochs)
    peak = 1.5e-4 * 16
    got = np.array([schedule(step) for step in range(steps + 1)])
    want = [formula(step, peak=peak, warmup=warmup, steps=steps) for step in range(steps + 1)]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-7 * peak)
    assert got[0] == (0 if warmup else np.float32(peak))
    assert got[-1] <= 1e-7 * peak


@pytest.mark.parametrize(("least", "warmup_epochs"), [(1e-6, 5.0), (1e-3, 0.0), (5e-3, 5.0)])
def test_schedule_ends_at_the_least_rate_whatever_the_batch(least, warmup_epochs):
    settings = {"base_learning_rate": 1e-3, "min_learning_rate": least, "warmup_epochs": warmup_epochs}
    _, schedule = optim.make(1024, 200, 10, **settings)
    warmup = int(10 * warmup_epochs)
    got = np.array([schedule(step) for step in range(201)])
    want = [formula(step, peak=4e-3, warmup=warmup, steps=200, least=least) for step in range(201)]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-7 * 4e-3)
    assert got[-1] == pytest.approx(least, rel=1e-6)


def test_schedule_of_the_paper_is_exact_to_the_last_of_half_a_million_steps():
    per_epoch = 1_281_167 // 4096
    _, schedule = optim.make(4096, 1600 * per_epoch, per_epoch)
    for step in [0, 1, 311, 312, 12_479, 12_480, 12_481, 100_000, 255_840, 499_000, 499_199]:
        want = formula(step, peak=2.4e-3, warmup=40 * 312, steps=1600 * 312)
        np.testing.assert_allclose(schedule(jnp.int32(step)), want, rtol=1e-5, atol=2.4e-3 * 2e-7, err_msg=str(step))


@pytest.mark.parametrize("batch_size", [8, 256, 1024, 4096])
def test_peak_scales_with_the_batch_in_units_of_256(batch_size):
    _, schedule = optim.make(batch_size, 100, 10, base_learning_rate=1e-3, warmup_epochs=1.0)
    rates = [float(schedule(step)) for step in range(101)]
    assert max(rates) == rates[10] == pytest.approx(1e-3 * batch_size / 256, rel=1e-6)


@pytest.mark.parametrize(("steps", "peak_at"), [(10, 5), (11, 5), (2, 1), (1, 0)])
def test_warm_up_longer_than_half_the_run_is_cut_to_half(steps, peak_at):
    _, schedule = optim.make(256, steps, 100, base_learning_rate=1.0, warmup_epochs=40.0)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    assert np.argmax(rates) == peak_at
    assert rates[peak_at] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_goes_downhill_at_the_rate_of_the_schedule(name):
    rate = {"adamw": 0.1, "lars": 5.0}[name]  # a trust ratio is small
    tx, schedule = optim.make(256, 200, 200, name=name, base_learning_rate=rate, warmup_epochs=0.1, weight_decay=0.0)
    params = {"kernel": jnp.full((2, 2), 3.0)}
    opt_state = tx.init(params)
    loss = lambda p: jnp.sum((p["kernel"] - 1.0) ** 2)  # noqa: E731

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    after_one, _ = step(params, opt_state)
    assert schedule(0) == 0
    np.testing.assert_array_equal(after_one["kernel"], params["kernel"])
    first = loss(params)
    for _ in range(200):
        params, opt_state = step(params, opt_state)
    assert loss(params) < 0.01 * first


@pytest.mark.parametrize(
    "chosen",
    [
        lambda path: path.startswith(("encoder/block_1/", "head/")),
        lambda path: path == "encoder/cls_token",
        lambda path: True,
        lambda path: False,
    ],
    ids=["block and head", "one", "all", "none"],
)
def test_split_has_each_leaf_on_one_side_and_join_puts_them_together(chosen):
    params = draw(np.random.default_rng(3), LAYERS)
    inside, outside = optim.split(params, chosen)
    leaves = by_name(params)
    assert set(by_name(inside)) == {name for name in leaves if chosen(name)}
    assert set(by_name(outside)) == {name for name in leaves if not chosen(name)}

    def folders(tree):
        return [tree] + [folder for node in tree.values() if isinstance(node, dict) for folder in folders(node)]

    for side in (inside, outside):
        assert all(folders(side)[1:]), "no empty folders"
    joined = optim.join(inside, outside)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, params))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_part_alone_is_trained_as_it_is_in_the_whole_and_has_moments_of_its_own_only(name):
    rng = np.random.default_rng(4)
    params, grads = draw(rng, LAYERS), [draw(rng, LAYERS, 0.1) for _ in range(STEPS)]
    part = lambda tree: optim.split(tree, lambda path: path.startswith(("encoder/block_1/", "head/")))[0]  # noqa: E731
    tx, _ = optim.make(BATCH, STEPS, 3, layer_of, name=name, warmup_epochs=2.0, layer_decay=0.5)
    whole = follow(tx, params, grads)[-1]
    alone = follow(tx, part(params), [part(grad) for grad in grads])[-1]
    assert len(alone) == 4
    for path, leaf in alone.items():
        np.testing.assert_allclose(leaf, whole[path], rtol=1e-6, err_msg=path)
    moments = {"adamw": 2, "lars": 1}[name]
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, part(params))) if leaf.ndim]
    assert sum(sizes) == moments * sum(leaf.size for leaf in alone.values())
