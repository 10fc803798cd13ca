"""What safety costs: the guard against steps that are not finite, and the sums of checkpoints.

    python tests/benchmarks/guard.py [--setups B,Ti,32px] [--rounds 15]

The pre-training step of `step.py` is compiled as it is and with the guard's test taken for true, so that XLA drops the
choice between the old state and the new one; both are in one process and make one step after the other, in turns. Told
are milliseconds of a step (medians), and the median over the rounds of the ratio of the two with its middle half. Then
the state of each setup is saved, with sums and without, in turns: seconds until `save` returns and until it is on disk.
"""

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from step import SETUPS, load, repeated, seconds_of, training_step

from mae_jax.model import native
from mae_jax.training import checkpoint, integrity


def guarded(config):
    step, abstract, new_state, batch = training_step(config)
    return step.lower(abstract, batch).compile(), new_state, batch


def unguarded(config):
    with mock.patch.object(jnp, "isfinite", lambda x: jnp.ones(jnp.shape(x), bool)):
        return guarded(config)


def compare_steps(config, rounds):
    """Milliseconds of both, and the quartiles of the ratio of the two in the same round."""
    runs = []
    for make in (guarded, unguarded):
        step, new_state, batch = make(config)
        run, _ = repeated(step, new_state(), batch)
        run(2)
        runs.append(run)
    times = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)  # neither is always first
        found = {i: seconds_of(runs[i], 1) for i in order}
        times.append((found[0], found[1]))
    times = np.array(times) * 1000
    return np.median(times, axis=0), np.percentile(times[:, 0] / times[:, 1], (25, 50, 75))


def compare_saves(state, rounds):
    """Seconds until `save` returns and until all is written, with sums and without: f64[2,2]."""
    times = {True: [], False: []}
    for number in range(2 * rounds):
        summed = bool(number % 2)
        with tempfile.TemporaryDirectory() as folder:
            sums = integrity.manifest_of if summed else lambda folder: "{}"
            with mock.patch.object(integrity, "manifest_of", sums):
                checkpoints = checkpoint.Checkpoints(Path(folder), {})
                began = time.perf_counter()
                checkpoints.save(state, 1)
                returned = time.perf_counter() - began
                checkpoints.close()
                times[summed].append((returned, time.perf_counter() - began))
    return np.array([np.median(times[summed], axis=0) for summed in (True, False)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    native.keep_freed_memory()  # as the command line does
    jax.config.update("jax_enable_compilation_cache", False)
    print("| setup | ms a step, guarded | not | ratio | its middle half |\n|---|---|---|---|---|")
    for setup in args.setups.split(","):
        (with_it, without), (low, middle, high) = compare_steps(load(setup), args.rounds)
        print(f"| {setup} | {with_it:.1f} | {without:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    print("\n| setup | MB | save returns, s | on disk, s | without sums | |\n|---|---|---|---|---|---|")
    for setup in args.setups.split(","):
        _, _, new_state, _ = training_step(load(setup))
        state = new_state()
        size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
        (returns, written), (bare_returns, bare_written) = compare_saves(state, 5)
        cells = (f"{size:.0f}", *(f"{x:.2f}" for x in (returns, written, bare_returns, bare_written)))
        print(f"| {setup} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
