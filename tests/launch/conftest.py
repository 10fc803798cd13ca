"""What the launch scripts talk to, played by a few lines each: executables that record how they were called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = """#!{python} -SE
import json, os, sys
fake = os.environ["FAKE"]
with open(fake + "/calls", "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


class Fakes:
    """A folder of executables that stand before all others, and what was called.

    Attributes:
      root: the folder; the fakes know it as $FAKE.
      launch: launch/ of this checkout.
      nasty: arguments with every character that a shell could make something of.
    """

    launch = Path(__file__).resolve().parents[2] / "launch"
    nasty = ("a b", "", "'", '"', "$HOME", "$(touch bad)", "`touch bad`", ";touch bad", "a\nb\n", "*", "\\", "&|<>!é")

    def __init__(self, root: Path):
        self.root = root
        (root / "bin").mkdir(parents=True)
        self.env = {"PATH": f"{root}/bin:{os.environ['PATH']}", "HOME": str(root), "FAKE": str(root)}

    def add(self, name: str, body: str = "") -> None:
        """An executable that records its arguments, then does `body`, in Python."""
        path = self.root / "bin" / name
        path.write_text(RECORD.format(python=sys.executable, name=name) + body)
        path.chmod(0o755)

    def start(self, *command: str, **env: str) -> subprocess.Popen:
        """Bash, where the fakes are; nothing else of this environment is known there."""
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(["bash", *command], cwd=self.root, env={**self.env, **env}, text=True, **pipes)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        """The same, until it ends."""
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def calls(self, *names: str) -> list[list[str]]:
        """How the executables were called, in order: all, or those of these names."""
        path = self.root / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if not names or call[0] in names]


@pytest.fixture
def fakes(tmp_path):
    """A `Fakes` without any executable yet but `sleep`, which takes no time."""
    if sys.platform != "linux":
        pytest.skip("Slurm and TPU VMs run Linux")
    fakes = Fakes(tmp_path / "fake")
    fakes.add("sleep")
    return fakes


@pytest.fixture
def shellcheck():
    """Checks scripts of launch/, where there is a shellcheck."""
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not command:
        pytest.skip("no shellcheck")

    def check(*names: str) -> None:
        done = subprocess.run([command, *(Fakes.launch / name for name in names)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    return check
