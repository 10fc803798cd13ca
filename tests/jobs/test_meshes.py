"""The same training on any mesh and in any number of parts: the same draws, losses and gradients."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from mae_jax.__main__ import main
from mae_jax.config import complete, load
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError
from mae_jax.jobs import classification, finetune, models, pretrain
from mae_jax.model import cudnn
from mae_jax.training import optim
from mae_jax.training.loop import create_state, make_train_step
from mae_jax.training.sharding import batch_sharding, make_mesh

MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "fsdp4-tensor2": {"data": 1, "fsdp": 4, "tensor": 2},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
}
ONE = {"data": 1}
DIGITS = "configs/pretrain.py:digits"
TI_64 = (  # ViT-Ti on pictures of 64 pixels
    *("--config.data.source=synthetic", "--config.data.held_out=validation", "--config.data.image_size=(64,64)"),
    *("--config.data.batch_size=64", "--config.data.augment=none", "--config.data.flip=False"),
    *("--config.encoder.width=192", "--config.encoder.heads=3", "--config.encoder.patch_size=8"),
    *("--config.decoder.width=128", "--config.decoder.depth=2", "--config.decoder.heads=4"),
)
REGULARIZED = (
    *("--config.mixup.mixup=0.8", "--config.mixup.cutmix=1.0", "--config.erasing.probability=0.25"),
    *("--config.encoder.drop_path=0.2", "--config.data.batch_size=64", "--config.head.head_std=0.01"),
)


class Training:
    """A pre-training or fine-tuning recipe on a mesh: its step, its first state and its batches."""

    def __init__(self, spec, sizes, overrides=(), accumulate=1, steps=1000):
        job = finetune if "finetune" in spec else pretrain
        config, problems = load(spec, overrides)
        config, more = complete(config, job.SCHEMA, job.VALUES)
        assert problems + more == []
        self.mesh, data = make_mesh(**sizes), Dataset(**config.data)
        if job is finetune:
            config.classes = data.opened.labels
            model = classification.build(config)
            init = lambda: classification.init(model, config, jax.random.key(0))  # noqa: E731
            self.draw, loss_fn = job.make_draw(model, config), job.make_loss(model)
        else:
            model, target = models.build(config)
            init = lambda: (models.init(model, config, jax.random.key(0)), {})  # noqa: E731
            self.draw, loss_fn = job.make_draw(model, config), job.make_loss(model, target, config)
        tx, schedule = optim.make(data.batch_size, steps, 11, **config.optim)
        self.abstract, self.new_state = create_state(init, tx, self.mesh)
        args = (self.draw, loss_fn, tx, schedule, jax.random.key(1), self.mesh)
        self.step = make_train_step(*args, accumulate=accumulate)
        self.batches = lambda: data.shuffled(0, 0, batch_sharding(self.mesh))

    def losses(self, steps):
        """Of the first steps, f64[steps]; and of the first of them the gradients, as AdamW's moments hold them."""
        state, found = self.new_state(), []
        for i, batch in zip(range(steps), self.batches(), strict=False):
            state, scalars = self.step(state, batch)
            found.append(float(scalars["loss"]))
            if i == 0:
                moments = jax.device_get(state.opt_state[0].mu)
        return np.array(found), moments


def assert_same_gradients(got, want):
    """Each array to 1e-5 of its own length, or of a thousandth of the whole where it is next to nothing."""
    whole = np.sqrt(sum(np.square(w, dtype=np.float64).sum() for w in jax.tree.leaves(want)))
    paths = jax.tree_util.tree_flatten_with_path(want)[0]
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        assert np.linalg.norm(g - w) <= 1e-5 * max(np.linalg.norm(w), 1e-3 * whole), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def alone():
    """Losses of 20 steps of the digits recipe on one device, and its first gradients."""
    return Training(DIGITS, ONE).losses(20)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, id=name, marks=() if name == "data2-fsdp2-tensor2" else pytest.mark.slow)
        for name, sizes in MESHES.items()
    ],
)
def test_losses_and_gradients_are_those_of_one_device(sizes, alone):
    losses, gradients = Training(DIGITS, sizes).losses(20)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_same_gradients(gradients, alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, MESHES["data2-fsdp2-tensor2"]], ids=["one", "data2-fsdp2-tensor2"])
def test_accumulating_four_parts_is_the_large_batch(sizes, alone):
    losses, gradients = Training(DIGITS, sizes, accumulate=4).losses(20)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_same_gradients(gradients, alone[1])


