"""A classifier on top of the encoder: for linear probing, partial and whole fine-tuning (paper section 4).

Linear probing (main_linprobe.py of the original code) takes the cls token after the encoder's final norm, BatchNorm
and a linear layer; fine-tuning (models_vit.py) the mean of the patch tokens without that norm, LayerNorm and a linear
layer. Parameters are {"encoder": as in an MAE's, "norm": ..., "head": ...}; which of them are trained, a job decides.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.model.layers import Dense, LayerNorm
from mae_jax.model.losses import weighted_mean
from mae_jax.model.vit import ViT

EPSILON = 1e-6  # of BatchNorm; PyTorch's default is 1e-5
MOMENTUM = 0.1  # in PyTorch's sense: the share of the new


class BatchNorm(nn.Module):
    """Normalisation of each feature over the batch, without scale and bias.

    The statistics are those of the whole batch, however many devices it is split over. The running ones are "mean"
    and "var", f32[D], in the collection "batch_stats". The batch is normalised by its biased variance, and moves the
    running one by its unbiased variance, as torch.nn.BatchNorm1d does.
    """

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None = None, update: bool = False) -> jax.Array:
        """Normalise f32[N,D]; see `Classifier.classify` for the rest."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[1:])
        if not update:
            return (x - mean.value[None]) * jax.lax.rsqrt(var.value + EPSILON)[None]
        weight = jnp.ones(len(x)) if weight is None else weight
        mean_of = jax.vmap(weighted_mean, (1, None))  # f32[N,D], f32[N] -> f32[D]
        batch_mean = mean_of(x, weight)
        batch_var = mean_of(jnp.square(x - batch_mean[None]), weight)
        count = weight.sum()
        rate = jnp.where(count > 0, MOMENTUM, 0.0)  # nothing is learnt from a batch of unreadable images
        mean.value += rate * (batch_mean - mean.value)
        var.value += rate * (batch_var * count / jnp.maximum(count - 1, 1) - var.value)
        return (x - batch_mean[None]) * jax.lax.rsqrt(batch_var + EPSILON)[None]


# A pooling makes one vector per image of the tokens: `f(f32[N,1+L,D]) -> f32[N,D]`.
POOLS = {"mean": lambda tokens: tokens[:, 1:].mean(axis=1), "cls": lambda tokens: tokens[:, 0]}
NORMS = ("layer", "batch", "none")


class Classifier(nn.Module):
    """An encoder, pooling, a norm and a linear head. All that follows the encoder is float32.

    Attributes:
      encoder: whose `positions`, `drop_path`, `final_norm` and `dtype` are as the protocol has them.
      classes: C.
      pool: a row of `POOLS`: "mean" of the patch tokens, without cls, or "cls".
      norm: one of `NORMS`, between pooling and head.
      head_std: of the head's first weights; its bias begins as 0.
    """

    encoder: ViT
    classes: int
    pool: str = "mean"
    norm: str = "layer"
    head_std: float = 0.01

    def __call__(
        self,
        images: jax.Array,
        weight: jax.Array | None = None,
        update: bool = False,
        paths: jax.Array | None = None,
    ) -> jax.Array:
        """Logits f32[N,C] of images f32[N,H,W,C] (already normalised); the rest as in `classify` and `features`."""
        return self.classify(self.features(images, paths), weight, update)

    def features(self, images: jax.Array, paths: jax.Array | None = None) -> jax.Array:
        """One vector for each of images f32[N,H,W,C] (already normalised): f32[N,D]. `paths` as in `ViT`."""
        return POOLS[self.pool](self.encoder(images, paths=paths).astype(jnp.float32))

    @nn.compact
    def classify(self, features: jax.Array, weight: jax.Array | None = None, update: bool = False) -> jax.Array:
        """Logits f32[N,C] of features f32[N,D].

        Args:
          weight: f32[N], 1 for what counts in the statistics of BatchNorm and 0 for what does not; all, without it.
          update: whether BatchNorm takes the statistics of this batch, and moves the running ones towards them, for
            which `apply` needs mutable=["batch_stats"]; else it takes the running ones. Nothing else depends on it.
        """
        if self.norm not in NORMS:
            raise ValueError(f"norm is one of {', '.join(NORMS)}, not {self.norm!r}")
        if self.norm == "layer":
            features = LayerNorm(epsilon=self.encoder.epsilon, name="norm")(features)
        if self.norm == "batch":
            features = BatchNorm(name="norm")(features, weight, update)
        # a normal distribution: timm's trunc_normal_ cuts it at +-2, hundreds of deviations away
        return Dense(self.classes, kernel_init=nn.initializers.normal(self.head_std), name="head")(features)


# What fine-tuning exempts from weight decay besides biases and norms, as timm's ViT says of itself.
UNDECAYED = ("cls_token", "positions")


def layer_of(path: str, depth: int) -> int:
    """How far below the head a parameter stands, for layer-wise decay (util/lr_decay.py of the original code).

    >>> [layer_of(path, 12) for path in ("head/kernel", "encoder/block_11/mlp/in/kernel", "encoder/cls_token")]
    [0, 1, 13]

    Args:
      path: of a parameter of a `Classifier`.
      depth: number of blocks of its encoder.

    Returns:
      0 for the head and the norms before it, 1 for the last block, `depth` for the first, `depth` + 1 for what comes
      before it.

    Raises:
      ValueError: no classifier has such a parameter.
    """
    match path.split("/"):
        case ["head" | "norm", *_] | ["encoder", "norm", *_]:
            return 0
        case ["encoder", block, *_] if block.startswith("block_"):
            return depth - int(block.removeprefix("block_"))
        case ["encoder", "cls_token" | "positions" | "patch_embedding", *_]:
            return depth + 1
    raise ValueError(f"{path} is no parameter of a classifier")


def check_trainable(what: str, depth: int) -> None:
    """Make sure that `what` is a choice of `trainable`.

    Raises:
      ValueError: it is not.
    """
    if what not in {"all", "head", "norms", "0.5", *map(str, range(1, depth + 1))}:
        raise ValueError(f"{what!r} is none of all, head, norms, 0.5, or a number of blocks from 1 to {depth}")


def trainable(path: str, depth: int, what: str) -> bool:
    """Whether a parameter is trained in partial fine-tuning (paper section 4.3, figure 9).

    >>> [trainable(f"encoder/block_11/{part}", 12, "0.5") for part in ("mlp/in/kernel", "attention/qkv/kernel")]
    [True, False]

    Args:
      path: of a parameter of a `Classifier`.
      depth: number of blocks of its encoder.
      what: "all"; "head", with the classifier's own norm; "norms", all of them, and the head; or a number of last
        blocks, "1" to `depth`, with the encoder's final norm, norm and head. "0.5" is the MLP of the last block, with
        the norm before it, in place of whole blocks.

    Raises:
      ValueError: `what` is none of these.
    """
    check_trainable(what, depth)
    first, *rest = path.split("/")
    if what == "all" or first in ("norm", "head"):
        return True
    if what == "head":
        return False
    if what == "norms":
        return any(name.endswith("norm") for name in rest)
    layer = layer_of(path, depth)
    if what == "0.5":
        return layer == 0 or (layer == 1 and rest[1] in ("mlp", "mlp_norm"))
    return layer <= int(what)
