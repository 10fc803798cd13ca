"""Gaussian noise on all pixels: what a denoising autoencoder takes away (Vincent et al. 2010, JMLR 11, 3371)."""

from __future__ import annotations

import jax


def add_noise(key: jax.Array, images: jax.Array, *, std: float = 0.0) -> jax.Array:
    """Images f32[N,H,W,C], normalised, with N(0, std) noise on each value of each pixel; 0: as they are."""
    return images + std * jax.random.normal(key, images.shape, images.dtype) if std else images
