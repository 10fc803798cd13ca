"""The evaluate job: the numbers of training again, other splits, some of the classes, several data sets at once."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.data.sources import SOURCES, digits, in_memory
from mae_jax.jobs import classification, evaluate
from mae_jax.training.sharding import make_mesh

CLASSES = [str(i) for i in range(10)]
COUNTED = ("examples", "correct", "top1", "top5", "confusion", "per_class")


def logits_of(init, images):
    """Of images uint8, from a classifier as `classification.load` gives it."""
    model, config, variables = classification.load(init)
    images = mae_jax.normalize(images, **config.pixels)
    return np.asarray(jax.jit(model.apply)(variables, images))


@pytest.mark.parametrize("run", ["probed", "tuned"])
def test_the_held_out_split_gives_the_numbers_of_the_last_evaluation_in_training(run, tmp_path, tools, request, capsys):
    init = request.getfixturevalue(run)
    assert tools.run("evaluate", tmp_path, f"--config.init={init}", recipe="") == 0
    got, want = tools.read_json(tmp_path / "results.json"), tools.read_json(init / "results.json")
    assert {key: got[key] for key in (*COUNTED, "data", "checkpoint")} == {
        key: want[key] for key in (*COUNTED, "data", "checkpoint")
    }
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert (got["job"], got["init"]) == ("evaluate", str(init))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "results.json", "confusion.png"}
    tools.check_picture(tmp_path / "confusion.png")
    assert f"top-1 {want['top1']:.2%}" in capsys.readouterr().out


def test_another_split_on_one_device_and_on_eight(tuned, tmp_path, tools, monkeypatch):
    arguments = (f"--config.init={tuned}/checkpoints/20", "--config.data.split=train[1003:1300]")
    assert tools.run("evaluate", tmp_path / "eight", *arguments, recipe="") == 0
    monkeypatch.setattr(evaluate, "make_mesh", lambda: make_mesh(data=1))
    assert tools.run("evaluate", tmp_path / "one", *arguments, "--config.data.batch_size=7", recipe="") == 2
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert tools.run("evaluate", tmp_path / "one", *arguments, "--config.data.batch_size=7", recipe="") == 0
    one, eight = (tools.read_json(tmp_path / name / "results.json") for name in ("one", "eight"))
    assert {key: one[key] for key in COUNTED} == {key: eight[key] for key in COUNTED}
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-6)
    images, labels = digits(split="train[1003:1300]").read(np.arange(297))
    tools.check_numbers(eight, logits_of(tuned, images), labels, CLASSES)


def test_of_a_data_set_with_some_of_the_classes_the_choice_is_among_those(tuned, tmp_path, tools):
    """A folder with three of the ten, as ImageNet-A has 200 of ImageNet's thousand; named by folder, in their order."""
    images, labels = digits(split="test").read(np.arange(359))
    some = np.flatnonzero(np.isin(labels, (1, 3, 7)))
    for i in some:
        path = tmp_path / "images" / str(labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, ..., 0]).save(path)
    folder = ("--config.data.source=folder", f"--config.data.path={tmp_path}/images", "--config.data.split=all")
    assert tools.run("evaluate", tmp_path / "out", f"--config.init={tuned}", *folder, recipe="") == 0
    results = tools.read_json(tmp_path / "out" / "results.json")
    numbers = {1: 0, 3: 1, 7: 2}
    logits = logits_of(tuned, images[some])[:, [1, 3, 7]]
    tools.check_numbers(results, logits, [numbers[label] for label in labels[some]], ["1", "3", "7"])
    assert results["data"] == {"source": "folder", "path": f"{tmp_path}/images", "split": "all"}
    assert results["top5"] == 1


def noisy(*, split, name, **_):
    """As if TFDS had digits under noise that grows with the number at the end of the name."""
    source = digits(split=split)
    images, labels = source.read(np.arange(source.size))
    level = int(name[-1])
    images = np.clip(images + np.random.default_rng(level).normal(0, 20 * level, images.shape), 0, 255)
    return in_memory(images.astype(np.uint8), labels, split, CLASSES)


