"""Every mask, target, loss and decoder through whole jobs; what a target is fitted to is found once and kept."""

import json
import shutil

import numpy as np
import pytest
from sklearn.decomposition import PCA

import mae_jax
from mae_jax.__main__ import main
from mae_jax.config import complete, load
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import digits
from mae_jax.jobs import fitting, models, pretrain
from mae_jax.model.layers import BLOCKS
from mae_jax.model.losses import LOSSES, PATCHES, fits
from mae_jax.model.mae import Decoder
from mae_jax.model.masking import SAMPLERS
from mae_jax.model.patches import normalize, patchify
from mae_jax.model.positions import POSITIONS
from mae_jax.model.targets import TARGETS, make

TINY = "configs/pretrain.py:digits,tiny"


def pretraining(workdir, *arguments):
    short = ("--config.train.steps=4", "--config.monitor.every=4", "--config.checkpoint.every=2")
    return main(
        ["pretrain", f"--config={TINY}", f"--workdir={workdir}", "--config.encoder.depth=1", *short, *arguments]
    )


def of_a_size(name):
    """The settings of a target, for patches of four values."""
    return [f"--config.target.name={name}"] + ["--config.target.size=3"] * (make(2, name=name).size is not None)


def fitted(*overrides):
    config, _ = load(TINY, overrides)
    config, problems = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    assert not problems
    return fitting.fit(models.build(config)[1], config, Dataset(**config.data)), config


def test_a_target_is_fitted_to_all_patches_of_the_training_images():
    found, config = fitted(*of_a_size("pca"), "--config.data.split=train[:300]")
    images = normalize(digits(split="train[:300]").read(np.arange(300))[0], **config.pixels)
    patches = np.asarray(patchify(images, 2), np.float64).reshape(-1, 4)
    want = PCA(3).fit(patches)
    np.testing.assert_allclose(found["mean"], patches.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["components"], want.components_, rtol=0, atol=1e-5)


def test_large_data_sets_give_a_sample_that_the_seed_alone_decides(monkeypatch):
    monkeypatch.setattr(fitting, "IMAGES", 50)
    monkeypatch.setattr(fitting, "PATCHES", 3)
    seen = []
    monkeypatch.setitem(
        TARGETS,
        "seen",
        lambda patch, size: make(patch, name="pca", size=3)._replace(fit=lambda x: seen.append(x) or {}),
    )
    config = "--config.target.name=seen"
    for change in ("seed=0", "data.batch_size=16", "data.augment=random_resized_crop", "mesh.data=1", "seed=1"):
        fitted(config, f"--config.{change}")
    assert all(x.shape == (150, 4) for x in seen)
    for other in seen[1:4]:
        np.testing.assert_array_equal(other, seen[0])
    assert not np.array_equal(seen[4], seen[0])


