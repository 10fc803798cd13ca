"""Files of named tensors: what is read, what is refused and how it is told, and that nothing unfinished stays."""

import argparse
import json
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.files import to_path
from mae_jax.interchange import tensors

SOME = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.float32([-0.0, np.nan]),
    "blocks.0": np.ones((1, 1, 4), np.float32),
}


def read_all(path):
    found = tensors.tensors_in(path)
    values = {name: tensor.read() for name, tensor in found.items()}
    assert {name: tensor.shape for name, tensor in found.items()} == {n: v.shape for n, v in values.items()}
    return values


def told(path, kind=CheckpointError):
    with pytest.raises(kind) as error:
        read_all(path)
    (problem,) = error.value.problems
    return problem


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


# safetensors


def test_what_is_written_is_read_again(tmp_path, worlds):
    tensors.write_safetensors(tmp_path / "x.safetensors", SOME)
    worlds.assert_bits(read_all(tmp_path / "x.safetensors"), SOME)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}, "without which transformers reads nothing"


def test_several_files_of_an_index(tmp_path, worlds):
    parts = {"a": ["a.weight"], "b": ["a.bias", "blocks.0"]}
    for part, names in parts.items():
        safetensors.numpy.save_file({n: SOME[n] for n in names}, tmp_path / f"{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"{p}.safetensors" for p, names in parts.items() for n in names}}))
    worlds.assert_bits(read_all(index), SOME)
    (tmp_path / "b.safetensors").unlink()
    assert told(index) == f"{tmp_path}/b.safetensors: no such file"


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert told(index).startswith(f"{index}: ")


@pytest.mark.parametrize(
    "part", ["../b.safetensors", "/etc/passwd", "inside/../../b.safetensors", "model.safetensors.index.json"]
)
def test_an_index_names_files_beside_it_and_no_others(part, tmp_path):
    (tmp_path / "inside").mkdir()
    safetensors.numpy.save_file(SOME, tmp_path / "b.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": part}}))
    assert told(index) == f"{index}: {part!r} is no file of tensors beside it; not read"


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file(size, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(SOME, path)
    path.write_bytes(path.read_bytes()[:size])
    assert told(path).startswith(f"{path}: not a whole safetensors file (")


def test_half_precision_is_read_as_it_is(tmp_path):
    header = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    header |= {"y": {"dtype": "F16", "shape": [1], "data_offsets": [4, 6]}}
    text = json.dumps(header).encode()
    data = struct.pack("<HH", 0x3F80, 0xC020) + np.float16([0.1]).tobytes()  # the upper halves of 1 and -2.5
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = read_all(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1, -2.5])
    np.testing.assert_array_equal(found["y"], np.float16([0.1]))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_what_numpy_has_no_number_for_is_told(dtype, tmp_path):
    text = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"ab")
    try:
        found = read_all(tmp_path / "x.safetensors")
    except CheckpointError as error:
        assert "x.safetensors" in str(error)
    else:
        assert found["x"].astype(np.float32).shape == (2,)


def test_other_files_and_none(tmp_path):
    (tmp_path / "x.ckpt").write_text("")
    assert told(tmp_path / "x.ckpt") == f"{tmp_path}/x.ckpt: is neither .safetensors nor one of .pth, .pt, .bin"
    assert told(tmp_path / "x.pth") == f"{tmp_path}/x.pth: no such file"
    assert told(tmp_path) == f"{tmp_path}: no such file"


# PyTorch's


def test_without_pytorch_one_line_names_the_extra(tmp_path, no_torch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK")
    assert told(path, ConfigError).endswith(
        'x.pth: is read by PyTorch, which is not installed: pip install "mae_jax[torch]"'
    )
    with pytest.raises(ConfigError, match=r'x.pth: is written by PyTorch, .* pip install "mae_jax\[torch\]"'):
        tensors.write_pytorch(path, SOME)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_tensors_bare_or_wrapped_in_both_kinds_of_file(wrapper, zipped, suffix, torch, tmp_path, worlds):
    held = {name: torch.from_numpy(value) for name, value in SOME.items()}
    held = held if wrapper is None else {wrapper: held, "epoch": 3, "optimizer": {"state": {}}}
    path = tmp_path / f"x{suffix}"
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    worlds.assert_bits(read_all(path), SOME)


def test_what_is_written_is_what_the_original_code_writes(torch, tmp_path, worlds):
    tensors.write_pytorch(tmp_path / "x.pth", SOME)
    held = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(held) == ["model"]
    worlds.assert_bits({name: value.numpy() for name, value in held["model"].items()}, SOME)


def test_settings_beside_the_tensors_are_no_hindrance(torch, tmp_path, worlds):
    args = argparse.Namespace(batch_size=64, lr=1e-3, dist_on_itp=False, model="mae_vit_base_patch16")
    held = {name: torch.from_numpy(value) for name, value in SOME.items()}
    torch.save({"model": held, "args": args, "epoch": 799}, tmp_path / "x.pth")
    worlds.assert_bits(read_all(tmp_path / "x.pth"), SOME)


def test_half_precision_and_parameters_that_are_trained(torch, tmp_path):
    held = {"x": torch.tensor([1, -2.5], dtype=torch.bfloat16), "y": torch.nn.Parameter(torch.ones(2).half())}
    torch.save(held, tmp_path / "x.pth")
    found = read_all(tmp_path / "x.pth")
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1, -2.5])
    np.testing.assert_array_equal(found["y"].astype(np.float32), [1, 1])


