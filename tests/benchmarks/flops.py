"""The arithmetic of the compiled training step beside what is needed, and the bytes it touches: nothing is run.

    python tests/benchmarks/flops.py [--sizes Ti,B,L,H] [--decoders 1,8] [--batch 64]

FLOPs and bytes are XLA's cost analysis of the step that it compiled from plain JAX (what runs in C++ on one CPU is
opaque to it); needed is `mae_jax.model.flops.training_flops`: the matrix products, and nothing for norms, softmax, GELU
or the optimizer. 224 pixels, patches of 16 (14 for H), decoder 512 wide.
"""

import argparse

import jax
import jax.numpy as jnp

from mae_jax import config
from mae_jax.jobs import models, pretrain
from mae_jax.model import native
from mae_jax.model.flops import training_flops
from mae_jax.model.vit import SIZES
from mae_jax.training import optim
from mae_jax.training.loop import create_state, make_train_step
from mae_jax.training.sharding import make_mesh


def compiled_step(settings):
    """The whole training step of a config, compiled for one device."""
    data = settings.data
    mesh = make_mesh(data=1)
    model, target = models.build(settings)
    tx, schedule = optim.make(data.batch_size, 10_000, 100, **settings.optim)
    abstract, _ = create_state(lambda: models.init(model, settings, jax.random.key(0)), tx, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((data.batch_size, *data.image_size, data.channels), jnp.uint8),
        "weight": jax.ShapeDtypeStruct((data.batch_size,), jnp.float32),
    }
    loss = pretrain.make_loss(model, target, settings)
    with native.unused():
        return make_train_step(loss, tx, schedule, jax.random.key(1), mesh).lower(abstract, batch).compile()


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
            cost = compiled_step(settings).cost_analysis()
            flops, touched = cost["flops"] / given.batch, cost["bytes accessed"] / given.batch
            print(
                f"{size:5} {depth:>7} {needed / 1e9:7.2f} GFLOP {flops / 1e9:7.2f} GFLOP {flops / needed:6.3f} "
                f"{touched / 1e9:6.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
