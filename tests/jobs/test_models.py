"""A path leads to the right parameters: those of the encoder, averaged where there are averages, or an error."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import mae_jax
from mae_jax.__main__ import main
from mae_jax.config import load, to_json
from mae_jax.errors import CheckpointError
from mae_jax.jobs import classification, finetune, models, pretrain
from mae_jax.model.positions import RESIZE
from mae_jax.training import checkpoint, integrity
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.loop import State

LAST_BLOCK = "encoder/block_1/"


def drawn(shapes, seed, only=""):
    """Random leaves of these shapes, of those whose path begins with `only`."""
    rng = np.random.default_rng(seed)
    leaves = {path: x for path, x in flatten_dict(shapes, sep="/").items() if path.startswith(only)}
    drawn = {path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for path, x in leaves.items()}
    return unflatten_dict(drawn, sep="/")


def saved(workdir, config, **parts):
    """A checkpoint of step 1, as training leaves it."""
    checkpoints = Checkpoints(workdir, to_json(config))
    checkpoints.save(State(jnp.int32(1), opt_state=(), norm=jnp.float32(0), **parts), 1)
    checkpoints.close()
    return parts["params"]


@pytest.fixture(scope="module")
def classifier():
    """The config of a fine-tuned classifier, and its parameters as shapes."""
    config, _, _ = finetune.check(load("configs/finetune.py:digits,scratch,tiny")[0])
    model = classification.build(config)
    params, _ = jax.eval_shape(lambda: classification.init(model, config, jax.random.key(0)))
    return config, params


@pytest.fixture(scope="module")
def autoencoder():
    """The config of an autoencoder, and its parameters as shapes."""
    config, _, _ = pretrain.check(load("configs/pretrain.py:digits,tiny")[0])
    model, _ = models.build(config)
    return config, jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))


def assert_same(got, want):
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)


@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_load_encoder_gives_the_encoder_of_any_training(kind, request, tmp_path):
    config, shapes = request.getfixturevalue(kind)
    elsewhere = config.copy_and_resolve_references()
    elsewhere.encoder.attention = "fused"  # on another machine; here, in float32 on many devices, there is no kernel
    params = saved(tmp_path, elsewhere, params=drawn(shapes, 0), stats={}, ema={})
    for path in (tmp_path, tmp_path / "checkpoints" / "1"):
        encoder, read = mae_jax.load_encoder(path)
        assert_same(read, params["encoder"])
    tokens = jax.eval_shape(encoder.apply, {"params": read}, jnp.zeros((2, 8, 8, 1)))
    assert (tokens.shape, tokens.dtype) == ((2, 17, config.encoder.width), jnp.float32)


def test_of_moving_averages_those_that_there_are_are_loaded(classifier, tmp_path):
    """Only what was trained has one: here the last block, and the head, which is none of the encoder's."""
    config, shapes = classifier
    ema = drawn(shapes, 1, LAST_BLOCK) | drawn(shapes, 2, "head/")
    params = saved(tmp_path, config, params=drawn(shapes, 0), stats={}, ema=ema)
    _, read = mae_jax.load_encoder(tmp_path)
    assert_same(read, params["encoder"] | ema["encoder"])
    _, _, variables = classification.load(tmp_path)
    assert_same(variables["params"], params | {"encoder": params["encoder"] | ema["encoder"], "head": ema["head"]})
    tuning, _, _ = finetune.check(load("configs/finetune.py:digits,tiny", [f"--config.init={tmp_path}"])[0])
    start = models.encoder_to_start_from(tuning)
    assert_same(start, params["encoder"] | ema["encoder"])


def test_what_is_missing_unused_or_misshapen_in_an_encoder_is_listed(autoencoder, tmp_path):
    config, shapes = autoencoder
    saved(tmp_path, config, params=drawn(shapes, 0), stats={}, ema={})
    where = tmp_path / "checkpoints" / "1"

    def problems(**encoder):
        """What is told where the config has another encoder than the checkpoint."""
        other = to_json(config)
        other["encoder"] |= encoder
        (where / "config" / "config.json").write_text(json.dumps(other))
        (where / "manifest" / "manifest.json").write_text(integrity.manifest_of(where))
        with pytest.raises(CheckpointError) as error:
            mae_jax.load_encoder(tmp_path)
        return sorted(line.removeprefix(f"{where}: ").split(" ")[:2] for line in error.value.problems)

    of_block_1 = [f"params/{path}" for path in flatten_dict(shapes, sep="/") if path.startswith(LAST_BLOCK)]
    assert len(of_block_1) == 12
    assert problems(depth=1) == sorted(["unused:", path] for path in of_block_1)
    missing = [["missing:", path.replace("block_1", "block_2")] for path in of_block_1]
    misshapen = [["misshapen:", "params/encoder/patch_embedding/kernel"]]
    assert problems(depth=3, patch_size=4) == sorted(missing + misshapen)


