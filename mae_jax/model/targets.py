"""What the decoder is asked to predict for each patch, and how a prediction becomes pixels again (paper, table 1d)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.model.hog import hog
from mae_jax.model.patches import patchify, unpatchify

EPSILON = 1e-6  # of the variance, as in models_mae.py of the original code
EXACT = jax.lax.Precision.HIGHEST  # targets are not rounded to what accelerators multiply by default


def as_it_is(x: jax.Array, count: int = 1) -> jax.Array:
    """Most targets are predicted as they are."""
    return x


def nothing(values: int) -> dict[str, np.ndarray]:
    """Most targets are fitted to no data."""
    return {}


class Target(NamedTuple):
    """Functions on normalised images f32[N,H,W,C]; `fitted` is what `fit` found.

    What a target is fitted to is a part of the parameters, which no step trains: params["target"].
    """

    # images, fitted -> f32[N,L,T], or the numbers of tokens i32[N,L,1]
    encode: Callable[..., jax.Array]
    # predictions f32[N,L,T], true images, fitted -> images; None: a prediction is no picture
    decode: Callable[..., jax.Array] | None
    # the row of `losses.LOSSES` for it, unless a config says another one
    loss: str = "l2"
    # what was encoded -> f32[N,M,T], to be averaged over images: of tokens, 1 for the right one and 0 for the others
    values: Callable[[jax.Array], jax.Array] = as_it_is
    # such an average f32[L,T], over how many images -> the prediction that says so: of tokens, their logits
    prediction: Callable[[jax.Array, int], jax.Array] = as_it_is
    # patches of training images f32[n,P*P*C] -> what to know of them
    fit: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    # P*P*C -> zeros in its place
    unfitted: Callable[[int], dict[str, np.ndarray]] = nothing
    # how many it is of, such as tokens; None: nothing that config.target.size could say
    size: int | None = None
    # how many values, P*P*C, a patch must have
    least: int = 1


def pixels(patch_size: int, size: int | None = None) -> Target:
    """The pixels of a patch in the order row, column, channel: T = P*P*C."""

    def decode(pred, images, fitted=None):
        return unpatchify(pred, patch_size, images.shape[1:3])

    return Target(lambda images, fitted=None: patchify(images, patch_size), decode)


def normalized_pixels(patch_size: int, size: int | None = None) -> Target:
    """Pixels standardised within each patch, over its P*P*C values, with the unbiased variance (paper section 3).

    Decoding puts the mean and deviation of the true patch back, which the model was never asked to predict.
    """

    def statistics(images):
        patches = patchify(images, patch_size)
        mean = patches.mean(axis=-1, keepdims=True)
        deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + EPSILON)
        return patches, mean, deviation

    def encode(images, fitted=None):
        patches, mean, deviation = statistics(images)
        return (patches - mean) / deviation

    def decode(pred, images, fitted=None):
        _, mean, deviation = statistics(images)
        return unpatchify(pred * deviation + mean, patch_size, images.shape[1:3])

    return Target(encode, decode, least=2)  # of one value there is no unbiased variance


def pca(patch_size: int, size: int | None = None) -> Target:
    """The first T = `size` principal components of a patch (96: paper, table 1d), not whitened."""
    size = 96 if size is None else size

    def encode(images, fitted):
        centred = patchify(images, patch_size) - fitted["mean"].reshape(1, 1, -1)
        return jnp.einsum("nlp,tp->nlt", centred, fitted["components"], precision=EXACT)

    def decode(pred, images, fitted):
        patches = jnp.einsum("nlt,tp->nlp", pred, fitted["components"], precision=EXACT)
        return unpatchify(patches + fitted["mean"].reshape(1, 1, -1), patch_size, images.shape[1:3])

    def fit(patches):
        from sklearn.decomposition import PCA  # takes a second to import

        found = PCA(size, svd_solver="covariance_eigh").fit(patches.astype(np.float64))
        return {"mean": found.mean_.astype(np.float32), "components": found.components_.astype(np.float32)}

    def unfitted(values):
        return {"mean": np.zeros(values, np.float32), "components": np.zeros((size, values), np.float32)}

    return Target(encode, decode, fit=fit, unfitted=unfitted, size=size, least=size)


def tokens(patch_size: int, size: int | None = None) -> Target:
    """Which of T = `size` (512) typical patches is the nearest one: a codebook of k-means on patches.

    In place of the tokens of a discrete VAE (paper, table 1d; BEiT, arXiv 2106.08254).
    """
    size = 512 if size is None else size

    def tokenize(images, fitted):
        codes, patches = fitted["centroids"], patchify(images, patch_size)
        products = jnp.einsum("nlp,vp->nlv", patches, codes, precision=EXACT)
        return jnp.argmin(0.5 * jnp.square(codes).sum(axis=1).reshape(1, 1, -1) - products, axis=-1)

    def decode(pred, images, fitted):
        return unpatchify(
            jnp.take(fitted["centroids"], jnp.argmax(pred, axis=-1), axis=0), patch_size, images.shape[1:3]
        )

    def fit(patches):
        from sklearn.cluster import MiniBatchKMeans

        return {"centroids": MiniBatchKMeans(size, random_state=0, n_init=1).fit(patches).cluster_centers_}

    def unfitted(values):
        return {"centroids": np.zeros((size, values), np.float32)}

    return tokenized(tokenize, size, decode)._replace(fit=fit, unfitted=unfitted)


def tokenized(tokenize: Callable[..., jax.Array], size: int, decode: Callable[..., jax.Array] | None = None) -> Target:
    """The tokens of any tokenizer, predicted with cross-entropy: T = `size`, of its vocabulary.

    Args:
      tokenize: images f32[N,H,W,C], fitted -> i32[N,L], jittable: a number below `size` for each patch.
      decode: logits f32[N,L,T], true images, fitted -> images, where there is a way.
    """

    def values(ids):
        return jax.nn.one_hot(ids[..., 0], size)

    def prediction(mean, count):
        return jnp.log((mean * count + 1) / (count + size))  # what was never seen may come yet (Laplace)

    return Target(lambda *args: tokenize(*args)[..., None], decode, "cross_entropy", values, prediction, size=size)


def histograms(patch_size: int, size: int | None = None) -> Target:
    """Histograms of oriented gradients in 2x2 cells of each patch (MaskFeat, arXiv 2112.09133): T = 2*2*C*9.

    A patch of less than 8 pixels or of an odd number is one cell.
    """
    cells = 2 if patch_size >= 8 and patch_size % 2 == 0 else 1

    def encode(images, fitted=None):
        found = hog(images, patch_size // cells)  # [N,rows*cells,columns*cells,C,9]
        return patchify(found.reshape(*found.shape[:3], -1), cells)

    return Target(encode, None)


# A target is `f(patch_size, size) -> Target`, `size` None where a config does not say it. T, the width of the decoder's
# output, follows from what it encodes. One of one's own is a row more: `TARGETS["mine"] = f`.
TARGETS = {
    "pixels": pixels,
    "normalized_pixels": normalized_pixels,
    "pca": pca,
    "tokens": tokens,
    "hog": histograms,
}


def make(patch_size: int, *, name: str, size: int | None = None) -> Target:
    """The target called `name`.

    Args:
      name: a row of `TARGETS`.
      size: how many components of `pca`, how many `tokens`; None: 96 and 512.
    """
    return TARGETS[name](patch_size, size)


def fitted_of(params: Mapping) -> Mapping:
    """What the target was fitted to, out of the parameters of a model; {} of most targets."""
    return params.get("target", {})
