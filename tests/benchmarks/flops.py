"""The arithmetic of the compiled training step beside what is needed, and the bytes it touches: nothing is run.

    python tests/benchmarks/flops.py [--sizes Ti,B,L,H] [--decoders 1,8] [--batch 64]

FLOPs and bytes are XLA's cost analysis of the step that it compiled from plain JAX (what runs in C++ on one CPU is
opaque to it); needed is `mae_jax.model.flops.training_flops`: the matrix products, and nothing for norms, softmax, GELU
or the optimizer. 224 pixels, patches of 16 (14 for H), decoder 512 wide.
"""

import argparse

from step import training_step

from mae_jax import config
from mae_jax.jobs import models
from mae_jax.model import native
from mae_jax.model.flops import training_flops
from mae_jax.model.vit import SIZES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="Ti,B,L,H")
    parser.add_argument("--decoders", default="1,8", help="how many blocks deep")
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    print(f"{'size':5} {'decoder':>7} {'needed':>14} {'compiled':>14} {'ratio':>6} {'bytes':>9}  per image")
    for size in given.sizes.split(","):
        for depth in given.decoders.split(","):
            changes = {f"encoder.{key}": value for key, value in SIZES[size].items()}
            changes |= {"encoder.patch_size": 14 if size == "H" else 16, "decoder.depth": depth}
            changes |= {"data.batch_size": given.batch}
            overrides = [f"--config.{key}={value}" for key, value in changes.items()]
            settings, problems = config.load("configs/pretrain.py:vit_b16", overrides)
            assert not problems, problems
            model, _ = models.build(settings)
            needed = training_flops(model, settings.data.image_size, settings.data.channels, settings.mask.ratio)
            with native.unused():
                step, abstract, _, images = training_step(settings)
                cost = step.lower(abstract, images).compile().cost_analysis()
            flops, touched = cost["flops"] / given.batch, cost["bytes accessed"] / given.batch
            print(
                f"{size:5} {depth:>7} {needed / 1e9:7.2f} GFLOP {flops / 1e9:7.2f} GFLOP {flops / needed:6.3f} "
                f"{touched / 1e9:6.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