def test_a_classifier_is_no_autoencoder_nor_the_other_way_round(classifier, autoencoder, tmp_path):
    for name, (config, shapes) in {"classifier": classifier, "autoencoder": autoencoder}.items():
        saved(tmp_path / name, config, params=drawn(shapes, 0), stats={}, ema={})
    with pytest.raises(CheckpointError, match="holds no decoder; name a workdir of pretrain"):
        mae_jax.load(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"holds no classifier .* name a workdir of probe or finetune"):
        classification.load(tmp_path / "autoencoder")


@pytest.mark.parametrize("kind", RESIZE)
def test_learned_positions_go_on_in_images_of_another_size(kind, tmp_path):
    config, _, _ = pretrain.check(load("configs/pretrain.py:digits,tiny", [f"--config.encoder.positions={kind}"])[0])
    model, _ = models.build(config)
    shapes = jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))
    params = saved(tmp_path, config, params=drawn(shapes, 0), stats={}, ema={})["encoder"]
    del params["norm"]  # fine-tuning has its own
    options = [f"--config.init={tmp_path}", f"--config.encoder.positions={kind}"]
    tuning, _, _ = finetune.check(load("configs/finetune.py:digits,tiny", options)[0])
    assert_same(models.encoder_to_start_from(tuning), params)
    tuning.data.image_size = (12, 8)
    resized = RESIZE[kind](params["positions"], (4, 4), (6, 4))
    assert_same(models.encoder_to_start_from(tuning), params | {"positions": resized})


def test_positions_of_another_kind_are_refused(autoencoder, tmp_path):
    config, shapes = autoencoder
    saved(tmp_path, config, params=drawn(shapes, 0), stats={}, ema={})
    options = [f"--config.init={tmp_path}", "--config.encoder.positions=rotary"]
    tuning, _, _ = finetune.check(load("configs/finetune.py:digits,tiny", options)[0])
    with pytest.raises(CheckpointError, match="positions sincos, not rotary; set"):
        models.encoder_to_start_from(tuning)


@pytest.mark.parametrize("job", ["knn", "reconstruct"])
def test_paths_in_the_config_of_a_checkpoint_are_not_written_to(job, pretrained, tmp_path, tools):
    foreign = tmp_path / "foreign"
    shutil.copytree(pretrained / "checkpoints" / "80", foreign)
    file = foreign / "config" / "config.json"
    config = tools.read_json(file)
    config["data"]["cache"] = str(tmp_path / "elsewhere")
    config["init"] = config["workdir"] = "../../elsewhere"
    file.write_text(json.dumps(config))
    (foreign / integrity.ITEM / integrity.FILE).write_text(integrity.manifest_of(foreign))
    before = set(foreign.rglob("*"))
    assert main([job, f"--config=configs/{job}.py", f"--config.init={foreign}", f"--workdir={tmp_path}/run"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "run"} and set(foreign.rglob("*")) == before


@pytest.mark.parametrize(
    "config", [[], {}, None, {"data": 1, "encoder": []}, {"encoder": {"width": "x", "no": 1}}], ids=str
)
def test_a_config_that_makes_no_model_is_one_line(config, tmp_path, capsys, refused):
    """Of a checkpoint whose sums are right."""
    checkpoint.write(tmp_path / "run", config, {"encoder": {"bias": np.zeros(3, np.float32)}})
    with pytest.raises(CheckpointError, match="its config "):
        models.load_encoder(tmp_path / "run")
    code = main(["export", f"--checkpoint={tmp_path / 'run'}", "--format=npz", f"--out={tmp_path / 'out.npz'}"])
    assert len(refused(capsys, code, 4, "checkpoints/0: its config ")) == 1
