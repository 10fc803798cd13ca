"""How a process learns of the others. What they do together is in tests/jobs/test_hosts.py, with real ones."""

import json
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from mae_jax.__main__ import main
from mae_jax.errors import ConfigError
from mae_jax.training import hosts

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_PROCID": "1"}


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(hosts, "_abort_as_lost", lambda: None)
    monkeypatch.setattr(hosts, "_hear_sigterm", lambda heard: None)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    return calls


def test_one_process_is_alone(initialized):
    with hosts.joined({}, {}):
        assert hosts.leads()
    assert not initialized


def test_flags_say_where_the_others_are(initialized):
    flags = {"coordinator": "10.0.0.1:1234", "processes": "4", "process": "3", "heartbeat": "7"}
    with hosts.joined(flags, SLURM):
        pass
    assert initialized == [
        {
            "coordinator_address": "10.0.0.1:1234",
            "num_processes": 4,
            "process_id": 3,
            "cluster_detection_method": "deactivate",
            "heartbeat_timeout_seconds": 7,
            "initialization_timeout": 310,
        }
    ]


@pytest.mark.parametrize(
    ("changed", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),  # one process a node has all of its GPUs
        ({}, [0]),
        ({"SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "4"}, None),  # JAX gives each its own
    ],
)
def test_srun_says_where_the_others_are(initialized, changed, devices):
    with hosts.joined({}, SLURM | changed):
        pass
    (given,) = initialized
    assert given["cluster_detection_method"] == "slurm"
    assert given.get("local_device_ids") == devices


@pytest.mark.parametrize("environ", [{"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, SLURM | {"SLURM_NTASKS": "1"}])
def test_a_batch_script_or_a_shell_under_slurm_is_alone(initialized, environ):
    with hosts.joined({}, environ):
        pass
    assert not initialized


def test_a_machine_with_tpus_asks_jax(initialized, monkeypatch):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    with hosts.joined({}, {"JAX_PLATFORMS": "cpu"}):
        pass
    assert not initialized
    with hosts.joined({}, {}):
        pass
    assert initialized == [{"heartbeat_timeout_seconds": 60, "initialization_timeout": 310}]

    def nobody(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    monkeypatch.setattr(hosts, "PATIENCE", 0.5)
    before = hosts.hang
    with hosts.joined({"hang": "7"}, {}):
        assert hosts.leads() and hosts.hang == 7
        time.sleep(1)  # nobody is waited for any more
    assert hosts.hang == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"processes": "2"}, "--processes: needs --coordinator and --process beside it"),
        ({"coordinator": "a:1", "processes": "2", "process": "2"}, "--process=2: is not one of 2"),
        (
            {"coordinator": "a:1", "processes": "two", "process": "0"},
            "--processes=two: is not a whole number from 1",
        ),
        ({"coordinator": "a:1", "processes": "2", "process": "-1"}, "--process=-1: is not a whole number from 0 on"),
        ({"coordinator": "a", "processes": "2", "process": "0"}, "--coordinator=a: is not HOST:PORT"),
        ({"coordinator": "a:99999", "processes": "2", "process": "0"}, "--coordinator=a:99999: cannot listen there"),
        ({"heartbeat": "99999999999"}, "of at most seven digits"),
        ({"hang": "soon"}, "--hang=soon: is not a whole number from 0 on"),
    ],
)
def test_flags_that_make_no_sense(initialized, flags, told):
    with pytest.raises(ConfigError, match=told), hosts.joined(flags, {}):
        pass
    assert not initialized


def test_a_port_that_is_taken(initialized):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        flags = {"coordinator": f"127.0.0.1:{other.getsockname()[1]}", "processes": "2", "process": "0"}
        told = r"use another port or, .*, another number for --process"
        with pytest.raises(ConfigError, match=told), hosts.joined(flags, {}):
            pass


def test_the_command_line_takes_them(tmp_path, capsys, refused):
    code = main(["knn", "--config=configs/knn.py", f"--workdir={tmp_path}", "--process=1"])
    refused(capsys, code, 2, "--process: needs --coordinator and --processes beside it")


def test_what_fails_on_a_process_alone_is_raised():
    with pytest.raises(RuntimeError, match="gloo"), hosts.failing_at_once():
        raise RuntimeError("gloo")


@pytest.mark.parametrize(("odd", "told"), [(None, None), (2, r"seed: 7 on process 2, but 0 on process 0 and others")])
def test_facts_have_to_agree(monkeypatch, odd, told):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    texts = [json.dumps({"seed": "7" if i == odd else "0", "steps": "5"}) for i in range(3)]
    monkeypatch.setattr(hosts, "gather", lambda text: texts)
    if told is None:
        hosts.agree({"seed": 0, "steps": 5})
    else:
        with pytest.raises(ConfigError, match=told):
            hosts.agree({"seed": 0, "steps": 5})


def test_hosts_need_the_same_number_of_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=i) for i in (0, 1, 1)])
    with pytest.raises(ConfigError, match="not 1 on process 0, 2 on process 1"):
        hosts._refuse_uneven_hosts()


def test_signals_are_noted_once():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.Signals() as signals:
        assert signals.at(1) == 0
        signal.raise_signal(signal.SIGTERM)
        assert signals.at(2) == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


HANGING = """
import time
from types import SimpleNamespace
from mae_jax.training import hosts
hosts.hang = 1.0
with hosts.Watchdog() as watchdog:
    time.sleep(1.5)  # compilation is not waited for
    watchdog.step()
    watchdog.pause()
    time.sleep(1.5)
    watchdog.step()
    print("working", flush=True)
    time.sleep(60)
"""


def test_a_hang_ends_the_process():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert done.returncode == 6, done.stderr
    assert done.stdout == "working\n"
    assert "no step in 1 s" in done.stderr and "time.sleep(60)" not in done.stderr
    assert 'File "<string>"' in done.stderr  # where it hangs
