"""What would help a plan: the nearest change of its config that makes it fit, or makes it faster. All are compiled."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import jax

from mae_jax.jobs import checks, model_checks, planned
from mae_jax.jobs.planned import Plan

TRIES = 5  # each takes as long to compile as the plan itself
LIMITS = {"compute": "compute", "memory": "the bandwidth of memory", "network": "the network"}  # as they are called
FASTER = 0.98  # of the time: less than that is none of a help
WEAKER = {"full": "dots", "dots": "none"}  # what recomputes less


def advice(plan: Plan, devices: Sequence[jax.Device], images: int | None) -> str:
    """One line: the nearest change that helps, and what comes of it; or that none does.

    Args:
      devices, images: as in `planned.make`.
    """
    tried = []
    changes = faster(plan) if plan.fits else smaller(plan)
    for change in itertools.islice(changes, TRIES):
        config = copy.deepcopy(plan.config)
        config.update_from_flattened_dict(change)
        if model_checks.autoencoder_problems(config) + checks.run_problems(config, devices):
            continue
        other = planned.make(config, plan.hardware, devices, images)
        needs, takes = other.memory.total / 2**20, 1e3 * other.estimate.step
        told = f"{shown(change)}: {needs:,.2f} MiB and {takes:.3f} ms a step, compiled"
        if other.fits and (not plan.fits or other.estimate.step < FASTER * plan.estimate.step):
            return told
        tried.append((needs, told))
    if plan.fits:
        return f"more devices, or faster ones: no setting here spares {LIMITS[plan.estimate.limit]}"
    if not tried:
        return "devices with more memory: no setting here needs less"
    return f"more devices, or some with more memory; not enough, but nearest, is {min(tried)[1]}"


def shown(change: dict) -> str:
    """As it is written on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in change.items())


def busier(plan: Plan) -> dict[str, int]:
    """The mesh with as many of the devices that are idle as a batch can be split over; as it is, where none are."""
    mesh, config = plan.mesh, plan.config
    parts = mesh["data"] * mesh["fsdp"] * config.accumulate
    more = [n for n in range(1, plan.there // plan.devices + 1) if config.data.batch_size % (n * parts) == 0]
    return mesh | {"data": max(more, default=1) * mesh["data"]}


def sizes_of(mesh: dict[str, int]) -> dict[str, int]:
    """A mesh as a change."""
    return {f"mesh.{axis}": size for axis, size in mesh.items()}


def smaller(plan: Plan) -> Iterator[dict]:
    """Changes that need less memory, in the order of what they cost."""
    config, memory, room, mesh = plan.config, plan.memory, plan.hardware.memory, busier(plan)
    state = memory.parameters + memory.optimizer
    if state > room / 4 and mesh["data"] > 1:  # the state is what is too large: share it
        factor = next((n for n in divisors(mesh["data"]) if state / n < room / 4), mesh["data"])
        mesh = mesh | {"data": mesh["data"] // factor, "fsdp": mesh["fsdp"] * factor}
    spread = {} if mesh == plan.mesh else sizes_of(mesh)
    if spread:
        yield spread
    stronger = [kind for kind in ("dots", "full") if kind not in (config.encoder.remat, config.decoder.remat)]
    if config.encoder.remat == "full":
        stronger = []
    for kind in stronger:
        yield spread | {"encoder.remat": kind, "decoder.remat": kind}
    remat = {"encoder.remat": "full", "decoder.remat": "full"}
    shares = mesh["data"] * mesh["fsdp"]
    parts = [n for n in divisors(config.data.batch_size // shares) if n > config.accumulate]
    enough = math.ceil(config.accumulate * memory.activations / max(room - state, room / 4))
    for n in [n for n in parts if n >= enough and n % config.accumulate == 0][:1]:
        yield spread | {"accumulate": n}
    if parts:
        yield spread | remat | {"accumulate": next((n for n in parts if n >= 2 * enough), parts[-1])}


def faster(plan: Plan) -> Iterator[dict]:
    """Changes that spare what limits a step; whether they do is for the compiler to tell."""
    config, mesh = plan.config, plan.mesh
    sizes = sizes_of(mesh)
    if (more := busier(plan)) != mesh:
        yield sizes_of(more)
    if config.dtype == "float32" and plan.estimate.limit != "network":
        yield {"dtype": "bfloat16"}
    if plan.estimate.limit == "network":
        for axis in ("tensor", "fsdp"):
            if mesh[axis] % 2 == 0:
                yield sizes | {f"mesh.{axis}": mesh[axis] // 2, "mesh.data": 2 * mesh["data"]}
    if config.accumulate > 1:
        yield {"accumulate": next(n for n in reversed(divisors(config.accumulate)) if n < config.accumulate)}
    recomputing = [part for part in ("encoder", "decoder") if config[part].remat in WEAKER]
    weaker = {f"{part}.remat": WEAKER[config[part].remat] for part in recomputing}
    if weaker:
        yield weaker
    if config.dtype == "float32" and plan.estimate.limit == "network":
        yield {"dtype": "bfloat16"}


def divisors(n: int) -> list[int]:
    """Of a number, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]