VIT = "configs/pretrain.py:vit_b16"


@pytest.fixture(scope="module")
def vit_alone():
    return Training(VIT, ONE, TI_64).losses(20)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_vit_ti_at_64_pixels_trains_the_same(sizes, vit_alone):
    want, want_gradients = vit_alone
    losses, gradients = Training(VIT, sizes, TI_64, accumulate=2 if sizes == MESHES["data8"] else 1).losses(20)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert_same_gradients(gradients, want_gradients)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(DIGITS, id="pretrain"),
        pytest.param("configs/finetune.py:digits,scratch", id="finetune", marks=pytest.mark.slow),
    ],
)
def test_masks_augmentations_and_drop_path_are_the_same_on_every_mesh(spec):
    """Bit for bit, whatever is drawn: all but the mixed pixels, whose sums a compiler may round otherwise."""
    overrides = REGULARIZED if "finetune" in spec else ()

    def drawn(sizes):
        training = Training(spec, sizes, overrides)
        return jax.device_get(jax.jit(training.draw)(next(training.batches()), jax.random.key(7)))

    want = drawn(ONE)
    assert ("mask" in want) or (want["paths"] == 0).any()
    for sizes in MESHES.values():
        got = drawn(sizes)
        assert got.keys() == want.keys()
        for name in got:
            for g, w in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
                np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 if name in ("image", "target") else 0)


@pytest.mark.slow
def test_fine_tuning_with_all_that_is_random_is_the_same_on_a_mesh_in_parts():
    spec, small = "configs/finetune.py:digits,scratch", (*REGULARIZED, "--config.encoder.depth=2")
    want, want_gradients = Training(spec, ONE, small).losses(5)
    losses, gradients = Training(spec, MESHES["data2-fsdp2-tensor2"], small, accumulate=2).losses(5)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert_same_gradients(gradients, want_gradients)


def test_heads_that_a_mesh_would_split_are_refused_where_cudnn_computes_attention(monkeypatch):
    overrides = ("--config.dtype=bfloat16", "--config.mesh.data=1", "--config.mesh.tensor=8")
    config, _ = load(VIT, (*TI_64, "--config.decoder.heads=8", *overrides))
    pretrain.check(config)
    monkeypatch.setattr(cudnn, "capability", lambda: 8.0)
    with pytest.raises(ConfigError, match=r"^config\.mesh\.tensor: 8 does not divide config\.encoder\.heads 3, "):
        pretrain.check(config)
    config.encoder.attention = "plain"
    pretrain.check(config)


BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def sent(training):
    """What a compiled step sends between devices: {kind: bytes of its results on one device}."""
    batch = next(training.batches())
    found = {}
    for line in training.step.lower(training.abstract, batch).compile().as_text().splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(BYTES[kind] * np.prod([int(n) for n in dims.split(",") if n] or [1]) for kind, dims in shapes)
            found[match[2]] = found.get(match[2], 0) + int(size)
    return found


def test_a_tensor_axis_sends_no_queries_keys_or_values():
    """Of activations it sends sums alone: what a device computes of attention is whole heads."""
    training = Training(VIT, MESHES["fsdp4-tensor2"], (*TI_64, "--config.encoder.depth=1", "--config.encoder.heads=4"))
    found, whole = sent(training), sum(leaf.size * 4 for leaf in jax.tree.leaves(training.abstract.params))
    assert found.keys() == {"all-gather", "all-reduce", "collective-permute"}  # no all-to-all
    assert found["collective-permute"] < whole / 8, "of the columns of qkv, which lie otherwise than heads"


