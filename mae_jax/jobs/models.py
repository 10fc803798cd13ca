"""From a config to its model, and from a path to a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.pipeline import Dataset
from mae_jax.errors import CheckpointError, in_short
from mae_jax.jobs import foreign
from mae_jax.model import masking, targets
from mae_jax.model.attention import attended
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.masking import Mask
from mae_jax.model.patches import grid_of, normalize
from mae_jax.model.positions import RESIZE, position_rows
from mae_jax.model.targets import Target
from mae_jax.model.vit import ViT
from mae_jax.training import checkpoint
from mae_jax.training.optim import join, split


def build(config: Mapping) -> tuple[MAE, Target]:
    """The autoencoder that a pre-training config describes, and the target it is trained for."""
    encoder = ViT(**config["encoder"], dtype=config["dtype"])
    target = targets.make(encoder.patch_size, **config["target"])

    def values(images):
        return target.values(target.encode(images, target.unfitted(patch_values(config))))

    width = jax.eval_shape(values, example_images(config)).shape[-1]
    return MAE(encoder, Decoder(width, **config["decoder"], dtype=config["dtype"])), target


def patch_values(config: Mapping) -> int:
    """P*P*C, the pixels of a patch."""
    return config["encoder"]["patch_size"] ** 2 * config["data"]["channels"]


def example_images(config: Mapping) -> jax.ShapeDtypeStruct:
    """One normalised image, as its shape: f32[1,H,W,C]."""
    data = Dataset(**config["data"])
    return jax.ShapeDtypeStruct((1, *data.image_size, data.channels), jnp.float32)


def init(model: MAE, config: Mapping, key: jax.Array) -> dict:
    """Fresh parameters of `model`: {"encoder": ..., "decoder": ...}, all float32. To be jitted, or for `eval_shape`.

    Where the encoder gets mask tokens, they are there too: {..., "mask_token": ...}. Where the target is one
    that is fitted to images, zeros stand for that: {..., "target": ...}.
    """
    images = jnp.zeros(example_images(config).shape)
    grid = grid_of(images.shape[1:3], model.encoder.patch_size)
    mask = masking.sample(key, 1, grid, **config["mask"])
    params = model.init(key, images, mask)["params"]
    zeros = unfitted(config)
    return params | ({"target": zeros} if zeros else {})


def unfitted(config: Mapping) -> dict[str, np.ndarray]:
    """Zeros in place of what the target is fitted to; empty where there is nothing to fit."""
    return targets.make(config["encoder"]["patch_size"], **config["target"]).unfitted(patch_values(config))


def mask_of(model: MAE, config: Mapping, params: dict, images: jax.Array, noise: Sequence[jax.Array]) -> Mask:
    """The mask that the encoder's own attention decides (`masking.guided`); no gradient goes through it.

    Args:
      images: f32[N,H,W,C], normalised.
      noise: from `mask_noise`.
    """
    seen = attended(model.encoder, jax.lax.stop_gradient(params["encoder"]), images)
    grid = grid_of(images.shape[1:3], model.encoder.patch_size)
    return masking.guided(*noise, seen, grid, **config["mask"])


def mask_noise(config: Mapping, key: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """What is random in such a mask: which patches are hidden, and which of these are decoded."""
    grid = grid_of(config["data"]["image_size"], config["encoder"]["patch_size"])
    units = masking.units_of(grid, config["mask"]["unit"])
    return masking.SAMPLERS[config["mask"]["name"]](key, num, units), masking.lots(key, num, grid)


def load_config(path: str | Path, **unsaid) -> ConfigDict:
    """The config of the run whose workdir or checkpoint is at `path`, or what is known of a model made elsewhere.

    Args:
      unsaid: what a file made elsewhere does not say, such as `heads`; see `foreign.read`.

    Raises:
      CheckpointError: there is no checkpoint, or no model can be made by its config.
    """
    if foreign.is_foreign(path):
        return ConfigDict(foreign.read(path, weights=False, **unsaid)[0])
    config = ConfigDict(stored_config(path))
    for part in ("encoder", "decoder"):  # how a run computed its attention says nothing of what can be done here
        if "attention" in config.get(part, ()):
            del config[part].attention
    return config


def stored_config(path: str | Path) -> dict:
    """As `checkpoint.load_config`, of a config that describes a model.

    Raises:
      CheckpointError: there is no checkpoint, or its config is no such one.
    """
    config = checkpoint.load_config(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{checkpoint.locate(path)}: its config holds no settings; use another checkpoint")
    groups = {"data": Dataset, "encoder": ViT}
    groups |= {name: kind for name, kind in {"decoder": Decoder, "pixels": normalize}.items() if name in config}
    try:
        _, problems = complete(ConfigDict({name: config[name] for name in groups if name in config}), groups, {})
    except (TypeError, ValueError) as error:  # names that can be none
        problems = [in_short(error)]
    if problems:
        where = checkpoint.locate(path)
        raise CheckpointError(f"{where}: its config makes no model: {'; '.join(problems)}; use another checkpoint")
    return config


def load(path: str | Path) -> tuple[MAE, dict]:
    """A trained autoencoder, computing in float32, and its parameters, {"encoder": ..., "decoder": ...}.

    Besides them, "target" is what its target was fitted to, where it was to anything.

    Args:
      path: a workdir, whose newest checkpoint is read, or one checkpoint in it.

    Raises:
      CheckpointError: there is none, or it does not fit its config, or it is of a classifier.
    """
    config = load_config(path)
    if "decoder" not in config:
        raise CheckpointError(f"{path}: holds no decoder; name a workdir of pretrain, or one of its checkpoints")
    config.dtype = "float32"
    model, _ = build(config)
    abstract = jax.eval_shape(lambda: init(model, config, jax.random.key(0)))
    return model, checkpoint.load(path, {"params": abstract})["params"]


def load_encoder(path: str | Path, **unsaid) -> tuple[ViT, dict]:
    """The encoder of any trained model: `encoder.apply({"params": params}, images)` gives f32[N,1+L,D].

    Images are f32[N,H,W,C], normalised as in training: `normalize(images, **load_config(path).pixels)`. Of a model
    with moving averages of its parameters, those are what is loaded.

    Args:
      path: a workdir of any training job, whose newest checkpoint is read, or one checkpoint in it; or a folder of
        Hugging Face's, or a file of tensors, as `mae-jax import` reads them.
      unsaid: what a file made elsewhere does not say, such as `heads`; see `foreign.read`.

    Raises:
      CheckpointError: there is none, or it does not fit its config.
    """
    if foreign.is_foreign(path):
        config, params, _ = foreign.read(path, **unsaid)
        return ViT(**config["encoder"]), params["encoder"]
    config = load_config(path)
    encoder = ViT(**config.encoder)
    abstract = {"encoder": encoder_shapes(encoder, config)}
    params = checkpoint.load(path, {"params": abstract}, "params/encoder/")["params"]
    return encoder, averaged(path, params)["encoder"]


def encoder_shapes(encoder: ViT, config: Mapping) -> dict:
    """The parameters of `encoder` for images as in `config`, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda images: encoder.init(jax.random.key(0), images), example_images(config))["params"]


