"""Jobs of several real processes on this machine: one result, one writer, and no one left behind.

Each process is a `mae-jax` of its own with some CPU devices, and they compute together over gloo.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from mae_jax.__main__ import main

HEARTBEAT = 5  # seconds
CLOCKS = {"train/images_per_second", "perf/data_wait_fraction"}
CLOCKS |= {"perf/slowest_host", "perf/slowest_host_data_wait_fraction"}
VIT_TI = (  # on pictures of 64 pixels
    *("--config.data.image_size=(64,64)", "--config.encoder.patch_size=8", "--config.encoder.width=192"),
    *("--config.encoder.depth=12", "--config.encoder.heads=3", "--config.mesh.fsdp=2"),
)
SMALL = (
    *("--config.data.batch_size=32", "--config.log.every=1", "--config.eval.every=0"),
    *("--config.monitor.every=0", "--config.pictures.every=0"),
)


class Together:
    """`processes` of one job, started."""

    def __init__(self, folder, compiled, processes, devices, arguments, alone=False, cwd=None, counted=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in all tests of jobs
        settings["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        self.processes = []
        self.logs = [folder / f"{port}_{i}.log" for i in range(processes)]
        for i, log in enumerate(self.logs):
            count = counted[i] if counted else processes
            flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"]
            flags += [f"--heartbeat={HEARTBEAT}"]
            own = arguments[i] if isinstance(arguments[0], tuple) else arguments
            command = [sys.executable, "-m", "mae_jax", own[0], *([] if alone else flags), *own[1:]]
            with log.open("w") as file:
                started = subprocess.Popen(
                    command, stdout=file, stderr=file, env=os.environ | settings, cwd=cwd and cwd[i]
                )
            self.processes.append(started)

    def codes(self, timeout=900):
        """Their exit codes, as they all end."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def told(self, i):
        return self.logs[i].read_text()


@pytest.fixture
def together(tmp_path, compiled):
    """A function that starts processes of one job, and sees to it that none outlives the test."""
    started = []

    def start(processes, *arguments, devices=2, **options):
        started.append(Together(tmp_path, compiled, processes, devices, arguments, **options))
        return started[-1]

    yield start
    for job in started:
        for process in job.processes:
            process.kill()
            process.wait()


