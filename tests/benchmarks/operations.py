"""Where the time of a training step goes on one CPU: each operation of `model/native.cc` on its own, by kind.

    python tests/benchmarks/operations.py [--setups B,Ti,32px] [--rounds 7]

Every call of the compiled step is found in its trace, with its shapes, and timed alone on random arrays; `rest` is what
the whole step takes besides: AdamW, gathers, residual sums, the loss. A kind's GFLOP/s count its matrix products. The
ceiling is a product of 2048 x 2048 matrices in PyTorch, measured between the rounds.
"""

import argparse
import collections
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from step import SETUPS, ceiling, load, seconds_of, training_step

from mae_jax.model import native


def calls_of(jaxpr):
    """How often each (name, shapes of the arguments, shapes of the results, attributes) of native.cc is called."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ffi_call":
            shapes = [
                tuple(tuple(v.aval.shape) for v in variables) for variables in (equation.invars, equation.outvars)
            ]
            attributes = tuple((key, float(value)) for key, value in dict(equation.params["attributes"]).items())
            found[equation.params["target_name"].removeprefix("mae_"), *shapes, attributes] += 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            found += calls_of(inner)
    return found


def flops_of(name, arguments):
    """Of the matrix products of one call."""
    if name in ("linear", "linear_gelu"):
        (m, i), (_, o) = arguments[:2]
        return 2 * m * i * o
    if name in ("input_gradient", "gelu_gradient"):
        (m, o), (i, _) = arguments[:2]
        return 2 * m * i * o
    if name == "kernel_gradient":
        (m, i), (_, o) = arguments[:2]
        return 2 * m * i * o
    if name.startswith("attention"):
        (n, q, heads, d), (_, t, *_) = arguments[:2]
        return (4 if name == "attention" else 10) * n * heads * q * t * d  # backward: the scores once more
    return 0


def seconds_of_call(name, arguments, results, attributes, rounds):
    """Median over rounds."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in arguments]
    run = jax.jit(lambda *args: native.call(name, results, *args, **dict(attributes)))
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(3):
            out = run(*arrays)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / 3)
    return np.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    native.keep_freed_memory()  # as the command line does
    multiply, _ = ceiling(None)
    for setup in given.setups.split(","):
        config = load(setup)
        step, abstract, new_state, batch = training_step(config)
        calls = calls_of(jax.make_jaxpr(step)(abstract, batch).jaxpr)
        compiled, state = step.lower(abstract, batch).compile(), new_state()
        whole, tops = [], []
        for _ in range(given.rounds):
            began = time.perf_counter()
            state, scalars = compiled(state, batch)
            jax.block_until_ready(scalars)
            whole.append(time.perf_counter() - began)
            tops.append(2 * 2048**3 / seconds_of(multiply, 3) / 1e9)
        total, top = np.median(whole[1:]), np.median(tops)
        print(f"\n{setup}: {1e3 * total:.0f} ms a step, ceiling {top:.0f} GFLOP/s")
        print(f"{'operation':20} {'calls':>6} {'ms':>8} {'of step':>8} {'GFLOP/s':>8} {'of ceiling':>10}")
        kinds = collections.defaultdict(lambda: [0, 0.0, 0])
        for (name, *rest), count in calls.items():
            took = seconds_of_call(name, *rest, given.rounds)
            for i, value in enumerate((count, count * took, count * flops_of(name, rest[0]))):
                kinds[name][i] += value
        for name, (count, seconds, flops) in sorted(kinds.items(), key=lambda item: -item[1][1]):
            rate = flops / seconds / 1e9
            speed = f"{rate:8.0f} {rate / top:10.0%}" if flops else ""
            print(f"{name:20} {count:6} {1e3 * seconds:8.1f} {seconds / total:8.1%} {speed}", flush=True)
        rest = total - math.fsum(seconds for _, seconds, _ in kinds.values())
        print(f"{'rest':20} {'':6} {1e3 * rest:8.1f} {rest / total:8.1%}", flush=True)


if __name__ == "__main__":
    main()
