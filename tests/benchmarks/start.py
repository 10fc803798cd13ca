"""Seconds from the command to the end of the first step, with nothing compiled before and again.

    python tests/benchmarks/start.py [--rounds 3]

Cold is a run with an empty cache folder, of the C++ as well; warm are later runs of the same command.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZE = {"encoder.width": 192, "encoder.heads": 3, "decoder.width": 128, "decoder.depth": 4, "decoder.heads": 4}
COMMANDS = {  # recipe, overrides
    "digits": ("digits", {}),
    "ViT-Ti": ("vit_b16", SIZE | {"data.source": "synthetic", "data.held_out": "validation", "data.batch_size": 32}),
}


def seconds_to_first_step(recipe, changes, cache):
    """Of the command line; it is ended then."""
    changes = changes | {"train.steps": 50}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "mae_jax", "pretrain", f"--config=configs/pretrain.py:{recipe}"]
        command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changes.items())]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would win
        began = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("first step"):
                    took = time.perf_counter() - began
                    process.kill()
                    return took
    sys.exit("it ended before its first step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="warm ones; the median counts")
    given = parser.parse_args()
    for name, (recipe, changes) in COMMANDS.items():
        with tempfile.TemporaryDirectory() as cache:
            cold, *warm = (seconds_to_first_step(recipe, changes, cache) for _ in range(1 + given.rounds))
        spread = f"{min(warm):.1f}-{max(warm):.1f}"
        print(f"{name:8} cold {cold:5.1f} s   warm {np.median(warm):5.1f} s ({spread})", flush=True)


if __name__ == "__main__":
    main()
