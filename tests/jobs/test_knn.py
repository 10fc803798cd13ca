"""The knn job and the monitor of pre-training, against scikit-learn on what `load_encoder` gives."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import mae_jax
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import digits
from mae_jax.jobs import knn
from mae_jax.jobs.runs import Run
from mae_jax.training.sharding import make_mesh

KS = (1, 5, 20, 100)
TEMPERATURE = 0.07


def features(init, images, kind="mean"):
    x = mae_jax.normalize(images, **mae_jax.load_config(init).pixels)
    if kind == "pixels":
        return np.asarray(x, np.float64).reshape(len(images), -1)
    encoder, params = mae_jax.load_encoder(init)
    tokens = np.asarray(jax.jit(encoder.apply)({"params": params}, x), np.float64)
    return tokens[:, 0] if kind == "cls" else tokens[:, 1:].mean(axis=1)


def sklearns(bank, labels, queries, k):
    """Weighted votes by scikit-learn: its cosine distance is 1 - similarity."""
    model = KNeighborsClassifier(
        min(k, len(bank)), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
    )
    return model.fit(bank, labels).predict(queries)


@pytest.mark.parametrize("kind", ["mean", "cls", "pixels"])
def test_the_job_is_scikit_learns_on_the_same_features(kind, pretrained, tmp_path, tools, capsys):
    arguments = (f"--config.init={pretrained}", f"--config.features={kind}", f"--config.k={KS}")
    assert tools.run("knn", tmp_path, *arguments, recipe="") == 0
    results = tools.read_json(tmp_path / "results.json")
    (images, labels), (asked, truth) = digits(split="train[:1003]").read(np.arange(1003)), tools.held_out()
    bank, queries = features(pretrained, images, kind), features(pretrained, asked, kind)
    want = {str(k): int((sklearns(bank, labels, queries, k) == truth).sum()) for k in KS}
    found = {k: share * 149 for k, share in results["top1"].items()}
    assert found == pytest.approx(want, abs=3.01), "but for neighbours as near as float32 can tell"
    assert min(want.values()) > 22, "better than guessing, so this says something"
    told = capsys.readouterr().out
    for k, share in results["top1"].items():
        assert f"{share:.2%}  of 149 images right by {k} of 1003 neighbours" in told
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "results.json"}
    about = {key: results[key] for key in ("job", "init", "checkpoint", "features", "data", "bank", "examples")}
    assert about == {
        "job": "knn",
        "init": str(pretrained),
        "checkpoint": f"{pretrained}/checkpoints/80",
        "features": kind,
        "data": {"source": "digits", "split": "test[:149]"},
        "bank": {"examples": 1003, "source": "digits", "split": "train[:1003]"},
        "examples": 149,
    }
    assert tools.read_json(tmp_path / "config.json")["k"] == list(KS)


@pytest.mark.parametrize("devices", [1, 8])
def test_every_answer_is_scikit_learns_on_any_number_of_devices(devices, pretrained, tools, monkeypatch):
    monkeypatch.setattr(knn, "QUERIES", 64)  # more than one lot, the last one not full
    (images, labels), (asked, _) = digits(split="train[:503]").read(np.arange(503)), tools.held_out()
    bank, queries = features(pretrained, images), features(pretrained, asked)
    bank, queries = bank - bank.mean(axis=0), queries - bank.mean(axis=0)  # apart, so that float32 can tell them
    as_job = [x.astype(np.float32) for x in (bank, queries)]
    got = knn.neighbours(as_job[0], labels, as_job[1], KS, 10, TEMPERATURE, make_mesh(data=devices))
    assert got.shape == (len(KS), 149)
    for k, answers in zip(KS, got, strict=True):
        np.testing.assert_array_equal(answers, sklearns(bank, labels, queries, k), err_msg=f"k = {k}")


def test_another_split_few_labels_and_an_earlier_checkpoint(pretrained, tmp_path, tools):
    few = ("--config.data.per_class=3", "--config.data.split=train", "--config.data.held_out=train[1300:]")
    arguments = (f"--config.init={pretrained}/checkpoints/40", "--config.k=(1,50)", *few)
    assert tools.run("knn", tmp_path / "a", *arguments, recipe="") == 0
    results = tools.read_json(tmp_path / "a" / "results.json")
    assert results["checkpoint"] == f"{pretrained}/checkpoints/40"
    assert (results["bank"]["examples"], results["examples"]) == (30, 138)
    assert results["data"]["split"] == "train[1300:]"
    assert tools.run("knn", tmp_path / "b", *arguments, "--config.data.subset_seed=1", recipe="") == 0
    other = tools.read_json(tmp_path / "b" / "results.json")
    assert other["top1"] != results["top1"], "other neighbours"


@pytest.mark.parametrize("run", ["probed", "tuned"])
def test_the_encoder_may_be_that_of_a_classifier(run, tmp_path, tools, request):
    init = request.getfixturevalue(run)
    assert tools.run("knn", tmp_path, f"--config.init={init}", "--config.k=(5,)", recipe="") == 0
    images, labels = digits(split="train[:1003]").read(np.arange(1003))
    asked, truth = tools.held_out()
    guesses = sklearns(features(init, images), labels, features(init, asked), 5)
    found = tools.read_json(tmp_path / "results.json")["top1"]
    assert found == {"5": pytest.approx((guesses == truth).mean(), abs=1.01 / 149)}


def test_the_monitor_is_the_same_on_a_part_of_the_data(pretrained, tools, capsys):
    """As eval/knn, at every look: 3 neighbours among 32 images vote on 16."""
    lines = [line for line in tools.lines_of(pretrained) if "eval/knn" in line]
    assert [line["step"] for line in lines] == [40, 80]
    images, labels = digits(split="train[:32]").read(np.arange(32))
    asked, truth = (x[:16] for x in tools.held_out())
    for line in lines:
        init = pretrained / "checkpoints" / str(line["step"])
        guesses = sklearns(features(init, images), labels, features(init, asked), 3)
        assert line["eval/knn"] == pytest.approx((guesses == truth).mean(), abs=1.01 / 16)


def test_the_monitor_is_off_without_labels(tmp_path, tools, monkeypatch):
    for i in range(70):
        Image.new("L", (8, 8), 3 * i).save(tmp_path / f"{i}.png")
    hooks_of = []

    def train(self, init, draw, loss_fn, hooks, **options):
        hooks_of.append(hooks)
        self.writer.close()
        self.checkpoints.close()

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(knn, "monitor", lambda *_, **__: "the monitor")
    folder = ("--config.data.source=folder", f"--config.data.path={tmp_path}", "--config.data.split=all")
    assert tools.run("pretrain", tmp_path / "without", *folder, "--config.data.held_out=all") == 0
    assert tools.run("pretrain", tmp_path / "with") == 0
    assert ["the monitor" in hooks for hooks in hooks_of] == [False, True]


def test_the_monitor_tells_its_share_of_the_time(pretrained, capsys):
    config = mae_jax.load_config(pretrained)
    encoder, params = mae_jax.load_encoder(pretrained)
    data = Dataset(**config.data)
    found = []
    writer = SimpleNamespace(scalars=lambda step, scalars: found.append((step, scalars)))
    run = SimpleNamespace(mesh=make_mesh(), writer=writer, began=time.time() - 100)
    every, look = knn.monitor(encoder, config, data, data.held_out_set(), run, every=7, bank=64, queries=16, k=5)
    state = SimpleNamespace(averaged={"encoder": params})
    look(state, 7)
    look(state, 14)
    assert every == 7
    assert [step for step, _ in found] == [7, 14]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"step 7  eval/knn {found[0][1]['eval/knn']:.2%} by 5 of 64 neighbours  (")
    shares = [float(line.rpartition("(")[2].removesuffix("% of the time)")) for line in (first, second)]
    assert 0 < shares[0] <= shares[1] < 60


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.features=means",), "config.features: no 'means'; use one of mean, cls, pixels; did you mean mean?"),
        (("--config.k=(0,5)",), "config.k: (0, 5) is not one or more numbers above 0"),
        (("--config.k=()",), "config.k: () is not"),
        (("--config.temperature=0.0",), "config.temperature: 0.0 is not above 0"),
        (("--config.data.source=digit",), "config.data.source: no 'digit'; use one of"),
        (("--config.data.batch_size=12",), "config.data.batch_size: 12 is not a multiple of the 8 device(s)"),
        (("--config.data.split=tain",), "no split 'tain'"),
        (("--config.data.held_out=test[:0]",), "has 0 images, fewer than one"),
        (("--config.data.per_class=-1",), "config.data.per_class: -1 is below 0"),
        (("--config.data.per_class=1000",), "config.data.per_class: 1000, but class"),
    ],
)
def test_mistakes_are_one_line_each(arguments, words, pretrained, tmp_path, tools, capsys):
    code = tools.run("knn", tmp_path / "out", f"--config.init={pretrained}", *arguments, recipe="")
    (line,) = tools.refused(capsys, code, 2, words)
    assert not (tmp_path / "out").exists(), line


def test_the_workdir_of_a_run_is_not_written_to(pretrained, tools, capsys):
    before = (pretrained / "config.json").read_bytes()
    code = tools.run("knn", pretrained, f"--config.init={pretrained}", recipe="")
    tools.refused(capsys, code, 2, "holds a training run")
    assert (pretrained / "config.json").read_bytes() == before
