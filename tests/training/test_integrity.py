"""A damaged checkpoint is found, named, kept aside and not gone on with, whatever of it is damaged and however."""

import contextlib
import ctypes
import errno
import gc
import json
import os
import shutil
import socket

import jax
import pytest

from mae_jax.__main__ import main
from mae_jax.errors import CheckpointError
from mae_jax.files import absolute
from mae_jax.jobs import verify
from mae_jax.training import checkpoint, integrity
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.loop import State

CONFIG = {"seed": 3, "data": {"image_size": [8, 8]}}


def make_state(step):
    """A state whose values tell the step."""
    params = {"encoder": {"kernel": jax.numpy.full((64, 16), step, "float32"), "bias": jax.numpy.arange(16.0) + step}}
    return State(step=jax.numpy.int32(step), params=params, opt_state={}, stats={}, ema={}, norm=jax.numpy.float32(0))


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))


def save(workdir, *steps):
    checkpoints = Checkpoints(workdir, CONFIG, keep=9)
    for step in steps:
        checkpoints.save(make_state(step), step)
    checkpoints.close()


def resume(workdir):
    """The state that a run would go on with."""
    checkpoints = Checkpoints(workdir, CONFIG, keep=9)
    try:
        return checkpoints.restore(ABSTRACT) if checkpoints.latest_step else None
    finally:
        checkpoints.close()


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest(folder):
    return max(folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The workdir of a run that saved three steps."""
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    save(workdir, 3, 5, 7)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of that, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


FILES = {
    "arrays": largest,
    "state/_METADATA": None,
    "state/_sharding": None,
    "state/manifest.ocdbt": None,
    "state/ocdbt.process_0/manifest.ocdbt": None,
    "state/array_metadatas/process_0": None,
    "config/config.json": None,
    "manifest/manifest.json": None,
    "_CHECKPOINT_METADATA": None,
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WAYS = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def damage(folder, file, way):
    path = FILES[file](folder) if FILES[file] else folder / file
    before = path.read_bytes()
    WAYS[way](path)
    assert not path.exists() or path.read_bytes() != before
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_it_is_gone_on_with(file, way, workdir, capsys):
    folder = workdir / "checkpoints" / "7"
    path = damage(folder, file, way)
    before = bytes_of(workdir)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()] == [["3", "as"], ["5", "as"], ["7", "damaged:"]]
    assert "1 of 3 checkpoints damaged" in err and len(err.splitlines()) == 1
    assert bytes_of(workdir) == before, "nothing is changed by looking"

    assert int(resume(workdir).step) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"damaged: {folder}: ") and str(path.relative_to(folder)) in line
    aside = workdir / "checkpoints" / "damaged" / "7"
    assert line.endswith(f"; moved to {aside}")
    assert bytes_of(aside) == {name[14:]: data for name, data in before.items() if name.startswith("checkpoints/7/")}
    assert main(["verify", f"--workdir={workdir}"]) == 0
    assert float(resume(workdir).params["encoder"]["kernel"][0, 0]) == 5


@pytest.mark.parametrize("gone", ["state", "config", "manifest", "."])
def test_so_is_one_of_which_a_folder_is_gone(gone, workdir, capsys):
    folder = workdir / "checkpoints" / "7"
    shutil.rmtree(folder / gone)
    folder.mkdir(exist_ok=True)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert int(resume(workdir).step) == 5
    assert (workdir / "checkpoints" / "damaged" / "7").is_dir()


def test_two_files_that_have_changed_places_are_found(workdir):
    one, *_, other = sorted((workdir / "checkpoints" / "7").glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert int(resume(workdir).step) == 5


LATE = {
    **dict.fromkeys(
        ["_CHECKPOINT_METADATA", "commit_success.txt", "manifest/commit_success.txt"], ("flipped", "deleted")
    ),
    "manifest/last.json": ("flipped", "empty"),
}


@pytest.mark.parametrize(("file", "way"), [(file, way) for file, ways in LATE.items() for way in ways])
def test_what_orbax_writes_after_the_sums_has_sums_of_its_own(file, way, workdir, capsys):
    path = workdir / "checkpoints" / "7" / file
    if file.endswith("METADATA") and way == "flipped":  # a time, of which nothing else depends
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"commit_timestamp_nsecs": told["commit_timestamp_nsecs"] ^ 1}))
    else:
        WAYS[way](path)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert f"7  damaged: {file} " in capsys.readouterr().out
    assert int(resume(workdir).step) == 5


def test_a_run_killed_before_it_wrote_those_leaves_a_whole_checkpoint(workdir):
    """But one that is marked as finished, and which Orbax can read."""
    folder = workdir / "checkpoints" / "7"
    (folder / "manifest" / "last.json").unlink()
    assert main(["verify", f"--workdir={workdir}"]) == 0
    assert int(resume(workdir).step) == 7
    (folder / "commit_success.txt").unlink()
    assert int(resume(workdir).step) == 5


@pytest.mark.parametrize(
    "changes",
    [{"init_timestamp_nsecs": "x"}, {"metrics": [1]}, {"custom_metadata": 5}, {"item_handlers": [1]}],
    ids=str,
)
def test_what_orbax_could_not_read_is_damaged_without_those_too(changes, workdir):
    folder = workdir / "checkpoints" / "7"
    (folder / "manifest" / "last.json").unlink()
    told = json.loads((folder / integrity.ORBAX).read_text())
    (folder / integrity.ORBAX).write_text(json.dumps(told | changes))
    assert int(resume(workdir).step) == 5


@pytest.mark.parametrize("file", ["state/extra", "manifest/extra", "extra"])
def test_a_file_that_was_added_is_damage(file, workdir, capsys):
    (workdir / "checkpoints" / "7" / file).write_text("")
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert f"7  damaged: {file} was added" in capsys.readouterr().out
    assert int(resume(workdir).step) == 5


def test_what_file_systems_and_copying_leave_behind_is_no_damage(workdir):
    (workdir / "checkpoints" / "7" / "state" / ".nfs000001").write_text("")
    (workdir / "checkpoints" / "7" / ".DS_Store").write_text("")
    assert int(resume(workdir).step) == 7


def test_trouble_that_passes_is_no_damage(workdir, monkeypatch):
    def no_more_files(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(integrity, "_size_and_sum", no_more_files)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        resume(workdir)
    monkeypatch.undo()
    assert int(resume(workdir).step) == 7


@pytest.mark.parametrize("name", ["7", "9"])
def test_a_checkpoint_by_the_name_of_another_step_is_damaged(name, workdir, capsys):
    """It would be gone on with, or taken for the end, with the weights of another step."""
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / "7")
    (folder / "3").rename(folder / name)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert f"{name}  damaged: it is the checkpoint of step 3" in capsys.readouterr().out
    assert int(resume(workdir).step) == 5
    assert (folder / "damaged" / name).is_dir()


def test_without_a_step_in_its_sums_a_checkpoint_counts_as_that_of_its_name(workdir):
    """As earlier versions wrote it."""
    path = workdir / "checkpoints" / "7" / "manifest" / "manifest.json"
    contents = json.loads(path.read_text())
    del contents["sha256"], contents["step"]
    path.write_text(json.dumps(contents | {"sha256": integrity._own_sum(contents)}))
    (path.parent / "last.json").unlink()
    assert int(resume(workdir).step) == 7


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder_in_place(path):
    path.unlink()
    path.mkdir()


def socket_in_place(path):
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):  # a short name
        bound.bind(path.name)


ODD = {
    "pipe": pipe,
    "folder": folder_in_place,
    "socket": socket_in_place,
    "deep": lambda path: path.write_text("[" * 200_000),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize(
    ("file", "way"),
    [(integrity.ORBAX, way) for way in ODD]
    + [(file, way) for file in ("state/_METADATA", "manifest/manifest.json") for way in ("pipe", "unreadable")],
)
def test_what_is_no_file_or_cannot_be_read_is_damage(file, way, workdir, capsys, no_override):
    ODD[way](workdir / "checkpoints" / "7" / file)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert f"7  damaged: {file}" in capsys.readouterr().out
    assert int(resume(workdir).step) == 5


@pytest.fixture
def no_override():
    """Within the test, root too may read and write only what it has the right to."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    if os.geteuid():
        yield
        return
    assert libc.capget(header, before) == 0
    fewer[:] = before[:]
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, before) == 0


