"""Where the time of a training step goes on one CPU: each operation of `model/native.cc` on its own, by kind.

    python tests/benchmarks/operations.py [--setups B,Ti,32px] [--rounds 7]

Every call of the step is found in its trace, with its shapes, and timed alone on random arrays, in turn with the whole
step; `rest` is what that takes besides: AdamW, gathers, residual sums, the loss. A kind's GFLOP/s count its matrix
products. The ceiling is a product of 2048 x 2048 matrices in PyTorch, in the same rounds.
"""

import argparse
import collections
import itertools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval as pe
from step import SETUPS, ceiling, load, repeated, seconds_of, training_step

from mae_jax.model import native

CACHE = 256 * 2**20  # bytes that no cache holds


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
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
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


def runner(name, arguments, results, attributes):
    """run(n): n calls, on several sets of random arrays in turn, so that they are not in the cache already."""
    rng = np.random.default_rng(0)
    size = 4 * sum(map(math.prod, arguments))
    sets = [
        [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in arguments]
        for _ in range(max(1, min(8, CACHE // size)))
    ]
    call = jax.jit(lambda *args: native.call(name, results, *args, **dict(attributes)))
    turns = itertools.cycle(sets)

    def run(n):
        for _ in range(n):
            jax.block_until_ready(call(*next(turns)))

    run(1)
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    native.keep_freed_memory()  # as the command line does
    multiply, _ = ceiling(None)
    for setup in given.setups.split(","):
        step, abstract, new_state, batch = training_step(load(setup))
        closed = jax.make_jaxpr(step)(abstract, batch)
        used, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
        calls = calls_of(used)  # without the gradient of the pixels, which nobody asks for
        runs = {"step": repeated(step.lower(abstract, batch).compile(), new_state(), batch)[0], "ceiling": multiply}
        runs |= {call: runner(*call) for call in calls}
        runs["step"](1)
        times = {name: [] for name in runs}
        for _ in range(given.rounds):
            for name, run in runs.items():
                times[name].append(seconds_of(run, 1 if name == "step" else 4))
        times = {name: np.array(took) for name, took in times.items()}
        top = 2 * 2048**3 / times["ceiling"] / 1e9  # GFLOP/s in each round
        print(f"\n{setup}: {1e3 * np.median(times['step']):.0f} ms a step, ceiling {np.median(top):.0f} GFLOP/s")
        print(f"{'operation':20} {'calls':>6} {'ms':>8} {'of step':>8} {'GFLOP/s':>8} {'of ceiling':>10}")
        kinds = {}
        for call, count in calls.items():
            kind = kinds.setdefault(call[0], [0, 0.0, 0])
            for i, value in enumerate((count, count * times[call], count * flops_of(call[0], call[1]))):
                kind[i] = kind[i] + value
        rest = 1 - sum(seconds / times["step"] for _, seconds, _ in kinds.values())
        for name, (count, seconds, flops) in sorted(kinds.items(), key=lambda item: -np.median(item[1][1])):
            rate = flops / seconds / 1e9
            speed = f"{np.median(rate):8.0f} {np.median(rate / top):10.0%}" if flops else ""
            share = np.median(seconds / times["step"])
            print(f"{name:20} {count:6} {1e3 * np.median(seconds):8.1f} {share:8.1%} {speed}", flush=True)
        print(f"{'rest':20} {'':6} {1e3 * np.median(rest * times['step']):8.1f} {np.median(rest):8.1%}", flush=True)


if __name__ == "__main__":
    main()
