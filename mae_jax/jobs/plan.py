"""Say what a pre-training run would need and cost on machines that are not there yet; nothing is trained.

    mae-jax plan --config=configs/pretrain.py:vit_h14 --config.mesh.data=16 --config.mesh.fsdp=16 --target=v5e

Reads the config of `mae-jax pretrain`, compiles its step for simulated devices, on this machine's CPU, and prints
parameters, arithmetic, memory of each device, what devices send one another, the time of a step and of the run, what
limits it, and a change that would help. Writes nothing.

    --target=NAME[:DEVICES]   a100, h100, v4, v5e, v5p or v6e; without DEVICES, as many as the mesh has
    --target=KEY=NUMBER,...   any other: memory, flops, bandwidth and network (of one device, in bytes and seconds), and
                              devices, as in devices=4,memory=24GiB,flops=150T,bandwidth=900G,network=25G; the others
                              are float32_flops, node, node_network, torus and ring (mae_jax/training/hardware.py)
    --images=N                training images, where they are neither known (ImageNet) nor here to be counted

docs/plan.md says what the numbers rest on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import known_size
from mae_jax.errors import ConfigError, UserError
from mae_jax.jobs import checks, model_checks, planned, pretrain, remedies
from mae_jax.jobs.planned import Plan
from mae_jax.jobs.remedies import LIMITS
from mae_jax.training import hardware
from mae_jax.training.hardware import PRESETS, Hardware
from mae_jax.training.loop import total_steps
from mae_jax.training.sharding import AXES, mesh_shape

WRITES_WORKDIR = False
ALSO = ("target", "images")  # flags beside the config
MOST = 4096  # devices that are simulated
IN_MEMORY = ("digits", "synthetic")  # sources whose labels can be looked at without reading files
MIB = 2**20


def run(config: ConfigDict, workdir: Path, target: str = "", images: str = "") -> None:
    """Plan what `config` describes on `target`."""
    config, described, devices, count, unknown = check(config, target, images)
    plan = planned.make(config, described, devices, count)
    print(*report(plan, target, unknown), sep="\n", flush=True)
    print(f"{'would help':13} {remedies.advice(plan, devices, count)}")


def check(
    config: ConfigDict, target: str = "", images: str = ""
) -> tuple[ConfigDict, Hardware, Sequence[jax.Device], int | None, str]:
    """The config with its defaults, what the target is, devices to compile for, training images, why none are known.

    Raises:
      ConfigError: with all that is wrong.
    """
    if "decoder" not in config:
        raise ConfigError("--config: has no decoder; plan is of what mae-jax pretrain runs, as in configs/pretrain.py")
    config, problems = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    if config is None:
        raise ConfigError(problems)
    described, named, wrong = read_target(target)
    problems += wrong
    if images and not re.fullmatch(r"[1-9]\d{0,14}", images):
        problems.append(f"--images={images}: is not a number above 0")
    count, wrong = device_count(config, named) if described else (1, [])
    problems += checks.untold(problems, wrong)
    devices = simulated(count)
    more = model_checks.autoencoder_problems(config) + checks.run_problems(config, devices)
    if wrong or not described:  # the mesh cannot be judged
        more = [problem for problem in more if not problem.startswith("config.mesh")]
    problems += checks.untold(problems, more)
    if not problems:
        problems += link_problems(described, target, math.prod(mesh_shape(count, **config.mesh)))
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    found, unknown = (int(images), "") if images else count_images(config)
    if found is not None:
        problems = length_problems(config, found)
    if problems:
        raise ConfigError(problems)
    return config, described, devices, found, unknown


def read_target(target: str) -> tuple[Hardware | None, int, list[str]]:
    """What --target describes, how many devices it names, and what is wrong with it, one line each."""
    if not target:
        return None, 0, [f"--target is missing; use one of {', '.join(PRESETS)}, or describe it: mae-jax plan --help"]
    try:
        return *hardware.describe(target), []
    except ConfigError as error:
        return None, 0, error.problems


def device_count(config: ConfigDict, named: int) -> tuple[int, list[str]]:
    """How many devices to compile for: as many as are `named`, or else as the mesh has; and what is wrong with that."""
    if named > MOST:
        return 1, [f"--target: {named} devices, but no more than {MOST} are simulated"]
    sizes = {axis: config.mesh[axis] for axis in AXES}
    for axis, size in sizes.items():
        if not named and size == -1:
            return 1, [
                f"config.mesh.{axis}: -1 is all devices that the other axes leave; say how many there are, as in "
                f"--target=h100:8 or --target=devices=8,...; or give --config.mesh.{axis}=N"
            ]
        if size < 1 and size != -1:
            return 1, [f"config.mesh.{axis}: {size} is not above 0, or -1 for all devices that the other axes leave"]
    if not named and math.prod(sizes.values()) > MOST:
        return 1, [f"config.mesh: {math.prod(sizes.values())} devices, but no more than {MOST} are simulated"]
    return named or math.prod(sizes.values()), []


def simulated(count: int) -> Sequence[jax.Device]:
    """So many devices of this machine's CPU, which JAX makes up when it is first used.

    Raises:
      ConfigError: it has been used, with fewer devices or other ones.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # there are devices already, and perhaps enough
    if jax.default_backend() != "cpu" or jax.device_count() < count:
        there = f"{jax.device_count()} device(s) of {jax.default_backend()}"
        raise ConfigError(f"--target: JAX is in use already, with {there}; plan {count} in a process of their own")
    return jax.devices()[:count]


