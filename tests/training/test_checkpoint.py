"""Checkpoints come back bit for bit, on any mesh, or not at all and with the reason."""

import os
import re
import shutil
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.training import checkpoint
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.loop import State
from mae_jax.training.sharding import make_mesh

CONFIG = {"data": {"image_size": [8, 8], "name": ""}, "seed": 3, "eval": {"images": None}, "lr": 1.5e-4}
PARAMS = {
    "encoder": {"kernel": (16, 4), "bias": (8,), "block_0": {"scale": (8,)}},
    "decoder": {"mask_token": (1, 1, 8)},
}
STATS = {"batch_stats": {"norm": {"mean": (8,), "var": (8,)}}}


def make_state(seed=0, step=0):
    """A state of random bits: any float32 there is, NaN, infinities and denormals too."""
    rng = np.random.default_rng(seed)

    def bits(shape):
        return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)

    params, stats = (jax.tree.map(bits, shapes, is_leaf=lambda x: isinstance(x, tuple)) for shapes in (PARAMS, STATS))
    opt_state = optax.adamw(1e-3).init(jax.tree.map(jnp.asarray, params))
    opt_state = jax.tree.map(lambda x: bits(x.shape) if x.dtype == jnp.float32 else x, opt_state)
    ema = {"encoder": {"block_0": {"scale": bits((8,))}}}  # of what is trained, a part
    return State(step=np.int32(step), params=params, opt_state=opt_state, stats=stats, ema=ema, norm=np.float32(0))


def place(state, mesh, split):
    """`state` on `mesh`: a copy on every device, or, with `split`, the first axis spread where 8 divides it."""

    def sharding(x):
        return NamedSharding(
            mesh, PartitionSpec("data") if split and x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
        )

    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)


def shapes_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g), np.asarray(w)
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(g.view(np.uint32), w.view(np.uint32))


def saved(workdir, *steps, config=CONFIG, **options):
    """Save a state for each step; returns the last."""
    checkpoints = Checkpoints(workdir, config, **options)
    for step in steps:
        state = place(make_state(step, step), make_mesh(data=1), split=False)
        checkpoints.save(state, step)
    checkpoints.close()
    return state


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = saved(tmp_path, 7)
    again = Checkpoints(tmp_path, CONFIG)
    assert again.latest_step == 7
    restored = again.restore(shapes_of(state))
    again.close()
    assert isinstance(restored, State)
    assert_same_bits(restored, state)


def test_saving_does_not_wait_and_does_not_see_later_steps(tmp_path):
    """The train step overwrites the memory of the state that is still being written."""
    state = place(make_state(), make_mesh(), split=False)
    want = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(state, 1)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    after = jax.block_until_ready(overwrite(state))
    checkpoints.close()
    again = Checkpoints(tmp_path, CONFIG)
    assert_same_bits(again.restore(shapes_of(after)), want)
    again.close()


@pytest.mark.parametrize("split", [False, True], ids=["copies", "split"])
def test_a_state_moves_from_8_devices_to_1_and_on_to_4_bit_for_bit(split, tmp_path):
    state = place(make_state(), make_mesh(data=8), split)
    if split:
        assert state.params["encoder"]["kernel"].addressable_shards[0].data.shape == (2, 4)
    for step, devices in ((1, 1), (2, 4)):
        writer = Checkpoints(tmp_path, CONFIG)
        writer.save(state, step)
        writer.close()
        target = shapes_of(place(make_state(1), make_mesh(data=devices), split))
        reader = Checkpoints(tmp_path, CONFIG)
        state = reader.restore(target)
        reader.close()
        assert_same_bits(state, make_state())
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, target)
        assert len(state.params["encoder"]["kernel"].addressable_shards) == devices


def test_the_latest_are_kept_and_the_multiples_for_good(tmp_path):
    saved(tmp_path, *range(1, 12), keep=2, keep_every=4)
    assert steps_in(tmp_path) == [4, 8, 10, 11]


def test_without_multiples_only_the_latest_are_kept(tmp_path):
    saved(tmp_path, *range(6), keep=1)
    assert steps_in(tmp_path) == [5]


def test_what_is_kept_holds_across_restarts(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2, keep_every=2)
    saved(tmp_path, 5, 6, 7, keep=2, keep_every=2)
    assert steps_in(tmp_path) == [2, 4, 6, 7]


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    first = saved(tmp_path, 5)
    again = Checkpoints(tmp_path, CONFIG)
    again.save(jax.tree.map(jnp.zeros_like, first), 5)
    again.close()
    reader = Checkpoints(tmp_path, CONFIG)
    assert_same_bits(reader.restore(shapes_of(first)), first)
    reader.close()