def lines(workdir):
    """metrics.jsonl by step, without what depends on the time."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        found.setdefault(numbers.pop("step"), {}).update({k: v for k, v in numbers.items() if k not in CLOCKS})
    return found


def assert_same(workdir, reference, rel=1e-5):
    got, want = lines(workdir), lines(reference)
    assert got.keys() == want.keys()
    for step in want:
        assert got[step] == pytest.approx(want[step], rel=rel), step


def wait_for_step(workdir, step, timeout=240):
    """Until the run in `workdir` has logged `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").exists() and max(lines(workdir), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {timeout} s")


def pretrain(workdir, *arguments, recipe="digits,tiny", steps=20):
    job = ("pretrain", f"--config=configs/pretrain.py:{recipe}", f"--workdir={workdir}")
    return (*job, f"--config.train.steps={steps}", *SMALL, *arguments)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(together, tmp_path):
    fsdp = "--config.mesh.fsdp=2"
    job = together(2, *pretrain(tmp_path / "two", fsdp, steps=4))
    assert main([*pretrain(tmp_path / "one", fsdp, "--config.mesh.data=2", steps=4)]) == 0
    assert job.codes() == [0, 0], job.told(0) + job.told(1)
    assert_same(tmp_path / "two", tmp_path / "one")
    assert "of 2 processes" in job.told(0)
    assert job.told(1) == ""  # one of them tells
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["device_count"] == 4 and summary["process_count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("digits,tiny", ("--config.mesh.data=4",)),
        ("digits,tiny", ("--config.mesh.tensor=2",)),  # of four processes, two have the same images
        ("folder,tiny", ("--config.mesh.fsdp=4", "--config.data.repeats=2")),
        ("vit_b16,tiny", VIT_TI),
    ],
)
def test_no_number_of_processes_changes_anything(together, tmp_path, recipe, more):
    alone = together(1, *pretrain(tmp_path / "alone", *more, recipe=recipe), devices=4, alone=True)
    assert alone.codes() == [0], alone.told(0)
    for processes in (2, 4):
        workdir = tmp_path / str(processes)
        job = together(processes, *pretrain(workdir, *more, recipe=recipe), devices=4 // processes)
        assert job.codes() == [0] * processes, job.told(0)
        assert_same(workdir, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "then"), [(2, 4), (4, 1)])
def test_one_is_killed_and_a_rerun_goes_on(together, tmp_path, processes, then):
    arguments = ("--config.checkpoint.every=10", "--config.mesh.fsdp=2")
    alone = together(1, *pretrain(tmp_path / "alone", *arguments, steps=120), devices=4, alone=True)
    assert alone.codes() == [0], alone.told(0)
    workdir = tmp_path / "run"
    job = together(processes, *pretrain(workdir, *arguments, steps=120), devices=4 // processes)
    wait_for_step(workdir, random.randrange(15, 40))
    victim = random.randrange(processes)
    job.processes[victim].kill()
    killed = time.monotonic()
    codes = job.codes()
    assert time.monotonic() - killed < 3 * HEARTBEAT
    assert codes[victim] == -signal.SIGKILL
    assert codes[:victim] + codes[victim + 1 :] == [6] * (processes - 1), (codes, job.told(0))
    again = together(then, *pretrain(workdir, *arguments, steps=120), devices=4 // then, alone=then == 1)
    assert again.codes() == [0] * then, again.told(0)
    assert "resuming" in again.told(0)
    assert_same(workdir, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(together, tmp_path, tools, processes):
    """With kill -9, at random moments and in the middle of saves; of several processes one is killed each time."""
    kills, every, workdir = 10, 4, tmp_path / "run"
    steps = 20 * (kills + 1)
    devices = {"devices": 4 // processes, "alone": processes == 1}

    def start(where):
        often = f"--config.checkpoint.every={every}"
        return together(processes, *pretrain(where, "--config.mesh.fsdp=4", often, steps=steps), **devices)

    whole = start(tmp_path / "whole")
    assert whole.codes() == [0] * processes, whole.told(0)
    cut = 0
    for kill in range(kills):
        job, saves = start(workdir), kill % 2 == 0
        wait_for_step(workdir, random.randrange(20 * kill + 1, 20 * kill + 15))
        deadline = time.monotonic() + 60
        while saves and not list(workdir.glob("checkpoints/*-tmp*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02 if saves else 0.2))
        victim = random.randrange(processes)
        job.processes[victim].kill()
        codes = job.codes(60)
        assert codes.pop(victim) == -signal.SIGKILL and codes == [6] * (processes - 1), job.told(0)
        cut += bool(list(workdir.glob("checkpoints/*-tmp*")))
    print(f"{cut} of {kills} in the middle of a save")
    assert cut >= 2
    last = start(workdir)
    assert last.codes() == [0] * processes, last.told(0)
    assert tools.lines_of(workdir, CLOCKS) == tools.lines_of(tmp_path / "whole", CLOCKS)
    assert [step for step, line in lines(workdir).items() if "train/loss" in line] == list(range(1, steps + 1))
    tools.assert_equal(tools.state_of(workdir, steps), tools.state_of(tmp_path / "whole", steps))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_all_together(together, tmp_path):
    def damage(step):
        file = max((checkpoints / step).glob("state/**/d/*"), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[::-1])

    workdir, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    # one of the metrics is logged, and time is asked for, at every step
    arguments = pretrain(
        workdir, "--config.mesh.fsdp=2", "--config.checkpoint.every=10", "--config.checkpoint.minutes=60"
    )
    job = together(2, *arguments)
    assert job.codes() == [0, 0], job.told(0)
    assert main(["verify", f"--workdir={workdir}"]) == 0, "whatever each process has written"
    before = lines(workdir)
    damage("20")
    again = together(2, *arguments)
    assert again.codes() == [0, 0], again.told(0) + again.told(1)
    assert again.told(0).count("moved to") == 1 and again.told(1) == ""
    assert "resuming from step 10" in again.told(0)
    assert lines(workdir) == before
    damage("20")
    damage("10")
    last = together(2, *arguments)
    assert last.codes() == [4, 4], last.told(0)
    assert "no checkpoint is left but damaged ones" in last.told(0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_has_all_save_the_same_step(together, tmp_path, processes, signum):
    workdir = tmp_path / "run"
    job = together(processes, *pretrain(workdir, steps=100_000), devices=4 // processes)
    wait_for_step(workdir, 10)
    asked = random.randrange(processes)
    job.processes[asked].send_signal(signum)
    expected = [143] * processes
    expected[asked] = 128 + signum
    assert job.codes(60) == expected, job.told(0)
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert step == max(lines(workdir))
    for i in range(processes):
        assert f"stopped at step {step}" in job.told(i)


@pytest.mark.slow
def test_a_signal_to_all_at_once(together, tmp_path):
    workdir = tmp_path / "run"
    job = together(2, *pretrain(workdir, steps=100_000))
    wait_for_step(workdir, 10)
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    assert job.codes(60) == [143, 143], job.told(0)
    assert len(list((workdir / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_hosts_that_do_not_share_the_workdir_are_told(together, tmp_path):
    elsewhere = [tmp_path / "a", tmp_path / "b"]
    for folder in elsewhere:
        folder.mkdir()
    job = together(2, *pretrain("run"), devices=1, cwd=elsewhere)
    assert job.codes(200) == [2, 2], job.told(0)
    assert "process 1 does not see what process 0 writes there" in job.told(0)


@pytest.mark.slow
def test_processes_that_differ_are_named(together, tmp_path):
    commands = [pretrain(tmp_path / "run", f"--config.seed={int(i == 1)}") for i in range(4)]
    job = together(4, *commands, devices=1)
    assert job.codes(120) == [2] * 4
    assert "config.seed: 1 on process 1, but 0 on process 0 and others" in job.told(0)
    assert "Traceback" not in job.told(1)


@pytest.mark.slow
def test_processes_that_were_told_of_other_numbers_of_them_are_named(together, tmp_path):
    """The first one waits for as many as it was told of, and JAX asks no other."""
    job = together(2, *pretrain(tmp_path / "run"), devices=1, counted=[2, 3])
    assert job.codes(120) == [2, 2], job.told(0)
    assert "--processes: 3 on process 1, but 2 on process 0" in job.told(0)


@pytest.mark.slow
def test_one_that_fails_does_not_keep_the_others(together, tmp_path):
    with_images, without = tmp_path / "a", tmp_path / "b"
    without.mkdir()
    (with_images / "images").mkdir(parents=True)
    for i in range(40):
        Image.new("L", (8, 8), 6 * i).save(with_images / "images" / f"{i}.png")
    images = ("--config.data.source=folder", "--config.data.path=images", "--config.data.split=all[:32]")
    images += ("--config.data.held_out=all[32:]",)
    job = together(2, *pretrain(tmp_path / "run", *images), devices=1, cwd=[with_images, without])
    began = time.monotonic()
    codes = job.codes(200)
    assert codes == [6, 2], (codes, job.told(0), job.told(1))
    assert "process 1: " in job.told(1)
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_no_process_may_be_left_without_work(together, tmp_path):
    job = together(2, *pretrain(tmp_path / "run", "--config.mesh.data=2", "--config.mesh.fsdp=1"), devices=2)
    assert job.codes(120) == [2, 2]
    assert "on 2 hosts, of which none may be left out" in job.told(0)


@pytest.mark.slow
def test_what_hangs_ends(together, tmp_path):
    workdir = tmp_path / "run"
    job = together(2, *pretrain(workdir, "--hang=4", "--heartbeat=300", steps=100_000), devices=1)
    wait_for_step(workdir, 5)
    job.processes[1].send_signal(signal.SIGSTOP)  # it does not even die
    job.processes[0].wait(60)
    assert job.processes[0].returncode == 6, job.told(0)
    assert "no step in 4 s" in job.told(0)
    job.processes[1].kill()


@pytest.mark.slow
def test_every_job_runs_on_two_processes(together, tmp_path):
    pretrained, alone = tmp_path / "pretrained", {}
    assert together(2, *pretrain(pretrained, "--config.mesh.fsdp=2")).codes() == [0, 0]
    init = f"--config.init={pretrained}"
    jobs = {
        "probe": ("--config=configs/probe.py:digits,tiny", init),
        "finetune": ("--config=configs/finetune.py:digits,tiny", init, "--config.encoder.drop_path=0.2"),
        "knn": ("--config=configs/knn.py", init),
        "reconstruct": ("--config=configs/reconstruct.py", init),
        "evaluate": ("--config=configs/evaluate.py", f"--config.init={tmp_path / 'finetune_1'}"),
    }
    for name, arguments in jobs.items():
        for processes in (1, 2):
            workdir = tmp_path / f"{name}_{processes}"
            job = together(
                processes, name, *arguments, f"--workdir={workdir}", devices=4 // processes, alone=processes == 1
            )
            assert job.codes() == [0] * processes, (name, job.told(0), job.told(-1))
            results = json.loads((workdir / "results.json").read_text())
            for clock in ("seconds", "init", "checkpoint"):
                results.pop(clock, None)
            alone.setdefault(name, results)
            for key, value in results.items():
                if isinstance(value, float):
                    assert value == pytest.approx(alone[name][key], rel=1e-4), (name, key)
                else:
                    assert type(value) is type(alone[name][key])
