"""The pre-training step against its peers, interleaved in one process: forward, backward and AdamW, float32.

    pip install -e ".[parity]"
    python tests/benchmarks/step.py [--setups B,Ti,32px] [--peers ours,plain,hf,hf_compiled] [--rounds 7]

One table: images/s (median over rounds), the ratio to Hugging Face eager in the same round (median), GFLOP/s of
the work that is needed (`model/flops.py`) and its share of the matrix-product ceiling measured in the same run, XLA's
temporary memory, and, of a process that does nothing else, its peak memory and the time from its start to the end of
its first step. Run it on a quiet machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from mae_jax.model import native

BEGAN = time.perf_counter()
SETUPS = {  # recipe, overrides
    "B": ("vit_b16", {"data.batch_size": 8}),
    "Ti": (
        "vit_b16",
        {"data.batch_size": 32, "encoder.width": 192, "encoder.heads": 3}
        | {"decoder.width": 128, "decoder.depth": 4, "decoder.heads": 4},
    ),
    "32px": ("cifar10", {"data.batch_size": 256, "encoder.depth": 6}),
}


def load(setup):
    from mae_jax import config

    recipe, changes = SETUPS[setup]
    settings, problems = config.load(
        f"configs/pretrain.py:{recipe}", [f"--config.{key}={value}" for key, value in changes.items()]
    )
    assert not problems, problems
    return settings


def images_of(config):
    import numpy as np

    shape = (config.data.batch_size, *config.data.image_size, config.data.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# A peer is `f(config) -> (run, temporary bytes or None)`; run(n) makes n steps and waits for them.


def repeated(step, state, batch):
    """A peer from a compiled step (state, batch) -> (state, anything)."""
    import jax

    def run(n):
        nonlocal state
        for _ in range(n):
            state, result = step(state, batch)
        jax.block_until_ready((state, result))

    return run, step.memory_analysis().temp_size_in_bytes


def ours(config):
    """This project's own train step, on one device."""
    import jax
    import jax.numpy as jnp

    from mae_jax.jobs import models, pretrain
    from mae_jax.training import optim
    from mae_jax.training.loop import create_state, make_train_step
    from mae_jax.training.sharding import make_mesh

    mesh = make_mesh(data=1)
    model, target = models.build(config)
    tx, schedule = optim.make(config.data.batch_size, 10_000, 100, **config.optim)
    abstract, new_state = create_state(lambda: models.init(model, config, jax.random.key(0)), tx, mesh)
    loss = pretrain.make_loss(model, target, config)
    batch = {"image": jnp.asarray(images_of(config)), "weight": jnp.ones(config.data.batch_size)}
    step = make_train_step(loss, tx, schedule, jax.random.key(1), mesh).lower(abstract, batch).compile()
    return repeated(step, new_state(), batch)


def plain(config):
    """The port of plain.py."""
    import jax.numpy as jnp

    sys.path.insert(0, str(Path(__file__).parent))
    from plain import make_step

    init, step = make_step(config)
    state, images = init(), jnp.asarray(images_of(config))
    step = step.lower(state, images).compile()
    return repeated(step, state, images)


