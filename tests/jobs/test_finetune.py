"""The finetune job: whole, in part and from nothing; what it begins with, how it goes on, and the recipes."""

import runpy
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mae_jax
from mae_jax.config import complete, load
from mae_jax.jobs import checks, classification, finetune, model_checks, models
from mae_jax.model.positions import sincos_positions
from mae_jax.model.vit import SIZES
from mae_jax.training import metrics, optim
from mae_jax.training.loop import total_steps

CLASSES = [str(i) for i in range(10)]
STEPS = 20


def settings(*arguments, recipe="digits,tiny"):
    """The config of a finetune job, complete, and its data sets."""
    config, problems = load(f"configs/finetune.py:{recipe}", arguments)
    assert problems == []
    return finetune.check(config)


def test_fine_tuning_leaves_what_its_docstring_promises(tuned, pretrained, tools):
    names = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "saved.json", "summary.json"}
    names |= {"results.json", "confusion.png", "curve.png"}
    assert {p.name for p in tuned.iterdir()} == names
    assert all(name in finetune.__doc__ for name in names)
    results = tools.read_json(tuned / "results.json")
    about = {key: results[key] for key in ("job", "init", "checkpoint", "data", "trained_on", "steps")}
    assert about == {
        "job": "finetune",
        "init": str(pretrained),
        "checkpoint": f"{tuned}/checkpoints/{STEPS}",
        "data": {"source": "digits", "split": "test[:149]"},
        "trained_on": {"examples": 1003, "source": "digits", "split": "train[:1003]"},
        "steps": STEPS,
    }
    assert Path(results["checkpoint"]).is_dir()
    lines = tools.lines_of(tuned)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/top1" in line] == [10, 20]
    for name in ("confusion.png", "curve.png"):
        tools.check_picture(tuned / name)


def test_its_numbers_are_those_of_the_averaged_weights(tuned, tools):
    """Computed again from the arrays of the checkpoint, as Orbax gives them."""
    config = mae_jax.load_config(tuned)
    model = classification.build(config)
    state = tools.state_of(tuned, STEPS)
    images, labels = tools.held_out()
    images = jnp.asarray((images / 255 - config.pixels.mean[0]) / config.pixels.std[0], jnp.float32)
    logits = {}
    for part in ("params/", "ema/"):
        tree = {}
        for name, leaf in tools.part_of(state, part).items():
            *path, last = name.split("/")
            node = tree
            for key in path:
                node = node.setdefault(key, {})
            node[last] = jnp.asarray(leaf)
        logits[part] = np.asarray(jax.jit(model.apply)({"params": tree}, images))
    tools.check_numbers(tools.read_json(tuned / "results.json"), logits["ema/"], labels, CLASSES)
    assert np.abs(logits["ema/"] - logits["params/"]).max() > 1e-3, "which are others than the last ones"


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been(tuned, pretrained, tmp_path, tools, monkeypatch):
    log = metrics.Progress.log

    def log_and_stop(self, at, scalars):
        log(self, at, scalars)
        if at == 13:
            signal.raise_signal(signal.SIGTERM)

    arguments = (f"--config.init={pretrained}", *tools.with_everything)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "log", log_and_stop)
        assert tools.run("finetune", tmp_path, *arguments) == 143
    assert not (tmp_path / "results.json").exists()
    assert tools.run("finetune", tmp_path, *arguments) == 0
    tools.assert_equal(tools.state_of(tmp_path, STEPS), tools.state_of(tuned, STEPS))
    assert tools.lines_of(tmp_path) == tools.lines_of(tuned)
    got, want = (tools.read_json(run / "results.json") for run in (tmp_path, tuned))
    assert {**got, "checkpoint": ""} == {**want, "checkpoint": ""}


# In part

BLOCK = {
    *(f"{norm}/{name}" for norm in ("attention_norm", "mlp_norm") for name in ("scale", "bias")),
    *(f"attention/{layer}/{name}" for layer in ("qkv", "out") for name in ("kernel", "bias")),
    *(f"mlp/{layer}/{name}" for layer in ("in", "out") for name in ("kernel", "bias")),
}
BLOCKS = [{f"encoder/block_{i}/{name}" for name in BLOCK} for i in range(2)]
FIRST = {"encoder/cls_token", "encoder/positions", "encoder/patch_embedding/kernel", "encoder/patch_embedding/bias"}
HEAD = {"norm/scale", "norm/bias", "head/kernel", "head/bias"}
PARTS = {
    "head": HEAD,
    "norms": HEAD | {name for block in BLOCKS for name in block if "_norm/" in name},
    "0.5": HEAD | {name for name in BLOCKS[1] if "/mlp" in name},
    "1": HEAD | BLOCKS[1],
    "2": HEAD | BLOCKS[1] | BLOCKS[0],
    "all": HEAD | BLOCKS[1] | BLOCKS[0] | FIRST,
}


