"""Whole jobs from their command line: what they write, how they stop and go on, what they read back."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from sklearn import preprocessing
from sklearn.neighbors import KNeighborsClassifier

import mae_jax
from mae_jax.__main__ import main
from mae_jax.config import load
from mae_jax.data.sources import digits
from mae_jax.errors import CheckpointError
from mae_jax.files import alone_in
from mae_jax.jobs import models, panels, pretrain
from mae_jax.jobs.runs import Run
from mae_jax.model import masking
from mae_jax.training import metrics
from mae_jax.training.sharding import batch_sharding, make_mesh

TINY = "--config=configs/pretrain.py:digits,tiny"
STEPS = 50
EVERY = 25
SHORT = (  # five epochs of 10 steps; one block compiles faster than two
    *(f"--config.train.steps={STEPS}", "--config.data.split=train[:80]", "--config.data.held_out=test[:20]"),
    *(f"--config.{group}.every={EVERY}" for group in ("eval", "monitor", "pictures", "checkpoint")),
    *("--config.optim.base_learning_rate=0.02", "--config.optim.warmup_epochs=1.0"),
    "--config.encoder.depth=1",
)
TIMINGS = {"train/images_per_second", "perf/data_wait_fraction"}
HIDDEN_GREY = 128

pytestmark = pytest.mark.usefixtures("quick_compilation")


def pretraining(workdir, *arguments, config=TINY):
    return main(["pretrain", config, f"--workdir={workdir}", *arguments])


def reconstruction(init, workdir, *arguments):
    config = "--config=configs/reconstruct.py"
    return main(["reconstruct", config, f"--workdir={workdir}", f"--config.init={init}", *arguments])


def lines_of(workdir, drop=()):
    return [{k: v for k, v in line.items() if k not in drop} for line in metrics.read(workdir / "metrics.jsonl")]


def series(workdir, name):
    return {line["step"]: line[name] for line in lines_of(workdir) if name in line}


def state_of(workdir, step):
    """The whole train state of a checkpoint as NumPy arrays, read by Orbax alone."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return reader.restore(folder, ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same_run(workdir, reference):
    """The same metrics, bit for bit except for timings, and the same state: parameters, moments and step."""
    assert lines_of(workdir, TIMINGS) == lines_of(reference, TIMINGS)
    got, want = state_of(workdir, STEPS), state_of(reference, STEPS)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.tobytes() == w.tobytes()
    for name in ("reconstructions/step_25.png", f"reconstructions/step_{STEPS}.png"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a finished run on eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    assert pretraining(workdir, *SHORT) == 0
    return workdir


@pytest.fixture(scope="module")
def pictured(trained, tmp_path_factory):
    """The workdir of a reconstruct job on the held-out split."""
    workdir = tmp_path_factory.mktemp("runs") / "pictures"
    assert reconstruction(trained, workdir, "--config.count=5") == 0
    return workdir


def panels_of(path, side, rows):
    """Take a picture apart again: uint8[rows,4,side,side,3] of original, masked, reconstruction, pasted."""
    picture = np.asarray(Image.open(path))
    zoom = max(1, round(112 / side))
    gap, header, size = 4, 18, side * zoom
    assert picture.shape == (header + rows * (size + gap), gap + 4 * (size + gap), 3)
    return np.array(
        [
            [picture[header + r * (size + gap) :, gap + c * (size + gap) :][:size:zoom, :size:zoom] for c in range(4)]
            for r in range(rows)
        ]
    )


# Pre-training


def test_a_run_leaves_everything_that_was_promised(trained):
    assert {p.name for p in trained.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "saved.json",
        "summary.json",
        "reconstructions",
        "checkpoints",
        "tensorboard",
    }
    config = json.loads((trained / "config.json").read_text())
    assert config["train"]["steps"] == STEPS
    assert config["data"]["held_out"] == "test[:20]"
    assert {p.name for p in (trained / "reconstructions").iterdir()} == {f"step_{i}.png" for i in (25, 50)}
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"25", "50"}, "two are kept"
    for step in ("25", "50"):
        assert json.loads((trained / "checkpoints" / step / "config" / "config.json").read_text()) == config
    assert len(list((trained / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_metrics_are_there_at_every_step_that_was_asked_for(trained):
    assert list(series(trained, "train/loss")) == list(range(1, STEPS + 1))
    assert list(series(trained, "train/learning_rate")) == list(range(1, STEPS + 1))
    assert list(series(trained, "train/grad_norm")) == list(range(1, STEPS + 1))
    assert list(series(trained, "train/images_per_second")) == list(range(2, STEPS + 1)), "the first step compiles"
    for name in ("loss", "baseline_loss", "knn"):
        assert list(series(trained, f"eval/{name}")) == [25, 50]
    assert [line["step"] for line in lines_of(trained)] == sorted([*range(1, STEPS + 1), 25, 25, 50, 50])
    assert all(np.isfinite(value) for line in lines_of(trained) for value in line.values())
    assert all(rate > 0 for rate in series(trained, "train/images_per_second").values())
    assert all(0 <= part <= 1 for part in series(trained, "perf/data_wait_fraction").values())
    shape = [step / 10 if step < 10 else 0.5 + 0.5 * np.cos(np.pi * (step - 10) / 40) for step in range(STEPS)]
    rates = list(series(trained, "train/learning_rate").values())
    assert rates == pytest.approx([0.02 * 8 / 256 * part for part in shape], rel=1e-4)


def test_summary_tells_what_was_done_and_with_what(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["job"] == "pretrain"
    assert (summary["steps"], summary["images_seen"]) == (STEPS, STEPS * 8)
    assert summary["wall_time_seconds"] > 0
    assert (summary["device"], summary["device_count"]) == ("cpu", 8)
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["versions"]["mae_jax"] == mae_jax.__version__
    names = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "skipped")} | {"data/unreadable"}
    names |= {f"eval/{name}" for name in ("loss", "baseline_loss", "knn")}
    assert summary["metrics"].keys() == names | TIMINGS
    for name in names:
        assert summary["metrics"][name] == series(trained, name)[STEPS]


def test_the_baseline_is_that_of_position_means_over_the_training_images(trained):
    """Computed again in NumPy, under the masks of the evaluation."""
    config = mae_jax.load_config(trained)
    read = lambda split: digits(split=split).read(np.arange(digits(split=split).size))[0]  # noqa: E731
    # eval.images = 16 of each split
    train, held_out = (patches_of(standard(read(s)[:16], config), 2) for s in (config.data.split, config.data.held_out))
    eval_key = jax.random.split(jax.random.key(config.seed), 3)[2]
    errors = []
    for i in range(2):
        mask = masking.sample(jax.random.fold_in(eval_key, i), 8, (4, 4), **config.mask)
        for image, hidden in zip(held_out[8 * i : 8 * i + 8], np.asarray(mask.hidden), strict=True):
            errors.append(np.mean((train.mean(axis=0)[hidden] - image[hidden]) ** 2))
    assert series(trained, "eval/baseline_loss")[STEPS] == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_monitor_is_what_neighbours_of_scikit_learn_say_of_the_encoder(trained):
    """Of the mean of the patch tokens of whole images, at every look."""
    config = mae_jax.load_config(trained)
    read = lambda split: digits(split=split).read(np.arange(digits(split=split).size))  # noqa: E731
    (bank, labels), (queries, truth) = read("train[:32]"), read("test[:16]")  # monitor.bank, monitor.queries

    def votes(distances):
        return np.exp(-(distances**2) / 2 / 0.07)  # of unit vectors: similarity is 1 - distance**2 / 2

    for step in (25, 50):
        encoder, params = mae_jax.load_encoder(trained / "checkpoints" / str(step))
        apply = jax.jit(lambda p, x, encoder=encoder: encoder.apply({"params": p}, x)[:, 1:].mean(axis=1))
        features, asked = (
            preprocessing.normalize(np.asarray(apply(params, jnp.float32(standard(x, config))), np.float64))
            for x in (bank, queries)
        )
        neighbours = KNeighborsClassifier(config.monitor.k, weights=votes, algorithm="brute").fit(features, labels)
        assert series(trained, "eval/knn")[step] == pytest.approx(neighbours.score(asked, truth), abs=1e-6)


def standard(images, config):
    return (images / 255.0 - np.array(config.pixels.mean)) / np.array(config.pixels.std)


def patches_of(images, side):
    """Cut float64[N,H,W,C] into [N,L,P*P*C], one patch at a time."""
    _, height, width, _ = images.shape
    return np.stack(
        [
            images[:, top : top + side, left : left + side].reshape(len(images), -1)
            for top in range(0, height, side)
            for left in range(0, width, side)
        ],
        axis=1,
    )


def test_a_finished_run_says_so_and_rewrites_nothing(trained, capsys):
    def everything():
        files = [p for p in trained.rglob("*") if p.is_file()]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = everything()
    assert pretraining(trained, *SHORT) == 0
    assert "already complete" in capsys.readouterr().out
    assert everything() == before


def stop_after(monkeypatch, step, signum):
    """Send a signal when the scalars of `step` are written."""
    log = metrics.Progress.log

    def log_and_stop(self, at, scalars):
        log(self, at, scalars)
        if at == step:
            signal.raise_signal(signum)

    monkeypatch.setattr(metrics.Progress, "log", log_and_stop)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(trained, tmp_path, monkeypatch, capsys):
    only_when_stopped = "--config.checkpoint.every=0"
    with monkeypatch.context() as patch:
        stop_after(patch, 33, signal.SIGTERM)
        assert pretraining(tmp_path, *SHORT, only_when_stopped) == 143
    assert capsys.readouterr().err == "mae-jax: stopped at step 33; the same command goes on from there\n"
    assert (tmp_path / "checkpoints" / "33").is_dir()
    assert not (tmp_path / "summary.json").exists()
    assert pretraining(tmp_path, *SHORT, only_when_stopped) == 0
    assert f"resuming from step 33 of {STEPS}" in capsys.readouterr().out
    assert_same_run(tmp_path, trained)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["images_seen"]) == (STEPS, STEPS * 8)


def as_process(log, *arguments, **environment):
    """Start `mae-jax pretrain` as a user would, in a process of its own."""
    command = [sys.executable, "-m", "mae_jax", "pretrain", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    with log.open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def kill_at_random(process, workdir, log):
    """End `process` without warning at some moment between its first line of metrics and its last."""
    moment = random.Random()
    lines, delay = moment.randrange(1, STEPS), moment.uniform(0, 0.1)
    print(f"kill -9 {delay:.3f} s after line {lines} of metrics.jsonl")
    while len(metrics.read(workdir / "metrics.jsonl")) < lines and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been(trained, tmp_path):
    workdir, log, often = tmp_path / "run", tmp_path / "log.txt", "--config.checkpoint.every=7"
    as_here = {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    kill_at_random(as_process(log, TINY, f"--workdir={workdir}", *SHORT, often, **as_here), workdir, log)
    assert pretraining(workdir, *SHORT, often) == 0
    assert_same_run(workdir, trained)


def test_a_second_run_in_the_workdir_of_a_first_is_refused(tmp_path, capsys, refused):
    with alone_in(tmp_path):
        refused(capsys, pretraining(tmp_path, *SHORT), 2, f"process {os.getpid()} on {socket.gethostname()} is at work")
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.slow
def test_processes_killed_three_times_end_as_if_they_had_not_been(tmp_path):
    """As users run them: each process compiles for itself, optimized, on the devices there are."""
    log, often = tmp_path / "log.txt", "--config.checkpoint.every=3"
    for name, kills in (("whole", 0), ("killed", 3)):
        for _ in range(kills):
            process = as_process(log, TINY, f"--workdir={tmp_path / name}", *SHORT, often)
            kill_at_random(process, tmp_path / name, log)
        assert as_process(log, TINY, f"--workdir={tmp_path / name}", *SHORT, often).wait() == 0, log.read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_losses_on_1_and_8_devices_agree(trained, tmp_path):
    less = ("--config.eval.every=0", "--config.monitor.every=0")
    assert pretraining(tmp_path, *SHORT, *less, "--config.mesh.data=1") == 0
    # AdamW divides rounding errors by their own size, so that parameters drift apart slowly
    for name, tolerance in (("train/loss", 1e-6), ("train/grad_norm", 1e-5)):
        one, eight = ([series(run, name)[step] for step in range(1, 11)] for run in (tmp_path, trained))
        assert one == pytest.approx(eight, rel=tolerance), name
    one, eight = (series(run, "eval/baseline_loss")[STEPS] for run in (tmp_path, trained))
    assert one == pytest.approx(eight, rel=1e-6)
    one, eight = (series(run, "eval/loss")[STEPS] for run in (tmp_path, trained))
    assert one == pytest.approx(eight, rel=1e-3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device_count"] == 1, "the devices that were used"


def test_masks_are_the_same_on_1_and_8_devices_and_differ_between_samples_and_steps(trained):
    config = mae_jax.load_config(trained)
    model, _ = models.build(config)

    def masks(devices, step):
        mesh = make_mesh(data=devices)
        batch = {"image": jax.device_put(np.zeros((8, 8, 8, 1), np.uint8), batch_sharding(mesh))}
        draw = jax.jit(pretrain.make_draw(model, config))
        return jax.device_get(draw(batch, jax.random.fold_in(jax.random.key(1), step))["mask"])

    one, eight, later = masks(1, 3), masks(8, 3), masks(8, 4)
    np.testing.assert_array_equal(one.visible, eight.visible)
    np.testing.assert_array_equal(one.hidden, eight.hidden)
    assert len({tuple(sorted(row)) for row in eight.visible}) > 1
    assert not np.array_equal(eight.visible, later.visible)
    for row in np.concatenate([eight.visible, eight.hidden], axis=1):
        assert sorted(row) == list(range(16))


@pytest.mark.slow
def test_a_small_set_is_learnt_by_heart(tmp_path, capsys):
    arguments = [
        *("--config.train.steps=800", "--config.data.split=train[:8]", "--config.data.held_out=train[:8]"),
        *("--config.optim.base_learning_rate=0.1", "--config.optim.warmup_epochs=100.0", "--config.optim.b2=0.99"),
        *("--config.optim.weight_decay=0.0", "--config.mask.ratio=0.5", "--config.log.every=400"),
        *(f"--config.{group}.every=0" for group in ("eval", "monitor", "pictures", "checkpoint")),
        "--config.mesh.data=1",
    ]
    assert pretraining(tmp_path, *arguments) == 0
    loss, baseline = (series(tmp_path, f"eval/{name}")[800] for name in ("loss", "baseline_loss"))
    assert loss < 0.5 * baseline
    assert f"held-out loss {loss:.4f} is {loss / baseline:.3f} of {baseline:.4f}" in capsys.readouterr().out


def assert_bfloat16_agrees(workdir, reference):
    exact, rounded = series(reference, "train/loss"), series(workdir, "train/loss")
    assert list(exact) == list(range(1, 51))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert all(rounded[step] != exact[step] for step in exact), "so it did compute in bfloat16"
    assert exact[50] < 0.9 * exact[1], "and it did train"
    for leaf in jax.tree.leaves(state_of(workdir, 50)):
        assert leaf.dtype in (np.float32, np.int32)


@pytest.mark.slow
def test_bfloat16_and_float32_agree_to_2_percent_over_50_steps(trained, tmp_path):
    less = ("--config.mesh.data=1", "--config.eval.every=0", "--config.monitor.every=0")  # to compile
    assert pretraining(tmp_path, *SHORT, *less, "--config.dtype=bfloat16") == 0
    assert_bfloat16_agrees(tmp_path, trained)


@pytest.mark.slow
def test_bfloat16_and_float32_agree_on_the_digits_recipe(tmp_path):
    for dtype in ("float32", "bfloat16"):
        arguments = ("--config.train.steps=50", "--config.log.every=1", f"--config.dtype={dtype}")
        assert pretraining(tmp_path / dtype, *arguments, config="--config=configs/pretrain.py:digits") == 0
    assert_bfloat16_agrees(tmp_path / "bfloat16", tmp_path / "float32")


@pytest.mark.slow
def test_bfloat16_trains_the_digits_recipe_to_the_held_out_loss_of_float32(tmp_path):
    less = ("--config.monitor.every=0", "--config.pictures.every=0", "--config.eval.every=0")
    for dtype in ("float32", "bfloat16"):
        arguments = ("--config=configs/pretrain.py:digits", f"--workdir={tmp_path / dtype}", f"--config.dtype={dtype}")
        process = as_process(tmp_path / f"{dtype}.txt", *arguments, *less)
        assert process.wait() == 0, (tmp_path / f"{dtype}.txt").read_text()
    exact, rounded = (series(tmp_path / dtype, "eval/loss") for dtype in ("float32", "bfloat16"))
    (step,) = exact
    # not both ways: one run says little, as float32 has ended at 0.318 and at 0.326 with its losses summed in another
    # order; tests/benchmarks/bfloat16.py has the mean over seeds
    assert rounded[step] <= 1.02 * exact[step]


@pytest.mark.slow
def test_the_quickstart_beats_the_baseline_as_promised(tmp_path):
    log = tmp_path / "log.txt"
    process = as_process(log, "--config=configs/pretrain.py:digits", f"--workdir={tmp_path / 'run'}")
    assert process.wait() == 0, log.read_text()
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert final["eval/loss"] <= 0.7 * final["eval/baseline_loss"]


def copy_of(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    return tmp_path / "copy"


def test_another_architecture_is_refused_with_all_differences(trained, capsys):
    before = (trained / "config.json").read_bytes()
    other = ("--config.encoder.width=64", "--config.decoder.depth=2", "--config.target.name=normalized_pixels")
    assert pretraining(trained, *SHORT, *other) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "config.decoder.depth: 1 in" in told[0] and "now 2" in told[0]
    assert "config.encoder.width: 32 in" in told[1] and "now 64" in told[1]
    assert "config.target.name: pixels in" in told[2] and "now normalized_pixels" in told[2]
    assert all("new --workdir" in line for line in told)
    assert (trained / "config.json").read_bytes() == before


def test_another_order_of_the_data_is_refused(trained, capsys):
    other = ("--config.data.split=train[:96]", "--config.seed=1", "--config.data.batch_size=16")
    other += ("--config.data.repeats=2",)
    assert pretraining(trained, *SHORT, *other) == 2
    told = capsys.readouterr().err
    for key in ("config.data.split", "config.seed", "config.data.batch_size", "config.data.repeats"):
        assert key in told


def test_a_run_stopped_after_its_last_checkpoint_still_ends_as_promised(trained, tmp_path):
    workdir = copy_of(trained, tmp_path)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "reconstructions")
    lines = [line for line in lines_of(workdir) if line["step"] < STEPS or "train/loss" in line]
    assert len(lines) == len(lines_of(workdir)) - 2, "without the last look"
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # the second time with all lines there
        assert pretraining(workdir, *SHORT) == 0
        assert lines_of(workdir, TIMINGS) == lines_of(trained, TIMINGS)
        picture = f"reconstructions/step_{STEPS}.png"
        assert (workdir / picture).read_bytes() == (trained / picture).read_bytes()
        (workdir / "summary.json").unlink()


@pytest.mark.parametrize(("free", "told"), [(0, "lock"), (4096, "config.json"), (16384, "are free there")])
def test_a_disk_that_is_full_at_the_start_is_one_line(free, told, small_disk, refused, capsys):
    disk = small_disk(10_000_000)
    (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - free))
    refused(capsys, pretraining(disk, *SHORT), 2, f"--workdir={disk}: ")[0].index(told)
    assert not list(disk.glob("*.tmp"))


def test_a_disk_that_has_no_room_for_the_summary_is_one_line(trained, small_disk, refused, monkeypatch, capsys):
    disk, summarize = small_disk(10_000_000), Run._summarize
    shutil.copytree(trained, disk, dirs_exist_ok=True)
    (disk / "summary.json").unlink()

    def summarize_on_a_full_disk(run):
        (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free))
        summarize(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_summarize", summarize_on_a_full_disk)
        refused(capsys, pretraining(disk, *SHORT), 2, f"--workdir={disk}: {disk}/summary.json: not written (No space")
    (disk / "filling").unlink()
    assert pretraining(disk, *SHORT) == 0
    assert_same_run(disk, trained)


DAMAGES = {
    "cut": b"{",
    "list": b"[1]",
    "null": b"null",
    "text": b'"abc"',
    "deep": b"[" * 200_000,
    "binary": b"\xff\x00",
}


@pytest.mark.parametrize("damage", [None, "folder", *DAMAGES])
def test_without_its_config_a_run_is_compared_with_its_newest_checkpoint(damage, trained, tmp_path, capsys):
    path = tmp_path / "config.json"
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    if damage == "folder":
        path.mkdir()
    elif damage:
        path.write_bytes(DAMAGES[damage])
    assert pretraining(tmp_path, *SHORT, "--config.seed=3") == 2
    found = capsys.readouterr()
    assert f"config.seed: 0 in {tmp_path}/checkpoints/50, now 3; use a new" in found.err
    assert f"{path}: not {'readable' if damage else 'there'}" in found.out
    assert path.exists() == bool(damage), "refused, and nothing is touched"


def test_a_run_that_goes_on_without_its_config_has_one_again(trained, tmp_path, capsys):
    workdir = copy_of(trained, tmp_path)
    (workdir / "config.json").write_text("{")
    (workdir / "summary.json").unlink()
    assert pretraining(workdir, *SHORT) == 0
    assert (workdir / "config.json").read_bytes() == (trained / "config.json").read_bytes()
    assert (workdir / "config.json.damaged").read_text() == "{"
    for file in (workdir / "checkpoints").glob("*/config/config.json"):
        file.write_text("")
    assert reconstruction(workdir, tmp_path / "out") == 4
    assert "50: damaged: config/config.json has 0 bytes, not " in capsys.readouterr().err
    (workdir / "config.json").unlink()
    assert pretraining(workdir, *SHORT) == 4
    assert "config.json: not there, nor is that of any checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_gone_back_over_to_the_same_result(trained, tmp_path, capsys):
    workdir = copy_of(trained, tmp_path)
    (workdir / "summary.json").unlink()
    file = max((workdir / "checkpoints" / str(STEPS)).glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[::-1])
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert pretraining(workdir, *SHORT) == 0
    out = capsys.readouterr().out
    assert f"moved to {workdir}/checkpoints/damaged/{STEPS}" in out and f"resuming from step {EVERY} of {STEPS}" in out
    assert_same_run(workdir, trained)
    assert main(["verify", f"--workdir={workdir}"]) == 0
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        (folder / "state" / "_METADATA").unlink()
    assert pretraining(workdir, *SHORT) == 4
    assert "no checkpoint is left but damaged ones" in capsys.readouterr().err


@pytest.mark.slow
def test_time_saves_besides_steps(tmp_path):
    less = [f"--config.{group}.every=0" for group in ("eval", "monitor", "pictures", "checkpoint")]
    keep = ("--config.checkpoint.keep=9", "--config.checkpoint.minutes=1e-9", "--config.log.every=4")
    assert pretraining(tmp_path, "--config.train.steps=10", *less, *keep) == 0
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "10"}


def test_a_finished_run_can_be_made_longer(trained, tmp_path, monkeypatch, capsys):
    workdir, summarize = copy_of(trained, tmp_path), Run._summarize

    def summarize_anew(run):
        assert not (workdir / "summary.json").exists(), "were this run killed, that of 50 steps would pass for its own"
        summarize(run)

    monkeypatch.setattr(Run, "_summarize", summarize_anew)
    assert pretraining(workdir, *SHORT, "--config.train.steps=52") == 0
    out = capsys.readouterr().out
    assert "changed: config.train.steps: 50 in" in out and "now 52" in out
    assert "resuming from step 50 of 52" in out
    assert list(series(workdir, "train/loss")) == list(range(1, 53))
    before = lines_of(trained)
    assert lines_of(workdir)[: len(before)] == before
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 52
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 52
    assert (workdir / "reconstructions" / "step_52.png").is_file()
    assert (workdir / "checkpoints" / "52").is_dir()


def test_a_run_cannot_be_made_shorter_than_it_is(trained, capsys):
    before = (trained / "config.json").read_bytes()
    assert pretraining(trained, *SHORT, "--config.train.steps=49") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "49 steps" in line and "has trained 50" in line
    assert (trained / "config.json").read_bytes() == before
    assert (trained / "summary.json").exists()


def test_a_run_that_died_before_its_summary_only_writes_that(trained, tmp_path):
    workdir = copy_of(trained, tmp_path)
    (workdir / "summary.json").unlink()
    assert pretraining(workdir, *SHORT) == 0
    assert_same_run(workdir, trained)
    again, first = (json.loads((run / "summary.json").read_text()) for run in (workdir, trained))
    assert again | {"wall_time_seconds": 0} == first | {"wall_time_seconds": 0}


# Reconstruction


@pytest.mark.parametrize("ratio", [0.75, 0.85])
@pytest.mark.parametrize("init", ["", "checkpoints/25"], ids=["workdir", "checkpoint"])
def test_reconstruct_leaves_a_picture_and_the_loss_of_every_image(init, ratio, trained, tmp_path, capsys):
    assert reconstruction(trained / init, tmp_path, f"--config.mask.ratio={ratio}", "--config.count=5") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["init"] == str(trained / init)
    assert results["mask"] == {"name": "random", "ratio": ratio, "unit": 1, "temperature": 1.0, "decoded": 1.0}
    losses = list(results["loss_by_image"].values())
    assert results["examples"] == len(losses) == 5
    assert results["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["mask"]["ratio"] == ratio
    picture = tmp_path / "reconstructions" / f"ratio_{ratio}.png"
    masked = panels_of(picture, 8, 5)[:, 1]
    hidden = (masked == HIDDEN_GREY).all(axis=-1).sum(axis=(1, 2)) / 4
    assert (hidden >= 16 - masking.visible_count(16, ratio)).all()
    out = capsys.readouterr().out
    assert f"{results['loss']:.4f}" in out and str(picture) in out


def test_reconstruct_reads_the_checkpoint_that_is_named(trained, tmp_path):
    for name in ("25", "50"):
        assert reconstruction(trained / "checkpoints" / name, tmp_path / name, "--config.count=5") == 0
    assert reconstruction(trained, tmp_path / "newest", "--config.count=5") == 0
    losses = {p.name: json.loads((p / "results.json").read_text())["loss"] for p in tmp_path.iterdir()}
    assert losses["newest"] == losses["50"] != losses["25"]


def test_visible_patches_are_pasted_exactly_and_hidden_ones_are_the_reconstruction(pictured):
    original, masked, rebuilt, pasted = panels_of(pictured / "reconstructions" / "ratio_0.75.png", 8, 5).swapaxes(0, 1)
    images, _ = digits(split="test[:20]").read(np.arange(5))
    np.testing.assert_array_equal(original, images.repeat(3, axis=-1))
    mask = masking.sample(jax.random.key(0), 5, (4, 4), ratio=0.75)
    hidden = np.asarray(mask.removed, bool).reshape(5, 4, 4).repeat(2, axis=1).repeat(2, axis=2)
    assert (hidden.sum(axis=(1, 2)) == 12 * 4).all()
    assert (masked[hidden] == HIDDEN_GREY).all()
    np.testing.assert_array_equal(masked[~hidden], original[~hidden])
    np.testing.assert_array_equal(pasted[~hidden], original[~hidden])
    np.testing.assert_array_equal(pasted[hidden], rebuilt[hidden])
    assert (rebuilt[~hidden] != original[~hidden]).any(), "the reconstruction is the model's, of visible patches too"


def check_losses(workdir, results, images, seed=0, ratio=0.75):
    """Compare the losses of a reconstruct job with the formula in NumPy, from the model's predictions."""
    config = mae_jax.load_config(workdir)
    model, params = mae_jax.load(workdir)
    side = config.encoder.patch_size
    mask = masking.sample(jax.random.key(seed), len(images), [s // side for s in config.data.image_size], ratio=ratio)
    x = standard(images, config)
    predict = jax.jit(lambda p, x, m: model.apply({"params": p}, x, m, every_patch=True))
    pred = np.asarray(predict(params, jnp.float32(x), mask), np.float64)
    want = patches_of(x, side)
    if config.target.name == "normalized_pixels":
        deviation = np.sqrt(want.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
        want = (want - want.mean(axis=-1, keepdims=True)) / deviation
    removed = np.asarray(mask.removed)
    losses = (removed * ((pred - want) ** 2).mean(axis=-1)).sum(axis=1) / removed.sum(axis=1)
    assert list(results["loss_by_image"].values()) == pytest.approx(losses.tolist(), rel=2e-5)


def test_losses_of_pixels_are_the_formula(trained, pictured):
    results = json.loads((pictured / "results.json").read_text())
    assert list(results["loss_by_image"]) == [f"test[:20] image {i}" for i in range(5)]
    check_losses(trained, results, digits(split="test[:20]").read(np.arange(5))[0])


def test_image_files_of_several_formats_can_be_named(trained, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = digits(split="test[:20]").read(np.arange(1))[0][0]
    grey = Image.fromarray(image[..., 0])
    grey.save(folder / "exact.png")
    grey.save(folder / "exact.bmp")
    grey.resize((31, 17)).convert("RGB").save(folder / "wide.jpg")
    grey.resize((17, 31)).convert("CMYK").save(folder / "cmyk.jpeg")
    grey.convert("RGBA").save(folder / "alpha.png")
    grey.save(folder / "exact.webp", lossless=True)
    grey.save(folder / "still.gif")
    named = f"{folder}/*.png, {folder}/exact.bmp,{folder}/*.jp*g,{folder}/exact.webp,{folder}/still.gif"
    assert reconstruction(trained, tmp_path / "out", f"--config.images={named}", "--config.seed=4") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    order = ("alpha.png", "exact.png", "exact.bmp", "cmyk.jpeg", "wide.jpg", "exact.webp", "still.gif")
    assert list(results["loss_by_image"]) == [str(folder / name) for name in order]
    panels = panels_of(tmp_path / "out" / "reconstructions" / "ratio_0.75.png", 8, 7)
    for name in ("alpha.png", "exact.png", "exact.bmp", "exact.webp", "still.gif"):
        np.testing.assert_array_equal(panels[order.index(name), 0], image.repeat(3, axis=-1), err_msg=name)
    check_losses(trained, results, panels[:, 0, :, :, :1], seed=4)


def test_an_unreadable_image_file_is_left_out_and_none_at_all_is_an_error(trained, tmp_path, capsys, caplog):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("L", (8, 8), 77).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    assert reconstruction(trained, tmp_path / "out", f"--config.images={bad},{good}") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["loss_by_image"]) == [str(good)]
    assert str(bad) in caplog.text
    assert reconstruction(trained, tmp_path / "none", f"--config.images={bad}") == 3
    assert str(bad) in capsys.readouterr().err


def test_reconstruct_into_the_workdir_of_a_run_does_not_spoil_the_run(trained, tmp_path, capsys):
    workdir = copy_of(trained, tmp_path)
    assert reconstruction(workdir, workdir, "--config.count=5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mae-jax: --workdir={workdir}: holds a training run")
    assert json.loads((workdir / "config.json").read_text()) == json.loads((trained / "config.json").read_text())
    assert pretraining(workdir, *SHORT) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [None, "checkpoints"])
def test_a_path_without_a_checkpoint_ends_in_one_line_and_exit_code_4(inside, tmp_path, capsys):
    init = tmp_path / "nowhere"
    if inside:
        (init / inside).mkdir(parents=True)
    assert reconstruction(init, tmp_path / "out") == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mae-jax: {init}: no checkpoint here")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        mae_jax.load(init)


# From Python


def test_load_gives_the_model_with_the_parameters_of_its_last_step(trained):
    model, params = mae_jax.load(trained)
    stored = state_of(trained, STEPS)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, stored)
    before = state_of(trained, 25)["params"]
    _, earlier = mae_jax.load(str(trained / "checkpoints" / "25"))
    jax.tree.map(np.testing.assert_array_equal, earlier, before)
    images = mae_jax.normalize(digits(split="test").read(np.arange(3))[0], **mae_jax.load_config(trained).pixels)
    mask = masking.sample(jax.random.key(0), 3, (4, 4))
    assert jax.jit(model.apply)({"params": params}, images, mask).shape == (3, 12, 4)


def test_load_encoder_gives_the_tokens_of_the_model_itself(trained):
    images = mae_jax.normalize(digits(split="test").read(np.arange(3))[0], **mae_jax.load_config(trained).pixels)
    encoder, params = mae_jax.load_encoder(trained)
    tokens = jax.jit(encoder.apply)({"params": params}, images)
    assert (tokens.shape, tokens.dtype) == ((3, 1 + 16, 32), jnp.float32)
    assert np.asarray(tokens).std() > 0.1
    model, whole = mae_jax.load(trained)
    own = jax.jit(lambda p, x: model.apply({"params": p}, x, method=lambda mae, x: mae.encoder(x)))(whole, images)
    np.testing.assert_array_equal(tokens, own)
    some = jnp.array([[3, 0, 9], [1, 15, 2], [4, 5, 6]])
    visible = jax.jit(encoder.apply)({"params": params}, images, some)
    assert visible.shape == (3, 1 + 3, 32), "and it is the one that reads visible patches alone"


def test_the_config_in_a_checkpoint_is_enough_to_load_it_from_elsewhere(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained / "checkpoints" / "50", moved)
    model, params = mae_jax.load(moved)
    jax.tree.map(np.testing.assert_array_equal, params, mae_jax.load(trained)[1])
    assert model == mae_jax.load(trained)[0]


# A folder of all sorts of files


def fill(root):
    """Write 24 good images of many kinds, one truncated file and one that is no image; returns the truncated one."""
    rng = np.random.default_rng(0)

    def picture(size=(40, 30), mode="RGB"):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)

    (root / "animals" / "cats").mkdir(parents=True)
    (root / "plants").mkdir()
    for i in range(15):
        picture((40 + i, 30)).save(root / "animals" / "cats" / f"{i}.JPG", format="JPEG")
    picture().save(root / "colour.png")
    picture(mode="L").save(root / "grey.png")
    picture(mode="L").save(root / "animals" / "grey.jpeg")
    picture(mode="CMYK").save(root / "plants" / "cmyk.jpg")
    picture(mode="RGBA").save(root / "plants" / "alpha.png")
    Image.fromarray(rng.integers(0, 2**16, (30, 40), np.uint16)).save(root / "plants" / "sixteen.png")
    frames = [picture(mode="P") for _ in range(3)]
    frames[0].save(root / "plants" / "moving.gif", save_all=True, append_images=frames[1:])
    picture().save(root / "plants" / "web.webp")
    picture().save(root / "plants" / "truly_a_png.jpg", format="PNG")
    (root / "plants" / "notes.txt").write_text("not an image, and not looked at")
    truncated = root / "plants" / "truncated.jpg"
    picture((200, 200)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:1500])
    return truncated


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory):
    """A run over such a folder: its workdir, the truncated file, and what was logged."""
    root, workdir = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("runs") / "folder"
    truncated = fill(root)
    arguments = [
        *("--config.data.source=folder", f"--config.data.path={root}", "--config.data.split=all"),
        *("--config.data.held_out=all", "--config.data.image_size=(32, 32)", "--config.encoder.patch_size=8"),
        *("--config.eval.images=25", "--config.train.steps=7", "--config.pictures.count=25"),
        *("--config.monitor.every=0", "--config.monitor.bank=25", "--config.monitor.queries=25"),
        "--config.mesh.data=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr("logging.warning", lambda message, *values: told.append(message % values))
        code = pretraining(workdir, *arguments, config="--config=configs/pretrain.py:folder,tiny")
    return code, workdir, truncated, told


def test_a_folder_of_all_sorts_of_files_trains_and_the_truncated_one_is_named(from_folder):
    code, workdir, truncated, told = from_folder
    assert code == 0
    assert list(series(workdir, "train/loss")) == list(range(1, 8))
    assert all(np.isfinite(value) for line in lines_of(workdir) for value in line.values())
    assert all(str(truncated) in line for line in told), "all others can be read"
    assert len(told) == 6, "once each for the pictures, training, baseline, evaluation, and the monitor's two sets"
    assert series(workdir, "eval/knn").keys() == {7}, "its folders are classes"
    assert len(panels_of(workdir / "reconstructions" / "step_7.png", 32, 24)) == 24


def test_losses_of_normalized_pixels_are_the_formula(from_folder, tmp_path):
    _, workdir, truncated, _ = from_folder
    assert reconstruction(workdir, tmp_path, "--config.count=25", "--config.mask.ratio=0.5") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["loss_by_image"]) == 24
    assert str(truncated) not in results["loss_by_image"]
    original = panels_of(tmp_path / "reconstructions" / "ratio_0.5.png", 32, 24)[:, 0]
    check_losses(workdir, results, original, ratio=0.5)


def test_a_normalized_target_is_drawn_with_mean_and_deviation_of_the_true_patch(from_folder, tmp_path):
    """A model that predicts nothing but the patch mean must draw the patch mean."""
    _, workdir, *_ = from_folder
    config = mae_jax.load_config(workdir)
    model, target = models.build(config)
    params = jax.tree.map(np.array, mae_jax.load(workdir)[1])
    params["decoder"]["head"] = jax.tree.map(np.zeros_like, params["decoder"]["head"])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mask = masking.sample(jax.random.key(0), 2, (4, 4))

    drawn, loss = panels.make_panels(model, target, config)(params, images, mask, standard(images, config))
    x = patches_of(standard(images, config), 8)
    means = np.broadcast_to(x.mean(axis=-1, keepdims=True), x.shape).reshape(2, 4, 4, 8, 8, 3)
    means = means.transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 3)
    want = np.clip((means * np.array(config.pixels.std) + np.array(config.pixels.mean)) * 255, 0, 255)
    assert np.abs(np.asarray(drawn)[:, 2] - want).max() <= 0.5 + 1e-3
    assert np.asarray(loss) == pytest.approx(191 / 192, rel=1e-3), "the variance of standardised patches, over n"


def test_load_of_a_config_written_on_the_command_line(trained):
    config, _ = load("configs/pretrain.py:digits,tiny", SHORT)
    stored = mae_jax.load_config(trained)
    assert stored.train.steps == config.train.steps == STEPS