def link_problems(described: Hardware, target: str, devices: int) -> list[str]:
    """What is not known of how so many devices are joined: a line, or none."""
    if devices > 1 and not described.network:
        return [f"--target={target}: network=... is missing, bytes/s that a device sends; the mesh has {devices}"]
    if 0 < described.node < devices and not described.node_network:
        return [f"--target={target}: joins up to {described.node} devices, and the mesh has {devices}"]
    return []


def count_images(config: ConfigDict) -> tuple[int | None, str]:
    """How many training images there are, or why that is not known; none of them is read."""
    data = config.data
    if data.per_class and data.source not in IN_MEMORY:
        return None, "config.data.per_class is of labels, which would have to be read"
    if data.source == "tfds" and (known := known_size(data.name, data.split)):
        return known, ""
    try:
        return Dataset(**data).opened.size, ""
    except UserError as error:
        return None, " ".join(error.problems)


def length_problems(config: ConfigDict, images: int) -> list[str]:
    """What is wrong with the length of a run over so many images: a line, or none."""
    size = config.data.batch_size
    if images < size:
        return [f"config.data: the training split has {images} images, fewer than config.data.batch_size {size}"]
    steps = total_steps(images // size, **config.train)
    if not 1 <= steps < 2**31:
        return [f"config.train: {steps} steps in all; give more than none and fewer than {2**31}"]
    return []


def report(plan: Plan, target: str, unknown: str) -> list[str]:
    """All that is known of a plan, a line each."""
    config, estimate, batch = plan.config, plan.estimate, plan.config.data.batch_size
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(plan.parameters.items(), reverse=True))
    turns = f", or {1e3 * estimate.in_turns:.3f} with nothing computed meanwhile" if estimate.exchanges else ""
    idle = f" ({plan.there - plan.devices} more are idle)" if plan.there > plan.devices else ""
    lines = [
        ("target", f"{plan.devices} of {target.partition(':')[0]}{idle}, mesh {mesh}; {config.dtype}, batch {batch}"),
        ("parameters", f"{sum(plan.parameters.values()):,}: {parts}"),
        ("needed", f"{scaled(plan.needed)}FLOP an image, {scaled(plan.needed * batch)}FLOP a step"),
        ("computed", f"{scaled(plan.executed)}FLOP an image, {plan.executed / plan.needed:.3f} of what is needed"),
        *memory_lines(plan),
        *exchange_lines(plan),
        ("time", f"{'ms':>12}  a step, at the target's peaks"),
        ("  compute", f"{1e3 * estimate.compute:12.3f}  matrix products"),
        ("  memory", f"{1e3 * estimate.memory:12.3f}  what operations take longer, waiting for memory"),
        ("  network", f"{1e3 * estimate.network:12.3f}  collectives, which go on meanwhile but for those along tensor"),
        ("  step", f"{1e3 * estimate.step:12.3f}  {batch / estimate.step:,.0f} images/s{turns}"),
        ("utilisation", f"{100 * plan.utilisation:12.1f}  % of the peak goes into what is needed"),
        ("hours", f"{plan.hours:12.4g}  for {plan.steps:,} steps" if plan.steps else f"need --images=N: {unknown}"),
        ("limited by", LIMITS[estimate.limit]),
    ]
    return [f"{name:13} {text}".rstrip() for name, text in lines]


def memory_lines(plan: Plan) -> list[tuple[str, str]]:
    """What fills the memory of a device."""
    memory, room = plan.memory, plan.hardware.memory
    kept = f"  about {memory.kept / MIB:,.2f} of it kept for the backward pass"
    fits = "fits" if plan.fits else "does not fit"
    if not plan.fits and memory.least <= room:
        fits += " as this CPU's compiler has it; what must be kept would"
    return [
        ("memory", f"{'MiB':>12}  on each device"),
        *((f"  {name}", f"{getattr(memory, name) / MIB:12,.2f}") for name in ("parameters", "optimizer", "batch")),
        ("  activations", f"{memory.activations / MIB:12,.2f}{kept}"),
        ("  total", f"{memory.total / MIB:12,.2f}  {memory.total / room:.1%} of {room / MIB:,.2f}: {fits}"),
    ]


def exchange_lines(plan: Plan) -> list[tuple[str, str]]:
    """What devices send one another."""
    if not plan.estimate.exchanges:
        return [("collectives", "none")]
    lines = [("collectives", f"{'arrays':>12} {'MB':>12} {'MB sent':>12} {'ms':>12}  a step, on each device")]
    for x in plan.estimate.exchanges:
        numbers = f"{x.arrays:12} {x.bytes / 1e6:12.3f} {x.sent / 1e6:12.3f} {1e3 * x.seconds:12.3f}"
        lines.append(("", f"{numbers}  {x.kind} along {', '.join(x.axes)}"))
    return lines


def scaled(number: float) -> str:
    """Four digits and a prefix: "289.2 G" of 289.17e9."""
    power = min(max(int(math.log10(max(number, 1))) // 3, 0), 6)
    return f"{number / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
