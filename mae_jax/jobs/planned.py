"""One pre-training config on one target: its step compiled on simulated devices, weighed and timed, and not run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.jobs import models, pretrain, runs
from mae_jax.model import masking, native
from mae_jax.model.flops import attended_flops, training_flops
from mae_jax.model.mae import MAE
from mae_jax.model.patches import grid_of
from mae_jax.training import program
from mae_jax.training.hardware import Hardware
from mae_jax.training.loop import KEEP_BARRIERS, State, total_steps
from mae_jax.training.roofline import Estimate, estimate
from mae_jax.training.sharding import batch_sharding, make_mesh

# The compiler for CPUs would turn bfloat16 into float32 before it is sent or stored; those for GPUs and TPUs do not.
KEEP_BFLOAT16 = {key: f"{passes},float-normalization-bf16" for key, passes in KEEP_BARRIERS.items()}
QUICKLY = KEEP_BFLOAT16 | {"xla_backend_optimization_level": 0}  # where nothing is to be run
STEPS_PER_EPOCH = 1000  # where the data is not known: the warm-up depends on it, and the program does not


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      parameters, optimizer: the parts of the train state.
      batch: images and their weights.
      activations: all else that the compiled program needs at its worst moment: what is kept for the backward pass,
        gradients, parameters put together.
      kept: about how much of that is kept for the backward pass, as it is traced, in the dtypes it is computed in; the
        compiler for CPUs holds some of it in float32 in place of bfloat16. Along `tensor` it is at least that much.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    kept: int

    @property
    def total(self) -> int:
        """Of the compiled program, by its own analysis."""
        return self.parameters + self.optimizer + self.batch + self.activations

    @property
    def least(self) -> int:
        """With nothing but what is kept among the activations."""
        return self.parameters + self.optimizer + self.batch + self.kept


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it is paid for.

    Attributes:
      there: devices there are; some are idle where the mesh has fewer.
      mesh: the size of each axis.
      parameters: how many, of the encoder and the decoder.
      needed: FLOPs of one image, as `model.flops` counts them.
      executed: FLOPs of one image, all matrix products of the compiled program.
      steps: of the whole run; None where the number of images is not known.
    """

    config: ConfigDict
    hardware: Hardware
    there: int
    mesh: dict[str, int]
    parameters: dict[str, int]
    needed: int
    executed: float
    memory: Memory
    estimate: Estimate
    steps: int | None

    @property
    def devices(self) -> int:
        """In the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether the compiled program has enough memory."""
        return self.memory.total <= self.hardware.memory

    @property
    def utilisation(self) -> float:
        """FLOPs that are needed, of those that all devices could do in the time of a step (PaLM's MFU)."""
        peak = self.devices * self.hardware.peak(self.config.dtype)
        return self.needed * self.config.data.batch_size / (self.estimate.step * peak)

    @property
    def hours(self) -> float | None:
        """Of all steps; evaluation and saving are not counted."""
        return None if self.steps is None else self.steps * self.estimate.step / 3600


def make(config: ConfigDict, hardware: Hardware, devices: Sequence[jax.Device], images: int | None) -> Plan:
    """Compile the step that `config` describes for devices that are like `hardware`.

    Args:
      devices: what to compile for, simulated: their number is all that counts.
      images: in the training split; None: not known.
    """
    config = at_its_costliest(config)
    steps_per_epoch = STEPS_PER_EPOCH if images is None else images // config.data.batch_size
    steps = total_steps(steps_per_epoch, **config.train)
    mesh, (model, target) = make_mesh(devices, **config.mesh), models.build(config)
    parts = pretrain.make_draw(model, config), pretrain.make_loss(model, target, config)
    lowered, state, batch = lower(config, mesh, steps, steps_per_epoch, pretrain.make_init(model, config), *parts)
    compiled = lowered.compile(compiler_options=KEEP_BFLOAT16)
    done = program.read(compiled.as_text(), mesh.size)
    at_once = config.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    return Plan(
        config,
        hardware,
        len(devices),
        dict(mesh.shape),
        {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()},
        needed(model, config),
        done.flops * mesh.size / config.data.batch_size,
        memory_of(
            compiled, state, batch, at_once * kept_of_image(config, state.params, *parts) // mesh.shape["tensor"]
        ),
        estimate(done, hardware, config.dtype, mesh.shape),
        None if images is None and config.train.steps is None else steps,
    )


