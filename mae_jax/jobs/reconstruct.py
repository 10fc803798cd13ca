r"""Picture what a trained autoencoder makes of images, at any mask ratio (paper figures 2 to 4).

    mae-jax reconstruct --config=configs/reconstruct.py --config.init=runs/digits --config.mask.ratio=0.85 \
        --workdir=runs/digits_85

Reads a workdir of pretrain, or one of its checkpoints (config.init), and image files (config.images), or else the
held-out split of its training data or another one (config.split). Writes into the workdir:

    config.json                       the config, complete
    reconstructions/ratio_R.png       a row per image: original, masked, reconstruction, visible patches pasted in
    results.json                      the loss of each image on its hidden patches, and their mean
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from mae_jax.config import make_workdir, schema_problems, to_json, write_json
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import ConfigError, DataError
from mae_jax.jobs import models
from mae_jax.model import losses, masking
from mae_jax.model.mae import MAE
from mae_jax.model.masking import Mask
from mae_jax.model.patches import denormalize, grid_of, normalize, unpatchify
from mae_jax.model.targets import Target
from mae_jax.training import checkpoint

WRITES_WORKDIR = True
PANELS = ("original", "masked", "reconstruction", "visible pasted in")
GREY = 128  # of hidden patches in the masked panel
VALUES = {"init": str, "images": str, "split": str, "count": int, "seed": int}
SCHEMA = {"mask": masking.sample}


def run(config: ConfigDict, workdir: Path) -> None:
    """Draw reconstructions and write the losses, as `config` says."""
    problems = schema_problems(config, SCHEMA, VALUES)
    if problems:
        raise ConfigError(problems)
    if not config.init:
        raise ConfigError("config.init: empty; name the workdir of a pretrain run, or one of its checkpoints")
    if (workdir / checkpoint.FOLDER).exists():
        raise ConfigError(f"--workdir={workdir}: holds a training run, whose files would be overwritten; name another")
    trained = models.load_config(config.init)
    trained.mask = config.mask
    data = Dataset(**trained.data).held_out_set()
    if config.images:
        data = dataclasses.replace(data, source="files", path=config.images)
    elif config.split:
        data = dataclasses.replace(data, split=config.split)
    check(config, data, trained)
    make_workdir(workdir)
    model, params = models.load(config.init)
    _, target = models.build(trained)
    images, names = first_images(data, data.open().size if config.images else config.count)
    mask = sample_mask(trained, jax.random.key(config.seed), len(images))
    panels, loss = make_panels(model, target, trained)(params, images, mask)

    write_json(workdir / "config.json", to_json(config))
    ratio = config.mask.get("ratio", 0.75)
    picture = workdir / "reconstructions" / f"ratio_{ratio:g}.png"
    save_picture(picture, sheet(np.asarray(panels)))
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
    print(f"{results['loss']:8.4f}  mean of {len(images)} images at mask ratio {ratio:g}")
    print(f"picture  {picture}")


def check(config: ConfigDict, data: Dataset, trained: ConfigDict) -> None:
    """Raise a ConfigError with all that is wrong, before anything is compiled."""
    problems = []
    ratio = config.mask.get("ratio", 0.75)
    rows, cols = grid_of(trained.data.image_size, trained.encoder.patch_size)
    if config.mask.get("name", "random") not in masking.SAMPLERS:
        problems.append(f"config.mask.name: no {config.mask.name!r}; use one of {', '.join(masking.SAMPLERS)}")
    if config.count < 1:
        problems.append(f"config.count: {config.count} is below 1")
    if not 0 <= config.seed < 2**32:
        problems.append(f"config.seed: {config.seed} is not between 0 and {2**32 - 1}")
    try:
        masking.visible_count(rows * cols, ratio)
    except ValueError as error:
        problems.append(f"config.mask.ratio: {error}; give a ratio that hides some patches and keeps some")
    try:
        if not data.open().size:
            problems.append(f"config.split: {data.split!r} has no images")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def first_images(data: Dataset, count: int) -> tuple[np.ndarray, list[str]]:
    """The first `count` images of `data`, uint8[n,H,W,C], less those that cannot be read; and their names."""
    source = data.open()
    count = min(count, source.size)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    (batch,) = dataclasses.replace(data, batch_size=count).once(device, limit=count)
    readable = np.flatnonzero(np.asarray(batch["weight"]))
    if not len(readable):
        raise DataError(f"none of the first {count} images can be read, beginning with {source.name(0)}")
    return np.asarray(batch["image"])[readable], [source.name(int(i)) for i in readable]


def sample_mask(config: Mapping, key: jax.Array, count: int) -> Mask:
    """Masks for `count` images of the model that `config` describes, as config.mask says."""
    grid = grid_of(config["data"]["image_size"], config["encoder"]["patch_size"])
    return masking.sample(key, count, grid, **config["mask"])


def make_panels(model: MAE, target: Target, config: ConfigDict) -> Callable:
    """A jitted `f(params, images uint8[N,H,W,C], mask) -> (panels uint8[N,4,H,W,C], loss f32[N])`.

    The panels are those of `PANELS`; the loss is that of each image on its hidden patches.
    """

    @jax.jit
    def draw(params, images, mask):
        x = normalize(images, **config.pixels)
        pred = model.apply({"params": params}, x, mask, every_patch=True)  # [N,L,T]
        loss = losses.mse(masking.take(pred, mask.hidden), masking.take(target.encode(x), mask.hidden))
        patch = model.encoder.patch_size
        removed = jnp.repeat(mask.removed[:, :, None], patch**2, axis=2)  # [N,L,P*P]
        hidden = unpatchify(removed, patch, images.shape[1:3]) > 0  # [N,H,W,1]
        rebuilt = denormalize(target.decode(pred.astype(jnp.float32), x), **config.pixels)
        grey = jnp.uint8(GREY)
        panels = [images, jnp.where(hidden, grey, images), rebuilt, jnp.where(hidden, rebuilt, images)]
        return jnp.stack(panels, axis=1), loss

    return draw


def sheet(panels: np.ndarray, side: int = 112) -> np.ndarray:
    """One picture of panels uint8[N,4,H,W,C], a row per image: uint8[h,w,3].

    Small images are enlarged to about `side` pixels without smoothing; of more than three channels the first is shown.
    """
    channels = panels.shape[-1]
    shown = panels if channels == 3 else np.repeat(panels[..., :1], 3, axis=-1)
    zoom = max(1, round(side / max(panels.shape[2:4])))
    shown = shown.repeat(zoom, axis=2).repeat(zoom, axis=3)
    n, columns, height, width, _ = shown.shape
    gap, header = 4, 18
    picture = Image.new("RGB", (columns * (width + gap) + gap, header + n * (height + gap)), "white")
    pen = ImageDraw.Draw(picture)
    for c, title in enumerate(PANELS):
        pen.text((gap + c * (width + gap), 3), title, fill="black")
        for r in range(n):
            picture.paste(Image.fromarray(shown[r, c]), (gap + c * (width + gap), header + r * (height + gap)))
    return np.asarray(picture)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8[h,w,3] as a PNG file, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
