"""Files of a workdir, on a disk and in a bucket (which a folder plays here)."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils.epath import backend, gpath
from PIL import Image

from mae_jax.errors import ConfigError
from mae_jax.files import absolute, alone_in, make_workdir, path_of, to_path, write, write_json, write_picture
from mae_jax.training import checkpoint, metrics


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    """A folder, or what looks like one in a bucket."""
    if request.param == "disk":
        return tmp_path / "run"

    class Bucket(backend._OsPathBackend):
        """Files of "gs://bucket/..." are those below tmp_path."""

    def moved(name):
        real = getattr(backend._OsPathBackend, name)
        here = lambda path: str(path).replace("gs://bucket", str(tmp_path))  # noqa: E731

        def call(self, *paths, **options):
            found = real(self, *[here(p) if "gs://" in str(p) else p for p in paths], **options)
            return [f.replace(str(tmp_path), "gs://bucket") for f in found] if name == "glob" else found

        return call

    for name in ("open", "exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "remove", "replace", "rename"):
        setattr(Bucket, name, moved(name))
    monkeypatch.setattr(gpath.backend_lib, "tf_backend", Bucket())
    return to_path("gs://bucket/run")


def test_a_workdir_is_made_with_its_parents(workdir):
    make_workdir(workdir / "a/b/c")
    make_workdir(workdir / "a/b/c")
    assert (workdir / "a/b/c").is_dir()


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 5000])
def test_a_workdir_that_cannot_be_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error:
        make_workdir(tmp_path / place)
    (line,) = error.value.problems
    assert f"--workdir={tmp_path / place}" in line


def test_a_workdir_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        make_workdir(tmp_path)


def test_a_file_is_there_whole_and_alone(workdir):
    write_json(workdir / "deep" / "a.json", {"a": [1, 2]})
    write_json(workdir / "deep" / "a.json", {"a": 3})
    assert json.loads((workdir / "deep" / "a.json").read_text()) == {"a": 3}
    assert [path.name for path in (workdir / "deep").iterdir()] == ["a.json"]


def test_a_picture_is_a_png_file(workdir):
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    write_picture(workdir / "a.png", picture)
    with (workdir / "a.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)


def test_one_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path / "a", b"")
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"a": 1.0})
    writer.picture(1, "pictures", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_metrics_go_on_where_they_were(workdir, monkeypatch):
    class Nowhere:
        write_scalars = write_images = close = lambda *args: None

    writers = SimpleNamespace(SummaryWriter=lambda path: None, AsyncWriter=lambda writer: Nowhere())
    monkeypatch.setattr(metrics, "metric_writers", writers)
    for resumed in (0, 2):
        writer = metrics.Writer(workdir, resumed)
        for step in range(resumed + 1, resumed + 4):
            writer.scalars(step, {"loss": 1 / step})
        writer.close()
    assert [line["step"] for line in metrics.read(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_checkpoints_are_found(workdir):
    for step in (3, 12, 7):
        for item in ("state", "config"):
            (workdir / "checkpoints" / str(step) / item).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "commit_success.txt").write_text("")
    if str(workdir).startswith("gs://"):  # where it says whether a checkpoint was written to the end
        (workdir / "checkpoints" / "15" / "state").mkdir(parents=True)
    assert sorted(checkpoint.steps_in(workdir / "checkpoints")) == [3, 7, 12]
    assert checkpoint.locate(str(workdir)) == workdir / "checkpoints" / "12"
    assert str(absolute(workdir)) == str(workdir)


@pytest.mark.parametrize(
    ("text", "path"), [("~/a", Path.home() / "a"), ("a/../b", Path("a/../b")), ("gs://a/b", "gs://a/b")]
)
def test_what_a_flag_names(text, path):
    assert str(path_of("workdir", text)) == str(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("~nobody_here/a", "no such user"), ("s3://a/b", "only gs://"), ("a/\udcff", r"=a/\\udcff: not UTF-8")],
)
def test_what_a_flag_cannot_name(text, told):
    with pytest.raises(ConfigError, match=told):
        path_of("workdir", text)


def test_nothing_is_left_of_a_run_that_was_alone(workdir):
    with alone_in(workdir):
        assert workdir.exists()
    assert list(workdir.iterdir()) == []


def test_a_second_run_in_a_workdir_is_told_of_the_first(tmp_path):
    owner = rf"process {os.getpid()} on {socket.gethostname()} is at work there"
    with alone_in(tmp_path):
        with pytest.raises(ConfigError, match=owner) as caught, alone_in(tmp_path):
            pass
        assert caught.value.exit_code == 2 and len(caught.value.problems) == 1
    with alone_in(tmp_path):
        pass


def test_a_run_that_fails_lets_the_next_in(tmp_path):
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path):
        raise ZeroDivisionError
    with alone_in(tmp_path):
        pass


ALONE = """
import sys, time
from pathlib import Path
from mae_jax.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("alone", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_run_leaves_behind_keeps_nobody_out(tmp_path, capsys):
    first = subprocess.Popen([sys.executable, "-c", ALONE, tmp_path], stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "alone\n"
        with pytest.raises(ConfigError, match=f"process {first.pid} on "), alone_in(tmp_path):
            pass
        first.kill()
    with alone_in(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    told = capsys.readouterr().out
    assert f"left behind by process {first.pid} on {socket.gethostname()}, which is gone" in told


def test_a_lock_that_is_removed_by_hand_locks_no_more_and_is_not_anothers_to_remove(tmp_path):
    with alone_in(tmp_path):
        (tmp_path / "lock").unlink()
        with alone_in(tmp_path):
            pass
        with alone_in(tmp_path):
            (tmp_path / "lock").rename(tmp_path / "away")
            (tmp_path / "lock").write_text("of a third")
    assert (tmp_path / "lock").read_text() == "of a third"


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_is_refused_and_not_followed(there, tmp_path):
    if there:
        (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to("mine")
    with pytest.raises(ConfigError, match="lock is a link"), alone_in(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine" if there else not (tmp_path / "mine").exists()


def test_a_lock_that_is_no_text_is_taken_over(tmp_path, capsys):
    (tmp_path / "lock").write_bytes(b"\xff\xfe\x00")
    with alone_in(tmp_path):
        assert (tmp_path / "lock").read_text().startswith("process ")
    assert "left behind by" in capsys.readouterr().out


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in(tmp_path), alone_in(tmp_path):
        assert "nothing keeps a second run out" in capsys.readouterr().out
