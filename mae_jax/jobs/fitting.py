"""What a target is to know of the training images before training begins: principal components, a codebook."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_jax.data.pipeline import Dataset
from mae_jax.errors import DataError
from mae_jax.model.patches import grid_of, normalize, patchify
from mae_jax.model.targets import Target

IMAGES, PATCHES = 4096, 16  # so many images, so many patches of each; all where there are fewer
BATCH = 256


def patch_count(config: ConfigDict, data: Dataset) -> int:
    """How many patches a target is fitted to."""
    rows, cols = grid_of(config.data.image_size, config.encoder.patch_size)
    return min(IMAGES, data.opened.size) * min(PATCHES, rows * cols)


def fit(target: Target, config: ConfigDict, data: Dataset) -> dict[str, np.ndarray]:
    """What `target` is fitted to: patches of training images as they are seen in evaluation, drawn by config.seed.

    Every host reads the same ones, and all have what the first one finds: libraries may round differently elsewhere.

    Raises:
      DataError: none of the images can be read.
    """
    count = min(IMAGES, data.examples.size)  # of `data` itself, whose images, where they are kept, are decoded once
    plain, found = data.plain().but(batch_size=min(BATCH, count)), []
    draw = np.random.RandomState(config.seed)
    batches = itertools.islice(plain.shuffled(config.seed, 0, None), -(-count // plain.batch_size))
    for batch in batches:
        images = normalize(batch["image"][batch["weight"] > 0], **config.pixels)
        patches = patchify(images, config.encoder.patch_size)  # [n,L,P*P*C]
        some = draw.rand(*patches.shape[:2]).argsort(axis=1)[:, :PATCHES]
        found.append(np.take_along_axis(patches, some[:, :, None], axis=1).reshape(-1, patches.shape[-1]))
    patches = np.concatenate(found)[: patch_count(config, data)]
    if not len(patches):
        raise DataError(f"config.data: none of the first {count} images of {data.split!r} can be read")
    print(f"fitting config.target {config.target.name} to {len(patches):,} patches of training images", flush=True)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(target.fit(patches)))
