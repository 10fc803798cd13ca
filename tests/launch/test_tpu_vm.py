"""launch/tpu_vm.sh, where fakes play Google Cloud: a slice of two workers, whose homes go with it."""

import shutil
import signal
import subprocess

import pytest

SLICE = ("--name=mae", "--zone=us-east5-a", "--type=v6e-16")
JOB = ("pretrain", "--config=configs/pretrain.py:vit_b16", "--workdir=gs://bucket/run")

# `state` holds what `list` says of the queued resource, a line a call, the last one for ever; `vm` the same of a TPU VM
# that was made without one; `created` what `create` puts there, `created_N` the N-th time; `fail` the beginnings of
# calls that fail, once each.
GCLOUD = """
import shutil
path = lambda name: os.path.join(fake, name)
lines = lambda name: open(path(name)).read().splitlines() if os.path.exists(path(name)) else []
def write(name, lines):
    with open(path(name), "w") as file:
        file.write("".join(line + "\\n" for line in lines))

kind, verb, *rest = sys.argv[3:]
flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
workers = ["0", "1"] if flags.get("worker") == "all" else [flags.get("worker")]
there = "state" if kind == "queued-resources" else "vm"
call = " ".join(sys.argv[3:])
for failure in lines("fail"):
    code, beginning = failure.split(" ", 1)
    if call.startswith(beginning):
        rest = lines("fail")
        rest.remove(failure)
        write("fail", rest)
        sys.exit(int(code))

if verb == "list":
    states = lines(there)
    print("".join(states[:1]))
    write(there, states[1:] or states) if states else None
elif verb == "create":
    times = len(lines("creations")) + 1
    write("creations", ["once"] * times)
    write("state", lines(f"created_{times}") or lines("created"))
    for worker in "01":
        os.makedirs(path("homes/" + worker + "/.local/bin"))
        shutil.copy(path("bin/uv"), path("homes/" + worker + "/.local/bin/uv"))
elif verb == "delete":
    import glob, signal
    os.remove(path("state"))
    for group in glob.glob(path("homes/*/mae_jax_run/group")):
        try:
            os.killpg(int(open(group).read()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(path("homes"))
elif verb == "scp":
    for worker in workers:
        shutil.copy(rest[0], path("homes/" + worker + "/" + rest[1].partition(":")[2]))
elif verb == "ssh":
    import ctypes, subprocess, time
    def there(worker):  # the machine: it outlives the connection, and buries its dead
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
        home = path("homes/" + worker)
        env = {**os.environ, "HOME": home, "PATH": path("worker") + ":/usr/bin:/bin"}
        shell = subprocess.Popen(["bash", "-c", flags["command"]], env=env, cwd=home)
        os.closerange(0, 3)
        code = None
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                os._exit(0)
            if pid == shell.pid:
                os.write(answer, bytes([os.waitstatus_to_exitcode(status) % 256]))
    codes = []
    for worker in workers:
        question, answer = os.pipe()
        if not os.fork():
            there(worker)
        os.set_blocking(question, False)
        while True:
            time.sleep(0.02)
            try:
                codes += os.read(question, 1)
                break
            except BlockingIOError:
                if "SUSPENDED" in lines("state"):
                    sys.exit(255)
    sys.exit(next((code for code in codes if code), 0))
"""
# Makes an environment whose mae-jax notes what it is given. On worker 0 it then does what the next line of `jobs` says:
# ends with a code, waits for the file `go`, or has its slice taken away; on others it waits to be told to end.
UV = """
if sys.argv[1] == "venv":
    os.makedirs(sys.argv[-1] + "/bin", exist_ok=True)
else:
    environment = os.path.dirname(sys.argv[4].partition("=")[2])
    with open(environment + "/mae-jax", "w") as file:
        file.write("#!" + sys.executable + " -SE\\n" + open(fake + "/mae-jax.py").read())
    os.chmod(environment + "/mae-jax", 0o755)
"""
MAE_JAX = """
import json, os, signal, sys, time
fake, worker = os.environ["FAKE"], os.path.basename(os.environ["HOME"])
signal.alarm(30)  # whatever becomes of the test
def end(*_):
    with open(fake + "/ended", "a") as ended:
        ended.write(worker)
    os._exit(143)
if worker != "0":
    signal.signal(signal.SIGTERM, end)
with open(fake + "/calls", "a") as calls:
    calls.write(json.dumps(["mae-jax", worker, os.path.basename(os.getcwd()), *sys.argv[1:]]) + "\\n")
if worker != "0":
    signal.pause()
while True:  # nothing happens before the other has started too, and is followed
    calls = [json.loads(line) for line in open(fake + "/calls") if line.endswith("\\n")]
    starts = [call[1] for call in calls if call[0] == "mae-jax"]
    *_, connection = [call[-1] for call in calls if call[4:5] == ["ssh"]]
    if starts.count("1") == starts.count("0") and ("sh follow" in connection or "sh attach" in connection):
        break
    time.sleep(0.02)
with open(fake + "/jobs") as file:
    now, *rest = file.read().splitlines()
with open(fake + "/jobs", "w") as file:
    file.write("\\n".join(rest))
print("the log of", now, flush=True)
if now == "wait":
    while not os.path.exists(fake + "/go"):
        time.sleep(0.02)
elif now == "taken":
    with open(fake + "/state", "w") as file:
        file.write("SUSPENDING\\nSUSPENDED\\n")
    os.killpg(0, signal.SIGKILL)
elif now == "rebooted":
    os.killpg(0, signal.SIGKILL)
else:
    sys.exit(int(now))
"""


