"""The pre-training step against its peers, in turns: forward, backward and AdamW, float32.

    pip install -e ".[parity]"
    python tests/benchmarks/step.py [--setups B,Ti,32px] [--peers hf,hf_compiled,plain,ours] [--rounds 7]

Each peer has a process of its own, as its users run it, and only one computes at a time. One table: images/s (median
over rounds), the ratio to the first peer in the same round (median), GFLOP/s of the work that is needed
(`model/flops.py`) and its share of the matrix-product ceiling measured between the rounds, XLA's temporary memory,
and of each process its peak memory and the time from its start to the end of its first step. Run it on a quiet machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()
SETUPS = {  # recipe, overrides
    "B": ("vit_b16", {"data.batch_size": 8}),
    "Ti": (
        "vit_b16",
        {"data.batch_size": 32, "encoder.width": 192, "encoder.heads": 3}
        | {"decoder.width": 128, "decoder.depth": 4, "decoder.heads": 4},
    ),
    "32px": ("cifar10", {"data.batch_size": 256, "encoder.depth": 6}),
    "28px": (  # of docs/fashion_mnist.md
        "fashion_mnist",
        {"data.batch_size": 128, "encoder.width": 64, "encoder.heads": 2, "decoder.width": 32, "decoder.depth": 1},
    ),
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


def training_step(config, model=None, **sizes):
    """This project's own train step: the jitted function, its state as shapes, how to make that, and a batch.

    Of `model` in place of the autoencoder that `config` describes, if one is given; on a mesh of `sizes`, or on one
    device.
    """
    import jax
    import numpy as np

    from mae_jax.jobs import models, pretrain, runs
    from mae_jax.training.sharding import batch_sharding, make_mesh

    mesh, keys = make_mesh(**{"data": 1} | sizes), (jax.random.key(0), jax.random.key(1))
    autoencoder, target = models.build(config)
    model = model or autoencoder
    init = pretrain.make_init(model, config)
    step_of, abstract, new_state = runs.set_up(config, mesh, 10_000, 100, *keys, init, pretrain.trained)
    step = step_of(pretrain.make_draw(model, config), pretrain.make_loss(model, target, config))
    batch = {"image": images_of(config), "weight": np.ones(config.data.batch_size, np.float32)}
    return step, abstract, new_state, jax.device_put(batch, batch_sharding(mesh))


def ours(config):
    """This project's own train step, on one device."""
    step, abstract, new_state, batch = training_step(config)
    return repeated(step.lower(abstract, batch).compile(), new_state(), batch)


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


def ours_in_jax(config):
    """This project's own step without its C++: what runs where there is no compiler, and on several devices."""
    from mae_jax.model import native

    with native.unused():
        return ours(config)


PEERS = {"hf": hf, "hf_compiled": hf_compiled, "plain": plain, "ours": ours, "ours_in_jax": ours_in_jax}


def seconds_of(run, n):
    began = time.perf_counter()
    run(n)
    return (time.perf_counter() - began) / n


def ceiling(config):
    """A peer of another kind: one step is a float32 matrix product of PyTorch."""
    import torch

    x = torch.ones(2048, 2048)

    def run(n):
        for _ in range(n):
            torch.mm(x, x)

    return run, None


PEERS |= {"ceiling": ceiling}


def work(setup, name):
    """The process of one peer: answers each number of steps that it reads with the seconds they took."""
    if name == "ours":
        from mae_jax.model import native

        native.keep_freed_memory()  # as the command line does
    run, temporary = PEERS[name](load(setup))
    run(1)
    first = time.perf_counter() - BEGAN
    run(2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"first": first, "peak": peak, "temporary": temporary}), flush=True)
    for line in sys.stdin:
        print(seconds_of(run, int(line)), flush=True)


class Peer:
    """A process that runs `work`."""

    def __init__(self, setup, name):
        command = [sys.executable, __file__, "--work", setup, name]
        pipe = subprocess.PIPE
        with tempfile.TemporaryFile("w+") as errors:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
            line = self.process.stdout.readline()
            errors.seek(0)
            if not line:
                sys.exit(f"{name} does not start: {errors.read()[-2000:]}")
        self.about = json.loads(line)

    def seconds(self, steps):
        """Of one step, over so many."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(setup, names, rounds, seconds):
    import numpy as np

    from mae_jax.jobs import models
    from mae_jax.model.flops import training_flops

    config = load(setup)
    model, _ = models.build(config)
    flops = training_flops(model, config.data.image_size, config.data.channels, config.mask.ratio)
    batch = config.data.batch_size
    peers = {name: Peer(setup, name) for name in [*names, "ceiling"]}
    steps = {name: max(1, round(seconds / peer.seconds(1))) for name, peer in peers.items()}
    rows = [{name: peer.seconds(steps[name]) for name, peer in peers.items()} for _ in range(rounds)]
    times = {name: np.array([row[name] for row in rows]) for name in peers}
    for peer in peers.values():
        peer.close()
    top = 2 * 2048**3 / np.median(times["ceiling"]) / 1e9
    print(f"\n{setup}: batch {batch}, {flops / 1e9:.2f} GFLOP an image, ceiling {top:.0f} GFLOP/s")
    head = ("peer", "images/s", f"of {names[0]}", "(range)", "GFLOP/s", "of ceiling", "temporary", "peak", "first step")
    print("{:12} {:>9} {:>9} {:>12} {:>8} {:>10} {:>10} {:>9} {:>10}".format(*head))
    for name in names:
        about = peers[name].about
        rate, ratio = batch / np.median(times[name]), times[names[0]] / times[name]
        gflops = rate * flops / 1e9
        temporary = f"{about['temporary'] / 1e6:.0f} MB" if about["temporary"] else "-"
        spread = f"{ratio.min():.2f}-{ratio.max():.2f}"
        print(
            f"{name:12} {rate:9.2f} {np.median(ratio):9.2f} {spread:>12} {gflops:8.0f} {gflops / top:10.0%} "
            f"{temporary:>10} {about['peak'] / 1e6:6.0f} MB {about['first']:8.1f} s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument(
        "--peers", default="hf,hf_compiled,plain,ours", help="the first is what others are compared with"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each peer in each round")
    parser.add_argument("--work", nargs=2, metavar=("SETUP", "PEER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    for flag, known in {"setups": SETUPS, "peers": PEERS}.items():
        if unknown := set(getattr(given, flag).split(",")) - set(known):
            parser.error(f"--{flag}: {', '.join(unknown)}: not among {', '.join(known)}")
    if given.work:
        return work(*given.work)
    for setup in given.setups.split(","):
        compare(setup, given.peers.split(","), given.rounds, given.seconds)


if __name__ == "__main__":
    main()
