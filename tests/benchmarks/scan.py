"""What it takes to compile the pre-training step with its blocks one by one, and in a lax.scan over stacked parameters.

    python tests/benchmarks/scan.py [--sizes B,L] [--devices 1,8] [--batch 8] [--steps 2]

Forward, backward and AdamW on the CPU; decoder 512x8. Parameters have the same names in both: "scan" stacks those of
the blocks within the step, of all but the decoder's last, which computes fewer tokens. Each is compiled in a process
of its own, with nothing kept from before: seconds of lowering and of compiling, by the clock and of the CPU, the peak
memory of the process then, XLA's temporary memory, and with --steps the seconds of one step.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from step import load, repeated, seconds_of, training_step

from mae_jax.jobs import models
from mae_jax.model import native
from mae_jax.model.layers import Block
from mae_jax.model.vit import SIZES

KINDS = ("unrolled", "scan")


class Scanned:
    """An autoencoder whose blocks are computed in a scan; parameters are those of `model`.

    Attributes:
      model: a `MAE`.
    """

    def __init__(self, model):
        self.model, self.encoder, self.decoder = model, model.encoder, model.decoder
        self.init = model.init

    def apply(self, variables, images, mask):
        counts = {"encoder": self.encoder.depth, "decoder": self.decoder.depth - 1}

        def intercept(call, args, kwargs, context):
            block = context.module
            if not isinstance(block, Block) or block.name is None or args[1]:
                return call(*args, **kwargs)
            x, part = args[0], block.path[0]
            if block.name != "block_0":
                return x  # the first has done it all
            own = [variables["params"][part][f"block_{i}"] for i in range(counts[part])]
            alone = block.clone(parent=None, name=None)
            step = lambda x, params: (alone.apply({"params": params}, x), None)  # noqa: E731
            return jax.lax.scan(step, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))[0]

        with nn.intercept_methods(intercept):
            return self.model.apply(variables, images, mask)


def work(kind, size, devices, batch, steps):
    """Compile one of them, and tell about it."""
    native.keep_freed_memory()  # as the command line does
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)
    config = load("B")
    config.data.batch_size = batch
    config.encoder.update(SIZES[size])
    model, _ = models.build(config)
    step, abstract, new_state, batch = training_step(config, Scanned(model) if kind == "scan" else model, data=devices)
    clock = lambda: np.array([time.perf_counter(), time.process_time()])  # noqa: E731
    began = clock()
    lowered = step.lower(abstract, batch)
    between = clock()
    step = lowered.compile()
    times = [*(between - began), *(clock() - between)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    run, temporary = repeated(step, new_state(), batch)
    seconds = run(1) or seconds_of(run, steps) if steps else None
    print(json.dumps([*times, peak, temporary / 1e6, seconds]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="B,L", help="of the encoder")
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="to time; 0: none")
    parser.add_argument("--work", nargs=3, metavar=("KIND", "SIZE", "DEVICES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        kind, size, devices = given.work
        return work(kind, size, int(devices), given.batch, given.steps)
    print("| size | devices | blocks | lowering (CPU) | compiling (CPU) | peak memory | temporary memory | step |")
    print("|---|---|---|---|---|---|---|---|")
    for size in given.sizes.split(","):
        for devices in given.devices.split(","):
            for kind in KINDS:
                command = [sys.executable, __file__, "--batch", str(given.batch), "--steps", str(given.steps)]
                told = subprocess.run([*command, "--work", kind, size, devices], stdout=subprocess.PIPE, check=True)
                lower, lower_cpu, compiling, compiling_cpu, peak, temporary, step = json.loads(told.stdout)
                step = f"{step:.2f} s" if step else "-"
                print(
                    f"| ViT-{size} | {devices} | {kind} | {lower:.1f} s ({lower_cpu:.1f}) | {compiling:.1f} s "
                    f"({compiling_cpu:.1f}) | {peak:.0f} MB | {temporary:.0f} MB | {step} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
