"""Decoded images that are kept give the very batches that decoding each time gives."""

import itertools
import logging
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax.data import cache
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError
from mae_jax.training.sharding import batch_sharding, make_mesh

AUGMENTED = {"augment": "random_resized_crop", "flip": True}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures of many sizes, two of which cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (9 + i, 30 - i, 3), np.uint8)).save(root / f"{i:02}.png")
    (root / "03.png").write_bytes(b"")
    (root / "11.png").write_bytes((root / "11.png").read_bytes()[:200])
    return {"source": "folder", "path": str(root), "split": "all", "batch_size": 8, "image_size": (8, 8)}


@pytest.fixture
def alike(tfds_dir):
    """Twenty pictures of one size."""
    mini = {"name": "mini_pictures", "data_dir": tfds_dir, "split": "train"}
    return {"source": "tfds", **mini, "batch_size": 8, "image_size": (5, 7), "channels": 1}


@pytest.fixture(params=["memory", "a folder"])
def where(request, tmp_path):
    return "memory" if request.param == "memory" else str(tmp_path / "kept")


def sharding():
    return batch_sharding(make_mesh())


def first(data, count, start=0):
    return [jax.device_get(batch) for batch in itertools.islice(data.shuffled(3, start, sharding()), count)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_pictures_of_many_sizes(pictures, where, caplog):
    plain, kept = Dataset(**pictures, **AUGMENTED), Dataset(**pictures, **AUGMENTED, cache=where)
    with caplog.at_level(logging.WARNING):
        want = first(plain, 5)
        told = sorted(caplog.messages)
        caplog.clear()
        assert_same(first(kept, 5), want)
        assert sorted(caplog.messages) == told and len(told) == 2
    assert kept.examples.shape == (None, None, 3)


@pytest.mark.parametrize("change", [{}, AUGMENTED, {"flip": True}, {"image_size": (4, 4)}], ids=str)
def test_pictures_of_one_size(change, alike, where):
    plain, kept = Dataset(**alike | change), Dataset(**alike | change, cache=where)
    assert_same(first(kept, 5), first(plain, 5))
    assert_same([*map(jax.device_get, kept.once(sharding()))], [*map(jax.device_get, plain.once(sharding()))])
    assert kept.examples.shape == (5, 7, 1)
    assert kept.examples.labels == plain.examples.labels


def test_batches_of_kept_pictures_need_no_tensorflow(alike, monkeypatch):
    kept = Dataset(**alike, cache="memory")
    kept.examples.read(np.arange(3))
    monkeypatch.setattr(Dataset, "_prepared", None)
    assert len(first(kept, 5)) == 5


def test_a_folder_is_written_once_and_found_again(alike, tmp_path, monkeypatch):
    want = first(Dataset(**alike, cache=str(tmp_path)), 3)
    monkeypatch.setattr(cache, "_decode_all", None)
    assert_same(first(Dataset(**alike, cache=str(tmp_path)), 3), want)
    with pytest.raises(TypeError):
        first(Dataset(**alike | {"split": "train[:9]"}, cache=str(tmp_path)), 1)


def test_what_was_cut_short_while_writing_is_not_taken_for_whole(alike, tmp_path, monkeypatch):
    write, parts = cache._decode_all, []

    def interrupted(source, channels, file):
        file.write(b"part of it")
        parts.append(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_decode_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first(Dataset(**alike, cache=str(tmp_path)), 1)
    monkeypatch.setattr(cache, "_decode_all", write)
    assert_same(first(Dataset(**alike, cache=str(tmp_path)), 3), first(Dataset(**alike), 3))


def test_a_process_that_was_slower_takes_what_is_there(alike, tmp_path, monkeypatch):
    want, rename = first(Dataset(**alike, cache=str(tmp_path)), 3), Path.rename
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / "aside")

    def too_late(self, target):
        rename(tmp_path / "aside", target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    assert_same(first(Dataset(**alike, cache=str(tmp_path)), 3), want)
    assert list(tmp_path.iterdir()) == [folder], "nothing unfinished is left"


def test_files_that_changed_are_decoded_again(tmp_path):
    (tmp_path / "a").mkdir()
    settings = {"source": "folder", "path": str(tmp_path / "a"), "split": "all", "batch_size": 8, "image_size": (8, 8)}
    for brightness in (10, 200):
        for i in range(8):
            Image.new("RGB", (8, 8), (brightness,) * 3).save(tmp_path / "a" / f"{i}.png")
        (batch,) = first(Dataset(**settings, cache=str(tmp_path / "kept")), 1)
        assert (batch["image"] == brightness).all()


@pytest.mark.parametrize("name", ["pixels", "table.npz"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_folder_is_one_line(name, kept, alike, tmp_path):
    first(Dataset(**alike, cache=str(tmp_path)), 1)
    (file,) = tmp_path.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"is damaged.*delete it"):
        first(Dataset(**alike, cache=str(tmp_path)), 1)


class Code:
    """What a file may hold that runs when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_array_file_with_code_is_not_run(alike, tmp_path):
    first(Dataset(**alike, cache=str(tmp_path / "kept")), 1)
    (file,) = tmp_path.glob("kept/*/table.npz")
    np.savez(file, shapes=np.array([Code(f"{tmp_path}/sprung")]), labels=np.zeros(1))
    with pytest.raises(ConfigError, match=r"is damaged.*allow_pickle"):
        first(Dataset(**alike, cache=str(tmp_path / "kept")), 1)
    assert not (tmp_path / "sprung").exists()


def test_opening_does_not_decode(alike, monkeypatch):
    monkeypatch.setattr(cache, "_decode_all", None)
    assert Dataset(**alike, cache="memory").opened.size == 20


def test_a_folder_that_cannot_be_written_is_one_line(alike, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"config\.data\.cache: .*file"):
        first(Dataset(**alike, cache=str(tmp_path / "file" / "below")), 1)


def test_a_set_in_which_nothing_can_be_read(tmp_path, where):
    for i in range(8):
        Path(tmp_path / f"{i}.png").write_bytes(b"nothing")
    settings = {"source": "folder", "path": str(tmp_path), "split": "all", "batch_size": 8, "image_size": (8, 8)}
    (batch,) = first(Dataset(**settings, cache=where), 1)
    assert not batch["weight"].any() and not batch["image"].any()
