"""launch/slurm.sh and slurm.sbatch, where fakes play Slurm."""

import json

import pytest

# Runs what it is given as every process of the job, one after the other, and reports the highest exit code.
SRUN = """
import signal, subprocess
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
if os.path.exists(fake + "/term-shell"):
    os.kill(os.getppid(), signal.SIGTERM)
codes = []
for process in range(int(os.environ["SLURM_NTASKS"])):
    step = subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(process)}, start_new_session=True)
    if os.path.exists(fake + "/term"):
        while not os.path.exists(fake + "/training"):
            pass
        os.killpg(step.pid, signal.SIGTERM)
    codes.append(step.wait() % 256)
sys.exit(max(codes))
"""
# Ends as the file `codes` says for its process; or saves on SIGTERM.
MAE_JAX = """
import signal, time
if os.path.exists(fake + "/term"):
    def save(*_):
        time.sleep(0.2)
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    open(fake + "/training", "w").close()
    time.sleep(30)
sys.exit(json.load(open(fake + "/codes"))[int(os.environ["SLURM_PROCID"])])
"""


@pytest.fixture
def slurm(fakes):
    """All that slurm.sbatch calls; `sbatch` only records."""
    for name, body in {"sbatch": "", "srun": SRUN, "mae-jax": MAE_JAX, "scontrol": ""}.items():
        fakes.add(name, body)
    fakes.add("squeue", "print(os.environ['STATE'])")
    return fakes


def job(slurm, *codes, arguments=("pretrain", "--workdir=x"), state="RUNNING", **env):
    """Runs slurm.sbatch as Slurm does, with processes that end with these codes."""
    (slurm.root / "codes").write_text(json.dumps(codes))
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(len(codes)), "STATE": state, **env}
    return slurm.run(str(slurm.launch / "slurm.sbatch"), *arguments, **env)


def requeued(slurm) -> bool:
    """Whether the job was queued again, and once only."""
    calls = slurm.calls("scontrol")
    assert calls in ([], [["scontrol", "requeue", "7"]])
    return bool(calls)


def test_shellcheck(shellcheck):
    shellcheck("slurm.sh", "slurm.sbatch")


def test_arguments_reach_sbatch_and_every_process_unchanged(slurm):
    script = str(slurm.launch / "slurm.sbatch")
    done = slurm.run(str(slurm.launch / "slurm.sh"), "--nodes=2", "--comment=a b", "--", "pretrain", *slurm.nasty)
    assert (done.returncode, done.stderr) == (0, "")
    assert slurm.calls() == [["sbatch", "--nodes=2", "--comment=a b", script, "pretrain", *slurm.nasty]]
    assert job(slurm, 0, 0, arguments=("pretrain", *slurm.nasty)).returncode == 0
    assert slurm.calls("mae-jax") == [["mae-jax", "pretrain", *slurm.nasty]] * 2
    assert not (slurm.root / "bad").exists()


def test_dry_run_prints_what_can_be_pasted(slurm):
    command = str(slurm.launch / "slurm.sh"), "--nodes=2", "--", "pretrain", *slurm.nasty
    assert slurm.run(*command).returncode == 0
    printed = slurm.run(command[0], "--dry-run", *command[1:])
    assert (printed.returncode, printed.stderr, len(slurm.calls())) == (0, "", 1)
    assert slurm.run("-c", printed.stdout).returncode == 0
    first, second = slurm.calls()
    assert first == second


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "-- JOB is missing"),
        (["--nodes=2"], "-- JOB is missing"),
        (["--nodes=2", "--"], "JOB is missing"),
        (["-N", "2", "--", "pretrain"], "2: options of sbatch"),
        (["pretrain"], "pretrain: options of sbatch"),
    ],
)
def test_misuse_is_refused_in_one_line(slurm, arguments, complaint):
    done = slurm.run(str(slurm.launch / "slurm.sh"), *arguments)
    assert done.returncode == 2 and not slurm.calls()
    assert done.stderr.startswith(f"slurm.sh: {complaint}") and done.stderr.count("\n") == 1


def test_help_is_the_header(slurm):
    assert "usage: launch/slurm.sh [--dry-run]" in slurm.run(str(slurm.launch / "slurm.sh"), "--help").stdout


@pytest.mark.parametrize("code", [143, 6, 134, 137])
def test_an_interrupted_job_is_queued_again(slurm, code):
    assert job(slurm, 0, code).returncode == code
    assert requeued(slurm)


@pytest.mark.parametrize("codes, code", [([2, 2], 2), ([143, 3], 3), ([6, 5], 5), ([1, 134, 137], 1), ([139, 6], 255)])
def test_a_failure_for_good_is_reported_and_not_repeated(slurm, codes, code):
    assert job(slurm, *codes).returncode == code
    assert not requeued(slurm)


def test_a_cancelled_job_stays_cancelled(slurm):
    done = job(slurm, 143, state="COMPLETING")
    assert (done.returncode, done.stderr) == (143, "")
    assert not requeued(slurm)


@pytest.mark.parametrize("tool", ["squeue", "scontrol"])
def test_where_slurm_does_not_answer_it_is_said_what_to_do(slurm, tool):
    slurm.add(tool, "sys.exit(1)")
    done = job(slurm, 143)
    assert done.returncode == 143 and "submit it once more" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("restarts, seconds, again", [("5", "0", False), ("4", "0", True), ("5", "700", True)])
def test_losing_a_process_at_once_is_not_repeated_for_ever(slurm, restarts, seconds, again):
    assert job(slurm, 6, 6, SLURM_RESTART_COUNT=restarts, SECONDS=seconds).returncode == 6
    assert requeued(slurm) == again


@pytest.mark.parametrize("target", ["term", "term-shell"])
def test_sigterm_waits_for_what_is_being_saved(slurm, target):
    """Slurm's signal before the time limit goes to the processes; a preemption may signal the script too."""
    (slurm.root / target).touch()
    assert job(slurm, 143).returncode == 143
    assert requeued(slurm)


def test_the_signal_leaves_the_script_alone_and_the_job_may_be_queued_again(slurm):
    """A trap here could only kill srun, and srun the processes."""
    lines = (slurm.launch / "slurm.sbatch").read_text().splitlines()
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--kill-on-bad-exit=0" in srun
