r"""Picture what a trained autoencoder makes of images, at any mask ratio (paper figures 2 to 4).

    mae-jax reconstruct --config=configs/reconstruct.py --config.init=runs/digits --config.mask.ratio=0.85 \
        --workdir=runs/digits_85

Reads a workdir of pretrain, or one of its checkpoints (config.init), and image files (config.images), or else the
held-out split of its training data or another one (config.split). Writes into the workdir:

    config.json                       the config, complete
    reconstructions/ratio_R.png       a row per image: original, masked, reconstruction, visible patches pasted in
    results.json                      the loss of each image, as in training, and their mean
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import to_json
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError
from mae_jax.files import make_workdir, write_json, write_picture
from mae_jax.jobs import checks, model_checks, models, panels
from mae_jax.model import masking
from mae_jax.model.mae import Decoder
from mae_jax.model.patches import grid_of

WRITES_WORKDIR = True
VALUES = {"init": str, "images": str, "split": str, "count": int, "seed": int}
SCHEMA = {"mask": masking.sample}


def run(config: ConfigDict, workdir: Path) -> None:
    """Draw reconstructions and write the losses, as `config` says."""
    config, trained, data = check(config)
    checks.refuse_training_run(workdir)
    make_workdir(workdir)
    model, params = models.load(config.init)
    _, target = models.build(trained)
    images, names = panels.first_images(data, data.examples.size if config.images else config.count)
    sampled = panels.sample(model, trained, params, images, jax.random.key(config.seed))
    drawn, loss = panels.make_panels(model, target, trained)(params, images, *sampled)

    write_json(workdir / "config.json", to_json(config))
    picture = workdir / "reconstructions" / f"ratio_{config.mask.ratio:g}.png"
    write_picture(picture, panels.sheet(np.asarray(drawn)))
    results = {
        "init": str(config.init),
        "mask": dict(config.mask),
        "examples": len(images),
        "loss": float(np.mean(loss)),
        "loss_by_image": dict(zip(names, map(float, loss), strict=True)),
    }
    write_json(workdir / "results.json", results)
    for name, value in results["loss_by_image"].items():
        print(f"{value:8.4f}  {name}")
    print(f"{results['loss']:8.4f}  mean of {len(images)} images at mask ratio {config.mask.ratio:g}")
    print(f"picture  {picture}")


def own_problems(config: ConfigDict) -> list[str]:
    """What is wrong with this job's own settings, whatever the model, one line each."""
    return [f"config.count: {config.count} is below 1"] * (config.count < 1) + model_checks.sampling_problems(config)


def check(config: ConfigDict) -> tuple[ConfigDict, ConfigDict, Dataset]:
    """The config with its defaults, that of the trained model under config.mask, and the images to look at.

    Raises:
      UserError: with all that is wrong, before anything is compiled.
    """
    config, trained, problems = checks.complete_for_trained(config, SCHEMA, VALUES, own_problems)
    if "decoder" not in trained:
        raise ConfigError([*problems, f"config.init: {config.init} holds no decoder; name a run of pretrain"])
    trained = ConfigDict({"loss": {}, "noise": {"std": 0.0}, **trained})  # of one made elsewhere, or before there were
    grid = grid_of(trained.data.image_size, trained.encoder.patch_size)
    problems += model_checks.mask_problems(config, grid, trained.loss.get("patches", "hidden"))
    problems += model_checks.head_problems(Decoder(0, **trained.decoder), config.mask.ratio)
    trained.mask = config.mask
    data = Dataset(**trained.data).held_out_set().but(cache="")
    if config.images:
        data = dataclasses.replace(data, source="files", path=config.images)
    elif config.split:
        data = dataclasses.replace(data, split=config.split)
    try:
        if not data.opened.size:
            problems.append(f"config.split: {data.split!r} has no images")
    except ConfigError as error:
        problems += [f"{problem} (as in training; or name images in config.images)" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return config, trained, data