def test_states_are_saved_by_time_too_where_that_is_asked_for(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, CONFIG, minutes=2.0, keep=9)
    state = place(make_state(), make_mesh(data=1), split=False)
    for step in range(1, 13):
        now += 30
        if step == 6:
            checkpoints.save(state, step)  # from which on time counts anew
        if checkpoints.is_time():
            checkpoints.save(state, step)
    checkpoints.close()
    assert steps_in(tmp_path) == [4, 6, 10]


def test_a_checkpoint_cut_short_by_a_crash_is_not_seen_and_swept_away(tmp_path):
    state = saved(tmp_path, 3)
    cut = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (cut / "state").mkdir(parents=True)
    (cut / "state" / "manifest").write_bytes(b"half")
    assert checkpoint.locate(tmp_path).name == "3"
    checkpoints = Checkpoints(tmp_path, CONFIG)
    assert checkpoints.latest_step == 3
    assert_same_bits(checkpoints.restore(shapes_of(state)), state)
    checkpoints.close()
    assert not cut.exists()


def test_a_stray_folder_is_not_the_latest_step(tmp_path):
    state = saved(tmp_path, 3)
    for stray in ("9", "10/state", "notes"):
        (tmp_path / "checkpoints" / stray).mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    assert checkpoints.latest_step == 3
    assert_same_bits(checkpoints.restore(shapes_of(state)), state)
    checkpoints.save(state, 4)
    checkpoints.close()
    again = Checkpoints(tmp_path, CONFIG)
    assert again.latest_step == 4
    again.close()


def test_the_untrained_state_is_not_saved(tmp_path):
    saved(tmp_path, 0)
    assert steps_in(tmp_path) == []


def test_a_run_without_checkpoints_has_no_latest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    assert checkpoints.latest_step is None
    checkpoints.close()


def test_every_difference_is_listed_with_names_shapes_and_dtypes(tmp_path):
    state = saved(tmp_path, 2)
    other = state.replace(params=jax.tree.map(lambda x: x, state.params))  # copies the dicts
    encoder = other.params["encoder"]
    encoder["kernel"] = jnp.zeros((16, 6))
    encoder["bias"] = jnp.zeros(8, jnp.bfloat16)
    encoder["new"] = jnp.zeros(3)
    del other.params["decoder"]
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(shapes_of(other))
    checkpoints.close()
    assert caught.value.exit_code == 4
    told = caught.value.problems
    assert all(str(tmp_path / "checkpoints" / "2") in line for line in told)

    def line_about(name):
        (line,) = [line for line in told if name in line]
        return line

    assert len(told) == 4
    kernel, bias = line_about("params/encoder/kernel"), line_about("params/encoder/bias")
    assert all("misshapen: params/encoder/" in line for line in (kernel, bias))
    assert "(16, 4)" in kernel and "(16, 6)" in kernel
    assert "float32" in bias and "bfloat16" in bias
    assert "missing: params/encoder/new" in line_about("params/encoder/new")
    assert "unused: params/decoder/mask_token" in line_about("params/decoder/mask_token")


def test_another_optimizer_is_a_difference(tmp_path):
    state = saved(tmp_path, 2)
    other = state.replace(opt_state=optax.sgd(1e-3, momentum=0.9).init(state.params))
    other = place(other, make_mesh(data=1), split=False)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="opt_state/0/mu/encoder/kernel"):
        checkpoints.restore(shapes_of(other))
    checkpoints.close()


@pytest.mark.parametrize("part", [("encoder",), ("decoder",), ("encoder", "decoder")], ids="+".join)
def test_parameters_alone_or_a_part_of_them_can_be_read(part, tmp_path):
    state = saved(tmp_path, 4, 12)
    wanted = {"params": {name: state.params[name] for name in part}}
    whole = "params" if len(part) == 2 else f"params/{part[0]}/"
    read = checkpoint.load(tmp_path, jax.eval_shape(lambda: wanted), whole)
    assert_same_bits(read, wanted)
    assert {leaf.device for leaf in jax.tree.leaves(read)} == {jax.devices()[0]}


def test_statistics_and_moving_averages_can_be_read_too(tmp_path):
    state = saved(tmp_path, 4)
    wanted = {"params": state.params, "stats": state.stats, "ema": state.ema}
    assert_same_bits(checkpoint.load(tmp_path, jax.eval_shape(lambda: wanted)), wanted)


def test_a_checkpoint_tells_what_it_holds(tmp_path):
    saved(tmp_path, 4)
    names = checkpoint.names_in(tmp_path)
    assert {name for name in names if not name.startswith("opt_state/")} == {
        *("step", "norm", "params/encoder/kernel", "params/encoder/bias", "params/encoder/block_0/scale"),
        *("params/decoder/mask_token", "stats/batch_stats/norm/mean", "stats/batch_stats/norm/var"),
        "ema/encoder/block_0/scale",
    }
    assert checkpoint.names_in(tmp_path / "checkpoints" / "4") == names


