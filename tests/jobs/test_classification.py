"""What jobs with a classifier share: which encoder and which data they accept, and what they sum up."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.__main__ import main
from mae_jax.errors import CheckpointError, DataError
from mae_jax.jobs import classification
from mae_jax.training import integrity

# A wrong encoder


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("encoder.depth=3", ("missing: params/encoder/block_2/mlp/in/kernel ((32, 128), 'float32')",)),
        ("encoder.depth=1", ("unused: params/encoder/block_1/attention/qkv/bias ((96,), 'float32')",)),
        (
            "encoder.width=64",
            ("misshapen: params/encoder/patch_embedding/kernel is ((4, 32), 'float32'), not ((4, 64), 'float32')",),
        ),
        (
            "encoder.patch_size=4",
            ("misshapen: params/encoder/patch_embedding/kernel is ((4, 32), 'float32'), not ((16",),
        ),
        ("encoder.mlp_ratio=2.0", ("misshapen: params/encoder/block_0/mlp/in/kernel",)),
    ],
)
def test_an_encoder_of_another_shape_is_refused_by_name(wrong, words, pretrained, tmp_path, tools, capsys):
    """Where the config of fine-tuning says all about its encoder."""
    arguments = (f"--config.init={pretrained}", f"--config.{wrong}")
    code = tools.run("finetune", tmp_path / "out", *arguments, recipe="digits,scratch,tiny")
    told = tools.refused(capsys, code, 4, *words)
    assert all(f"{pretrained}/checkpoints/80: " in line for line in told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("job", "recipe"), [("probe", "imagenet,tiny"), ("finetune", "vit_b16,tiny")])
def test_an_encoder_of_other_channels_is_refused_by_name(job, recipe, pretrained, tmp_path, tools, capsys):
    code = tools.run(job, tmp_path / "out", f"--config.init={pretrained}", recipe=recipe)
    (line,) = tools.refused(capsys, code, 4, "misshapen: params/encoder/patch_embedding/kernel is ((4, 32)")
    assert "not ((12, 32), 'float32')" in line
    assert not (tmp_path / "out").exists()


def copied(run, tmp_path, change):
    """A copy of a workdir whose checkpoints say that they are of another model than they are."""
    shutil.copytree(run, tmp_path / "copy")
    for path in (tmp_path / "copy" / "checkpoints").glob("*/config/config.json"):
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
        (path.parents[1] / "manifest" / "manifest.json").write_text(integrity.manifest_of(path.parents[1]))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("job", "run"), [("probe", "pretrained"), ("knn", "pretrained"), ("evaluate", "probed"), ("evaluate", "tuned")]
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused_by_name(job, run, tmp_path, tools, request, capsys):
    def deeper(config):
        config["encoder"]["depth"] = 3

    init = copied(request.getfixturevalue(run), tmp_path, deeper)
    recipe = "digits,tiny" if job == "probe" else ""
    code = tools.run(job, tmp_path / "out", f"--config.init={init}", recipe=recipe)
    told = tools.refused(capsys, code, 4, "missing: params/encoder/block_2/attention/out/bias ((32,), 'float32')")
    assert len(told) == 12, "the parameters of a block"
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_other_classes_or_without_its_statistics_is_refused_by_name(probed, tmp_path, tools, capsys):
    def another(config):
        config["classes"].append("x")
        config["head"]["norm"] = "layer"

    init = copied(probed, tmp_path, another)
    code = tools.run("evaluate", tmp_path / "out", f"--config.init={init}", recipe="")
    told = tools.refused(capsys, code, 4, "missing: params/norm/scale", "missing: params/norm/bias")
    assert sum("misshapen: params/head/" in line for line in told) == 2
    assert not (tmp_path / "out").exists()


def test_what_no_shape_tells_of_an_encoder_is_compared_too(pretrained, tuned, tmp_path, tools, capsys):
    recipe = "digits,scratch,tiny"
    code = tools.run(
        "finetune", tmp_path / "a", f"--config.init={pretrained}", "--config.encoder.heads=8", recipe=recipe
    )
    tools.refused(capsys, code, 4, "2 heads, not 8")
    code = tools.run("finetune", tmp_path / "b", f"--config.init={tuned}", "--config.encoder.positions=sincos")
    tools.refused(capsys, code, 4, "positions learned, not sincos; set config.encoder.positions to learned")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["probe", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_run_goes_on_though_what_it_began_with_is_gone(job, pretrained, tmp_path, tools):
    init, workdir = tmp_path / "init", tmp_path / "run"
    shutil.copytree(pretrained, init)
    assert tools.run(job, workdir, f"--config.init={init}", "--config.train.steps=4") == 0
    shutil.rmtree(init)
    assert tools.run(job, workdir, f"--config.init={init}", "--config.train.steps=6") == 0
    assert tools.read_json(workdir / "results.json")["steps"] == 6


def test_a_run_is_saved_before_it_is_reported(pretrained, tmp_path, tools, monkeypatch):
    def fail(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(classification, "leave", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        tools.run("finetune", tmp_path, f"--config.init={pretrained}", "--config.train.steps=3")
    assert (tmp_path / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("job", ["knn", "evaluate"])
def test_a_named_data_set_that_the_source_does_not_read_is_refused(job, pretrained, tuned, tmp_path, tools, capsys):
    init = f"--config.init={tuned if job == 'evaluate' else pretrained}"
    code = main([job, f"--config=configs/{job}.py", init, f"--workdir={tmp_path}", "--config.data.name=mnist"])
    tools.refused(capsys, code, 2, "config.data.name: 'mnist', which the source 'digits' does not read")


def test_what_has_no_label_weighs_nothing():
    batch = {"label": np.array([0, -1, 2]), "weight": np.array([1.0, 1.0, 0.0], np.float32)}
    np.testing.assert_array_equal(classification.weight_of(batch), [1, 0, 0])


@pytest.mark.parametrize("job", ["probe", "finetune", "knn", "evaluate", "reconstruct"])
def test_an_init_that_is_not_there_is_one_line(job, tmp_path, tools, capsys):
    recipe = "digits,tiny" if job in ("probe", "finetune") else ""
    code = tools.run(job, tmp_path / "out", f"--config.init={tmp_path}/nowhere", recipe=recipe)
    (line,) = tools.refused(capsys, code, 4, f"{tmp_path}/nowhere: no checkpoint here")
    assert not (tmp_path / "out").exists(), line


@pytest.mark.parametrize("job", ["probe", "finetune", "knn", "evaluate", "reconstruct"])
def test_no_init_is_one_line(job, tmp_path, tools, capsys):
    """No test set is evaluated with a random encoder by accident; fine-tuning from nothing has to say which encoder."""
    recipe = "digits,tiny" if job in ("probe", "finetune") else ""
    code = tools.run(job, tmp_path / "out", recipe=recipe)
    (line,) = tools.refused(capsys, code, 2, "config.init: empty; name the workdir of a training run")
    assert not (tmp_path / "out").exists(), line


@pytest.mark.parametrize("run", ["probed", "tuned"])
def test_a_classifier_cannot_be_reconstructed(run, tmp_path, tools, request, capsys):
    init = request.getfixturevalue(run)
    code = tools.run("reconstruct", tmp_path / "out", f"--config.init={init}", recipe="")
    (line,) = tools.refused(capsys, code, 2, f"config.init: {init} holds no decoder; name a run of pretrain")
    assert not (tmp_path / "out").exists(), line
    with pytest.raises(CheckpointError, match="holds no decoder"):
        mae_jax.load(init)


def test_an_autoencoder_is_no_classifier(pretrained):
    with pytest.raises(CheckpointError, match="holds no classifier"):
        classification.load(pretrained)


# The data


def folder_of(root, classes, count=9):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (8, 8), 10 * i).save(root / name / f"{i}.png")


@pytest.mark.parametrize("job", ["probe", "finetune"])
def test_data_without_labels_or_with_other_classes_when_held_out_is_refused(job, pretrained, tmp_path, tools, capsys):
    folder_of(tmp_path / "flat", ["."], 20)
    folder_of(tmp_path / "other" / "train", "ab")
    folder_of(tmp_path / "other" / "test", "ac")
    arguments = (f"--config.init={pretrained}", "--config.data.source=folder", "--config.data.batch_size=8")
    flat = (f"--config.data.path={tmp_path}/flat", "--config.data.split=all", "--config.data.held_out=all")
    code = tools.run(job, tmp_path / "out", *arguments, *flat)
    told = tools.refused(capsys, code, 2, "the training split 'all' has no labels", "the held-out split 'all' has no")
    assert len(told) == 2
    other = (f"--config.data.path={tmp_path}/other", "--config.data.split=train", "--config.data.held_out=test")
    code = tools.run(job, tmp_path / "out", *arguments, *other)
    (line,) = tools.refused(capsys, code, 2, "config.data: the training and the held-out split have other classes")
    assert not (tmp_path / "out").exists(), line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.head.pool=meen", "config.head.pool: no 'meen'; use one of mean, cls; did you mean mean?"),
        ("--config.head.norm=bach", "config.head.norm: no 'bach'; use one of layer, batch, none"),
        ("--config.head.head_std=-1.0", "config.head.head_std: -1.0 is below 0"),
        (
            "--config.trainable=3",
            "config.trainable: '3' is none of all, head, norms, 0.5, or a number of blocks from 1",
        ),
        ("--config.trainable=0", "config.trainable: '0' is none of"),
        ("--config.ema=1.0", "config.ema: 1.0 is not between 0 (off) and 1"),
        ("--config.mixup.cutmix=-1.0", "config.mixup.cutmix: -1.0 is below 0"),
        ("--config.mixup.label_smoothing=1.5", "config.mixup.label_smoothing: 1.5 is not between 0 and 1"),
        ("--config.erasing.probability=2.0", "config.erasing.probability: 2.0 is not between 0 and 1"),
        ("--config.encoder.drop_path=1.0", "config.encoder.drop_path: 1.0 is not between 0 and 1"),
        ("--config.encoder.positions=sin", "config.encoder.positions: no 'sin'"),
        ("--config.optim.layer_decay=0.0", "config.optim.layer_decay: 0.0 is not above 0"),
        ("--config.data.randaugment=11.0", "config.data.randaugment: 11.0 is not between 0 (off) and 10"),
        ("--config.data.per_class=500", "config.data.per_class: 500, but class"),
        ("--config.data.image_size=(9, 8)", "config.data.image_size: (9, 8) is not (height, width), both divisible"),
    ],
)
def test_mistakes_are_one_line_each(argument, words, pretrained, tmp_path, tools, capsys):
    code = tools.run("finetune", tmp_path / "out", f"--config.init={pretrained}", argument)
    (line,) = tools.refused(capsys, code, 2, words)
    assert not (tmp_path / "out").exists(), line


# What is summed up


def test_numbers_of_a_confusion_matrix():
    confusion = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]])
    found = classification.summary({"confusion": confusion, "top5": np.array(10.0), "loss": np.array(5.0)}, list("abc"))
    assert found == {
        "examples": 10,
        "top1": 0.7,
        "top5": 1.0,
        "loss": 0.5,
        "correct": 7,
        "per_class": {
            "a": {"examples": 4, "top1": 0.75},
            "b": {"examples": 0, "top1": None},
            "c": {"examples": 6, "top1": pytest.approx(4 / 6)},
        },
    }
    assert classification.describe(found) == "top-1 70.00%  top-5 100.00%  loss 0.5000  on 10 images"


@pytest.mark.parametrize("total", [{}, {"confusion": np.zeros((2, 2)), "top5": np.zeros(()), "loss": np.zeros(())}])
def test_nothing_to_count_is_an_error_and_not_zero(total):
    with pytest.raises(DataError, match="none has a label"):
        classification.summary(total, ["a", "b"])


def test_other_pixels_than_the_encoder_was_trained_on_are_noted(pretrained, tmp_path, tools, capsys):
    code = tools.run("probe", tmp_path / "run", f"--config.init={pretrained}", "--config.pixels.mean=(0.5,)")
    assert code == 0
    assert f"note: {pretrained} was trained on pixels of " in capsys.readouterr().out