@pytest.mark.parametrize("what", [w if w == "1" else pytest.param(w, marks=pytest.mark.slow) for w in PARTS])
def test_what_is_trained_changes_and_all_else_stays_bit_for_bit(what, pretrained, tmp_path, tools):
    arguments = (
        f"--config.init={pretrained}",
        "--config.train.steps=2",
        f"--config.trainable={what}",
        "--config.ema=0.5",
    )
    assert tools.run("finetune", tmp_path, *arguments, "--config.mesh.data=1") == 0
    config = mae_jax.load_config(tmp_path)
    init_key = jax.random.split(jax.random.key(config.seed), 3)[0]
    fresh, _ = classification.init(classification.build(config), config, init_key)
    before = tools.flat({**fresh, "encoder": models.encoder_to_start_from(config)})
    state = tools.state_of(tmp_path, 2)
    after = tools.part_of(state, "params/")
    assert after.keys() == before.keys() == PARTS["all"]
    assert {name for name in after if not np.array_equal(after[name], before[name])} == PARTS[what]
    assert tools.part_of(state, "ema/").keys() == PARTS[what]
    for moment in ("/mu/", "/nu/"):
        kept = {name.partition(moment)[2] for name in state if moment in name and np.ndim(state[name])}
        assert kept == PARTS[what], moment
    results = tools.read_json(tmp_path / "results.json")
    assert results["examples"] == 149


# What it begins with


def starting(init, *arguments, recipe="digits,tiny"):
    config, *_ = settings(f"--config.init={init}", *arguments, recipe=recipe)
    return models.encoder_to_start_from(config)


def test_it_begins_with_the_encoder_of_any_run_or_checkpoint(pretrained, probed, tuned, tools):
    state = tools.state_of(pretrained, 80)
    want = {name: leaf for name, leaf in tools.part_of(state, "params/encoder/").items() if name[:5] != "norm/"}
    want["positions"] = np.concatenate([np.zeros((1, 32), np.float32), sincos_positions((4, 4), 32)])[None]
    for init in (pretrained, pretrained / "checkpoints" / "80", probed):
        tools.assert_equal(tools.flat(starting(init)), want)
    earlier = tools.flat(starting(pretrained / "checkpoints" / "40"))
    assert not np.array_equal(earlier["cls_token"], want["cls_token"])
    averages = tools.part_of(tools.state_of(tuned, STEPS), "ema/encoder/")
    tools.assert_equal(tools.flat(starting(tuned)), averages)


def test_a_run_really_begins_with_that(tuned, tmp_path, tools):
    """Without a learning rate the parameters stay as they began, and so do their averages."""
    still = ("--config.optim.base_learning_rate=0.0", "--config.optim.min_learning_rate=0.0", "--config.ema=0.5")
    arguments = (f"--config.init={tuned}", *still, "--config.train.steps=1")
    assert tools.run("finetune", tmp_path, *arguments) == 0
    state, averages = tools.state_of(tmp_path, 1), tools.part_of(tools.state_of(tuned, STEPS), "ema/encoder/")
    tools.assert_equal(tools.part_of(state, "params/encoder/"), averages)
    tools.assert_equal(tools.part_of(state, "ema/"), tools.part_of(state, "params/"))


def test_from_nothing(tmp_path, tools):
    still = ("--config.optim.base_learning_rate=0.0", "--config.optim.min_learning_rate=0.0")
    arguments = (*still, "--config.train.steps=1")
    assert tools.run("finetune", tmp_path, *arguments, recipe="digits,scratch,tiny") == 0
    assert tools.read_json(tmp_path / "results.json")["init"] == ""
    config = mae_jax.load_config(tmp_path)
    key = jax.random.split(jax.random.key(config.seed), 3)[0]
    fresh = jax.jit(lambda: classification.init(classification.build(config), config, key)[0])()
    got = tools.part_of(tools.state_of(tmp_path, 1), "params/")
    assert got.keys() == tools.flat(fresh).keys()
    for name, leaf in tools.flat(fresh).items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.fixture(scope="module")
