"""What the decoder is asked to predict for each patch, and how a prediction becomes pixels again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mae_jax.model.patches import patchify, unpatchify

EPSILON = 1e-6  # of the variance, as in models_mae.py of the original code


class Target(NamedTuple):
    """Two functions on normalised images."""

    encode: Callable[[jax.Array], jax.Array]  # images f32[N,H,W,C] -> targets f32[N,L,T]
    decode: Callable[[jax.Array, jax.Array], jax.Array]  # predictions f32[N,L,T], true images -> images f32[N,H,W,C]


def pixels(patch_size: int) -> Target:
    """The pixels of a patch in the order row, column, channel: T = P*P*C."""
    return Target(
        encode=partial(patchify, patch_size=patch_size),
        decode=lambda pred, images: unpatchify(pred, patch_size, images.shape[1:3]),
    )


def normalized_pixels(patch_size: int) -> Target:
    """Pixels standardised within each patch, over its P*P*C values, with the unbiased variance (paper section 3).

    Decoding puts the mean and deviation of the true patch back, which the model was never asked to predict.
    """

    def statistics(images):
        patches = patchify(images, patch_size)
        mean = patches.mean(axis=-1, keepdims=True)
        deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + EPSILON)
        return patches, mean, deviation

    def encode(images):
        patches, mean, deviation = statistics(images)
        return (patches - mean) / deviation

    def decode(pred, images):
        _, mean, deviation = statistics(images)
        return unpatchify(pred * deviation + mean, patch_size, images.shape[1:3])

    return Target(encode, decode)


# A target is `f(patch_size) -> Target`; T, the width of the decoder's output, follows from what it encodes.
TARGETS = {"pixels": pixels, "normalized_pixels": normalized_pixels}


def make(patch_size: int, *, name: str) -> Target:
    """The target called `name`, a row of `TARGETS`."""
    return TARGETS[name](patch_size)