def averaged(path: str | Path, params: dict) -> dict:
    """The parameters read from the checkpoint at `path`, with the moving averages of those that have one."""
    kept = {name.removeprefix("ema/") for name in checkpoint.names_in(path) if name.startswith("ema/")}
    inside, _ = split(params, kept.__contains__)
    return join(params, checkpoint.load(path, {"ema": jax.eval_shape(lambda: inside)}, ())["ema"]) if inside else params


def encoder_to_start_from(config: ConfigDict) -> dict:
    """The parameters of config.init's encoder, as those of the encoder that `config` describes.

    Positions must be of the same kind, but that those of config.init may be fixed where learned ones begin with them;
    what is learned of them is resized where the grid of patches is another. A final norm that is not wanted is left
    out.

    Raises:
      CheckpointError: anything else is missing, unused or of another shape; all of it is listed.
    """
    trained = load_config(config.init)
    encoder, before = ViT(**config.encoder), ViT(**trained.encoder)
    problems = []
    if encoder.heads != before.heads:  # which no shape would show
        problems.append(f"{config.init}: its encoder has {before.heads} heads, not {encoder.heads}")
    if before.positions not in (encoder.positions, "sincos" if encoder.positions == "learned" else None):
        problems.append(
            f"{config.init}: its encoder has positions {before.positions}, not {encoder.positions}; "
            f"set config.encoder.positions to {before.positions}"
        )
    if problems:
        raise CheckpointError(problems)
    wanted = encoder_shapes(encoder, config)
    read = dict(wanted)
    if before.positions in RESIZE:
        read["positions"] = encoder_shapes(before, trained)["positions"]
    else:
        read.pop("positions", None)
    if not encoder.final_norm and before.final_norm:
        read["norm"] = encoder_shapes(ViT(**{**config.encoder, "final_norm": True}), config)["norm"]
    params = checkpoint.load(config.init, {"params": {"encoder": read}}, "params/encoder/")["params"]
    params = averaged(config.init, params)["encoder"]
    if "positions" in wanted:
        grids = [grid_of(c.data.image_size, c.encoder.patch_size) for c in (trained, config)]
        begin = params["positions"] if "positions" in params else position_rows(grids[0], encoder.width)
        params["positions"] = jnp.asarray(RESIZE[encoder.positions](np.asarray(begin), *grids))
    return {name: params[name] for name in wanted}
