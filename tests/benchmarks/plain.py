"""A masked autoencoder in Flax as one would write it down from the paper: the yardstick for what care brings.

Everything is what flax, optax and the original code suggest at first sight: `nn.MultiHeadDotProductAttention`,
`nn.LayerNorm`, all patches embedded before three quarters of them are dropped, tokens put back in order for the
decoder, a prediction for every patch. Same loss, same parameters up to their names; not used by the project.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mae_jax.model.patches import normalize, patchify
from mae_jax.model.positions import sincos_positions

NORM = {"epsilon": 1e-6}


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.LayerNorm(**NORM)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.Dense(4 * width)(nn.LayerNorm(**NORM)(x))
        return x + nn.Dense(width)(nn.gelu(y, approximate=False))


class PlainMAE(nn.Module):
    """The loss of the paper on normalised pixels, f32[], of images f32[N,H,W,C] under noise f32[N,L]."""

    encoder: dict  # patch_size, width, depth, heads
    decoder: dict  # width, depth, heads
    ratio: float

    @nn.compact
    def __call__(self, images, noise):
        n, height, width, channels = images.shape
        side, wide = self.encoder["patch_size"], self.encoder["width"]
        grid = (height // side, width // side)
        patches = grid[0] * grid[1]
        order = jnp.argsort(noise, axis=1)
        restore = jnp.argsort(order, axis=1)
        kept = int(patches * (1 - self.ratio))

        x = nn.Conv(wide, (side, side), (side, side))(images).reshape(n, patches, wide)
        x = x + sincos_positions(grid, wide)[None]
        x = jnp.take_along_axis(x, order[:, :kept, None], axis=1)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, wide))
        x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, wide)), x], axis=1)
        for _ in range(self.encoder["depth"]):
            x = Block(self.encoder["heads"])(x)
        x = nn.LayerNorm(**NORM)(x)

        narrow = self.decoder["width"]
        x = nn.Dense(narrow)(x)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, narrow))
        y = jnp.concatenate([x[:, 1:], jnp.broadcast_to(mask_token, (n, patches - kept, narrow))], axis=1)
        y = jnp.take_along_axis(y, restore[:, :, None], axis=1) + sincos_positions(grid, narrow)[None]
        x = jnp.concatenate([x[:, :1], y], axis=1)
        for _ in range(self.decoder["depth"]):
            x = Block(self.decoder["heads"])(x)
        pred = nn.Dense(side**2 * channels)(nn.LayerNorm(**NORM)(x))[:, 1:]

        target = patchify(images, side)
        target = (target - target.mean(-1, keepdims=True)) / jnp.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
        removed = (restore >= kept).astype(jnp.float32)
        return (jnp.square(pred - target).mean(-1) * removed).sum() / removed.sum()


def make_step(config):
    """(init, step) of plain training as `config` says: init() -> state, step(state, uint8[N,H,W,C]) -> state, loss."""
    encoder, decoder = ({k: config[g][k] for k in ("width", "depth", "heads")} for g in ("encoder", "decoder"))
    model = PlainMAE({"patch_size": config.encoder.patch_size, **encoder}, decoder, config.mask.ratio)
    tx = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.05, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    height, width = config.data.image_size
    patches = height * width // config.encoder.patch_size**2

    def loss_fn(params, images, key):
        noise = jax.random.uniform(key, (len(images), patches))
        return model.apply(params, normalize(images, **config.pixels), noise)

    @jax.jit
    def init():
        images = jnp.zeros((1, height, width, config.data.channels))
        params = model.init(jax.random.key(0), images, jnp.zeros((1, patches)))
        return 0, params, tx.init(params)

    def step(state, images):
        count, params, moments = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images, jax.random.fold_in(jax.random.key(1), count))
        updates, moments = tx.update(grads, moments, params)
        return (count + 1, optax.apply_updates(params, updates), moments), loss

    return init, jax.jit(step, donate_argnums=0)