class Cloud:
    """The fakes, and a checkout with nothing in it but launch/."""

    def __init__(self, fakes, checkout):
        self.fakes, self.root, self.script = fakes, fakes.root, str(checkout / "launch" / "tpu_vm.sh")
        for name, body in {"gcloud": GCLOUD, "uv": UV}.items():
            fakes.add(name, body)
        (fakes.root / "worker").mkdir()
        for name, body in {
            "c++": "",
            "sleep": "exec /bin/sleep 0.05",
            "tail": 'exec /usr/bin/tail -s 0.05 "$@"',
        }.items():
            self.write(f"worker/{name}", f"#!/bin/sh\n{body}\n").chmod(0o755)
        self.write("mae-jax.py", MAE_JAX)
        self.write("created", "ACCEPTED\nPROVISIONING\nACTIVE\n")
        shutil.copytree(fakes.launch, checkout / "launch")
        for command in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q -m x"):
            subprocess.run(["git", "-C", checkout, *command.split()], check=True)

    def write(self, name, text):
        (self.root / name).write_text(text)
        return self.root / name

    def run(self, *arguments, jobs="0"):
        """Runs the script to its end, with what the job does each time it is started."""
        self.write("jobs", jobs.replace(" ", "\n"))
        return self.fakes.run(self.script, *arguments)

    def verbs(self):
        """What was done to the slice, in order; `ssh` as what was run there."""
        verbs = []
        for _, *call in self.fakes.calls("gcloud"):
            verb, command = call[3], [word for word in call if word.startswith("--command=")]
            if command:
                verb = next(word for word in ("install", "start", "attach", "follow") if f"sh {word}" in command[0])
            verbs += [verb] if verb != "list" else []
        return verbs

    def jobs(self, worker="0"):
        """The arguments of each start of mae-jax on a worker."""
        return [call[3:] for call in self.fakes.calls("mae-jax") if call[1] == worker]


ONCE = ["create", "scp", "install", "start", "follow"]
AGAIN = ["attach", "scp", "install", "start", "follow"]


@pytest.fixture
def cloud(fakes, tmp_path):
    """A `Cloud` without any slice. What still runs there at the end is ended."""
    cloud = Cloud(fakes, tmp_path / "checkout")
    yield cloud
    for group in cloud.root.glob("homes/*/mae_jax_run/group"):
        subprocess.run(["kill", "-KILL", "--", f"-{group.read_text().strip()}"], capture_output=True)


def test_shellcheck(shellcheck):
    shellcheck("tpu_vm.sh", "tpu_worker.sh")