def at_96(untrained, tmp_path_factory, tools):
    """Two steps of the recipe of ViT-B at 96 pixels, of an encoder pre-trained at 64."""
    workdir = tmp_path_factory.mktemp("runs") / "at_96"
    arguments = (f"--config.init={untrained('vit_b16')}", "--config.data.image_size=(96, 96)", "--config.mesh.data=1")
    assert tools.run("finetune", workdir, *arguments, recipe="vit_b16,tiny") == 0
    return workdir


def torch_resized(positions, old, new):
    torch = pytest.importorskip("torch")
    table = torch.tensor(positions[0, 1:].reshape(1, *old, -1)).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=new, mode="bicubic", align_corners=False)
    table = table.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).numpy()
    return np.concatenate([positions[:, :1], table], axis=1)


@pytest.mark.slow
def test_positions_are_resized_for_another_image_size(untrained, at_96, tools):
    init = untrained("vit_b16")
    learned = starting(init, "--config.data.image_size=(96, 96)", recipe="vit_b16,tiny")["positions"]
    fixed = np.concatenate([np.zeros((1, 32), np.float32), sincos_positions((4, 4), 32)])[None]
    np.testing.assert_allclose(learned, torch_resized(fixed, (4, 4), (6, 6)), rtol=1e-5, atol=1e-5)
    trained = tools.state_of(at_96, 2)["params/encoder/positions"]
    assert trained.shape == (1, 37, 32)
    assert not np.array_equal(trained, learned), "and trained from there"
    back = starting(at_96, "--config.data.image_size=(64, 128)", recipe="vit_b16,tiny")["positions"]
    np.testing.assert_allclose(back, torch_resized(trained, (6, 6), (4, 8)), rtol=1e-5, atol=1e-5)
    assert tools.read_json(at_96 / "results.json")["examples"] == 256


def test_sincos_positions_are_computed_anew_for_another_image_size(untrained, tools):
    init = untrained("vit_b16")
    arguments = ("--config.data.image_size=(96, 96)", "--config.encoder.positions=sincos")
    config, *_ = settings(f"--config.init={init}", *arguments, recipe="vit_b16,tiny")
    params = models.encoder_to_start_from(config)
    assert "positions" not in params
    images = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
    got = classification.build(config).encoder.apply({"params": params}, images)
    encoder, whole = mae_jax.load_encoder(init)
    want = encoder.clone(final_norm=False).apply({"params": whole}, images)
    np.testing.assert_array_equal(got, want)


# Recipes

RECIPES = runpy.run_path("configs/finetune.py")
SPECS = [f"{name},tiny" for name in RECIPES["RECIPES"]] + [f"{name},scratch,tiny" for name in RECIPES["SMALL"]]
QUICK = {"fashion_mnist_10,tiny"}


@pytest.mark.parametrize("spec", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SPECS])
def test_recipes_run_at_their_tiny_size(spec, untrained, tmp_path, tools):
    name = next(name for name in ("fashion_mnist", "vit_h14", "vit_", "digits") if spec.startswith(name))
    init = "" if "scratch" in spec else untrained("vit_b16" if name == "vit_" else name)
    assert tools.run("finetune", tmp_path, f"--config.init={init}", "--config.mesh.data=1", recipe=spec) == 0
    results = tools.read_json(tmp_path / "results.json")
    assert results["steps"] == (20 if name == "digits" else 2)
    assert (results["examples"], len(results["per_class"])) == ((149, 10) if name == "digits" else (256, 2))
    assert np.isfinite(results["loss"])