def test_several_data_sets_at_once_and_their_mean_corruption_error(tuned, tmp_path, tools, monkeypatch, capsys):
    monkeypatch.setitem(SOURCES, "tfds", noisy)
    names = [f"imagenet2012_corrupted/{name}" for name in ("fog_1", "fog_5", "snow_1")]
    arguments = (f"--config.init={tuned}", "--config.data.source=tfds", f"--config.names={tuple(names)}")
    assert tools.run("evaluate", tmp_path, *arguments, recipe="") == 0
    results = tools.read_json(tmp_path / "results.json")
    assert list(results["sets"]) == names
    errors = []
    for name in names:
        source = noisy(split="test[:149]", name=name)
        images, labels = source.read(np.arange(149))
        guesses = logits_of(tuned, images).argmax(axis=1)
        errors.append((guesses != labels).mean())
        assert results["sets"][name]["top1"] == pytest.approx(1 - errors[-1])
        assert results["sets"][name]["data"] == {"source": "tfds", "name": name, "split": "test[:149]"}
    assert results["top1"] == pytest.approx(1 - np.mean(errors))
    fog, snow = np.mean(errors[:2]) / 0.819324, errors[2] / 0.866816
    assert results["mce"] == pytest.approx((fog + snow) / 2)
    assert f"mCE {results['mce']:.2%} of 3 corrupted sets" in capsys.readouterr().out


def only_some(*, split, **_):
    """As if TFDS had the digits 2, 5 and 9 alone, under the names of all ten, as it has ImageNet-A."""
    images, labels = digits(split="test").read(np.arange(359))
    some = np.isin(labels, (2, 5, 9))
    return in_memory(images[some], labels[some], split, CLASSES)


def test_the_choice_may_be_among_the_classes_that_occur(tuned, tmp_path, tools, monkeypatch):
    monkeypatch.setitem(SOURCES, "tfds", only_some)
    arguments = (f"--config.init={tuned}", "--config.data.source=tfds", "--config.data.name=some")
    assert tools.run("evaluate", tmp_path / "all", *arguments, recipe="") == 0
    assert tools.run("evaluate", tmp_path / "some", *arguments, "--config.occurring_only=True", recipe="") == 0
    images, labels = only_some(split="").read(np.arange(only_some(split="").size))
    logits = logits_of(tuned, images)
    tools.check_numbers(tools.read_json(tmp_path / "all" / "results.json"), logits, labels, CLASSES)
    numbers = [(2, 5, 9).index(label) for label in labels]
    tools.check_numbers(tools.read_json(tmp_path / "some" / "results.json"), logits[:, [2, 5, 9]], numbers, list("259"))


def test_errors_of_alexnet_are_those_of_the_paper():
    """Hendrycks and Dietterich 2019, table 1: AlexNet's errors in percent; its own mCE is 100 %."""
    table = {
        "gaussian_noise": 88.6,
        "shot_noise": 89.4,
        "impulse_noise": 92.3,
        "defocus_blur": 82.0,
        "glass_blur": 82.6,
    }
    table |= {"motion_blur": 78.6, "zoom_blur": 79.8, "snow": 86.7, "frost": 82.7, "fog": 81.9, "brightness": 56.5}
    table |= {"contrast": 85.3, "elastic_transform": 64.6, "pixelate": 71.8, "jpeg_compression": 60.7}
    assert evaluate.ALEXNET.keys() == table.keys()
    for name, error in table.items():
        assert 100 * evaluate.ALEXNET[name] == pytest.approx(error, abs=0.06), name
    own = {f"{name}_{severity}": error for name, error in evaluate.ALEXNET.items() for severity in range(1, 6)}
    assert evaluate.mean_corruption_error(own) == pytest.approx(1)


