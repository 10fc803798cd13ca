"""Sweeps end to end: trials in processes of their own, what is kept, what fails, what comes out; and Slurm's script."""

import csv
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.__main__ import main
from mae_jax.config import load
from mae_jax.files import write_json
from mae_jax.jobs import tables, trials

SWEEPS = sorted(path.stem for path in Path("configs/sweeps").glob("*.py") if path.stem != "chains")

# two trials of seconds, the second of which may be told to fail at its last job
CHAIN = """
from ml_collections import ConfigDict

def get_config(name=""):
    config = ConfigDict({"seeds": (0, 1)})
    small = {"data": {"split": "train[:80]", "held_out": "test[:40]"}}
    config.jobs = (
        {"name": "pretrain", "config": "configs/pretrain.py:digits,tiny", "set": small},
        {"name": "neighbours", "job": "knn", "config": "configs/knn.py", "init": "pretrain", "seeded": (),
         "set": {"k": (3,)}, "shows": {"3-NN": "top1.3"}},
        {"name": "probe", "config": "configs/probe.py:digits,tiny", "init": "pretrain", "shows": {"linear": "top1"},
         "set": small},
    )
    return config
"""
SWEEP = """
from ml_collections import ConfigDict

def get_config(name=""):
    config = ConfigDict({"title": "Mask ratio", "axis": "hidden, %", "reference": "ratio_75"})
    config.chain = "FOLDER/chain.py"
    config.trials = (
        {"name": "ratio_75", "label": "75", "at": 75.0, "published": {"linear": 73.5}},
        {"name": "ratio_50", "label": "50", "at": 50.0, "pretrain": {"mask": {"ratio": 0.5}}, "probe": {FAULT},
         "published": {"linear": 69.9}},
    )
    return config
"""
NO_IMAGES = '"data": {"split": "train[:0]"}'


@pytest.fixture
def sweep(tmp_path, compiled, monkeypatch):
    """A function that runs the sweep above, with a fault or none: `f(*flags, fault="") -> exit code`."""
    environ = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": compiled}
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))

    def prepared(*flags, fault=""):
        (tmp_path / "chain.py").write_text(CHAIN)
        (tmp_path / "sweep.py").write_text(SWEEP.replace("FOLDER", str(tmp_path)).replace("FAULT", fault))
        return ["sweep", f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/run", *flags]

    def run(*flags, fault=""):
        return main(prepared(*flags, fault=fault))

    run.prepared, run.workdir = prepared, tmp_path / "run"
    return run


def rows_of(workdir):
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def when_done(workdir):
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in workdir.rglob("done.json")}


@pytest.mark.slow
def test_from_trials_to_a_table(sweep, capsys):
    """One trial fails at its last job: the other ends, it is named with its log, and the next time it alone goes on."""
    assert sweep("--seeds=0", "--parallel=2", fault=NO_IMAGES) == 1
    told = capsys.readouterr()
    log = sweep.workdir / "ratio_50" / "seed_0" / "log.txt"
    assert str(log) in told.err and "ratio_75" not in told.err
    assert "config.data: the training split 'train[:0]' has 0 images" in log.read_text()
    assert len(rows_of(sweep.workdir)) == 1
    before = when_done(sweep.workdir)
    assert len(before) == 5  # all three of one trial, two of the other

    assert sweep("--seeds=0") == 0
    assert "1 of 2 trials are done" in capsys.readouterr().out
    after = when_done(sweep.workdir)
    assert len(after) == 6 and before.items() <= after.items()

    first, second = rows_of(sweep.workdir)
    assert (first["trial"], second["trial"]) == ("ratio_75", "ratio_50")
    for row in (first, second):
        assert float(row["computed"]) == pytest.approx(float(row["needed"]), rel=0.05)  # of a width of 32
        assert 0 <= float(row["linear"]) <= 1 and 0 <= float(row["3-NN"]) <= 1
    table = (sweep.workdir / "sweep.md").read_text()
    assert "linear, paper" in table and "**73.5**" in table and "| 69.9 |" in table
    assert np.asarray(Image.open(sweep.workdir / "sweep.png")).std() > 0

    (sweep.workdir / "sweep.md").unlink()
    assert sweep("--seeds=0", "--collect") == 0
    assert (sweep.workdir / "sweep.md").read_text() == table
    assert when_done(sweep.workdir) == after


