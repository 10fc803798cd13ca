"""Preparing data sets: the official Fashion-MNIST out of Debian's package, and what goes wrong, in one line."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mae_jax.__main__ import main
from mae_jax.data.prepare import prepare, restore_fashion_mnist
from mae_jax.data.sources import SOURCES
from mae_jax.errors import ConfigError, DataError

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
debian = pytest.mark.skipif(not PACKAGED.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")

# What gzip's header holds when the official archives were made: flags (8: a name follows) and seconds since 1970.
OFFICIAL = {
    "train-images-idx3-ubyte": (8, 1504176606),
    "train-labels-idx1-ubyte": (8, 1504176606),
    "t10k-images-idx3-ubyte": (8, 1504176627),
    "t10k-labels-idx1-ubyte": (8, 1504176627),
}


class NeedsFiles(tfds.core.GeneratorBasedBuilder):
    """A data set whose files cannot be downloaded."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "fetch numbers.txt yourself"

    def _info(self):
        features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.manual_dir / "numbers.txt")}

    def _generate_examples(self, path):
        for i, line in enumerate(path.read_text().splitlines()):
            yield i, {"number": int(line)}


def archive(name, content, flags, time):
    """A gzip file as the official ones are (with a name and a time) or as Debian's (with neither)."""
    body = gzip.compress(content, mtime=0)[10:]
    label = name.encode() + b"\0" if flags & 8 else b""
    return b"\x1f\x8b\x08" + bytes([flags]) + struct.pack("<I", time) + b"\x02\x03" + label + body


@pytest.fixture
def restored(tmp_path):
    """Folders: of packages, of what they should become, and to write to."""
    folders = [tmp_path / name for name in ("packaged", "official", "restored")]
    for folder in folders:
        folder.mkdir()
    return folders


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_headers_are_rebuilt_bit_for_bit(restored):
    packaged, official, folder = restored
    for name, (flags, time) in OFFICIAL.items():
        (official / f"{name}.gz").write_bytes(archive(name, name.encode() * 50, flags, time))
        (packaged / f"{name}.gz").write_bytes(archive(name, name.encode() * 50, 0, 0))
    assert restore_fashion_mnist(packaged, folder) == folder
    assert contents(folder) == contents(official) != contents(packaged)
    assert all(gzip.decompress(data) == name[:-3].encode() * 50 for name, data in contents(folder).items())


def test_official_archives_are_left_as_they_are(restored):
    packaged, _, folder = restored
    for name in OFFICIAL:
        (packaged / f"{name}.gz").write_bytes(archive(name, b"content", 8, 12345))
    restore_fashion_mnist(packaged, folder)
    assert contents(folder) == contents(packaged)


@pytest.mark.parametrize("data", [b"", b"\x1f", b"no gzip at all", b"\x1f\x8b\x08"])
def test_what_is_no_archive_is_left_to_the_checksums(restored, data):
    packaged, _, folder = restored
    for name in OFFICIAL:
        (packaged / f"{name}.gz").write_bytes(data)
    restore_fashion_mnist(packaged, folder)
    assert contents(folder) == contents(packaged)


@pytest.mark.parametrize("there", [0, 3])
def test_missing_archives_and_the_package_that_has_them_are_named(restored, there):
    """Else TFDS would try for minutes to download them."""
    packaged, _, folder = restored
    names = [f"{name}.gz" for name in OFFICIAL]
    for name in names[:there]:
        (packaged / name).write_bytes(archive(name, b"content", 0, 0))
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist") as error:
        restore_fashion_mnist(packaged, folder)
    (line,) = error.value.problems
    assert "config.data.manual_dir" in line and repr(str(packaged)) in line
    assert [name in line for name in names] == [i >= there for i in range(4)]


@debian
def test_debians_archives_become_those_that_tfds_knows(tmp_path):
    restore_fashion_mnist(PACKAGED, tmp_path)
    known = {Path(url).name: info for url, info in tfds.builder("fashion_mnist", data_dir=tmp_path).url_infos.items()}
    assert set(known) == {f"{name}.gz" for name in OFFICIAL}
    for name, info in known.items():
        data = (tmp_path / name).read_bytes()
        assert len(data) == info.size and hashlib.sha256(data).hexdigest() == info.checksum


@debian
@pytest.mark.slow
def test_the_documented_command_prepares_fashion_mnist_offline(tmp_path, capsys):
    command = ["prepare", "--config=configs/prepare.py", f"--config.data.data_dir={tmp_path}"]
    assert main(command) == 0
    assert str(tmp_path / "fashion_mnist") in capsys.readouterr().out
    train, test = (SOURCES["tfds"](name="fashion_mnist", data_dir=str(tmp_path), split=s) for s in ("train", "test"))
    assert (train.size, test.size) == (60_000, 10_000)
    assert train.labels[0] == "T-shirt/top" and len(train.labels) == 10
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_prepared_set_is_left_alone(tfds_dir):
    folder = Path(tfds_dir) / "mini_pictures" / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(name="mini_pictures", data_dir=tfds_dir) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_prepared_can_be_read(tmp_path):
    folder = prepare(name="mini_pictures", data_dir=str(tmp_path))
    assert folder == tmp_path / "mini_pictures" / "1.0.0" and folder.is_dir()
    assert SOURCES["tfds"](name="mini_pictures", data_dir=str(tmp_path), split="test").size == 5


def problem(kind, **settings):
    with pytest.raises(kind) as error:
        prepare(**settings)
    (line,) = error.value.problems
    assert "\n" not in line and len(line) < 700
    return line


def test_an_unknown_set_gets_the_nearest_name(tmp_path):
    line = problem(ConfigError, name="fashion_mnst", data_dir=str(tmp_path))
    assert "config.data.name" in line and "did you mean fashion_mnist?" in line


@pytest.mark.parametrize("manual_dir", ["/no/such/folder", "~no_such_user_here/x"])
def test_a_missing_folder_is_named(tmp_path, manual_dir):
    line = problem(ConfigError, name="needs_files", data_dir=str(tmp_path), manual_dir=manual_dir)
    assert "config.data.manual_dir" in line and repr(manual_dir) in line


def test_files_that_must_be_given_are_asked_for(tmp_path):
    line = problem(DataError, name="needs_files", data_dir=str(tmp_path))
    assert "needs_files" in line and "--config.data.manual_dir" in line


def test_files_that_are_not_what_they_should_be_leave_nothing_behind(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    (manual / "numbers.txt").write_text("1\n2\nthree\n")
    line = problem(DataError, name="needs_files", data_dir=str(tmp_path / "data"), manual_dir=str(manual))
    assert "three" in line
    (manual / "numbers.txt").write_text("1\n2\n3\n")
    assert prepare(name="needs_files", data_dir=str(tmp_path / "data"), manual_dir=str(manual)).is_dir()


def test_the_command_ends_with_3_where_data_are_missing(tmp_path, capsys):
    command = ["prepare", "--config=configs/prepare.py:needs_files", f"--config.data.data_dir={tmp_path}"]
    assert main(command) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mae-jax: cannot prepare needs_files")