def hf(config, compiled=False):
    """ViTMAEForPreTraining of transformers with scaled_dot_product_attention, and PyTorch's fused AdamW."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=config.data.image_size[0],
            num_channels=config.data.channels,
            patch_size=config.encoder.patch_size,
            hidden_size=config.encoder.width,
            num_hidden_layers=config.encoder.depth,
            num_attention_heads=config.encoder.heads,
            intermediate_size=4 * config.encoder.width,
            decoder_hidden_size=config.decoder.width,
            decoder_num_hidden_layers=config.decoder.depth,
            decoder_num_attention_heads=config.decoder.heads,
            decoder_intermediate_size=4 * config.decoder.width,
            mask_ratio=config.mask.ratio,
            norm_pix_loss=config.target.name == "normalized_pixels",
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    pixels = torch.from_numpy(images_of(config)).permute(0, 3, 1, 2).contiguous().float().div(255).sub(0.5).div(0.25)
    forward = torch.compile(model) if compiled else model

    def run(n):
        for _ in range(n):
            optimizer.zero_grad()
            forward(pixel_values=pixels).loss.backward()
            optimizer.step()

    return run, None


def hf_compiled(config):
    return hf(config, compiled=True)


PEERS = {"hf": hf, "hf_compiled": hf_compiled, "plain": plain, "ours": ours}


def seconds_of(run, n):
    began = time.perf_counter()
    run(n)
    return (time.perf_counter() - began) / n


def ceiling():
    """GFLOP/s of a float32 matrix product, the better of XLA and PyTorch."""
    import jax
    import jax.numpy as jnp

    side = 2048
    x = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = min(seconds_of(lambda n: product(x, x).block_until_ready(), 1) for _ in range(7))
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        y = torch.ones(side, side)
        best = min(best, *(seconds_of(lambda n: torch.mm(y, y), 1) for _ in range(7)))
    return 2 * side**3 / best / 1e9


def alone(setup, name):
    """What one peer needs in a process of its own: seconds to the end of the first step, and peak bytes."""
    run, _ = PEERS[name](load(setup))
    run(1)
    first = time.perf_counter() - BEGAN
    run(2)
    print(json.dumps([first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def compare(setup, names, rounds, seconds, processes):
    import numpy as np

    from mae_jax.jobs import models
    from mae_jax.model.flops import training_flops

    config = load(setup)
    model, _ = models.build(config)
    flops = training_flops(model, config.data.image_size, config.data.channels, config.mask.ratio)
    batch = config.data.batch_size
    runs, memory, steps = {}, {}, {}
    for name in names:
        runs[name], memory[name] = PEERS[name](config)
        runs[name](2)
        steps[name] = max(1, round(seconds / seconds_of(runs[name], 1)))
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(seconds_of(runs[name], steps[name]))
    top = ceiling()
    reference = np.array(times[names[0]])
    print(f"\n{setup}: batch {batch}, {flops / 1e9:.2f} GFLOP an image, ceiling {top:.0f} GFLOP/s")
    head = ("peer", "images/s", f"of {names[0]}", "(range)", "GFLOP/s", "of ceiling", "temporary", "peak", "first step")
    print("{:12} {:>9} {:>9} {:>12} {:>8} {:>10} {:>10} {:>9} {:>10}".format(*head))
    for name in names:
        took = np.array(times[name])
        rate, ratio = batch / np.median(took), reference / took
        gflops = rate * flops / 1e9
        temporary = f"{memory[name] / 1e6:.0f} MB" if memory[name] else "-"
        first = peak = "-"
        if processes:
            command = [sys.executable, __file__, "--alone", setup, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            first, peak = json.loads(done.stdout.splitlines()[-1])
            first, peak = f"{first:.1f} s", f"{peak / 1e6:.0f} MB"
        spread = f"{ratio.min():.2f}-{ratio.max():.2f}"
        print(
            f"{name:12} {rate:9.2f} {np.median(ratio):9.2f} {spread:>12} {gflops:8.0f} {gflops / top:10.0%} "
            f"{temporary:>10} {peak:>9} {first:>10}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--peers", default=",".join(PEERS), help="the first is what the others are compared with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each peer in each round")
    parser.add_argument("--no-processes", action="store_true", help="skip peak memory and time to the first step")
    parser.add_argument("--alone", nargs=2, metavar=("SETUP", "PEER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    native.keep_freed_memory()  # as the command line does; PyTorch here has its advantages too
    if given.alone:
        return alone(*given.alone)
    for setup in given.setups.split(","):
        compare(setup, given.peers.split(","), given.rounds, given.seconds, not given.no_processes)


if __name__ == "__main__":
    main()