@pytest.mark.slow
def test_killed_half_way(sweep):
    """SIGKILL to the sweep leaves its trial running: a second sweep waits for it, and repeats nothing."""
    command = [sys.executable, "-m", "mae_jax", *sweep.prepared("--seeds=0")]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first = sweep.workdir / "ratio_75" / "seed_0" / "pretrain" / "done.json"
    deadline = time.monotonic() + 200
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    job.wait()
    before = when_done(sweep.workdir)
    assert before
    assert sweep("--seeds=0") == 0
    after = when_done(sweep.workdir)
    assert len(after) == 6 and before.items() <= after.items()


@pytest.mark.slow
def test_a_signal_stops_the_trials_too(sweep):
    command = [sys.executable, "-m", "mae_jax", *sweep.prepared("--seeds=0,1", "--parallel=2")]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(list(sweep.workdir.glob("*/*/log.txt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=100)
    assert job.returncode == 143
    assert told.count("mae-jax:") == 1
    assert not subprocess.run(["pgrep", "-f", str(sweep.workdir)], capture_output=True).stdout


@pytest.mark.slow
def test_a_slurm_array(sweep, tmp_path, monkeypatch, capsys):
    """A fake sbatch keeps the script; what that would start is then started, as Slurm's task 1."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" {tmp_path}/script.sh; echo Submitted batch job 77',
        "srun": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert sweep("--parallel=2", "--slurm=partition=gpu,gpus_per_node=1,timeout_min=600") == 0
    assert "submitted 77: 4 trials, 2 at a time" in capsys.readouterr().out
    script = (tmp_path / "script.sh").read_text()
    for line in ("--array=0-3%2", "--partition=gpu", "--gpus-per-node=1", "--time=600", "--job-name=mae_jax"):
        assert f"#SBATCH {line}\n" in script
    (command,) = [line for line in script.splitlines() if line.startswith("srun")]
    words = command.split()
    task = {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "SLURM_NTASKS": "1"}
    task |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    start = words[words.index(sys.executable) :]
    subprocess.run(start, env=os.environ | task | {"SUBMITIT_EXECUTOR": "slurm"}, check=True)
    assert sweep("--collect") == 0
    assert [(row["trial"], row["seed"]) for row in rows_of(sweep.workdir)] == [("ratio_75", "1")]


def test_dry_run(sweep, capsys):
    assert sweep("--dry-run") == 0
    heads, *lines, total = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["trial", "seeds", "parameters", "MFLOP/image"]
    first, second = (line.split() for line in lines)
    assert first[0] == "ratio_75" and first[5] == "1.00x"
    assert second[0] == "ratio_50" and float(second[5].rstrip("x")) > 1
    assert "GFLOP/s" in total
    assert not sweep.workdir.exists()


@pytest.mark.parametrize("chain", ["digits", "fashion_mnist", "vit_l16"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_one_that_could_run(name, chain, tmp_path):
    sweep, _ = load(f"configs/sweeps/{name}.py:{chain}")
    jobs, _ = load(sweep.chain)
    found = trials.of_sweep(sweep, jobs, tmp_path)  # all names and types of settings are looked at
    assert len(found) == len(sweep.trials) * len(jobs.seeds)
    assert sweep.reference in {trial.name for trial in found}
    assert len(
        {link.folder for trial in found for link in trial.chain if tmp_path / "shared" not in link.folder.parents}
    )
    columns = {column for job in jobs.jobs for column in job.get("shows", {})}
    if chain == "vit_l16":
        assert {column for trial in sweep.trials for column in trial.get("published", {})} <= columns
        (reference,) = (trial for trial in found if trial.name == sweep.reference)
        config = trials.configured(reference.chain[0])
        assert config.target.name == "pixels" and config.mask.ratio == 0.75, "as the paper's tables have it"


def test_settings_that_have_changed_are_not_mixed(sweep, refused, capsys):
    """What is in the workdir is of other settings: nothing is run."""
    done = sweep.workdir / "ratio_50" / "seed_0" / "pretrain" / "done.json"
    write_json(done, {"job": "pretrain", "config": "configs/pretrain.py:digits,tiny", "settings": {"mask.ratio": 0.6}})
    refused(capsys, sweep("--seeds=0"), 2, f"{done.parent} was run with other settings")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--sweep=configs/sweeps/mask.py",), "no file 'configs/sweeps/mask.py'"),
        (("--sweep=configs/pretrain.py:digits",), "is no sweep"),
        (("--sweep=configs/sweeps/mask_ratio.py:digit",), "no 'digit'"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--parallel=0"), "--parallel=0: is not a number above 0"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--seeds=a"), "--seeds=a: are not numbers"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--trials=ratio_7"), "no 'ratio_7'; did you mean ratio_75?"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--slurm=gpu"), "--slurm: 'gpu' is not KEY=VALUE"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--dry-runs"), "--dry-runs: no such flag; did you mean --dry-run?"),
        (("--sweep=configs/sweeps/mask_ratio.py", "--workdir=gs://bucket/x"), "a sweep needs a folder"),
    ],
)
def test_bad_usage(flags, found, tmp_path, refused, capsys):
    workdir = () if any(flag.startswith("--workdir") for flag in flags) else (f"--workdir={tmp_path}",)
    refused(capsys, main(["sweep", *workdir, *flags]), 2, found)


def test_slurm_that_is_not_there(sweep, refused, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    refused(capsys, sweep("--slurm=partition=gpu"), 2, "--slurm: Could not detect")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('"set": small}', '"sets": small}', "no setting 'sets'; did you mean set?"),
        ('"init": "pretrain"', '"init": "train"', "its init 'train' is no job before it"),
        ('"job": "knn"', '"job": "kn"', "no job 'kn' of mae-jax; did you mean knn?"),
        ("digits,tiny", "digits,small", "no variant 'small' of digits"),
        ('{"split": "train[:80]"', '{"splits": "train[:80]"', "no such key in configs/pretrain.py:digits,tiny"),
    ],
)
def test_a_bad_chain(before, after, found, sweep, tmp_path, refused, capsys):
    command = sweep.prepared()
    (tmp_path / "chain.py").write_text(CHAIN.replace(before, after))
    refused(capsys, main(command), 2, found)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('{"name": "ratio_50", ', "{", "sweep.trials: None is no name"),
        ('"name": "ratio_50"', '"name": "shared"', "sweep.trials: 'shared' is no name for a folder of its own"),
        ('"at": 75.0', '"at": "x"', "sweep.trials: 'ratio_75': at is 'x', no number"),
        ('{"linear": 73.5}', "84.9", "sweep.trials: 'ratio_75': published is no dict of numbers"),
        ('"pretrain": {"mask": {"ratio": 0.5}}', '"pretrain": 5', "'ratio_50': pretrain is 5, no dict of settings"),
        ('"ratio": 0.5', '"ratoi": 0.5', "sweep.trials: ratio_50: --config.mask.ratoi"),
        ('"ratio": 0.5', '"ratio": 0.99', "sweep.trials: ratio_50: config.mask.ratio"),
        ('"ratio": 0.5', '"name": "blok"', "sweep.trials: ratio_50: config.mask.name"),
        (
            "    return config",
            '    return ConfigDict({**config, "trials": 5})',
            "sweep.trials: is no sequence of dicts",
        ),
        ('"reference": "ratio_75"', '"reference": "ratio_7"', "sweep.reference: no trial 'ratio_7'; did you mean"),
    ],
)
def test_a_bad_sweep(before, after, found, sweep, tmp_path, refused, capsys):
    """Before anything is run, all that is wrong is told with the setting that it is wrong in."""
    command, text = sweep.prepared(), (tmp_path / "sweep.py").read_text()
    assert before in text
    (tmp_path / "sweep.py").write_text(text.replace(before, after))
    refused(capsys, main([*command, "--dry-run"]), 2, found)


def test_only_accuracies_are_told_in_percent():
    of_jobs = ("top1", "top1.20", "metrics.eval/knn", "metrics.eval/loss", "metrics.train/images_per_second")
    assert [tables.is_share(where) for where in of_jobs] == [True, True, True, False, False]


def test_a_trial_whose_arithmetic_was_not_counted_is_not_done(tmp_path):
    sweep, chain = (load(f"configs/sweeps/{name}.py:digits")[0] for name in ("mask_token", "chains"))
    trial = trials.of_sweep(sweep, chain, tmp_path)[0]
    for link in trial.chain:
        write_json(link.folder / trials.DONE, link.identity | {"seconds": 1.0})
    assert not trial.done
    write_json(trial.folder / trials.FLOPS, {"needed": 1, "computed": 1.0})
    assert trial.done


def test_rows_without_a_result_are_empty():
    assert tables.with_spread([], ".1f") == ""
    assert tables.with_spread([50], ".1f") == "50.0"
    assert tables.with_spread([50, 60], ".1f") == "55.0 ± 7.1"
    assert tables.as_csv([{"a": 1}, {"a": 2, "b": 3}]).decode() == textwrap.dedent("""\
        a,b
        1,
        2,3
    """)