def test_recipes_name_data_sets_that_tfds_has():
    import tensorflow_datasets as tfds

    recipes = runpy.run_path("configs/evaluate.py")
    for name, split in (("imagenet_a", "test"), ("imagenet_r", "test"), ("imagenet_sketch", "test")):
        config = recipes["get_config"](name)
        tfds.builder_cls(config.data.name)
        assert config.data.split == split
        assert config.occurring_only == (name != "imagenet_sketch"), "200 classes of 1000 occur in -A and -R"
    config = recipes["get_config"]("imagenet_c")
    known = {
        f"imagenet2012_corrupted/{c.name}" for c in tfds.builder_cls("imagenet2012_corrupted").builder_configs.values()
    }
    assert len(config.names) == 15 * 5 and set(config.names) <= known
    assert (config.data.split, config.occurring_only) == ("validation", False)
    assert recipes["get_config"]().data.to_dict() == {
        **dict.fromkeys(("source", "name", "data_dir", "path", "split", "held_out_augment")),
        "batch_size": 256,
    }
    for name in recipes["SETS"]:
        assert f"\n{name or '(none)'} " in recipes["__doc__"]


# What is refused


@pytest.fixture
def sources(monkeypatch):
    """Data sets that do not fit a classifier of digits, by name."""
    whole = digits(split="test[:20]")
    images, labels = whole.read(np.arange(20))
    table = {
        "unlabelled": dataclasses.replace(whole, labels=()),
        "strange": in_memory(images, labels, "", [*CLASSES[:7], "x", "y", "z"]),
        "many": in_memory(images, labels, "", [f"n{i}" for i in range(12)]),
        "coloured": in_memory(images.repeat(3, axis=-1), labels, "", CLASSES),
        "imagenet2012_corrupted/rain_1": whole,
    }
    monkeypatch.setitem(SOURCES, "tfds", lambda *, name, **_: table[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.data.name=unlabelled",), "config.data: the unlabelled split 'test[:149]' has no labels"),
        (("--config.data.name=strange",), "strange has classes that "),
        (("--config.data.name=many",), "does not know: n0, n1, n2, n3, n4 and 7 more"),
        (("--config.data.name=coloured",), "config.data.channels: tfds has images of 3 channel(s), not 1"),
        (("--config.names=('imagenet2012_corrupted/rain_1',)",), "no error of AlexNet is known"),
        (("--config.data.source=tdfs",), "config.data.source: no 'tdfs'; use one of"),
        (("--config.data.batch_size=20",), "config.data.batch_size: 20 is not a multiple of the 8 device(s), above 0"),
        (("--config.data.source=digits", "--config.data.split=test[:0]"), "has 0 images, fewer than one"),
        (("--config.data.source=digits", "--config.data.split=tost"), "no split 'tost'"),
        (("--config.data.source=digits", "--config.names=('a', 'b')"), "config.names: data sets of TFDS, but"),
        (("--config.data.source=folder", "--config.data.path=nowhere"), "no folder 'nowhere'"),
    ],
)
def test_data_that_does_not_fit_is_one_line(arguments, words, probed, sources, tmp_path, tools, capsys):
    source = () if any("source" in argument for argument in arguments) else ("--config.data.source=tfds",)
    code = tools.run("evaluate", tmp_path / "out", f"--config.init={probed}", *source, *arguments, recipe="")
    (line,) = tools.refused(capsys, code, 2, words)
    assert not (tmp_path / "out").exists(), line


def test_a_run_of_pretrain_has_no_head_to_evaluate(pretrained, tmp_path, tools, capsys):
    code = tools.run("evaluate", tmp_path / "out", f"--config.init={pretrained}", recipe="")
    (line,) = tools.refused(capsys, code, 2, f"config.init: {pretrained} holds no classifier")
    assert not (tmp_path / "out").exists(), line


def test_the_workdir_of_a_run_is_not_written_to(probed, tools, capsys):
    before = (probed / "results.json").read_bytes()
    code = tools.run("evaluate", probed, f"--config.init={probed}", recipe="")
    tools.refused(capsys, code, 2, "holds a training run")
    assert (probed / "results.json").read_bytes() == before