def lower(
    config: ConfigDict, mesh: Mesh, steps: int, steps_per_epoch: int, init: Callable, draw: Callable, loss_fn: Callable
) -> tuple[jax.stages.Lowered, State, dict]:
    """The train step as it is handed to the compiler, and its state and batch as shapes; nothing of it is computed."""
    keys = jax.random.split(jax.random.key(config.seed), 2)
    batch = abstract_batch(config, config.data.batch_size, batch_sharding(mesh))
    with native.unused():  # the target has no use for what is compiled for this CPU
        step_of, state, _ = runs.set_up(config, mesh, steps, steps_per_epoch, *keys, init, pretrain.trained)
        return step_of(draw, loss_fn).lower(state, batch), state, batch


def abstract_batch(config: ConfigDict, size: int, sharding: jax.sharding.Sharding | None = None) -> dict:
    """A batch as `Dataset` gives it, as shapes; without the labels, which pre-training does not read."""
    shape = (size, *config.data.image_size, config.data.channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding),
        "weight": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding),
    }


def flops(config: ConfigDict) -> tuple[int, float]:
    """FLOPs of one image in a training step: as `model.flops` counts them, and all matrix products of the program.

    It is compiled for one CPU, which any machine has, and for a batch of two.
    """
    config = at_its_costliest(config)
    config = ConfigDict({**config, "data": {**config.data, "batch_size": 2, "repeats": 1}, "accumulate": 1})
    mesh, (model, target) = make_mesh(jax.devices("cpu")[:1]), models.build(config)
    parts = pretrain.make_draw(model, config), pretrain.make_loss(model, target, config)
    lowered, _, _ = lower(config, mesh, STEPS_PER_EPOCH, STEPS_PER_EPOCH, pretrain.make_init(model, config), *parts)
    done = program.read(lowered.compile(compiler_options=QUICKLY).as_text(), 1)
    return needed(model, config), done.flops / 2


def at_its_costliest(config: ConfigDict) -> ConfigDict:
    """Of a mask schedule, the stage that hides the least: what a run needs at most. Without one, `config`."""
    start = config.mask_schedule.start
    if start is None or start >= config.mask.ratio:
        return config
    return ConfigDict({**config, "mask": {**config.mask, "ratio": start}})


def needed(model: MAE, config: ConfigDict) -> int:
    """FLOPs of one image in a training step, as `model.flops` counts them: masks and targets that need any included."""
    data, mask = config.data, config.mask
    every_patch = config.loss.patches == "all"
    step = training_flops(model, data.image_size, data.channels, mask.ratio, every_patch, mask.decoded)
    looked = attended_flops(model, data.image_size, data.channels) if mask.name in masking.GUIDED else 0
    patches = math.prod(grid_of(data.image_size, config.encoder.patch_size))
    fitted = models.unfitted(config).values()
    encoded = 2 * patches * sum(x.size for x in fitted if x.ndim > 1)  # by components, or a codebook
    return step + looked + encoded


def memory_of(compiled: jax.stages.Compiled, state, batch, kept: int) -> Memory:
    """What a device needs for a compiled step, by the program's own analysis."""
    analysis = compiled.memory_analysis()
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    total += analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # of the old state's memory, new is made
    parameters, whole, batch = (_bytes_on_device(tree) for tree in (state.params, state, batch))
    return Memory(parameters, whole - parameters, batch, total - whole - batch, kept)


def _bytes_on_device(tree) -> int:
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def kept_of_image(config: ConfigDict, params, draw: Callable, loss_fn: Callable) -> int:
    """Bytes that the backward pass of one image needs of the forward pass; parameters are not among them."""

    def residuals(params, batch):
        examples = draw(batch, jax.random.key(0))
        return jax.vjp(lambda params: loss_fn(params, {}, examples)[0].sum(), params)[1]

    def kept(images: int) -> int:
        with native.unused():
            leaves = jax.tree.leaves(jax.eval_shape(residuals, params, abstract_batch(config, images)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return kept(2) - kept(1)
