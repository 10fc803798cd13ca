"""What the trials of a sweep will cost: parameters, arithmetic, and a guess of the time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.jobs import models, plan, planned
from mae_jax.jobs.trials import Trial, configured
from mae_jax.training.loop import total_steps

UTILISATION = 0.5  # of the machine's products, in the guess of the time
HEADS = ("trial", "seeds", "parameters", "MFLOP/image", "compiled", "relative", "steps", "hours")
FORM = "{:24} {:>5} {:>12} {:>12} {:>9} {:>9} {:>9} {:>9}"


def lines(found: Sequence[Trial], reference: str) -> Iterator[str]:
    """A line for each setting, as soon as its step is compiled.

    FLOPs are those of one image in a step of pre-training: what is needed; of the compiled program relative to that;
    and what is needed relative to the `reference`, the name of a setting. The time is that of pre-training.
    """
    seeds, settings = Counter(trial.name for trial in found), {trial.name: trial for trial in found}
    rate, total, basis = UTILISATION * product_rate(), 0.0, math.nan
    yield FORM.format(*HEADS)
    for name in sorted(settings, key=lambda name: name != reference):  # the reference first
        config = next((configured(link) for link in settings[name].chain if link.job == "pretrain"), None)
        if config is None:
            yield FORM.format(name, seeds[name], *[""] * 6)
            continue
        needed, computed = planned.flops(config)
        basis = needed if name == reference else basis
        relative = "" if math.isnan(basis) else f"{needed / basis:.2f}x"
        steps = step_count(config)
        hours = needed * config.data.batch_size * (steps or 0) / rate / 3600
        total += hours * seeds[name]
        told = (f"{steps:,}", f"{hours:.3g}") if steps else ("unknown", "")
        arithmetic = (f"{parameter_count(config):,}", f"{needed / 1e6:,.1f}", f"{computed / needed:.3f}", relative)
        yield FORM.format(name, seeds[name], *arithmetic, *told)
    yield (
        f"about {total:.3g} hours of pre-training in all on this machine, were it to do {rate / 1e9:,.0f} GFLOP/s: "
        f"{UTILISATION:.0%} of what its matrix products do"
    )


def parameter_count(config: ConfigDict) -> int:
    """Of the autoencoder."""
    model, _ = models.build(config)
    shapes = jax.eval_shape(lambda: models.init(model, config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def step_count(config: ConfigDict) -> int | None:
    """How many steps it trains; None where the number of images is not known."""
    images, _ = plan.count_images(config)
    return None if images is None else total_steps(images // config.data.batch_size, **config.train)


def product_rate() -> float:
    """FLOP/s of large matrix products in float32 on the first device there is, the best of three."""
    side, best = 2048, math.inf
    x, multiply = jnp.ones((side, side), jnp.float32), jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    for _ in range(3):
        began = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
