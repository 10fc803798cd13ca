"""The probe job: the same in NumPy and PyTorch, stopped and resumed, with features once or at each step."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.config import complete, load
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import digits
from mae_jax.jobs import checks, classification, model_checks, probe
from mae_jax.training import metrics, optim
from mae_jax.training.loop import total_steps

CLASSES = [str(i) for i in range(10)]
STEPS = 100


def cls_features(init, images):
    """The cls token after the final norm, f64[N,D], from what a user gets of `load_encoder`."""
    encoder, params = mae_jax.load_encoder(init)
    images = mae_jax.normalize(images, **mae_jax.load_config(init).pixels)
    return np.asarray(encoder.apply({"params": params}, images), np.float64)[:, 0]


def test_a_probe_leaves_what_its_docstring_promises(probed, pretrained, tools):
    names = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "saved.json", "summary.json"}
    names |= {"results.json", "confusion.png", "curve.png"}
    assert {p.name for p in probed.iterdir()} == names
    assert all(name in probe.__doc__ for name in names)
    results = tools.read_json(probed / "results.json")
    about = {key: results[key] for key in ("job", "init", "checkpoint", "data", "trained_on", "steps")}
    assert about == {
        "job": "probe",
        "init": str(pretrained),
        "checkpoint": f"{probed}/checkpoints/{STEPS}",
        "data": {"source": "digits", "split": "test[:149]"},
        "trained_on": {"examples": 1003, "source": "digits", "split": "train[:1003]"},
        "steps": STEPS,
    }
    assert Path(results["checkpoint"]).is_dir()
    summary = tools.read_json(probed / "summary.json")
    assert (summary["job"], summary["steps"], summary["images_seen"]) == ("probe", STEPS, 64 * STEPS)
    lines = tools.lines_of(probed)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    (_, last) = (line for line in lines if "eval/top1" in line)
    assert last == {"step": STEPS} | {f"eval/{key}": results[key] for key in ("top1", "top5", "loss")}
    for name in ("confusion.png", "curve.png"):
        tools.check_picture(probed / name)
    config = tools.read_json(probed / "config.json")
    assert config["classes"] == CLASSES
    trained = tools.read_json(pretrained / "config.json")["encoder"]
    assert config["encoder"] == trained, "config.encoder = {} means that of config.init"


def test_its_numbers_are_those_of_a_linear_head_on_normalised_cls_tokens(probed, pretrained, tools):
    state = tools.state_of(probed, STEPS)
    images, labels = tools.held_out()
    x = cls_features(pretrained, images)
    x = (x - state["stats/batch_stats/norm/mean"]) / np.sqrt(state["stats/batch_stats/norm/var"] + 1e-6)
    logits = x @ state["params/head/kernel"].astype(np.float64) + state["params/head/bias"]
    results = tools.read_json(probed / "results.json")
    tools.check_numbers(results, logits, labels, CLASSES)
    assert results["correct"] > 20, "else this says little"


def test_the_encoder_is_frozen_and_costs_no_moments(probed, pretrained, tools):
    state = tools.state_of(probed, STEPS)
    before = tools.part_of(tools.state_of(pretrained, 80), "params/encoder/")
    tools.assert_equal(tools.part_of(state, "params/encoder/"), before)
    moments = [name for name in state if name.startswith("opt_state/") and np.ndim(state[name])]
    assert sorted("/".join(name.split("/")[-2:]) for name in moments) == ["head/bias", "head/kernel"]
    assert not tools.part_of(state, "ema/")


def test_a_probe_is_the_same_in_pytorch(probed, pretrained, tools):
    """A hundred steps of BatchNorm, a linear layer and LARS as in main_linprobe.py, on the same batches."""
    torch = pytest.importorskip("torch")
    config = mae_jax.load_config(probed)
    images, labels = digits(split="train[:1003]").read(np.arange(1003))
    features = torch.tensor(cls_features(pretrained, images))
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), torch.nn.Linear(features.shape[1], 10)
    ).double()
    init_key = jax.random.split(jax.random.key(config.seed), 3)[0]
    params, _ = classification.init(classification.build(config), config, init_key)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(np.asarray(params["head"]["kernel"], np.float64).T))
        model[1].bias.zero_()
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    losses = []
    peak, warmup = 60 * 64 / 256, STEPS // 2  # ten epochs of 15 steps would be more than half
    for step in range(STEPS):
        places = np.arange(64 * step, 64 * step + 64)
        index = [np.random.RandomState([config.seed, p // 1003]).permutation(1003)[p % 1003] for p in places]
        loss = torch.nn.functional.cross_entropy(model(features[index]), torch.tensor(labels[index]))
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        part = (step - warmup) / (STEPS - warmup)
        rate = peak * (step / warmup if step < warmup else 0.5 + 0.5 * np.cos(np.pi * part))
        with torch.no_grad():
            for p, velocity in momentum.items():
                trust = 0.001 * p.norm() / p.grad.norm() if p.ndim > 1 else 1.0
                velocity.mul_(0.9).add_(trust * p.grad)
                p.sub_(rate * velocity)
    state = tools.state_of(probed, STEPS)
    np.testing.assert_allclose(state["params/head/kernel"], model[1].weight.detach().T, atol=2e-3)
    np.testing.assert_allclose(state["params/head/bias"], model[1].bias.detach(), atol=1e-2)
    for name, ours in (("running_mean", "mean"), ("running_var", "var")):
        np.testing.assert_allclose(state[f"stats/batch_stats/norm/{ours}"], getattr(model[0], name), rtol=1e-4)
    ours = [line["train/loss"] for line in tools.lines_of(probed) if "train/loss" in line]
    assert ours[:50] == pytest.approx(losses[:50], rel=1e-3)
    assert ours == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_features_once_or_at_each_step_make_no_difference(
    norm, probed, pretrained, tmp_path, tools, monkeypatch, capsys
):
    arguments = (f"--config.init={pretrained}", f"--config.head.norm={norm}")
    once = probed
    if norm != "batch":
        once = tmp_path / "once"
        assert tools.run("probe", once, *arguments) == 0
        assert "features of 1003 and 149 images in" in capsys.readouterr().out
    monkeypatch.setattr(Dataset, "augmented", True)
    assert tools.run("probe", tmp_path / "each", *arguments) == 0
    assert "features of" not in capsys.readouterr().out
    got, want = (tools.state_of(run, STEPS) for run in (tmp_path / "each", once))
    assert sorted(got) == sorted(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)
    got, want = (tools.read_json(run / "results.json") for run in (tmp_path / "each", once))
    assert got["confusion"] == want["confusion"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_a_probe_on_one_device_counts_the_same(probed, pretrained, tmp_path, tools):
    arguments = (f"--config.init={pretrained}", "--config.mesh.data=1")
    assert tools.run("probe", tmp_path, *arguments) == 0
    one, eight = (tools.read_json(run / "results.json") for run in (tmp_path, probed))
    for key in ("examples", "correct", "top1", "top5", "confusion", "per_class"):
        assert one[key] == eight[key], key
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-3), "a hundred steps of float32 apart"


def stop_after(monkeypatch, step):
    """Send SIGTERM when the scalars of `step` are written."""
    log = metrics.Progress.log

    def log_and_stop(self, at, scalars):
        log(self, at, scalars)
        if at == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(metrics.Progress, "log", log_and_stop)


def test_a_stopped_probe_goes_on_with_the_encoder_it_began_with(probed, pretrained, tmp_path, tools, monkeypatch):
    """Even where config.init, a workdir, has been trained further since."""
    init = tmp_path / "init"
    for step in (80, 40):  # the newest checkpoint at first, then the second newest
        (init / "checkpoints").mkdir(parents=True, exist_ok=True)
        (init / "checkpoints" / str(step)).symlink_to(pretrained / "checkpoints" / str(step))
    arguments = (f"--config.init={init}",)
    with monkeypatch.context() as patch:
        stop_after(patch, 57)
        assert tools.run("probe", tmp_path / "run", *arguments) == 143
    assert not (tmp_path / "run" / "results.json").exists()
    (init / "checkpoints" / "90").symlink_to(pretrained / "checkpoints" / "40")
    assert tools.run("probe", tmp_path / "run", *arguments) == 0
    tools.assert_equal(tools.state_of(tmp_path / "run", STEPS), tools.state_of(probed, STEPS))
    assert tools.lines_of(tmp_path / "run") == tools.lines_of(probed)
    got, want = (tools.read_json(run / "results.json") for run in (tmp_path / "run", probed))
    assert {**got, "init": "", "checkpoint": ""} == {**want, "init": "", "checkpoint": ""}


def test_a_finished_probe_says_so_and_another_init_is_refused(probed, pretrained, tools, capsys):
    before = {p: p.read_bytes() for p in probed.iterdir() if p.is_file()}
    assert tools.run("probe", probed, f"--config.init={pretrained}") == 0
    assert "already complete" in capsys.readouterr().out
    code = tools.run("probe", probed, f"--config.init={pretrained}/checkpoints/40", "--config.head.pool=mean")
    told = tools.refused(capsys, code, 2, "config.init: ", "config.head.pool: cls in ")
    assert all("use a new --workdir" in line for line in told)
    assert {p: p.read_bytes() for p in probed.iterdir() if p.is_file()} == before


def test_so_many_labels_of_each_class(pretrained, tmp_path, tools):
    few = ("--config.data.per_class=4", "--config.data.split=train", "--config.data.batch_size=8")
    assert tools.run("probe", tmp_path, f"--config.init={pretrained}", *few) == 0
    results = tools.read_json(tmp_path / "results.json")
    assert results["trained_on"]["examples"] == 40
    assert results["examples"] == 149, "all that is held out"


# Recipes


@pytest.mark.parametrize("name", [pytest.param("fashion_mnist", marks=pytest.mark.slow), "imagenet"])
def test_recipes_run_at_their_tiny_size(name, untrained, tmp_path, tools):
    init = untrained({"fashion_mnist": "fashion_mnist", "imagenet": "vit_b16"}[name])
    assert tools.run("probe", tmp_path, f"--config.init={init}", "--config.mesh.data=1", recipe=f"{name},tiny") == 0
    results = tools.read_json(tmp_path / "results.json")
    assert (results["steps"], results["examples"], list(results["per_class"])) == (2, 256, ["dark", "light"])
    assert np.isfinite(results["loss"])


@pytest.mark.parametrize(("encoder", "width"), [("vit_b16", 768), ("vit_l16", 1024), ("vit_h14", 1280)])
def test_the_imagenet_recipe_is_that_of_the_paper(encoder, width):
    """Table 10 of He et al. 2021; main_linprobe.py of the original code."""
    config, _ = load("configs/probe.py:imagenet")
    trained, _ = load(f"configs/pretrain.py:{encoder}")
    config.encoder = trained.encoder
    config, problems = complete(config, probe.SCHEMA, probe.VALUES)
    assert problems + model_checks.classifier_problems(config) + checks.run_problems(config) == []
    config.classes = [str(i) for i in range(1000)]
    model = classification.build(config)
    params, stats = jax.eval_shape(lambda: classification.init(model, config, jax.random.key(0)))
    assert {k: v.shape for k, v in params["head"].items()} == {"kernel": (width, 1000), "bias": (1000,)}
    assert {k: v.shape for k, v in stats["batch_stats"]["norm"].items()} == {"mean": (width,), "var": (width,)}
    assert params.keys() == {"encoder", "head"}
    assert (model.pool, model.norm, model.head_std) == ("cls", "batch", 0.01)
    assert "norm" in params["encoder"]
    data = config.data
    assert (data.batch_size, data.augment, data.flip) == (16384, "random_resized_crop", True)
    assert (tuple(data.image_size), data.held_out_augment, data.held_out) == ((224, 224), "centre_crop", "validation")
    assert config.optim.weight_decay == 0
    assert (config.optim.name, config.optim.b1, config.optim.base_learning_rate) == ("lars", 0.9, 0.1)
    per_epoch = 1_281_167 // 16384
    steps = total_steps(per_epoch, **config.train)
    assert steps == 90 * 78
    _, schedule = optim.make(data.batch_size, steps, per_epoch, **config.optim)
    assert schedule(10 * 78) == pytest.approx(6.4, rel=1e-6)
    assert schedule(5 * 78) == pytest.approx(3.2, rel=1e-6)
    assert schedule(50 * 78) == pytest.approx(3.2, rel=1e-5), "half of the cosine"
    assert schedule(steps) == pytest.approx(0, abs=1e-6)
