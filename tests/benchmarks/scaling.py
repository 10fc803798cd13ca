"""How the pre-training step's time grows: with the batch, the patches left visible, devices, and mask tokens.

    python tests/benchmarks/scaling.py [--parts batch,ratio,devices,tokens] [--rounds 7] [--figure docs/mask_tokens.png]

Forward, backward and AdamW, float32, on the CPU; every part has a process of its own. What is compared is interleaved;
times are medians over rounds, and so are ratios, each of two times in the same round. Run it on a quiet machine.

    batch    the 32px setup of step.py in batches of 64, 128 and 256: time per image. Claim: the same within 10 %.
    ratio    ViT-Ti hiding 0.5, 0.75 and 0.9 of the patches: time beside FLOPs that are needed (`model/flops.py`).
             Claim: the ratios to those of 0.75 agree within 15 %.
    devices  32px, batch 256, on 1 and on 8 simulated devices of one process, in three meshes, and what makes the
             difference. Claim: data=8 costs at most 1.10 times 1. With several devices the C++ of `model/native.py` is
             not used, here in neither.
    tokens   an encoder on all patches, the hidden ones as mask tokens, against MAE's on the visible ones (paper table
             1c): time, and FLOPs as XLA counts them. ViT-L with --depth blocks and a decoder cut in proportion.
             The paper: 3.3 times the FLOPs and 2.8 times the time, with 24 blocks and 8 in the decoder.
"""

import argparse
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageDraw, ImageFont
from step import load, ours, repeated, seconds_of, training_step

from mae_jax.jobs import models
from mae_jax.model import native
from mae_jax.model.flops import training_flops
from mae_jax.model.mae import MAE
from mae_jax.model.masking import visible_count
from mae_jax.model.patches import grid_of
from mae_jax.model.vit import SIZES
from mae_jax.training.sharding import batch_sharding, make_mesh

BATCHES = (64, 128, 256)
RATIOS = (0.5, 0.75, 0.9)
MESHES = {"1": {}, "data=8": {"data": 8}, "fsdp=8": {"fsdp": 8}, "fsdp=4, tensor=2": {"fsdp": 4, "tensor": 2}}
PAPER = {"FLOPs": 3.3, "time": 2.8}  # of an encoder with mask tokens, in units of MAE's: table 1c


def configured(setup, changes):
    """A setup of step.py with some settings changed."""
    config = load(setup)
    config.update_from_flattened_dict(changes)
    return config


def run_of(config, model=None):
    """run(n), which makes n steps and waits for them."""
    step, abstract, new_state, batch = training_step(config, model)
    return repeated(step.lower(abstract, batch).compile(), new_state(), batch)[0]


def interleaved(runs, given):
    """Seconds of a step of each of `runs`: {name: f64[rounds]}."""
    steps = {}
    for name, run in runs.items():
        run(2)
        steps[name] = max(1, round(given.seconds / seconds_of(run, 1)))
    times = {name: [] for name in runs}
    for _ in range(given.rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, steps[name]))
    return {name: np.array(took) for name, took in times.items()}


def shown(ratios):
    """The median of some ratios, and their range."""
    return f"{np.median(ratios):8.3f} {f'{ratios.min():.2f}-{ratios.max():.2f}':>12}"


def batch(given):
    times = interleaved({n: ours(configured("32px", {"data.batch_size": n}))[0] for n in BATCHES}, given)
    each = {n: took / n for n, took in times.items()}
    print(f"\n32px\n{'batch':>8} {'ms/image':>9} {f'of {BATCHES[-1]}':>8} {'(range)':>12}")
    ratios = {n: took / each[BATCHES[-1]] for n, took in each.items()}
    for n in BATCHES:
        print(f"{n:8} {1e3 * np.median(each[n]):9.3f} {shown(ratios[n])}")
    print(f"farthest from 1: {max(abs(np.median(r) - 1) for r in ratios.values()):.1%} (claim: within 10 %)")


