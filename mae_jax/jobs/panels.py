"""Pictures of reconstructions: a row of panels per image, as in the paper's figures 2 to 4."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from mae_jax.data.noise import add_noise
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import DataError
from mae_jax.jobs import models
from mae_jax.model import losses, masking, targets
from mae_jax.model.mae import MAE
from mae_jax.model.masking import Mask
from mae_jax.model.patches import denormalize, grid_of, normalize, unpatchify
from mae_jax.model.targets import Target

PANELS = ("original", "masked", "reconstruction", "visible pasted in")
GREY = 128  # of hidden patches in the masked panel


def first_images(data: Dataset, count: int) -> tuple[np.ndarray, list[str]]:
    """The first `count` images of `data`, uint8[n,H,W,C], less those that cannot be read; and their names."""
    source = data.examples
    count = min(count, source.size)
    (batch,) = data.but(batch_size=count, repeats=1).once(None, limit=count)
    readable = np.flatnonzero(batch["weight"])
    if not len(readable):
        raise DataError(f"none of the first {count} images can be read, beginning with {source.name(0)}")
    return batch["image"][readable], [source.name(int(i)) for i in readable]


def sample(model: MAE, config: ConfigDict, params: dict, images: np.ndarray, key: jax.Array) -> tuple[Mask, jax.Array]:
    """Masks for images uint8[N,H,W,C] as config.mask says, and what the encoder sees of them as config.noise does.

    Returns:
      The masks, and f32[N,H,W,C]: the images, normalised, and noise.
    """
    mask_key, noise_key = jax.random.split(key) if config.noise.std else (key, key)
    seen = add_noise(noise_key, normalize(images, **config.pixels), **config.noise)
    if config.mask.name in masking.GUIDED:
        guided = jax.jit(lambda *args: models.mask_of(model, config, *args))
        return guided(params, seen, models.mask_noise(config, mask_key, len(images))), seen
    grid = grid_of(images.shape[1:3], model.encoder.patch_size)
    return masking.sample(mask_key, len(images), grid, **config.mask), seen


def make_panels(model: MAE, target: Target, config: ConfigDict) -> Callable:
    """A jitted `f(params, images, mask, seen) -> (panels uint8[N,4,H,W,C], loss f32[N])`, of images uint8[N,H,W,C].

    `mask` and `seen` are from `sample`. The panels are those of `PANELS`, or the first two where a prediction is no
    picture; the loss is that of each image.
    """
    measure, all_count = losses.make(target.loss, **config.loss)

    @jax.jit
    def draw(params, images, mask, seen):
        x = normalize(images, **config.pixels)
        pred = model.apply({"params": params}, seen, mask, every_patch=True)  # [N,L,T]
        fitted = targets.fitted_of(params)
        want = target.encode(x, fitted)
        counted = (pred, want) if all_count else (masking.take(pred, mask.hidden), masking.take(want, mask.hidden))
        patch = model.encoder.patch_size
        removed = jnp.repeat(mask.removed[:, :, None], patch**2, axis=2)  # [N,L,P*P]
        hidden = unpatchify(removed, patch, images.shape[1:3]) > 0  # [N,H,W,1]
        visible = denormalize(seen, **config.pixels)
        panels = [images, jnp.where(hidden, jnp.uint8(GREY), visible)]
        if target.decode:
            rebuilt = denormalize(target.decode(pred.astype(jnp.float32), x, fitted), **config.pixels)
            panels += [rebuilt, jnp.where(hidden, rebuilt, visible)]
        return jnp.stack(panels, axis=1), measure(*counted)

    return draw


def sheet(panels: np.ndarray, side: int = 112) -> np.ndarray:
    """One picture of panels uint8[N,4 or 2,H,W,C], a row per image: uint8[h,w,3].

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
    for c, title in enumerate(PANELS[:columns]):
        pen.text((gap + c * (width + gap), 3), title, fill="black")
        for r in range(n):
            picture.paste(Image.fromarray(shown[r, c]), (gap + c * (width + gap), header + r * (height + gap)))
    return np.asarray(picture)
