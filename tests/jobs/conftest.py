"""What the tests of jobs share: how to run one, and one pre-trained, one probed and one fine-tuned model to look at."""

import contextlib
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from mae_jax.__main__ import main
from mae_jax.config import complete, load, to_json
from mae_jax.data.sources import digits
from mae_jax.jobs import models, pretrain
from mae_jax.training import metrics
from mae_jax.training.checkpoint import Checkpoints

TRAIN, HELD_OUT = "train[:1003]", "test[:149]"  # sizes that neither the batch nor the eight devices divide
SMALL = {
    "pretrain": ("--config.train.steps=80", "--config.optim.base_learning_rate=0.02", "--config.eval.every=0"),
    "probe": ("--config.train.steps=100", "--config.optim.base_learning_rate=60.0", "--config.eval.every=50"),
    "finetune": ("--config.train.steps=20", "--config.optim.base_learning_rate=0.02", "--config.head.head_std=0.01"),
}
TIMINGS = {"train/images_per_second", "perf/data_wait_fraction"}


@contextlib.contextmanager
def quickly(folder):
    """Whole jobs repeat the same programs: keep what is compiled in `folder`, and do not polish it."""
    settings = {  # and their defaults
        "jax_compilation_cache_dir": (str(folder), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_disable_most_optimizations": (True, False),
    }
    already = jax.config.jax_compilation_cache_dir == str(folder)

    def use(which):
        for name, values in () if already else settings.items():
            jax.config.update(name, values[which])
        compilation_cache.reset_cache()

    use(0)
    try:
        yield
    finally:
        use(1)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of compiled programs that all tests of jobs share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compiled):
    with quickly(compiled):
        yield


def run(job, workdir, *arguments, recipe="digits,tiny"):
    """The exit code of a job on some of the digits, or with `recipe` on what that says."""
    small = ()
    if recipe.startswith("digits"):
        small = (f"--config.data.split={TRAIN}", f"--config.data.held_out={HELD_OUT}", "--config.data.batch_size=64")
        small += SMALL[job]
    config = f"--config=configs/{job}.py" + f":{recipe}" * bool(recipe)
    return main([job, config, f"--workdir={workdir}", *small, *arguments])


def read_json(path):
    return json.loads(path.read_text())


def lines_of(workdir, drop=TIMINGS):
    """The lines of metrics.jsonl, without timings."""
    return [{k: v for k, v in line.items() if k not in drop} for line in metrics.read(workdir / "metrics.jsonl")]


def state_of(workdir, step):
    """The train state of a checkpoint by name, "params/head/kernel", as NumPy arrays, read by Orbax alone."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        state = reader.restore(folder, ocp.args.PyTreeRestore(restore_args=as_numpy))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def part_of(state, prefix):
    """Of a flat state, what is below `prefix`, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}


def flat(params):
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}


def assert_equal(got, want):
    """The same names with the same arrays, bit for bit."""
    assert sorted(got) == sorted(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def held_out():
    """The images that these models are evaluated on, uint8[149,8,8,1], and their labels."""
    return digits(split=HELD_OUT).read(np.arange(149))


def numbers(logits, labels):
    """What results.json should say of logits [N,C] and labels [N], counted one image after the other."""
    logits = np.asarray(logits, np.float64)
    confusion = np.zeros((logits.shape[1],) * 2, int)
    losses, top5 = [], 0
    for row, label in zip(logits, labels, strict=True):
        ranked = sorted(range(len(row)), key=lambda c: (-row[c], c))
        confusion[label, ranked[0]] += 1
        top5 += label in ranked[:5]
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    correct = int(np.trace(confusion))
    return {
        "examples": len(labels),
        "correct": correct,
        "top1": pytest.approx(correct / len(labels), rel=1e-12),
        "top5": pytest.approx(top5 / len(labels), rel=1e-12),
        "loss": pytest.approx(np.mean(losses), rel=1e-5),
        "confusion": confusion.tolist(),
    }


def check_numbers(results, logits, labels, classes):
    """Hold results.json against logits, by image and by class."""
    want = numbers(logits, labels)
    assert {key: results[key] for key in want} == want
    for number, name in enumerate(classes):
        row = want["confusion"][number]
        share = row[number] / sum(row) if sum(row) else None
        assert results["per_class"][name] == {"examples": sum(row), "top1": share}
    assert list(results["per_class"]) == list(classes)


def check_picture(path, least=300):
    """A PNG file of a sensible size with something in it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert least <= min(picture.size) and max(picture.size) <= 1500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.fixture(scope="session")
def tools(refused):
    """The functions above; test modules cannot import a conftest."""
    names = (run, read_json, lines_of, state_of, part_of, flat, assert_equal, held_out, check_numbers, check_picture)
    return SimpleNamespace(with_everything=WITH_EVERYTHING, **{f.__name__: f for f in (*names, refused)})


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, compiled):
    """The workdir of a pre-training of 80 steps, with another checkpoint at step 40."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    with quickly(compiled):
        assert run("pretrain", workdir, "--config.checkpoint.every=40", "--config.monitor.every=40") == 0
    return workdir


@pytest.fixture(scope="session")
def probed(pretrained, tmp_path_factory, compiled):
    """The workdir of a probe of it, of 100 steps, with evaluations at steps 50 and 100."""
    workdir = tmp_path_factory.mktemp("runs") / "probed"
    with quickly(compiled):
        assert run("probe", workdir, f"--config.init={pretrained}") == 0
    return workdir


@pytest.fixture(scope="session")
def tuned(pretrained, tmp_path_factory, compiled):
    """The workdir of 20 steps of its fine-tuning, with mixing, erasing, stochastic depth and moving averages."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    with quickly(compiled):
        assert run("finetune", workdir, f"--config.init={pretrained}", *WITH_EVERYTHING) == 0
    return workdir


WITH_EVERYTHING = (
    *("--config.mixup.mixup=0.8", "--config.mixup.cutmix=1.0", "--config.erasing.probability=0.25"),
    *("--config.encoder.drop_path=0.1", "--config.ema=0.8", "--config.eval.every=10"),
)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, compiled):
    """A function: the name of a pre-training recipe -> a workdir with its model of tiny size as it is at first."""

    @functools.cache
    def write(name):
        workdir = tmp_path_factory.mktemp("runs") / name
        config, _ = load(f"configs/pretrain.py:{name},tiny")
        config, _ = complete(config, pretrain.SCHEMA, pretrain.VALUES)
        model, _ = models.build(config)
        with quickly(compiled):
            params = jax.jit(lambda: models.init(model, config, jax.random.key(0)))()
        checkpoints = Checkpoints(workdir, to_json(config))
        checkpoints.save({"params": params}, 1)
        checkpoints.close()
        return workdir

    return write