def test_a_job_from_nothing_to_nothing(cloud):
    done = cloud.run(*SLICE, "--spot", *JOB)
    assert done.returncode == 0, done.stderr
    assert "the log of 0" in done.stdout
    assert cloud.verbs() == [*ONCE, "delete"]
    create = next(call for call in cloud.fakes.calls("gcloud") if call[4] == "create")
    names = ["mae", "--node-id=mae", "--zone=us-east5-a"]
    assert create[5:] == [*names, "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    for worker in "01":
        assert cloud.jobs(worker) == [list(JOB)]
    assert all(call[2] == "mae_jax" for call in cloud.fakes.calls("mae-jax"))  # where relative configs are found
    assert not (cloud.root / "state").exists()


def test_arguments_arrive_unchanged(cloud):
    arguments = ["pretrain", *cloud.fakes.nasty]
    done = cloud.run(*SLICE, *arguments)
    assert done.returncode == 0, done.stderr
    assert cloud.jobs("0") == cloud.jobs("1") == [arguments]
    assert not list(cloud.root.rglob("bad"))


def test_a_slice_that_is_taken_away_is_made_again_and_the_job_resumed(cloud):
    done = cloud.run(*SLICE, *JOB, jobs="taken taken 0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, "delete"] * 3
    assert cloud.jobs() == [list(JOB)] * 3
    assert done.stderr.count("mae was taken away; once more") == 2


def test_a_slice_that_cannot_be_had_back_at_once_is_waited_for(cloud):
    cloud.write("fail", "1 queued-resources delete\n")
    cloud.write("state", "SUSPENDED\n")
    (cloud.root / "homes").mkdir()
    assert cloud.run(*SLICE, *JOB).returncode == 0
    assert cloud.verbs() == ["delete", "delete", *ONCE, "delete"]


@pytest.mark.parametrize("states", ["PROVISIONING SUSPENDING SUSPENDED", "WAITING_FOR_RESOURCES ACTIVE SUSPENDED"])
def test_a_slice_that_is_taken_away_while_it_is_made_or_copied_to_is_made_again(cloud, states):
    """Twice: before it is ever there, or when the first copy to it fails."""
    copied = "ACTIVE" in states
    cloud.write("fail", "1 tpu-vm scp\n" * 2 * copied)
    for time in (1, 2):
        cloud.write(f"created_{time}", states.replace(" ", "\n"))
    done = cloud.run(*SLICE, *JOB)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*["create", *["scp"] * copied, "delete"] * 2, *ONCE, "delete"]
    assert cloud.jobs() == [list(JOB)]


def test_a_slice_that_was_taken_away_is_asked_for_until_it_is_had(cloud):
    """Other than at the first time: a request that fails, or is refused, says nothing about zone and type any more."""
    cloud.write("created_2", "FAILED\n")
    done = cloud.run(*SLICE, *JOB, jobs="taken 0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, "delete", "create", "delete", *ONCE, "delete"]


def test_a_slice_that_is_not_listed_at_once_is_asked_for_once(cloud):
    cloud.write("created", "\n\nACTIVE\n")
    assert cloud.run(*SLICE, *JOB).returncode == 0
    assert cloud.verbs() == [*ONCE, "delete"]
    cloud.write("created", "\n")
    done = cloud.run(*SLICE, *JOB)
    assert done.returncode == 1 and "is not listed" in done.stderr
    assert cloud.verbs() == [*ONCE, "delete", "create"]


@pytest.mark.parametrize("code, failures, expected", [(3, 2, 3), (0, 3, 1)])
def test_a_slice_that_cannot_be_deleted_is_tried_again_and_said_to_cost(cloud, code, failures, expected):
    cloud.write("fail", "1 queued-resources delete\n" * failures)
    done = cloud.run(*SLICE, *JOB, jobs=str(code))
    assert done.returncode == expected
    assert cloud.verbs() == [*ONCE, *["delete"] * 3]
    assert ("mae is still there, at a cost" in done.stderr) == (failures == 3)


def test_an_interrupted_job_is_resumed_on_the_same_slice(cloud):
    done = cloud.run(*SLICE, *JOB, jobs="6 134 143 rebooted 0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, *AGAIN * 4, "delete"]
    assert cloud.jobs("0") == cloud.jobs("1") == [list(JOB)] * 5
    assert (cloud.root / "ended").read_text() == "1" * 4  # what was left of the job there was ended first


@pytest.mark.parametrize("code", [1, 2, 5, 139])
def test_a_failure_for_good_is_not_repeated_and_costs_nothing_more(cloud, code):
    done = cloud.run(*SLICE, *JOB, jobs=f"{code} 0")
    assert done.returncode == code
    assert cloud.verbs() == [*ONCE, "delete"]
    assert len(cloud.jobs()) == 1


def test_what_never_works_is_given_up(cloud):
    cloud.write("fail", "1 tpu-vm scp\n" * 9)
    assert cloud.run(*SLICE, *JOB).returncode == 1
    assert cloud.verbs() == ["create", "scp", *["attach", "scp"] * 5, "delete"]


def test_no_slice(cloud):
    cloud.write("fail", "1 queued-resources create\n")
    done = cloud.run(*SLICE, *JOB)
    assert (done.returncode, cloud.verbs()) == (1, ["create"])
    assert "tpu_vm.sh: no mae (see above); check quota, zone and type" in done.stderr


def test_a_request_that_fails(cloud):
    cloud.write("created", "WAITING_FOR_RESOURCES\nFAILED\n")
    done = cloud.run(*SLICE, *JOB)
    assert (done.returncode, cloud.verbs()) == (1, ["create", "describe", "delete"])
    assert "Google cannot provide mae" in done.stderr


def test_an_interrupted_script_is_followed_up_by_the_same_command(cloud):
    cloud.write("jobs", "wait")
    first = cloud.fakes.start(cloud.script, *SLICE, *JOB)
    assert first.stdout.readline() == "the log of wait\n"
    first.send_signal(signal.SIGTERM)  # handled once gcloud has ended, which a terminal would interrupt too
    other = cloud.fakes.run(cloud.script, *SLICE, "knn")
    assert other.returncode == 1 and "another job runs on mae" in other.stderr
    second = cloud.fakes.start(cloud.script, *SLICE, *JOB)
    assert second.stdout.readline() == "the log of wait\n"
    (cloud.root / "go").touch()
    assert first.wait(20) == 143
    assert "mae is still there, at a cost" in first.stderr.read()
    assert second.wait(20) == 0
    assert cloud.verbs() == [*ONCE, "attach", "attach", "delete"]
    for process in (first, second):
        process.communicate()


def test_a_lost_connection_is_taken_up_again(cloud):
    cloud.write("jobs", "wait")
    cloud.write("fail", "255 tpu-vm ssh mae --zone=us-east5-a --worker=0\n")
    process = cloud.fakes.start(cloud.script, *SLICE, *JOB)
    assert process.stdout.readline() == "the log of wait\n"
    (cloud.root / "go").touch()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert cloud.verbs() == [*ONCE, "attach", "delete"]


def test_no_connection_leaves_the_job_alone(cloud):
    cloud.write("fail", "1 tpu-vm ssh mae --zone=us-east5-a --worker=0\n" * 20)
    done = cloud.run(*SLICE, *JOB, jobs="wait")
    assert done.returncode == 1 and "no connection to mae" in done.stderr and "still there" in done.stderr
    assert "delete" not in cloud.verbs()


def test_gcloud_that_fails_leaves_the_slice_alone(cloud):
    cloud.write("state", "ACTIVE\n")
    cloud.write("fail", "1 queued-resources list\n" * 3)
    done = cloud.run(*SLICE, *JOB)
    assert (done.returncode, cloud.verbs()) == (1, [])
    assert "gcloud does not say what mae is doing" in done.stderr


def test_keep(cloud):
    assert cloud.run(*SLICE, "--keep", "pretrain", "--workdir=runs/here").returncode == 0
    assert cloud.verbs() == ONCE
    assert cloud.run(*SLICE, *JOB).returncode == 0
    assert cloud.verbs() == [*ONCE, *AGAIN, "delete"]


def test_what_others_made_is_used_and_left(cloud):
    assert cloud.run(*SLICE, "--keep", *JOB).returncode == 0
    (cloud.root / "state").unlink()
    (cloud.root / "calls").unlink()
    cloud.write("vm", "CREATING\nCREATING\nREADY\n")
    assert cloud.run(*SLICE, *JOB).returncode == 0
    assert cloud.verbs() == AGAIN
    cloud.write("vm", "PREEMPTED\n")
    done = cloud.run(*SLICE, *JOB)
    assert done.returncode == 1 and "mae is PREEMPTED, and was made by others" in done.stderr
    assert cloud.verbs() == AGAIN


def test_dry_run_prints_what_can_be_pasted(cloud):
    command = (*SLICE, "--spot", "pretrain", *cloud.fakes.nasty)
    printed = cloud.run("--dry-run", *command)
    assert (printed.returncode, printed.stderr, cloud.fakes.calls()) == (0, "", [])
    assert not (cloud.root / "build").exists()
    done = [cloud.run(*command)]
    real = cloud.fakes.calls("gcloud")
    (cloud.root / "calls").unlink()
    cloud.write("jobs", "0")
    done.append(cloud.fakes.run("-ec", printed.stdout))
    assert [process.returncode for process in done] == [0, 0]
    pasted = cloud.fakes.calls("gcloud")
    assert cloud.jobs() == [["pretrain", *cloud.fakes.nasty]]
    real, pasted = ([call for call in calls if call[4] != "list"] for calls in (real, pasted))
    assert pasted == real


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (SLICE, "JOB is missing"),
        ((*SLICE[1:], *JOB), "--name=... is missing"),
        ((*SLICE, "--name=Mae", *JOB), "--name=Mae: a name has"),
        ((*SLICE, "--type=v9-8", *JOB), "--type=v9-8: no runtime is known"),
        ((*SLICE, "--zone", "x", *JOB), "--zone: no such option, or one without its value"),
        ((*SLICE, "pretrain", "--workdir=runs/x"), "--workdir=runs/x is on disks that are deleted"),
    ],
)
def test_misuse_is_refused_in_one_line(cloud, arguments, complaint):
    done = cloud.run(*arguments)
    assert done.returncode == 2 and not cloud.fakes.calls()
    assert done.stderr.startswith(f"tpu_vm.sh: {complaint}") and done.stderr.count("\n") == 1


def test_what_is_not_committed_is_said_not_to_be_copied(cloud):
    with open(cloud.script, "a") as file:
        file.write("# changed\n")
    assert "not committed are not copied" in cloud.run("--dry-run", *SLICE, *JOB).stderr


def test_help_is_the_header(cloud):
    done = cloud.run("--help")
    assert "usage: launch/tpu_vm.sh [--dry-run]" in done.stdout and "set -e" not in done.stdout