def plain_file(folder):
    damage(folder / "7", "arrays", "flipped")
    (folder / "damaged").write_text("mine")


def read_only(folder):
    damage(folder / "7", "arrays", "flipped")
    folder.chmod(0o500)


def link_to_nothing(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("nowhere")


STUCK = {
    "plain_file": (plain_file, r"checkpoints/7: damaged: .*; it cannot be moved to .*damaged \(File exists\): make"),
    "read_only": (read_only, r"checkpoints/7: damaged: .*; it cannot be moved to .*damaged \(Permission denied\)"),
    "step": (
        lambda folder: (folder / "7").chmod(0),
        r"checkpoints/7: damaged: .*; it cannot be moved to ",
    ),
    "all": (lambda folder: folder.chmod(0), r"run/checkpoints: cannot be read \(Permission denied\); make it a folder"),
    "link": (link_to_nothing, r"run/checkpoints: cannot be read \(No such file or directory\); make it a folder"),
}


@pytest.mark.parametrize("way", STUCK)
def test_where_nothing_can_be_moved_a_line_says_what_to_do(way, workdir, no_override):
    folder = workdir / "checkpoints"
    STUCK[way][0](folder)
    with pytest.raises(CheckpointError, match=STUCK[way][1]) as caught:
        resume(workdir)
    assert len(caught.value.problems) == 1
    assert main(["verify", f"--workdir={workdir}"]) == 4
    if not folder.is_symlink():
        folder.chmod(0o700)
        (folder / "7").chmod(0o700)


@pytest.mark.parametrize("changes", [{"format": "2.0"}, {"format": True}, {"files": [1]}, {"files": {"a": 1}}], ids=str)
def test_sums_that_are_none_are_damage(changes, workdir):
    rewrite(workdir / "checkpoints" / "7", **changes)
    assert main(["verify", f"--workdir={workdir}"]) == 4
    assert int(resume(workdir).step) == 5


def test_an_empty_folder_of_the_name_of_a_step_is_damage_and_what_has_another_name_is_nothing(workdir, capsys):
    folder = workdir / "checkpoints"
    (folder / "notes").mkdir()
    (folder / "10").write_text("")
    assert main(["verify", f"--workdir={workdir}"]) == 0
    assert int(resume(workdir).step) == 7
    (folder / "9").mkdir()
    assert main(["verify", f"--workdir={workdir}"]) == 4
    capsys.readouterr()
    assert int(resume(workdir).step) == 7
    assert f"damaged: {folder / '9'}: " in capsys.readouterr().out
    assert (folder / "damaged" / "9").is_dir()


def test_what_a_run_removes_while_it_is_read_is_not_damaged(workdir, monkeypatch, capsys):
    """Old checkpoints are removed as new ones come, file by file."""
    folder, look = workdir / "checkpoints" / "3", integrity.damage
    (workdir / "lock").write_text("process 1 on here")

    def removing(where):
        if where.name == "3":
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            files[0].unlink()
            found = look(where)
            if len(files) < 12:
                shutil.rmtree(folder)
            return found
        return look(where)

    monkeypatch.setattr(integrity, "damage", removing)
    monkeypatch.setattr(verify.time, "sleep", lambda seconds: None)
    assert main(["verify", f"--workdir={workdir}"]) == 0
    assert "3  removed meanwhile" in capsys.readouterr().out


def test_the_newest_that_is_whole_is_found_and_later_ones_are_saved_anew(workdir, capsys):
    for step in ("5", "7"):
        damage(workdir / "checkpoints" / step, "arrays", "flipped")
    assert int(resume(workdir).step) == 3
    assert len(capsys.readouterr().out.splitlines()) == 2
    save(workdir, 5, 7)
    assert int(resume(workdir).step) == 7
    damage(workdir / "checkpoints" / "7", "arrays", "flipped")
    assert int(resume(workdir).step) == 5
    assert {p.name for p in (workdir / "checkpoints" / "damaged").iterdir()} == {"5", "7", "7.1"}, "nothing is lost"


def test_where_none_is_whole_nothing_begins_anew(workdir, capsys):
    for step in ("3", "5", "7"):
        damage(workdir / "checkpoints" / step, "arrays", "truncated")
    for _ in range(2):  # and not the next time either
        with pytest.raises(CheckpointError, match="no checkpoint is left but damaged ones") as caught:
            resume(workdir)
        assert caught.value.exit_code == 4
    shutil.move(workdir / "checkpoints" / "damaged", workdir / "elsewhere")
    (workdir / "saved.json").unlink()
    assert resume(workdir) is None, "unless they are moved away"


GONE = {
    "deleted": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
    "elsewhere": lambda folder: folder.rename(folder.with_name("checkpoint")),
    "renamed": lambda folder: [path.rename(f"{path}.bak") for path in list(folder.iterdir())],
}


@pytest.mark.parametrize("way", GONE)
def test_where_all_are_gone_nothing_begins_anew(way, workdir):
    GONE[way](workdir / "checkpoints")
    before = bytes_of(workdir)
    with pytest.raises(CheckpointError, match="run/checkpoints: no checkpoint is left of the run") as caught:
        resume(workdir)
    assert caught.value.exit_code == 4 and len(caught.value.problems) == 1
    assert bytes_of(workdir) == before


def test_a_workdir_of_an_earlier_version_is_known_by_its_checkpoints_or_its_summary(workdir):
    (workdir / "saved.json").unlink()
    resume(workdir)
    assert (workdir / "saved.json").exists()
    GONE["deleted"](workdir / "checkpoints")
    (workdir / "saved.json").rename(workdir / "summary.json")
    with pytest.raises(CheckpointError, match="no checkpoint is left of the run"):
        resume(workdir)


def rewrite(folder, **changes):
    """A manifest with other contents, and the right sum."""
    path = folder / "manifest" / "manifest.json"
    contents = json.loads(path.read_text()) | changes
    del contents["sha256"]
    path.write_text(json.dumps(contents | {"sha256": integrity._own_sum(contents)}))


def test_a_newer_format_is_refused_by_name_and_left_where_it_is(workdir, capsys):
    rewrite(workdir / "checkpoints" / "7", format=integrity.FORMAT + 1, more=[1, 2])
    before = bytes_of(workdir)
    with pytest.raises(CheckpointError, match=f"7: is of format {integrity.FORMAT + 1}, and this version"):
        resume(workdir)
    with pytest.raises(CheckpointError, match="is of format"):
        checkpoint.load(workdir, {"params": ABSTRACT.params})
    assert main(["verify", f"--workdir={workdir}"]) == 4
    out, err = capsys.readouterr()
    assert "damaged" not in out + err and "7: is of format" in out and "1 of 3 checkpoints of a newer format" in err
    assert bytes_of(workdir) == before


def without_sums(folder):
    """The checkpoint as an earlier version wrote it."""
    shutil.rmtree(folder / "manifest")
    told = json.loads((folder / integrity.ORBAX).read_text())
    del told["item_handlers"]["manifest"]
    (folder / integrity.ORBAX).write_text(json.dumps(told))


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with_and_this_is_told(workdir, capsys):
    without_sums(workdir / "checkpoints" / "7")
    assert main(["verify", f"--workdir={workdir}"]) == 0
    assert "7  of an earlier version" in capsys.readouterr().out
    assert int(resume(workdir).step) == 7
    assert "7 is of an earlier version, without sums to verify" in capsys.readouterr().out
    assert checkpoint.load_config(workdir) == CONFIG


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax leaves behind
@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/_METADATA"])
def test_one_that_cannot_be_restored_either_is_one_line(file, workdir):
    without_sums(workdir / "checkpoints" / "7")
    (workdir / "checkpoints" / "7" / file).write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"7: not readable .*; move it away to go on from another") as caught:
        resume(workdir)
    assert len(str(caught.value)) < 500
    del caught
    gc.collect()


