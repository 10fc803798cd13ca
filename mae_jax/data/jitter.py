"""Colour jitter: brightness, contrast and saturation, changed at random (table 1e of the paper)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance

CHANGES = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # the last, of a grey image: nothing


def jitter(image: np.ndarray, seed: np.ndarray, *, strength: float) -> np.ndarray:
    """The image after all of `CHANGES` in random order: torchvision's ColorJitter, with the same range for each.

    Args:
      image: uint8[H,W,C], C = 1 or 3.
      seed: i64[2], which alone decides.
      strength: the factor of each is uniform from 1 - strength, at least 0, to 1 + strength.

    Returns:
      uint8[H,W,C].
    """
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    # RandomState, as its methods are promised never to change; counted from where RandAugment's numbers never come
    rng = np.random.RandomState(np.random.Philox(key=seed.astype(np.uint64), counter=1 << 192))
    for i in rng.permutation(len(CHANGES)):
        picture = CHANGES[i](picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return np.asarray(picture).reshape(image.shape)
