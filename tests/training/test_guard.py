"""Steps that are not finite, or far too large: what they leave alone, who is told, and how a run ends."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mae_jax.__main__ import main
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import DataError, NumericsError
from mae_jax.jobs import pretrain
from mae_jax.training import metrics, optim
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.guard import Guard
from mae_jax.training.loop import USUAL, create_state, make_train_step
from mae_jax.training.sharding import make_mesh

GOOD = {"skipped": False, "loss": 1.0, "grad_norm": 1.0, "data/unreadable": 0}
BAD = {"skipped": True, "loss": float("nan"), "grad_norm": float("inf"), "data/unreadable": 0}
DATA = ("--config.data.split=train[:80]", "--config.data.held_out=test[:20]")


def run_of(spike=0.0, ema=0.9, accumulate=1, devices=1):
    """The first state of a small regression with all that a state can have, and its step."""
    mesh = make_mesh(data=devices)
    tx, schedule = optim.make(256, 500, 50, base_learning_rate=0.05, warmup_epochs=0.0, weight_decay=0.1)

    def init():
        return {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}, {"count": jnp.zeros(())}

    def loss_fn(params, stats, batch):
        error = batch["x"] @ params["head"]["kernel"] + params["head"]["bias"][None]
        return jnp.mean(jnp.square(error), axis=1), {"count": stats["count"] + 1}

    _, new_state = create_state(init, tx, mesh, ema=ema)
    draw = lambda batch, key: batch  # noqa: E731
    args = (draw, loss_fn, tx, schedule, jax.random.key(0), mesh)
    return new_state(), make_train_step(*args, ema=ema, accumulate=accumulate, spike=spike)


def batch(scale=1.0):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    x[5, 1] *= scale
    return {"x": x, "weight": np.ones(16, np.float32)}


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize(("accumulate", "devices"), [(1, 1), (1, 8), (2, 1)])
def test_a_step_that_is_not_finite_touches_nothing(poison, accumulate, devices):
    state, step = run_of(accumulate=accumulate, devices=devices)
    state, scalars = step(state, batch())
    assert not scalars["skipped"]
    before = jax.device_get(state)
    state, scalars = step(state, batch(poison))
    assert scalars["skipped"]
    after = jax.device_get(state)
    assert after.step == before.step + 1
    for got, want in zip(jax.tree.leaves(after.replace(step=0)), jax.tree.leaves(before.replace(step=0)), strict=True):
        np.testing.assert_array_equal(got, want)
    state, scalars = step(state, batch())  # and goes on
    assert not scalars["skipped"] and np.isfinite(scalars["loss"])
    assert not np.array_equal(state.params["head"]["kernel"], before.params["head"]["kernel"])


def test_a_spike_is_skipped_where_that_is_asked_for():
    for spike, skipped in ((0.0, False), (10.0, True)):
        state, step = run_of(spike=spike)
        early, scalars = step(state, batch(1000.0))
        assert not scalars["skipped"], "nothing is known yet of what is usual"
        state = early.replace(step=jnp.full_like(early.step, USUAL), norm=jnp.ones_like(early.norm))
        assert bool(step(state, batch(1000.0))[1]["skipped"]) == skipped


def guarded(tmp_path, back="earlier", first=0, **options):
    tmp_path.mkdir(exist_ok=True)
    return Guard(tmp_path, first, lambda step: [step, step + 1], lambda state: back, 100, 20, **options)


def test_what_is_skipped_is_counted_and_written_down(tmp_path, capsys):
    guard = guarded(tmp_path, patience=2)
    assert guard.look("now", 0, GOOD) == "now" and guard.totals["skipped"] == 0
    assert not guard.path.exists()
    assert guard.look("now", 1, BAD) == "now"
    assert guard.look("now", 2, GOOD) == "now"
    assert guard.look("now", 3, BAD) == "now", "not in a row"
    assert guard.totals["skipped"] == 2
    assert metrics.read(guard.path)[1] == {"step": 3, "loss": "nan", "grad_norm": "inf", "images": [3, 4]}
    assert "step 3: loss nan, grad_norm inf: skipped" in capsys.readouterr().out
    assert guarded(tmp_path, first=3).totals["skipped"] == 1, "a run that goes on from step 3 has not seen step 3"
    assert [line["step"] for line in metrics.read(guard.path)] == [1]


def test_going_back_once_and_giving_up(tmp_path):
    guard = guarded(tmp_path, patience=2)
    assert [guard.look("now", step, BAD) for step in range(3)] == ["now", "earlier", "now"]
    with pytest.raises(NumericsError, match=r"2 steps in a row .* up to step 3, again; lower config.optim"):
        guard.look("now", 3, BAD)


def test_there_is_nothing_to_go_back_to(tmp_path):
    guard = guarded(tmp_path, back=None, patience=1)
    with pytest.raises(NumericsError, match="no checkpoint to go back to"):
        guard.look("now", 0, BAD)


def test_indexes_are_those_of_the_batch():
    data = Dataset(source="digits", split="train", image_size=(8, 8), channels=1, batch_size=32, repeats=2)
    examples = data.shuffled(3, 60, None)
    for step in range(60, 63):  # over the end of an epoch
        images, _ = data.examples.read(data.indexes(3, step))
        np.testing.assert_array_equal(next(examples)["image"], images.repeat(2, axis=0))


@pytest.fixture
def poisoned(monkeypatch):
    """A function that has pre-training of digits meet NaN at some steps: the images there are not numbers."""
    make_loss = pretrain.make_loss

    def poison(*steps):
        def poisoned_loss(model, target, config):
            loss_fn = make_loss(model, target, config)

            def poisoned(params, stats, examples):
                values, stats = loss_fn(params, stats, examples)
                wrong = jnp.isin(examples["number"], jnp.array(steps))
                return jnp.where(wrong, jnp.nan, values), stats

            return poisoned

        shuffled = Dataset.shuffled

        def numbered(self, seed, start, sharding):
            for number, found in enumerate(shuffled(self, seed, start, sharding), start):
                yield found | {"number": jax.device_put(np.full(self.batch_size, number), sharding)}

        monkeypatch.setattr(pretrain, "make_loss", poisoned_loss)
        monkeypatch.setattr(Dataset, "shuffled", numbered)

    return poison


def training(workdir, *arguments):
    job = ("pretrain", "--config=configs/pretrain.py:digits,tiny", f"--workdir={workdir}", *DATA)
    job += ("--config.train.steps=12", "--config.checkpoint.every=4", "--config.encoder.depth=1")
    return main([*job, "--config.monitor.every=0", "--config.guard.patience=3", *arguments])


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_goes_back_past_bad_data_once(poisoned, tmp_path, capsys, refused):
    """Three bad steps in a row: back to the checkpoint of step 4. Three more: exit code 5, and nothing is lost."""
    poisoned(5, 6, 7)
    assert training(tmp_path / "once") == 0
    assert "going on from the newest checkpoint, after these images" in capsys.readouterr().out
    skipped = metrics.read(tmp_path / "once" / "skipped.jsonl")
    assert [line["step"] for line in skipped] == [5, 6, 7]
    assert len(skipped[0]["images"]) == 8
    lines = [line for line in metrics.read(tmp_path / "once" / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["train/skipped"] == 3 and np.isfinite(lines[-1]["train/loss"])
    summary = json.loads((tmp_path / "once" / "summary.json").read_text())
    assert summary["steps"] == 12

    poisoned(5, 6, 7, 8, 9, 10)
    refused(capsys, training(tmp_path / "twice"), 5, "3 steps in a row", "again; lower config.optim")
    assert (tmp_path / "twice" / "checkpoints" / "4").is_dir()


@pytest.mark.usefixtures("quick_compilation")
def test_nothing_is_saved_while_steps_are_skipped(poisoned, tmp_path, monkeypatch, capsys):
    """Steps 3 to 6 are skipped: what is gone back to is the checkpoint of step 3."""
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, step: saved.append(step) or save(self, state, step))
    poisoned(3, 4, 5, 6)
    often = ("--config.checkpoint.every=1", "--config.checkpoint.minutes=1e-9", "--config.checkpoint.keep=1")
    assert training(tmp_path, *often, "--config.guard.patience=4", "--config.train.steps=8") == 0
    assert "going on from the newest checkpoint" in capsys.readouterr().out
    assert sorted({*saved}) == [1, 2, 3, 7, 8]


@pytest.mark.usefixtures("quick_compilation")
def test_parameters_out_of_all_bounds_are_not_saved(tmp_path, capsys, refused):
    far = ("--config.optim.base_learning_rate=1e20", "--config.optim.warmup_epochs=0.0", "--config.checkpoint.every=1")
    refused(capsys, training(tmp_path, *far), 5, "3 steps in a row", "no checkpoint to go back to")
    assert not any((tmp_path / "checkpoints").iterdir())
    with pytest.raises(NumericsError, match="step 1 left nothing to compute with"):
        guarded(tmp_path).keeps({"kernel": jnp.full((2, 3), 3e19)}, 1, last=True)


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_in_which_every_step_is_skipped_fails_however_short(tmp_path, capsys, refused):
    noisy = ("--config.noise.std=3e38", "--config.train.steps=2", "--config.log.every=1")
    refused(capsys, training(tmp_path, *noisy), 5, "2 steps in a row", "no checkpoint to go back to")
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert '"train/loss": null' in first


def unread(guard, counts, first=0):
    """Look at steps with so many unreadable samples."""
    for step, count in enumerate(counts, first):
        guard.look("now", step, GOOD | {"data/unreadable": count})


def test_samples_that_cannot_be_read_are_counted_and_written_down(tmp_path):
    guard = guarded(tmp_path)
    unread(guard, [0, 3, 0, 5])
    assert guard.totals == {"skipped": 0, "data/unreadable": 8}
    assert metrics.read(guard.unreadable_path) == [{"step": 1, "unreadable": 3}, {"step": 3, "unreadable": 5}]
    again = guarded(tmp_path, first=3)
    assert again.totals["data/unreadable"] == 3, "a run that goes on from step 3 has not seen step 3"
    unread(again, [5, 1], first=3)
    assert [line["step"] for line in metrics.read(guard.unreadable_path)] == [1, 3, 4]


@pytest.mark.parametrize("damage", [b"\xff\x00", b"5", b'{"step": 1}'], ids=["binary", "5", "step"])
def test_what_is_damaged_of_skipped_and_unreadable_is_kept_aside(damage, tmp_path, capsys):
    (tmp_path / "skipped.jsonl").write_bytes(b'{"step": 0}\n' + damage.replace(b"step", b"stop") + b"\n")
    (tmp_path / "unreadable.jsonl").write_bytes(b'{"step": 0, "unreadable": 2}\n' + damage + b"\n")
    guard = guarded(tmp_path, first=2)
    assert guard.totals == {"skipped": 1, "data/unreadable": 2}
    told = capsys.readouterr().out.splitlines()
    for name, line in zip(("skipped.jsonl", "unreadable.jsonl"), told, strict=True):
        assert line.startswith(f"{tmp_path / name}: damaged in line 2; kept as ")
        assert damage in (tmp_path / f"{name}.damaged").read_bytes().replace(b"stop", b"step")
        assert len(metrics.read(tmp_path / name)) == 1


def test_too_many_samples_that_cannot_be_read_end_the_run(tmp_path):
    unread(guarded(tmp_path / "first"), [100] + [0] * 30)
    with pytest.raises(
        DataError, match=r"^101 of the last 1000 samples .* step 9, .*unreadable 0.1; mae-jax check-data"
    ):
        unread(guarded(tmp_path / "all"), [100, *[0] * 8, 1])
    unread(guarded(tmp_path / "off", unreadable=1.0), [100] * 30)
    spread = guarded(tmp_path / "spread")
    unread(spread, [10] * 50)
    with pytest.raises(DataError, match="201 of the last 2000"):
        unread(spread, [11], first=50)
    late = guarded(tmp_path / "late")
    unread(late, [0] * 1000)
    with pytest.raises(DataError, match=r"300 of the last 2000 samples .* step 1002"):
        unread(late, [100] * 30, first=1000)


def test_a_small_set_is_judged_after_an_epoch(tmp_path):
    guard = Guard(tmp_path, 0, lambda step: [step], lambda state: state, 8, 3)
    unread(guard, [8, 0])
    with pytest.raises(DataError, match="9 of the last 24"):
        unread(guard, [1], first=2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_of_bad_files_goes_on_as_if_it_had_not_been_stopped_and_ends_when_there_are_too_many(
    tmp_path, monkeypatch, caplog, refused, capsys
):
    root = tmp_path / "files"
    root.mkdir()
    for i in range(48):
        noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{i:02}.png")
    (root / "07.png").write_bytes(b"")
    arguments = [
        *("--config=configs/pretrain.py:folder,tiny", "--config.data.source=folder", f"--config.data.path={root}"),
        *("--config.data.split=all", "--config.data.held_out=all[:8]", "--config.data.batch_size=8"),
        *("--config.train.steps=12", "--config.checkpoint.every=5", "--config.log.every=3", "--config.mesh.data=1"),
        *("--config.monitor.bank=8", "--config.monitor.queries=8", "--config.eval.every=0"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["pretrain", *arguments, f"--workdir={whole}"]) == 0
    look = Guard.look

    def die(self, state, step, scalars):
        if step == 8:
            raise KeyboardInterrupt
        return look(self, state, step, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "look", die)
        assert main(["pretrain", *arguments, f"--workdir={parts}"]) == 130
    assert main(["pretrain", *arguments, f"--workdir={parts}"]) == 0

    def told(workdir):
        clocks = ("train/images_per_second", "perf/data_wait_fraction")
        lines = metrics.read(workdir / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in clocks} for line in lines]

    assert told(parts) == told(whole)
    assert (parts / "unreadable.jsonl").read_text() == (whole / "unreadable.jsonl").read_text()
    assert [line["data/unreadable"] for line in told(whole) if "data/unreadable" in line][-1] == 2, "in two epochs"
    for i in range(10):
        (root / f"{i:02}.png").write_bytes(b"no picture")
    capsys.readouterr()
    code = main(["pretrain", *arguments, f"--workdir={tmp_path}/bad"])
    assert refused(capsys, code, 3, "10 of the last 48 samples") and not list((tmp_path / "bad").glob("checkpoints/9*"))