def ratio(given):
    runs, flops = {}, {}
    for hidden in RATIOS:
        config = configured("Ti", {"data.batch_size": 16, "mask.ratio": hidden})
        runs[hidden] = ours(config)[0]
        model, _ = models.build(config)
        flops[hidden] = training_flops(model, config.data.image_size, config.data.channels, hidden)
    times = interleaved(runs, given)
    print(f"\nTi, batch 16\n{'hidden':>8} {'ms/step':>9} {'of 0.75':>8} {'(range)':>12} {'FLOPs':>8} {'quotient':>9}")
    excess = {}
    for hidden in RATIOS:
        measured, needed = times[hidden] / times[0.75], flops[hidden] / flops[0.75]
        excess[hidden] = np.median(measured) / needed
        milliseconds = 1e3 * np.median(times[hidden])
        print(f"{hidden:8} {milliseconds:9.1f} {shown(measured)} {needed:8.3f} {excess[hidden]:9.3f}")
    print(f"farthest from FLOPs: {max(abs(e - 1) for e in excess.values()):.1%} (claim: within 15 %)")


COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(program):
    """How many a compiled step has, and the bytes of their results on one device."""
    found = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", program)
    arrays = [(kind, dims) for result in found for kind, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result)]
    widths = {kind: int(re.search(r"\d+", kind)[0]) // 8 for kind, _ in arrays}
    return len(found), sum(
        widths[kind] * np.prod([int(n) for n in dims.split(",") if n] or [1]) for kind, dims in arrays
    )


def spent(run, steps):
    """CPU seconds and switches from one thread to another, of one step."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    run(steps)
    after, took = resource.getrusage(resource.RUSAGE_SELF), time.process_time() - began
    switches = sum(getattr(after, key) - getattr(before, key) for key in ("ru_nvcsw", "ru_nivcsw"))
    return took / steps, switches / steps


def products(config, sizes):
    """run(n) of the encoder's largest product, of the rows that each device has of it."""
    mesh = make_mesh(**{"data": 1} | sizes)
    rows = config.data.batch_size * (
        1 + visible_count(math.prod(grid_of(config.data.image_size, 4)), config.mask.ratio)
    )
    x = jax.device_put(jnp.ones((rows, config.encoder.width)), batch_sharding(mesh))
    kernel = jax.device_put(
        jnp.ones((config.encoder.width, 4 * config.encoder.width)), NamedSharding(mesh, PartitionSpec())
    )
    product = jax.jit(lambda x, kernel: x @ kernel)

    def run(n):
        for _ in range(100 * n):
            out = product(x, kernel)
        jax.block_until_ready(out)

    return run


def devices(given):
    config = load("32px")
    runs, about = {}, {}
    for name, sizes in MESHES.items():
        step, abstract, new_state, batch = training_step(config, **sizes)
        step = step.lower(abstract, batch).compile()
        runs[name], temporary = repeated(step, new_state(), batch)
        cost, count = step.cost_analysis(), math.prod(sizes.values())
        about[name] = [cost["flops"] * count, cost["bytes accessed"] * count, temporary * count]
        about[name] += collectives(step.as_text())
    times = interleaved(runs, given)
    switching = {name: spent(run, 3) for name, run in runs.items()}
    alone = interleaved({name: products(config, MESHES[name]) for name in ("1", "data=8")}, given)
    head = (
        "ms/step",
        "of 1",
        "(range)",
        "CPU of 1",
        "FLOPs of 1",
        "bytes of 1",
        "memory of 1",
        "sends",
        "MB",
        "switches",
    )
    print(f"\n32px, batch {config.data.batch_size}")
    print("{:16} {:>9} {:>8} {:>12} {:>9} {:>11} {:>11} {:>12} {:>6} {:>7} {:>9}".format("mesh", *head))
    for name, took in times.items():
        flops, accessed, temporary = np.array(about[name][:3]) / about["1"][:3]
        sends, size = about[name][3:]
        cpu, switches = switching[name]
        print(
            f"{name:16} {1e3 * np.median(took):9.1f} {shown(took / times['1'])} {cpu / switching['1'][0]:9.2f} "
            f"{flops:11.3f} {accessed:11.3f} {temporary:12.3f} {sends:6} {size / 1e6:7.2f} {switches:9.0f}"
        )
    print(f"the encoder's largest product, in eight parts: {shown(alone['data=8'] / alone['1'])} of the time in one")
    print(f"data=8 costs {np.median(times['data=8'] / times['1']):.2f} times 1 (claim: at most 1.10)")


def tokens(given):
    blocks = max(1, round(given.depth * 8 / SIZES["L"]["depth"]))  # the paper's decoder has 8 for the whole ViT-L
    sizes = {f"encoder.{key}": value for key, value in SIZES["L"].items()} | {"encoder.depth": given.depth}
    large = configured("B", {"data.batch_size": 8, "decoder.depth": blocks, **sizes})
    title = f"ViT-L with {given.depth} blocks, {blocks} in the decoder, 224 px, batch 8, 0.75 hidden"
    measured = with_mask_tokens(large, title, given)
    with_mask_tokens(configured("28px", {}), "64x4, 32x1 in the decoder, 28 px, batch 128, 0.75 hidden", given)
    if given.figure:
        given.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(measured, f"One training step, ViT-L with {given.depth} blocks; MAE is 1").save(given.figure)


def with_mask_tokens(config, title, given):
    """FLOPs and time of a step of that with mask tokens in the encoder, both times MAE's."""
    mae, _ = models.build(config)
    compared = {"MAE": mae, "mask tokens": MAE(mae.encoder, mae.decoder.clone(mask_tokens="encoder"))}
    flops = {}
    for name, model in compared.items():
        with native.unused():  # XLA cannot count what C++ does
            step, abstract, _, batch = training_step(config, model)
            flops[name] = step.lower(abstract, batch).cost_analysis()["flops"]
    times = interleaved({name: run_of(config, model) for name, model in compared.items()}, given)
    print(f"\n{title}")
    print(f"{'encoder':12} {'ms/step':>9} {'of MAE':>8} {'(range)':>12} {'GFLOP/step':>11} {'of MAE':>8}")
    for name, took in times.items():
        count = f"{flops[name] / 1e9:11.1f} {flops[name] / flops['MAE']:8.3f}"
        print(f"{name:12} {1e3 * np.median(took):9.0f} {shown(took / times['MAE'])} {count}")
    measured = {
        "FLOPs": flops["mask tokens"] / flops["MAE"],
        "time": float(np.median(times["mask tokens"] / times["MAE"])),
    }
    print(", ".join(f"{key} {value:.2f} times MAE's (paper: {PAPER[key]})" for key, value in measured.items()))
    return measured


def draw(measured, title):
    """Two pairs of bars, of FLOPs and of time: MAE, and `measured` times as high that with mask tokens."""
    width, height, left, floor, ceiling, bar, gap = 640, 400, 90, 330, 100, 90, 100
    colours = {"MAE": "#4878a8", "mask tokens in the encoder": "#d08040"}
    unit = (floor - ceiling) / max(*measured.values(), *PAPER.values())
    picture = Image.new("RGB", (width, height), "white")
    pen, font, small = ImageDraw.Draw(picture), ImageFont.load_default(16), ImageFont.load_default(13)
    pen.text((width / 2, 24), title, fill="black", font=font, anchor="mm")
    for i, (name, colour) in enumerate(colours.items()):
        x = 180 + 110 * i
        pen.rectangle((x, 48, x + 12, 60), fill=colour)
        pen.text((x + 20, 54), name, fill="black", font=small, anchor="lm")
    for i, (key, value) in enumerate(measured.items()):
        x = left + i * (2 * bar + gap)
        for tall, colour in zip((1, value), colours.values(), strict=True):
            top = floor - tall * unit
            pen.rectangle((x, top, x + bar - 6, floor), fill=colour)
            pen.text((x + bar / 2 - 3, top - 12), f"{tall:.2f}", fill="black", font=font, anchor="mm")
            x += bar
        pen.text((x - bar - 3, floor + 20), key, fill="black", font=font, anchor="mm")
        pen.text((x - bar - 3, floor + 42), f"in the paper: {PAPER[key]}", fill="#555", font=small, anchor="mm")
    pen.line((left - 30, floor, width - left + 30, floor), fill="black", width=2)
    return picture


PARTS = {"batch": batch, "ratio": ratio, "devices": devices, "tokens": tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each in each round, or one step")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoders that tokens compares")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="where tokens draws its ratios, a PNG file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        native.keep_freed_memory()  # as the command line does
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8 if given.part == "devices" else 1)
        return PARTS[given.part](given)
    chosen = given.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: {', '.join(unknown)}: not among {', '.join(PARTS)}")
    for part in chosen:  # each alone: how many devices there are cannot be changed once JAX has started
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)


if __name__ == "__main__":
    main()
