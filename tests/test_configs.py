"""Every recipe trains at its small size, and has the paper's numbers at its full one."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax.__main__ import main
from mae_jax.config import complete
from mae_jax.errors import ConfigError
from mae_jax.jobs import checks, model_checks, models, pretrain
from mae_jax.training import optim
from mae_jax.training.loop import total_steps

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("pretrain_recipes", ROOT / "configs" / "pretrain.py")
recipes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipes)

IMAGENET = ("vit_b16", "vit_l16", "vit_h14")
IMAGENET_TRAIN = 1_281_167


# recipes that are one and the same once they are small need not be run twice
DIFFERENT = {str(recipes.get_config(f"{name},tiny")): name for name in recipes.RECIPES}.values()


QUICK = {"folder", "digits,simmim"}
SMALL = [*DIFFERENT, *(f"digits,{objective}" for objective in recipes.OBJECTIVES)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SMALL])
def test_every_recipe_trains_two_steps_at_its_tiny_size(name, tmp_path, quick_compilation):
    one_device = "--config.mesh.data=1"  # compiles in half the time
    assert main(["pretrain", f"--config=configs/pretrain.py:{name},tiny", f"--workdir={tmp_path}", one_device]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == [1, 2]
    assert np.isfinite(list(losses.values())).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["images_seen"] == 16
    assert np.isfinite(summary["metrics"]["eval/loss"])
    assert 0 <= summary["metrics"]["eval/knn"] <= 1
    assert (tmp_path / "reconstructions" / "step_2.png").is_file()
    assert (tmp_path / "checkpoints" / "2").is_dir()
    config, full = json.loads((tmp_path / "config.json").read_text()), recipes.get_config(name)
    for group, key in (("target", "name"), ("mask", "ratio"), ("encoder", "patch_size"), ("optim", "weight_decay")):
        assert config[group][key] == full[group][key], "shrinking keeps what the recipe is about"


@pytest.mark.parametrize("name", [*recipes.RECIPES, *(f"vit_b16,{objective}" for objective in recipes.OBJECTIVES)])
def test_every_recipe_is_complete_and_builds_at_its_full_size(name):
    config, problems = complete(recipes.get_config(name), pretrain.SCHEMA, pretrain.VALUES)
    assert problems + model_checks.autoencoder_problems(config) + checks.run_problems(config) == []
    model, _ = models.build(config)
    params = jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))
    width = params["decoder"]["head"]["kernel"].shape[-1]
    pixels = config.encoder.patch_size**2 * config.data.channels
    assert width == {"tokens": 512, "hog": 2 * 2 * 3 * 9}.get(config.target.name, pixels)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_in_the_table_of_its_file(name):
    assert f"\n{name} " in recipes.__doc__


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_have_the_numbers_of_the_paper(name):
    config = recipes.get_config(name)
    assert config.data.name == "imagenet2012"
    assert config.data.split == "train"
    assert tuple(config.data.image_size) == (224, 224)
    assert config.data.batch_size == 4096
    assert config.data.augment == "random_resized_crop"
    assert tuple(config.data.scale) == (0.2, 1.0)
    assert tuple(config.data.ratio) == (3 / 4, 4 / 3)
    assert config.data.flip is True
    assert tuple(config.pixels.mean) == (0.485, 0.456, 0.406)
    assert tuple(config.pixels.std) == (0.229, 0.224, 0.225)
    mask = {"name": "random", "ratio": 0.75, "unit": 1, "temperature": 1.0, "decoded": 1.0}
    assert config.mask.to_dict() == mask
    assert config.mask_schedule.to_dict() == {"start": None, "stages": 4}
    assert config.target.to_dict() == {"name": "normalized_pixels", "size": None}
    assert config.loss.to_dict() == {"name": "", "patches": "hidden"}
    decoder = {"width": 512, "depth": 8, "heads": 16, "mlp_ratio": 4.0, "remat": "none", "attention": "auto"}
    decoder |= {"kind": "self", "mask_tokens": "decoder", "positions": "sincos"}
    assert config.encoder.positions == "sincos"
    assert config.decoder.to_dict() == decoder
    assert config.optim.to_dict() == {
        "name": "adamw",
        "base_learning_rate": 1.5e-4,
        "warmup_epochs": 40.0,
        "weight_decay": 0.05,
        "b1": 0.9,
        "b2": 0.95,
    }
    assert config.train.to_dict() == {"steps": None, "epochs": 1600.0}


@pytest.mark.parametrize(
    ("name", "encoder", "parameters"),
    [
        ("vit_b16", (16, 768, 12, 12), 111_655_680),
        ("vit_l16", (16, 1024, 24, 16), 329_239_296),
        ("vit_h14", (14, 1280, 32, 16), 656_613_964),
    ],
)
def test_imagenet_recipes_have_the_encoders_of_the_paper(name, encoder, parameters):
    config = recipes.get_config(name)
    assert tuple(config.encoder[key] for key in ("patch_size", "width", "depth", "heads")) == encoder
    assert config.encoder.mlp_ratio == 4.0
    model, _ = models.build(config)
    params = jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_take_1600_epochs_of_312_steps_with_40_of_warm_up(name):
    config = recipes.get_config(name)
    per_epoch = IMAGENET_TRAIN // config.data.batch_size
    steps = total_steps(per_epoch, **config.train)
    assert steps == 1600 * 312
    _, schedule = optim.make(config.data.batch_size, steps, per_epoch, **config.optim)
    assert schedule(40 * 312) == pytest.approx(2.4e-3, rel=1e-6)
    assert schedule(20 * 312) == pytest.approx(1.2e-3, rel=1e-6)
    assert schedule(40 * 312) > schedule(40 * 312 - 1)
    assert schedule(40 * 312) >= schedule(40 * 312 + 312)
    assert schedule(820 * 312) == pytest.approx(1.2e-3, rel=1e-5), "half of the cosine"
    for group in ("eval", "pictures", "checkpoint"):
        assert config[group].every % 312 == 0, "at whole epochs"


def test_changing_one_recipe_does_not_change_another():
    changed = recipes.get_config("vit_l16")
    changed.encoder.width = 8
    changed.pixels.mean = (0.0, 0.0, 0.0)
    changed.decoder.depth = 1
    for name in IMAGENET:
        fresh = recipes.get_config(name)
        assert (fresh.encoder.width, fresh.decoder.depth, fresh.pixels.mean[0]) != (8, 1, 0.0)
        assert fresh.encoder.width > 8
        assert fresh.decoder.depth == 8
        assert fresh.pixels.mean[0] == 0.485


@pytest.mark.parametrize("spec", ["vit_b61", "digits,huge", ",tiny", ""])
def test_an_unknown_recipe_or_variant_is_named(spec):
    with pytest.raises(ConfigError, match=r"no (recipe|variant)"):
        recipes.get_config(spec)
