"""Features of images, one vector each, computed once: what k-NN and a probe without augmentation work on."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mae_jax.data.pipeline import Dataset
from mae_jax.errors import DataError
from mae_jax.model.classifier import POOLS
from mae_jax.model.patches import normalize
from mae_jax.model.vit import ViT
from mae_jax.training.sharding import batch_sharding, place, state_sharding, whole


def make_extract(encoder: ViT, pool: str, pixels: dict) -> Callable:
    """A jitted `f(params of the encoder, images uint8[N,H,W,C]) -> f32[N,D]`; `pool` is a row of `POOLS`, or "pixels".

    "pixels" are the normalised pixels themselves, what any encoder has to beat.
    """

    @jax.jit
    def extract(params, images):
        x = normalize(images, **pixels)
        if pool == "pixels":
            return x.reshape(len(x), -1)
        return POOLS[pool](encoder.apply({"params": params}, x).astype(jnp.float32))

    return extract


def collect(
    extract: Callable, params, data: Dataset, mesh: Mesh, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features f32[n,D] and labels i64[n] of the images of `data` that can be read and have a label, in order.

    They are whole on every host.

    Args:
      extract: from `make_extract`.
      limit: take only so many images, the first ones.

    Raises:
      DataError: there is none.
    """
    params = place(params, state_sharding(params, mesh))
    found = []
    for batch in data.once(batch_sharding(mesh), limit):
        parts = {"feature": extract(params, batch["image"]), "label": batch["label"], "weight": batch["weight"]}
        found.append(whole(parts, mesh))
    kept = [(part["weight"] > 0) & (part["label"] >= 0) for part in found]
    if not any(map(np.any, kept)):
        raise DataError(f"config.data: no image of the split {data.split!r} can be read and has a label")
    features, labels = (
        np.concatenate([part[key][k] for part, k in zip(found, kept, strict=True)]) for key in ("feature", "label")
    )
    return features, labels.astype(np.int64)