class Code:
    """What a file may hold that runs when it is read."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MAE_JAX_TEST_TRAP"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_named_and_not_run(zipped, torch, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_JAX_TEST_TRAP", str(tmp_path / "sprung"))
    path = tmp_path / "x.pth"
    torch.save({"model": Code()}, path, _use_new_zipfile_serialization=zipped)
    assert told(path) == f"{path}: holds more than tensors: it would run {os.mkdir.__module__}.mkdir; not loaded"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_that_pytorch_did_not_write(protocol, zipped, torch, tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("MAE_JAX_TEST_TRAP", str(tmp_path / "sprung"))
    path, data = tmp_path / "x.pth", pickle.dumps({"model": Code()}, protocol)
    if zipped:
        torch.save({}, path)
        with zipfile.ZipFile(path) as before:
            parts = {name: before.read(name) for name in before.namelist()}
        with zipfile.ZipFile(path, "w") as after:
            for name, part in parts.items():
                after.writestr(name, data if name.endswith("data.pkl") else part)
    else:
        path.write_bytes(data)
    assert told(path) == f"{path}: holds more than tensors: it would run {os.mkdir.__module__}.mkdir; not loaded"
    assert not (tmp_path / "sprung").exists() and not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_in_a_pickle_that_pytorch_does_not_read_safely(zipped, torch, tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pth", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    assert "x.pth: a pickle of protocol 4 or 5, " in told(tmp_path / "x.pth")


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_of_pytorchs(size, torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({name: torch.from_numpy(value) for name, value in SOME.items()}, path)
    path.write_bytes(path.read_bytes()[:size])
    assert told(path).startswith(f"{path}: not a whole file of PyTorch's (")


@pytest.mark.parametrize("held", [{}, [1], 5, {"model": {}}, {"model": 1}, {"x": 1}])
def test_a_file_without_tensors(held, torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(held, path)
    assert told(path) == f"{path}: holds no tensors by name, nor model or state_dict with such in it"


def test_tensors_without_names(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({0: torch.ones(2)}, path)
    assert told(path) == f"{path}: holds no tensors by name, nor model or state_dict with such in it"


# what is written as a whole


def siblings(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_a_file_and_a_folder_appear_when_they_are_done(tmp_path):
    with tensors.whole(tmp_path / "new" / "x") as unfinished:
        unfinished.write_text("done")
        assert not (tmp_path / "new" / "x").exists()
    assert (tmp_path / "new" / "x").read_text() == "done"
    with tensors.whole(tmp_path / "new" / "y") as unfinished:
        unfinished.mkdir()
        (unfinished / "z").write_text("done")
    assert (tmp_path / "new" / "y" / "z").read_text() == "done"
    assert siblings(tmp_path / "new" / "x") == ["x", "y"]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("error", [CheckpointError("no"), KeyboardInterrupt(), MemoryError()])
def test_what_fails_leaves_nothing(folder, error, tmp_path):
    def fail():
        with tensors.whole(tmp_path / "x") as unfinished:
            if folder:
                unfinished.mkdir()
            (unfinished / "y" if folder else unfinished).write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "y").write_text("old")
    for name in ("file", "folder"):
        words = f"{name}: is there already; name another, or delete it"
        with pytest.raises(ConfigError, match=words), tensors.whole(tmp_path / name):
            raise AssertionError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "y").read_text() == "old"


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "x").mkdir()
    with tensors.whole(tmp_path / "x") as unfinished:
        unfinished.mkdir()
        (unfinished / "y").write_text("done")
    assert (tmp_path / "x" / "y").read_text() == "done"


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("gs://bucket/x", "gs://bucket/x: is in a bucket"),
        ("/", "/: is the root folder"),
        ("", ": is the current folder"),
        ("run/checkpoints/6/x", "6/x: is among the checkpoints of a run"),
        ("run/checkpoints/7", "checkpoints/7: is among the checkpoints of a run"),
        ("link/6/x", "link/6/x: is among the checkpoints of a run"),
    ],
)
def test_where_nothing_may_be_written(out, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "6" / "state").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run/checkpoints")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=re.escape(words)), tensors.whole(to_path(out)) as unfinished:
        unfinished.write_text("")
    assert sorted(tmp_path.rglob("*")) == before
    with tensors.whole(tmp_path / "checkpoints" / "x") as unfinished:  # no run's
        unfinished.write_text("")


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/x: cannot be written \("),
        tensors.whole(tmp_path / "file" / "x") as unfinished,
    ):
        unfinished.write_text("")
    assert siblings(tmp_path / "file") == ["file"]