def test_parameters_of_a_run_on_8_devices_are_read_onto_one(tmp_path):
    state = place(make_state(), make_mesh(), split=True)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(state, 1)
    checkpoints.close()
    wanted = {"params": state.params}
    assert_same_bits(checkpoint.load(tmp_path, jax.eval_shape(lambda: wanted)), wanted)


def test_parameters_that_are_not_there_or_not_used_or_differ_are_refused(tmp_path):
    saved(tmp_path, 4)
    wanted = {
        "encoder": {
            "kernel": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16),
            "bias": jax.ShapeDtypeStruct((9,), jnp.float32),
            "block_1": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
        }
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path, {"params": wanted}, "params/encoder/")
    told = [line.removeprefix(f"{tmp_path / 'checkpoints' / '4'}: ") for line in caught.value.problems]
    of_encoder = [
        "missing: params/encoder/block_1/scale ((8,), 'float32')",
        "unused: params/encoder/block_0/scale ((8,), 'float32')",
        "misshapen: params/encoder/bias is ((8,), 'float32'), not ((9,), 'float32')",
        "misshapen: params/encoder/kernel is ((16, 4), 'float32'), not ((16, 4), 'bfloat16')",
    ]
    assert sorted(told) == sorted(of_encoder), "a decoder is of no interest"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "checkpoints" / "4", {"params": wanted})
    told = [line.removeprefix(f"{tmp_path / 'checkpoints' / '4'}: ") for line in caught.value.problems]
    decoder = "unused: params/decoder/mask_token ((1, 1, 8), 'float32')"
    assert sorted(told) == sorted([*of_encoder, decoder]), "unless all parameters are wanted"


def test_a_workdir_its_checkpoints_or_one_of_them_can_be_named(tmp_path):
    saved(tmp_path, 9, 10, keep=5)
    newest = tmp_path / "checkpoints" / "10"
    assert checkpoint.locate(tmp_path) == newest, "by number, not by name"
    assert checkpoint.locate(str(tmp_path / "checkpoints")) == newest
    assert checkpoint.locate(newest) == newest
    assert checkpoint.locate(tmp_path / "checkpoints" / "9").name == "9"


def test_a_path_below_home_can_be_named(tmp_path, monkeypatch):
    saved(tmp_path / "runs" / "a", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.locate("~/runs/a") == tmp_path / "runs" / "a" / "checkpoints" / "1"


@pytest.mark.parametrize("inside", [None, "checkpoints", "checkpoints/9", "checkpoints/best"], ids=str)
def test_where_there_is_no_checkpoint_the_error_names_the_path(inside, tmp_path):
    workdir = tmp_path / "run"
    if inside:
        (workdir / inside).mkdir(parents=True)
    for path in (workdir, str(workdir)):
        with pytest.raises(CheckpointError, match="no checkpoint here") as caught:
            checkpoint.locate(path)
        assert str(workdir) in caught.value.problems[0]
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("path", ["", "x" * 5000, "\0", "~no_such_user_here/x", "/proc/1/fd/x"], ids=repr)
def test_a_path_that_cannot_be_has_no_checkpoint(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.locate(path)


def test_stray_files_and_empty_folders_are_not_taken_for_checkpoints(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "checkpoints" / "99").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert checkpoint.locate(tmp_path).name == "3"


def test_each_checkpoint_carries_its_config(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2, config={**CONFIG, "seed": 4})
    assert checkpoint.load_config(tmp_path / "checkpoints" / "1") == CONFIG
    assert checkpoint.load_config(tmp_path) == {**CONFIG, "seed": 4}
    assert (tmp_path / "checkpoints" / "1" / "config" / "config.json").is_file()


def large(step):
    """A state of 400 kB that does not compress."""
    bits = np.random.default_rng(step).integers(0, 2**32, (100, 1000), np.uint32).view(np.float32)
    return place(State(np.int32(step), {"kernel": bits}, (), {}, {}, np.float32(0)), make_mesh(data=1), split=False)


def fill(folder, leave=0):
    """Write a file until the disk of `folder` is full, but for `leave` bytes."""
    path = folder / "filling"
    with path.open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))
    return path


# TensorStore still has some to tell when Orbax has stopped to listen
of_writes_given_up = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@of_writes_given_up
def test_a_full_disk_costs_checkpoints_and_leaves_nothing_of_them(small_disk, capsys):
    workdir = small_disk(4_000_000)
    checkpoints = Checkpoints(workdir, CONFIG, keep=2)
    filling = None
    for step in range(1, 9):
        if step in (3, 6):
            checkpoints._settle(checkpoint.PATIENCE)
            filling = fill(workdir, leave=200_000)
        checkpoints.save(large(step), step)
        if step in (4, 7):  # the second of two in a row has failed before there is room again
            checkpoints._settle(checkpoint.PATIENCE)
            filling.unlink()
            assert checkpoints.latest_step == step - 2
    checkpoints.close()
    told = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [str(workdir / "checkpoints" / str(step)) for step in (3, 4, 6, 7)]
    assert steps_in(workdir) == [5, 8]
    again = Checkpoints(workdir, CONFIG)
    assert_same_bits(again.restore(shapes_of(large(8))), large(8))
    again.close()


