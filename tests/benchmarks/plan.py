"""The plan's model of a step's time beside steps that are run, and the table of docs/plan.md.

    python tests/benchmarks/plan.py [--setups Ti,B] [--rounds 5]
    python tests/benchmarks/plan.py --table [--recipes vit_b16,vit_l16,vit_h14] [--targets h100:8,v4:64,v5e:256]

The first measures what this machine multiplies (matrices of 2048 x 2048, in JAX) and what its memory moves (copies of
256 MB), describes it to `mae-jax plan` in these numbers, and runs the step that was planned, a setup of step.py, on one
device, in turns with both: with the C++ that training uses there, and in plain JAX, which is what is planned. Claim:
within 35 % of the plan. Run it on a quiet machine. The second compiles each recipe for each target, in bfloat16, in a
process of its own, and prints a row of Markdown.
"""

import argparse
import resource
import subprocess
import sys
import time

MESHES = {  # recipe, target: what else is set there, beside bfloat16
    ("vit_l16", "h100:8"): {"encoder.remat": "dots", "decoder.remat": "dots"},
    ("vit_h14", "h100:8"): {"mesh.data": 1, "mesh.fsdp": 8, "encoder.remat": "full", "decoder.remat": "full"},
    ("vit_h14", "v4:64"): {"mesh.data": 8, "mesh.fsdp": 8},
    ("vit_h14", "v5e:256"): {"mesh.data": 16, "mesh.fsdp": 16},
}
BUFFER = 2**26  # float32 numbers


def measured():
    """Peers for `seconds_of`: a matrix product, and a copy."""
    import jax
    import jax.numpy as jnp

    def repeated(function, array):
        function = jax.jit(function)

        def run(n):
            for _ in range(n):
                result = function(array)
            jax.block_until_ready(result)

        return run

    return {
        "product": repeated(lambda x: x @ x, jnp.ones((2048, 2048))),
        "copy": repeated(lambda x: x + 1, jnp.ones(BUFFER)),
    }


def check(given):
    import jax
    import numpy as np
    from step import load, ours, ours_in_jax, seconds_of

    from mae_jax.config import complete
    from mae_jax.jobs import planned, pretrain
    from mae_jax.model import native
    from mae_jax.training.hardware import Hardware

    native.keep_freed_memory()  # as the command line does
    head = ("setup", "GFLOP/s", "GB/s", "planned", "run", "of plan", "(range)", "in JAX", "of plan")
    print("{:6} {:>8} {:>6} {:>9} {:>9} {:>8} {:>12} {:>9} {:>8}".format(*head))
    for setup in given.setups.split(","):
        config = load(setup)
        peers = {"ours": ours(config)[0], "ours_in_jax": ours_in_jax(config)[0], **measured()}
        for run in peers.values():
            run(2)
        steps = {name: max(1, round(given.seconds / seconds_of(run, 1))) for name, run in peers.items()}
        rows = [{name: seconds_of(run, steps[name]) for name, run in peers.items()} for _ in range(given.rounds)]
        times = {name: np.array([row[name] for row in rows]) for name in peers}
        flops, bandwidth = 2 * 2048**3 / np.median(times["product"]), 2 * 4 * BUFFER / np.median(times["copy"])
        complete_config, _ = complete(config, pretrain.SCHEMA, pretrain.VALUES)
        here = Hardware(memory=2**34, flops=flops, bandwidth=bandwidth)
        plan = planned.make(complete_config, here, jax.devices(), None).estimate.step
        ratios = {name: times[name] / plan for name in ("ours", "ours_in_jax")}
        spread = f"{ratios['ours'].min():.2f}-{ratios['ours'].max():.2f}"
        print(
            f"{setup:6} {flops / 1e9:8.0f} {bandwidth / 1e9:6.1f} {1e3 * plan:6.0f} ms "
            f"{1e3 * np.median(times['ours']):6.0f} ms {np.median(ratios['ours']):8.2f} {spread:>12} "
            f"{1e3 * np.median(times['ours_in_jax']):6.0f} ms {np.median(ratios['ours_in_jax']):8.2f}",
            flush=True,
        )


def row(recipe, target):
    """A row of the table, of one recipe on one target, in this process."""
    from mae_jax.config import load
    from mae_jax.jobs import plan, planned

    changes = {"dtype": "bfloat16"} | MESHES.get((recipe, target), {})
    config, problems = load(f"configs/pretrain.py:{recipe}", [f"--config.{k}={v}" for k, v in changes.items()])
    assert not problems, problems
    began = time.perf_counter()
    config, hardware, devices, images, _ = plan.check(config, target)
    made = planned.make(config, hardware, devices, images)
    took, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mesh = "×".join(str(size) for size in made.mesh.values())
    estimate, memory = made.estimate, made.memory
    state = f"{memory.parameters / 2**30:.2f} + {memory.optimizer / 2**30:.2f}"
    share = f"{memory.total / 2**30:.1f} of {hardware.memory / 2**30:.0f}"
    terms = " / ".join(f"{1e3 * getattr(estimate, term):.0f}" for term in ("compute", "memory", "network"))
    print(
        f"| `{recipe}` | {target} | {mesh} | {config.encoder.remat} | {state} | {memory.activations / 2**30:.1f} "
        f"({memory.kept / 2**30:.1f}) | {share} | {terms} | {1e3 * estimate.step:.0f} | {made.utilisation:.0%} | "
        f"{made.hours:.1f} | {estimate.limit} | {took:.0f} s, {peak / 1e9:.1f} GB |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default="Ti,B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each in each round, or one step")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--recipes", default="vit_b16,vit_l16,vit_h14")
    parser.add_argument("--targets", default="h100:8,v4:64,v5e:256")
    parser.add_argument("--row", nargs=2, metavar=("RECIPE", "TARGET"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        return row(*given.row)
    if not given.table:
        return check(given)
    for recipe in given.recipes.split(","):
        for target in given.targets.split(","):  # how many devices there are cannot be changed once JAX has started
            subprocess.run([sys.executable, __file__, "--row", recipe, target], check=True)


if __name__ == "__main__":
    main()
