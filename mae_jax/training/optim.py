"""Optimizers, the learning-rate schedule, and what weight decay touches."""

from __future__ import annotations

import jax
import optax


def decayed(params):
    """True for parameters of two dimensions and more: all kernels, and the cls and mask tokens, not biases and norms.

    As `param_groups_weight_decay` of timm does in main_pretrain.py of the original code.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(schedule: optax.Schedule, weight_decay: float, b1: float, b2: float) -> optax.GradientTransformation:
    """AdamW with decoupled decay times the learning rate, as in PyTorch (paper table 8)."""
    return optax.adamw(schedule, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=decayed)


# An optimizer is `f(schedule, weight_decay, b1, b2) -> optax.GradientTransformation`.
OPTIMIZERS = {"adamw": adamw}


def make(
    batch_size: int,
    steps: int,
    steps_per_epoch: int,
    *,
    name: str = "adamw",
    base_learning_rate: float = 1.5e-4,
    warmup_epochs: float = 40.0,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.95,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule, set anew every step as in util/lr_sched.py of the original code.

    The learning rate rises linearly from 0 over the warm-up and falls along half a cosine to 0 at `steps`. Its peak
    is `base_learning_rate` * `batch_size` / 256 (Goyal et al. 2017). A warm-up longer than half the run is cut to
    half, so that a recipe shortened for a trial still trains.

    Args:
      batch_size: images per step, over all devices.
      steps: length of the run.
      steps_per_epoch: unit of `warmup_epochs`.
      name: a row of `OPTIMIZERS`.

    Returns:
      The gradient transformation, and the schedule: step -> learning rate.
    """
    peak = base_learning_rate * batch_size / 256
    warmup = min(round(warmup_epochs * steps_per_epoch), steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(steps, 1))
    return OPTIMIZERS[name](schedule, weight_decay, b1, b2), schedule
