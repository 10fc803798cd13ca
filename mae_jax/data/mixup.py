"""Mixup and cutmix: each image of a batch blended with another one, or patched with it, and its target with it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    classes: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    probability: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mix a batch with itself reversed, all images alike: `Mixup` of timm, with its mode "batch" and its defaults.

    Args:
      key: decides on one lambda, and one box, for the whole batch.
      images: f32[N,H,W,C].
      labels: i32[N].
      weight: f32[N]; an image whose partner weighs nothing, being padding or unreadable, is left as it is.
      classes: how many there are.
      mixup: alpha of mixup (Zhang et al. 2018, arXiv 1710.09412): lambda is drawn from Beta(alpha, alpha); 0: none.
      cutmix: alpha of cutmix (Yun et al. 2019, arXiv 1905.04899); 0: none. Where both are given, each is as likely.
      probability: share of the batches that are mixed at all.
      label_smoothing: share of a target that is spread evenly over all classes.

    Returns:
      The images, and their targets f32[N,classes], each of sum 1.
    """
    targets = smoothed(labels, classes, label_smoothing)
    if not mixup and not cutmix:
        return images, targets
    key, box_key = jax.random.split(key)
    lam, cut = draw(key, mixup, cutmix, probability)
    return blend(images, targets, weight, lam, cut, draw_box(box_key, lam, images.shape[1:3]))


def smoothed(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Targets f32[N,classes] of labels i32[N], with `smoothing` spread evenly (Szegedy et al. 2016)."""
    return (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes


def draw(key: jax.Array, mixup: float, cutmix: float, probability: float) -> tuple[jax.Array, jax.Array]:
    """Lambda f32[], the share of its own that an image keeps, and whether to cut, bool[]."""
    keys = jax.random.split(key, 3)
    cut = jax.random.uniform(keys[0]) < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = jnp.where(cut, cutmix, mixup)
    lam = jax.random.beta(keys[1], alpha, alpha)
    return jnp.where(jax.random.uniform(keys[2]) < probability, lam, 1.0), cut


def draw_box(key: jax.Array, lam: jax.Array, size: Sequence[int]) -> jax.Array:
    """The box (top, bottom, left, right) i32[4] of 1 - lambda of an image's area, but for what lies outside.

    Its centre is anywhere in the image, and its sides are even numbers of pixels, as in timm.
    """
    size = jnp.array(size)
    centre = jax.random.randint(key, (2,), 0, size)
    half = (size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    return jnp.stack([jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)], axis=1).ravel()


def blend(
    images: jax.Array, targets: jax.Array, weight: jax.Array, lam: jax.Array, cut: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Images and targets with `lam` of their own, the rest from the batch reversed; as arguments, as `mix` has them.

    Where `cut`, all outside of `box` is an image's own, and its target follows the area.
    """
    height, width = images.shape[1:3]
    top, bottom, left, right = box
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    own_pixels = jnp.where(cut, 1.0 - inside, lam)  # [H,W]
    own_target = jnp.where(cut, 1.0 - (bottom - top) * (right - left) / (height * width), lam)
    partnered = weight[::-1] > 0

    def mixed(x, own):
        own = jnp.where(partnered.reshape(-1, *[1] * (x.ndim - 1)), own, 1.0)
        return x * own + x[::-1] * (1 - own)

    return mixed(images, own_pixels[None, :, :, None]), mixed(targets, own_target[None, None])