@pytest.mark.parametrize("file", ["arrays", "config/config.json"])
def test_whoever_reads_a_checkpoint_verifies_it(file, workdir):
    damage(workdir / "checkpoints" / "7", file, "flipped")
    for read in (
        lambda: checkpoint.load(workdir, {"params": ABSTRACT.params}),
        lambda: checkpoint.read(workdir, ("params",)),
        *([lambda: checkpoint.load_config(workdir)] * (file == "config/config.json")),
    ):
        with pytest.raises(CheckpointError, match=r"checkpoints/7: damaged: .* has other bytes; use another"):
            read()
    assert checkpoint.load_config(workdir / "checkpoints" / "5") == CONFIG


def test_a_checkpoint_without_training_has_sums_too(tmp_path):
    checkpoint.write(tmp_path, CONFIG, make_state(1).params)
    folder = absolute(tmp_path / "checkpoints" / "0")
    assert integrity.is_sealed(folder) and integrity.damage(folder) == ""


def test_sums_are_written_before_a_checkpoint_is_committed(tmp_path, monkeypatch):
    """So that a run which is killed leaves none without."""
    monkeypatch.setattr(integrity, "_own_sum", lambda contents: 1 / 0)  # as if killed
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(make_state(1), 1)
    with pytest.raises(CheckpointError, match=r"not saved .division by zero"):
        checkpoints.close()
    assert checkpoint.steps_in(tmp_path / "checkpoints") == []


def test_a_folder_without_checkpoints_cannot_be_verified(tmp_path, capsys):
    assert main(["verify", f"--workdir={tmp_path}"]) == 4
    assert "no checkpoint here" in capsys.readouterr().err