@of_writes_given_up
def test_the_third_save_in_a_row_that_fails_is_one_too_many(small_disk, capsys):
    workdir = small_disk(2_000_000)
    checkpoints = Checkpoints(workdir, CONFIG)
    checkpoints.save(large(1), 1)
    checkpoints._settle(checkpoint.PATIENCE)
    filling = fill(workdir, leave=200_000)
    for step in (2, 3, 4):
        checkpoints.save(large(step), step)
    with pytest.raises(CheckpointError, match=r"checkpoints/4: not saved \(.*space.*\), and 3 in a row were not"):
        checkpoints.save(large(5), 5)
    checkpoints.close()
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert steps_in(workdir) == [1]
    filling.unlink()


@of_writes_given_up
def test_the_last_save_has_to_succeed(small_disk):
    workdir = small_disk(2_000_000)
    checkpoints = Checkpoints(workdir, CONFIG)
    fill(workdir, leave=200_000)
    checkpoints.save(large(1), 1)
    with pytest.raises(CheckpointError, match=r"checkpoints/1: not saved .*No space left") as caught:
        checkpoints.close()
    assert caught.value.exit_code == 4 and len(caught.value.problems) == 1
    assert steps_in(workdir) == []


@pytest.mark.parametrize("names", [2, 12, 24], ids="{}_names_left".format)
def test_where_no_folder_can_be_made_a_save_fails_at_once(names, small_disk, capsys):
    """And not when Orbax gives up, which is after five minutes."""
    workdir = small_disk("4m,nr_inodes=100")
    checkpoints = Checkpoints(workdir, CONFIG)
    checkpoints.save(make_state(1, 1), 1)
    checkpoints._settle(checkpoint.PATIENCE)
    filling = workdir / "filling"
    filling.mkdir()
    for i in range(os.statvfs(workdir).f_favail - names):
        (filling / str(i)).touch()
    began = time.monotonic()
    checkpoints.save(make_state(2, 2), 2)
    checkpoints._settle(checkpoint.PATIENCE)
    assert time.monotonic() - began < 30
    assert re.search(r"checkpoints/2: not saved \(.*No space left.*\); training goes on", capsys.readouterr().out)
    assert os.statvfs(workdir).f_favail == names, "nothing is left of it"
    shutil.rmtree(filling)
    checkpoints.save(make_state(3, 3), 3)
    checkpoints.close()
    assert steps_in(workdir) == [1, 3]


def test_a_save_that_cannot_begin_is_told_and_the_next_is_tried(tmp_path, monkeypatch, capsys):
    checkpoints = Checkpoints(tmp_path, CONFIG)

    def fail(*args, **options):
        raise OSError(5, "Input/output error")

    checkpoints.save(make_state(1, 1), 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "save", fail)
        checkpoints.save(make_state(2, 2), 2)
    checkpoints.save(make_state(3, 3), 3)
    told = "checkpoints/2: not saved ([Errno 5] Input/output error); training goes on, and the next one is tried"
    assert told in capsys.readouterr().out
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize(
    ("steps", "options", "count"),
    [
        (100, {}, 1),
        (100, {"every": 60}, 2),
        (100, {"every": 10}, 4),
        (100, {"every": 10, "keep": 1}, 2),
        (100, {"minutes": 1.0}, 4),
        (100, {"every": 10, "keep": 1, "keep_every": 50}, 4),
    ],
)
def test_space_is_needed_for_what_will_be_kept_and_one_more(steps, options, count, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CONFIG, **options)
    abstract = {
        "kernel": jax.ShapeDtypeStruct((10**6, 10), jnp.float32),
        "half": jax.ShapeDtypeStruct((5,), "bfloat16"),
    }
    size = 4 * 10**7 + 10
    free = count * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    checkpoints.make_sure_of_space(abstract, steps)
    free -= 1
    with pytest.raises(ConfigError, match=rf"{free / 1e9:.3g} GB are free there, and {count} checkpoints of 0.04 GB"):
        checkpoints.make_sure_of_space(abstract, steps)
    checkpoints.close()


def test_what_is_there_already_needs_no_more_space(tmp_path, monkeypatch):
    state = saved(tmp_path, 10, 20, 30)
    checkpoints = Checkpoints(tmp_path, CONFIG, every=10)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    checkpoints.make_sure_of_space(shapes_of(state), 100)
    checkpoints.make_sure_of_space(shapes_of(state), 30)
    checkpoints.close()