def full_size(spec):
    """The completed config of an ImageNet recipe, with the encoder that pre-training leaves."""
    config, _ = load(f"configs/finetune.py:{spec}")
    if "width" not in config.encoder:
        trained, _ = load(f"configs/pretrain.py:{spec.removesuffix('_448')}")
        config.encoder = {**trained.encoder.to_dict(), **config.encoder.to_dict()}
    config, problems = complete(config, finetune.SCHEMA, finetune.VALUES)
    assert problems + model_checks.classifier_problems(config) + checks.run_problems(config) == []
    config.classes = [str(i) for i in range(1000)]
    return config


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [  # those of timm's ViTs with global_pool="avg", whose fc_norm stands for the final norm
        *(("vit_b16", 86_567_656), ("vit_l16", 304_326_632), ("vit_h14", 632_045_800)),
        ("vit_h14_448", 632_045_800 + (32**2 - 16**2) * 1280),
        # with fixed positions
        ("vit_b16_scratch", 86_567_656 - 197 * 768),
        ("vit_l16_scratch", 304_326_632 - 197 * 1024),
        ("vit_h14_scratch", 632_045_800 - 257 * 1280),
    ],
)
def test_imagenet_recipes_have_the_models_of_the_paper(spec, parameters):
    config = full_size(spec)
    model = classification.build(config)
    params, stats = jax.eval_shape(lambda: classification.init(model, config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert stats == {}
    size = {"b": "B", "l": "L", "h": "H"}[spec[4]]
    assert {key: config.encoder[key] for key in ("width", "depth", "heads")} == SIZES[size]
    assert (model.pool, model.norm, model.encoder.final_norm) == ("mean", "layer", False)


@pytest.mark.parametrize(
    ("spec", "base", "epochs", "layer_decay", "drop_path"),
    [
        *(("vit_b16", 5e-4, 100, 0.65, 0.1), ("vit_l16", 1e-3, 50, 0.75, 0.2)),
        *(("vit_h14", 1e-3, 50, 0.75, 0.3), ("vit_h14_448", 1e-3, 50, 0.75, 0.3)),
    ],
)
def test_fine_tuning_recipes_have_the_numbers_of_table_9(spec, base, epochs, layer_decay, drop_path):
    config = full_size(spec)
    assert config.optim.to_dict() == {
        "name": "adamw",
        "base_learning_rate": base,
        "min_learning_rate": 1e-6,
        "warmup_epochs": 5.0,
        "weight_decay": 0.05,
        "b1": 0.9,
        "b2": 0.999,
        "layer_decay": layer_decay,
    }
    assert (config.encoder.drop_path, config.encoder.positions, config.ema) == (drop_path, "learned", 0)
    assert config.mixup.to_dict() == {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "label_smoothing": 0.1}
    assert config.erasing.to_dict() == {"probability": 0.25}
    assert config.head.head_std == 2e-5
    check_input(config, 1024, (448, 448) if spec.endswith("448") else (224, 224))
    check_schedule(config, base, epochs, 5, 1e-6)


@pytest.mark.parametrize(
    ("spec", "epochs", "drop_path"),
    [("vit_b16_scratch", 300, 0.1), ("vit_l16_scratch", 200, 0.2), ("vit_h14_scratch", 200, 0.2)],
)
def test_recipes_from_nothing_have_the_numbers_of_table_11(spec, epochs, drop_path):
    config = full_size(spec)
    assert config.optim.to_dict() == {
        "name": "adamw",
        "base_learning_rate": 1e-4,
        "min_learning_rate": 0.0,
        "warmup_epochs": 20.0,
        "weight_decay": 0.3,
        "b1": 0.9,
        "b2": 0.95,
        "layer_decay": 1.0,
    }
    assert (config.encoder.drop_path, config.ema, config.init) == (drop_path, 0.9999, "")
    assert config.mixup.to_dict() == {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "label_smoothing": 0.1}
    check_input(config, 4096, (224, 224))
    check_schedule(config, 1e-4, epochs, 20, 0)


def check_input(config, batch_size, image_size):
    data = config.data
    assert (data.batch_size, data.augment, data.flip) == (batch_size, "random_resized_crop", True)
    assert (tuple(data.scale), tuple(data.ratio), data.randaugment) == ((0.08, 1.0), (3 / 4, 4 / 3), 9)
    assert tuple(data.image_size) == image_size
    assert data.held_out_augment == ("centre_crop" if image_size[0] <= 224 else "none")
    assert (data.name, data.split, data.held_out) == ("imagenet2012", "train", "validation")


def check_schedule(config, base, epochs, warmup, least):
    per_epoch = 1_281_167 // config.data.batch_size
    steps = total_steps(per_epoch, **config.train)
    assert steps == epochs * per_epoch
    _, schedule = optim.make(config.data.batch_size, steps, per_epoch, lambda path: 0, **config.optim)
    peak = base * config.data.batch_size / 256
    assert schedule(warmup * per_epoch) == pytest.approx(peak, rel=1e-6)
    assert schedule((warmup + epochs) * per_epoch / 2) == pytest.approx((peak + least) / 2, rel=1e-5)
    assert schedule(steps) == pytest.approx(least, abs=1e-8)