@pytest.mark.parametrize("name", ["data8", "fsdp8"])
def test_only_parameters_and_gradients_are_sent(name):
    """No activation is, although nothing constrains them: each is put together once, and reduced once."""
    training = Training(DIGITS, MESHES[name], ("--config.data.batch_size=512",))
    found, whole = sent(training), sum(leaf.size * 4 for leaf in jax.tree.leaves(training.abstract.params))
    assert found.pop("all-reduce") + found.pop("reduce-scatter", 0) < 1.05 * whole
    assert found.pop("all-gather", 0) <= whole * (name == "fsdp8")
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("spec", [DIGITS, f"{DIGITS},crossmae"], ids=["self", "cross"])
def test_rematerialising_either_part_changes_the_memory_of_a_step_and_not_its_loss(spec):
    """As the compiled step of the whole recipe reports it, on a mesh."""
    alike = ("--config.encoder.width=64", "--config.encoder.heads=2", "--config.decoder.depth=2")  # either counts
    found, lost = {}, {}
    for encoder, decoder in (("none", "none"), ("full", "none"), ("none", "full"), ("dots", "dots"), ("full", "full")):
        remat = (f"--config.encoder.remat={encoder}", f"--config.decoder.remat={decoder}")
        training = Training(spec, MESHES["data2-fsdp2-tensor2"], (*remat, *alike))
        batch = next(training.batches())
        compiled = training.step.lower(training.abstract, batch).compile()
        found[encoder, decoder] = compiled.memory_analysis().temp_size_in_bytes
        lost[encoder, decoder] = float(compiled(training.new_state(), batch)[1]["loss"])
    assert found["full", "full"] < min(found["full", "none"], found["none", "full"], found["dots", "dots"])
    assert max(found["full", "none"], found["none", "full"], found["dots", "dots"]) < found["none", "none"]
    assert list(lost.values()) == pytest.approx([lost["none", "none"]] * len(lost), rel=1e-6)


def pretraining(workdir, *arguments):
    small = ("--config.train.steps=20", "--config.data.split=train[:160]", "--config.data.held_out=test[:40]")
    small += ("--config.encoder.depth=1", "--config.data.batch_size=32", "--config.checkpoint.every=10")
    arguments = (*small, "--config.monitor.every=10", *arguments)
    return main(["pretrain", "--config=configs/pretrain.py:digits,tiny", f"--workdir={workdir}", *arguments])


def mesh_flags(sizes):
    return [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_in_other_parts(tmp_path, tools):
    """The newest of its checkpoints is lost, and with it the machine."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretraining(whole, *mesh_flags(ONE)) == 0
    assert pretraining(parts, *mesh_flags(MESHES["fsdp8"])) == 0
    (parts / "summary.json").unlink()
    shutil.rmtree(parts / "checkpoints" / "20")
    assert pretraining(parts, *mesh_flags({"data": 1, "fsdp": 2, "tensor": 2}), "--config.accumulate=2") == 0
    lines = [[line for line in tools.lines_of(run) if "train/loss" in line] for run in (whole, parts)]
    assert [line["step"] for line in lines[1]] == list(range(1, 21))
    for one, other in zip(*lines, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
    assert json.loads((parts / "summary.json").read_text())["device_count"] == 4


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_widths_trains_the_same_and_says_so(tmp_path, tools, capsys):
    batch = "--config.data.batch_size=36"
    assert pretraining(tmp_path / "one", batch, *mesh_flags(ONE)) == 0
    assert "note: whole" not in capsys.readouterr().out
    assert pretraining(tmp_path / "three", batch, *mesh_flags({"data": 1, "fsdp": 3})) == 0
    note = r"note: whole on each device, .*: decoder/block_0/attention/out/kernel \(\d+, \d+\) by fsdp=3 and \d+ more"
    assert re.search(note, capsys.readouterr().out)
    lines = [[line for line in tools.lines_of(tmp_path / run) if "train/loss" in line] for run in ("one", "three")]
    for one, other in zip(*lines, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_what_was_trained_on_a_mesh_serves_every_job(tmp_path):
    split = mesh_flags(MESHES["data2-fsdp2-tensor2"])
    assert pretraining(tmp_path / "run", *split) == 0
    init, small = f"--config.init={tmp_path / 'run'}", ("--config.train.steps=4", "--config.data.split=train[:160]")
    for job in ("probe", "finetune"):
        arguments = [f"--config=configs/{job}.py:digits", f"--workdir={tmp_path / job}", init, *small, *split]
        assert main([job, *arguments, "--config.accumulate=2"]) == 0
    assert main(["knn", "--config=configs/knn.py", f"--workdir={tmp_path / 'knn'}", init]) == 0
    judged = [f"--config.init={tmp_path / 'finetune'}", f"--workdir={tmp_path / 'judged'}"]
    assert main(["evaluate", "--config=configs/evaluate.py", *judged]) == 0
    found = [json.loads((tmp_path / name / "results.json").read_text())["top1"] for name in ("finetune", "judged")]
    assert found[0] == found[1]
    assert main(["reconstruct", "--config=configs/reconstruct.py", f"--workdir={tmp_path / 'look'}", init]) == 0