TOKENS = ("--config.target.name=tokens", "--config.target.size=20")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of two steps of training on tokens."""
    workdir = tmp_path_factory.mktemp("runs") / "tokens"
    assert pretraining(workdir, *TOKENS, "--config.train.steps=2", "--config.monitor.every=2") == 0
    return workdir


@pytest.mark.slow
def test_a_codebook_is_kept_in_the_checkpoint_and_never_trained(run):
    model, params = mae_jax.load(run)
    np.testing.assert_array_equal(params["target"]["centroids"], fitted(*TOKENS)[0]["centroids"])
    assert model.decoder.target_width == len(params["target"]["centroids"]) == 20


@pytest.mark.slow
def test_a_decoder_of_tokens_is_not_exported_as_one_of_pixels(run, tmp_path, refused, capsys):
    code = main(["export", f"--checkpoint={run}", "--format=huggingface", f"--out={tmp_path / 'out'}"])
    refused(capsys, code, 4, "predicts tokens, not pixels; export --part=encoder")


@pytest.mark.slow
def test_a_run_goes_on_and_is_looked_at_without_fitting_again(run, tmp_path, monkeypatch):
    _, before = mae_jax.load(run)
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.delattr(fitting, "fit")
    assert pretraining(tmp_path / "run", *TOKENS) == 0
    _, params = mae_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(params["target"]["centroids"], before["target"]["centroids"])
    look = ["reconstruct", "--config=configs/reconstruct.py", f"--config.init={tmp_path / 'run'}"]
    assert main([*look, f"--workdir={tmp_path / 'look'}", "--config.count=2"]) == 0
    assert json.loads((tmp_path / "look" / "results.json").read_text())["loss"] > 1
    for kind in ("huggingface", "timm"):
        export = ["export", f"--checkpoint={tmp_path / 'run'}", f"--format={kind}", "--part=encoder"]
        assert main([*export, f"--out={tmp_path / f'{kind}.safetensors'}"]) == 0


CHOICES = {f"mask {name}": [f"--config.mask.name={name}", "--config.mask.ratio=0.5"] for name in SAMPLERS}
CHOICES |= {
    f"target {name}, {patches}": [*of_a_size(name), f"--config.loss.patches={patches}"]
    for name in TARGETS
    for patches in PATCHES
}
OWN = {make(2, name=name).loss: name for name in reversed(TARGETS)}  # a target whose own loss it is
CHOICES |= {
    f"loss {name}": [f"--config.loss.name={name}", *of_a_size(next(OWN[own] for own in OWN if fits(name, own)))]
    for name in LOSSES
    if name not in OWN
}
CHOICES |= {f"positions {kind}": [f"--config.encoder.positions={kind}"] for kind in POSITIONS}
CHOICES |= {f"decoder positions {kind}": [f"--config.decoder.positions={kind}"] for kind in POSITIONS if kind != "none"}
CHOICES |= {
    **{f"decoder {kind}": [f"--config.decoder.kind={kind}"] for kind in BLOCKS if kind != Decoder.kind},
    "a quarter decoded": ["--config.decoder.kind=cross", "--config.mask.decoded=0.25"],
    "half decoded, guided": ["--config.mask.decoded=0.5", "--config.mask.name=most_attended"],
    "mask tokens in the encoder": ["--config.decoder.mask_tokens=encoder"],
    "linear head": ["--config.decoder.mask_tokens=encoder", "--config.decoder.depth=0"],
}


@pytest.mark.slow
def test_nothing_hidden_trains_and_is_pictured(tmp_path):
    hide_nothing = ("--config.mask.ratio=0", "--config.loss.patches=all", "--config.decoder.depth=0")
    assert pretraining(tmp_path / "run", *hide_nothing, "--config.mesh.data=1") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["eval/loss"] > 0
    look = ["reconstruct", "--config=configs/reconstruct.py", f"--config.init={tmp_path / 'run'}"]
    look += [f"--workdir={tmp_path / 'look'}", "--config.count=2"]
    assert main([*look, "--config.mask.ratio=0"]) == 0
    assert main(look) == 2, "the head has no latents of hidden patches"


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_choice_trains_and_is_looked_at_the_same_on_1_and_8_devices(choice, tmp_path, tools):
    found = []
    for devices in (1, 8):
        run = tmp_path / str(devices)
        assert pretraining(run, *choice, f"--config.mesh.data={devices}") == 0
        found.append(tools.lines_of(run))
        assert (
            main(["reconstruct", "--config=configs/reconstruct.py", f"--config.init={run}", f"--workdir={run}_look"])
            == 0
        )
    for one, eight in zip(*found, strict=True):
        assert one.keys() == eight.keys()
        for key in one.keys() & {"train/loss", "train/grad_norm", "eval/loss", "eval/baseline_loss"}:
            assert np.isfinite(one[key])
            assert eight[key] == pytest.approx(one[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "least_attended"])
def test_a_ratio_schedule_goes_on_where_it_was(name, tmp_path, tools):
    """Three stages of two steps; the second is cut in half."""
    change = (f"--config.mask.name={name}", "--config.mask_schedule.start=0.25", "--config.mask_schedule.stages=3")
    change += ("--config.train.steps=6", "--config.checkpoint.every=3", "--config.optim.warmup_epochs=0.0")
    for run in ("whole", "parts"):
        assert pretraining(tmp_path / run, *change) == 0
    (tmp_path / "parts" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "6")
    assert pretraining(tmp_path / "parts", *change) == 0
    lines = [
        [line["train/loss"] for line in tools.lines_of(tmp_path / run) if "train/loss" in line]
        for run in ("whole", "parts")
    ]
    assert len(lines[0]) == 6
    assert lines[0] == lines[1]
    constant = tmp_path / "constant"
    assert pretraining(constant, *change[:1], *change[3:]) == 0
    first = next(line["train/loss"] for line in tools.lines_of(constant) if "train/loss" in line)
    assert first != lines[0][0]
