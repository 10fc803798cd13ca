"""Portable files compute what the model does, each alone and where this project is not."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.interchange import portable
from mae_jax.model import native
from mae_jax.model.vit import ViT

SHAPE = (16, 24, 3)
BATCHES = (1, 3, 64)
ELSEWHERE = """
import sys
sys.modules["mae_jax"] = sys.modules["flax"] = None  # now to import them is an error
import jax
import numpy as np
images, batches = np.load("images.npy"), [int(n) for n in sys.argv[1].split(",")]
for name in sys.argv[2:]:
    call = jax.export.deserialize(open(name, "rb").read()).call
    np.savez(name, **{str(n): call(images[:n]) for n in batches})
"""


def images_for(batch):
    return np.random.default_rng(1).standard_normal((batch, *SHAPE), np.float32)


def forward_of(**settings):
    """A ViT with random parameters, none of them what it begins with, as a function of images."""
    model = ViT(4, **{"width": 32, "depth": 2, "heads": 2, **settings})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
    variables = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)
    return lambda images: model.apply(variables, images)


def test_stablehlo_runs_where_this_project_is_not(tmp_path):
    forwards = {positions: forward_of(positions=positions) for positions in ("learned", "sincos")}
    images = images_for(max(BATCHES))
    np.save(tmp_path / "images.npy", images)
    for name, forward in forwards.items():
        portable.stablehlo(forward, SHAPE, tmp_path / name)
    command = [sys.executable, "-c", ELSEWHERE, ",".join(map(str, BATCHES)), *forwards]
    subprocess.run(command, cwd=tmp_path, check=True)
    for name, forward in forwards.items():
        with np.load(tmp_path / f"{name}.npz") as outputs:
            for n in BATCHES:
                np.testing.assert_allclose(outputs[str(n)], jax.jit(forward)(images[:n]), rtol=0, atol=1e-5)


def test_stablehlo_is_for_all_platforms_and_any_number_of_images(tmp_path):
    portable.stablehlo(forward_of(), SHAPE, tmp_path / "program")
    exported = jax.export.deserialize((tmp_path / "program").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(x) for x in exported.in_avals] == ["float32[n,16,24,3]"]
    assert [str(x) for x in exported.out_avals] == ["float32[n,25,32]"]


def test_stablehlo_calls_no_function_of_this_project(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as where C++ serves
    monkeypatch.setattr(native, "_registered", lambda: True)
    forward = forward_of()
    assert "mae_linear" in jax.jit(forward).lower(images_for(1)).as_text()  # which would be found
    portable.stablehlo(forward, SHAPE, tmp_path / "program")
    program = jax.export.deserialize((tmp_path / "program").read_bytes()).mlir_module()
    assert "@mae_" not in program
    assert "stablehlo.dot_general" in program


@pytest.mark.parametrize("settings", [{"positions": "learned"}, {"width": 288, "depth": 1}], ids=["small", "large"])
def test_onnx_is_one_file_and_equal(settings, tmp_path):
    """The large one has matrices that the converter would put beside the file."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    forward, images = forward_of(**settings), images_for(max(BATCHES))
    portable.onnx(forward, SHAPE, tmp_path / "unfinished")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "unfinished").rename(tmp_path / "elsewhere" / "model.onnx")
    assert [x.name for x in tmp_path.iterdir()] == ["elsewhere"]
    session = onnxruntime.InferenceSession(moved)
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", ["n", *SHAPE])]
    assert [(x.name, x.shape[0]) for x in session.get_outputs()] == [("outputs", "n")]
    for n in BATCHES:
        (outputs,) = session.run(None, {"images": images[:n]})
        np.testing.assert_allclose(outputs, jax.jit(forward)(images[:n]), rtol=0, atol=1e-4)


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ConfigError, match=r'pip install "mae_jax\[onnx\]"'):
        portable.onnx(forward_of(), SHAPE, tmp_path / "model.onnx")


@pytest.mark.parametrize("write", [portable.stablehlo, portable.onnx])
def test_too_many_parameters_are_refused_before_they_are_copied(write, tmp_path, monkeypatch):
    if write is portable.onnx:
        pytest.importorskip("jax2onnx")
    monkeypatch.setattr(portable, "LIMIT", 100_000)  # which has 113 kB
    with pytest.raises(CheckpointError, match="GiB"):
        write(forward_of(), SHAPE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_npz_has_the_names_and_bits_it_was_given(tmp_path):
    leaves = {"encoder/cls_token": np.float32([[np.nan, -0.0, 1]]), "step": np.int32(7), "empty": np.zeros((0, 3))}
    portable.npz(leaves, tmp_path / "no_suffix")
    assert [x.name for x in tmp_path.iterdir()] == ["no_suffix"]
    with np.load(tmp_path / "no_suffix") as file:
        assert sorted(file) == sorted(leaves)
        for name, value in leaves.items():
            assert (file[name].dtype, file[name].tobytes()) == (value.dtype, value.tobytes())
