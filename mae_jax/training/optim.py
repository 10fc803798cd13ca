"""Optimizers, the learning-rate schedule, what weight decay touches, and which parameters are trained at all."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

TRUST = 1e-3  # of LARS, as in util/lars.py of the original code


def decayed(params, exempt: Container[str] = ()):
    """True for parameters of two dimensions and more: all kernels, and the cls and mask tokens, not biases and norms.

    As `param_groups_weight_decay` of timm does in main_pretrain.py of the original code.

    Args:
      exempt: names of parameters, such as "cls_token", that are not decayed all the same.
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in exempt, params)


def adamw(
    schedule: optax.Schedule, weight_decay: float, b1: float, b2: float, mask: Callable
) -> optax.GradientTransformation:
    """AdamW with decoupled decay times the learning rate, as in PyTorch (paper table 8)."""
    return optax.adamw(schedule, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=mask)


def lars(
    schedule: optax.Schedule, weight_decay: float, b1: float, b2: float, mask: Callable
) -> optax.GradientTransformation:
    """LARS (You et al. 2017) with momentum `b1`, as util/lars.py of the original code; `b2` is ignored.

    Decay and trust ratio only for what the `mask` lets. The momentum is of gradients, before the learning rate;
    `optax.lars` has it after, which under a changing schedule is another optimizer.
    """
    ratio = optax.chain(optax.add_decayed_weights(weight_decay), optax.scale_by_trust_ratio(trust_coefficient=TRUST))
    return optax.chain(optax.masked(ratio, mask), optax.trace(b1), optax.scale_by_learning_rate(schedule))


# An optimizer is `f(schedule, weight_decay, b1, b2, mask of what is decayed) -> optax.GradientTransformation`.
OPTIMIZERS = {"adamw": adamw, "lars": lars}


def scale_by_layer(layer_of: Callable[[str], int], layer_decay: float) -> optax.GradientTransformation:
    """Multiply each parameter's update by `layer_decay` ** `layer_of(path)`.

    Behind an optimizer whose updates are proportional to the learning rate, this is a learning rate per layer
    (BEiT, arXiv 2106.08254; util/lr_decay.py of the original code).
    """

    def scale(path, update):
        return update * layer_decay ** layer_of(jax.tree_util.keystr(path, simple=True, separator="/"))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def make(
    batch_size: int,
    steps: int,
    steps_per_epoch: int,
    layer_of: Callable[[str], int] | None = None,
    exempt: Container[str] = (),
    *,
    name: str = "adamw",
    base_learning_rate: float = 1.5e-4,
    min_learning_rate: float = 0.0,
    warmup_epochs: float = 40.0,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.95,
    layer_decay: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule, set anew every step as in util/lr_sched.py of the original code.

    The learning rate rises linearly from 0 over the warm-up and falls along half a cosine to `min_learning_rate` at
    `steps`. Its peak is `base_learning_rate` * `batch_size` / 256 (Goyal et al. 2017). A warm-up longer than half the
    run is cut to half, so that a recipe shortened for a trial still trains.

    Args:
      batch_size: images per step, over all devices.
      steps: length of the run.
      steps_per_epoch: unit of `warmup_epochs`.
      layer_of: the layer of a parameter by its path, "encoder/block_3/mlp/in/kernel", counted from the output: 0 for
        the head. Only for a `layer_decay`.
      exempt: as in `decayed`.
      name: a row of `OPTIMIZERS`.
      min_learning_rate: as it is; the batch size does not scale it.
      layer_decay: each layer learns this much slower than the one above it; 1: all the same.

    Returns:
      The gradient transformation, and the schedule: step -> learning rate, of layer 0.

    Raises:
      ValueError: a `layer_decay`, but no `layer_of`.
    """
    peak = base_learning_rate * batch_size / 256
    warmup = min(round(warmup_epochs * steps_per_epoch), steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, 1), min_learning_rate
    )
    tx = OPTIMIZERS[name](schedule, weight_decay, b1, b2, partial(decayed, exempt=exempt))
    if layer_decay == 1:
        return tx, schedule
    if layer_of is None:
        raise ValueError(f"a layer decay of {layer_decay} needs to know the layer of each parameter")
    return optax.chain(tx, scale_by_layer(layer_of, layer_decay)), schedule


def split(params: dict, chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """Divide nested dicts in two: the leaves whose path, "encoder/block_3/mlp/in/kernel", is `chosen`, and the others.

    >>> split({"norm": {"scale": 1, "bias": 2}, "head": {"bias": 3}}, lambda path: path.endswith("bias"))
    ({'norm': {'bias': 2}, 'head': {'bias': 3}}, {'norm': {'scale': 1}})
    """
    leaves = flatten_dict(params, sep="/")
    inside = {path: leaf for path, leaf in leaves.items() if chosen(path)}
    outside = {path: leaf for path, leaf in leaves.items() if path not in inside}
    return unflatten_dict(inside, sep="/"), unflatten_dict(outside, sep="/")


def join(inside: dict, outside: dict) -> dict:
    """The inverse of `split`: one tree of the leaves of both."""
    return unflatten_dict(flatten_dict(inside, sep="/") | flatten_dict(outside, sep="/"), sep="/")
