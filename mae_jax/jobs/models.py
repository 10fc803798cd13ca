"""From a config to its model, and from a path to a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.data.pipeline import Dataset
from mae_jax.model import masking, targets
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.patches import grid_of
from mae_jax.model.targets import Target
from mae_jax.model.vit import ViT
from mae_jax.training import checkpoint


def build(config: Mapping) -> tuple[MAE, Target]:
    """The autoencoder that a pre-training config describes, and the target it is trained for."""
    encoder = ViT(**config["encoder"], dtype=config["dtype"])
    target = targets.make(encoder.patch_size, **config["target"])
    width = jax.eval_shape(target.encode, example_images(config)).shape[-1]
    return MAE(encoder, Decoder(width, **config["decoder"], dtype=config["dtype"])), target


def example_images(config: Mapping) -> jax.ShapeDtypeStruct:
    """One normalised image, as its shape: f32[1,H,W,C]."""
    data = Dataset(**config["data"])
    return jax.ShapeDtypeStruct((1, *data.image_size, data.channels), jnp.float32)


def init(model: MAE, config: Mapping, key: jax.Array) -> dict:
    """Fresh parameters of `model`: {"encoder": ..., "decoder": ...}, all float32. To be jitted, or for `eval_shape`."""
    images = jnp.zeros(example_images(config).shape)
    grid = grid_of(images.shape[1:3], model.encoder.patch_size)
    mask = masking.sample(key, 1, grid, **config["mask"])
    return model.init(key, images, mask)["params"]


def load_config(path: str | Path) -> ConfigDict:
    """The config of the run whose workdir or checkpoint is at `path`."""
    return ConfigDict(checkpoint.load_config(path))


def load(path: str | Path) -> tuple[MAE, dict]:
    """A trained autoencoder, computing in float32, and its parameters, {"encoder": ..., "decoder": ...}.

    Args:
      path: a workdir, whose newest checkpoint is read, or one checkpoint in it.

    Raises:
      CheckpointError: there is none, or it does not fit its config.
    """
    config = load_config(path)
    config.dtype = "float32"
    model, _ = build(config)
    abstract = jax.eval_shape(lambda: init(model, config, jax.random.key(0)))
    return model, checkpoint.load_params(path, abstract)


def load_encoder(path: str | Path) -> tuple[ViT, dict]:
    """The encoder of `load(path)` alone: `encoder.apply({"params": params}, images)` gives f32[N,1+L,D].

    Images are f32[N,H,W,C], normalised as in training: `normalize(images, **load_config(path).pixels)`.
    """
    model, params = load(path)
    return model.encoder, params["encoder"]
