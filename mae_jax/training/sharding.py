"""The device mesh, and which axis of it each array is split over.

The mesh has three named axes, and any of them may be 1:

    data      every device along it has a part of the batch and the whole state (data parallelism)
    fsdp      a part of the batch and a part of the state, which is put together where it is used (ZeRO, FSDP)
    tensor    the whole of the batch and a part of each layer: some heads, some hidden units (tensor parallelism)

The model knows nothing of it: `RULES` lays the train state out and `batch_sharding` the batch, and from these two XLA
finds the rest. Activations need no word from us (tests/training/test_sharding.py looks at what is compiled): they stay
split like the batch, and what is sent is parameters and gradients, under `tensor` the sums behind each second layer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both

# How the train state lies on the mesh: the first pattern that the end of a path matches counts, for a parameter as
# for its moments and its moving average, whose paths end in the parameter's. Kernels are [inputs, outputs].
RULES = (
    # the first layer of two: a device has the outputs of some heads or hidden units ...
    (r"(attention/(qkv|q|kv)|mlp/in)/kernel", P("fsdp", "tensor")),
    (r"(attention/(qkv|q|kv)|mlp/in)/bias", P("tensor")),
    # ... and the second layer takes them as its inputs, so that only its sums are sent
    (r"(attention|mlp)/out/kernel", P("tensor", "fsdp")),
    # layers that stand alone: the model's width is what is split, as it is what divides
    (r"(patch_embedding|embedding)/kernel", P(None, "fsdp")),
    (r"head/kernel", P("fsdp", None)),
    # what is small is on every device: biases, norms, tokens, positions, statistics, targets, counts
    (r"bias|scale|cls_token|mask_token|positions|mean|var|components|centroids|step|count|norm", P()),
)


def mesh_shape(
    devices: int, slices: int = 1, hosts: int = 1, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> tuple[int, ...]:
    """The sizes (data, fsdp, tensor) of a mesh over `devices` devices, or over the first of them.

    >>> mesh_shape(8, data=-1, fsdp=4), mesh_shape(8, data=2, fsdp=1)
    ((2, 4, 1), (2, 1, 1))

    Args:
      slices: of so many devices each as fast links join; only `data` crosses from one to the next.
      hosts: that the devices belong to; of several, none may be left out.
      data, fsdp, tensor: one may be -1: all devices that the other two leave.

    Raises:
      ValueError: they do not fit.
    """
    sizes = (data, fsdp, tensor)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) <= 1 and all(size == -1 or 1 <= size <= devices for size in sizes):
        if -1 in sizes and devices % known == 0:
            sizes = tuple(devices // known if size == -1 else size for size in sizes)
        used = math.prod(sizes)
        whole = used == devices and sizes[0] % slices == 0
        if whole or (0 < used <= devices and slices == hosts == 1):
            return sizes
    told = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, (data, fsdp, tensor), strict=True))
    there = f"{devices} device(s)" + f" of {hosts} hosts" * (hosts > 1) + f" in {slices} slices" * (slices > 1)
    raise ValueError(f"{told} do not fit {there}")


def slice_count(devices: Sequence[jax.Device]) -> int:
    """How many slices of a TPU pod `devices` belong to, or groups of GPUs that share fast links; 1 if unknown."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The `devices` as an array of `shape` (data, fsdp, tensor), such that neighbours have fast links.

    Of several slices, each one is a block along `data`, which sends the least.
    """
    slices = slice_count(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    within, between = (data // slices, *rest), (slices, *[1] * len(rest))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh with the axes `AXES`, over all `devices` or, where their product is less, over the first of them.

    Args:
      devices: None: those of all hosts.
      data, fsdp, tensor: sizes of the axes; one may be -1: all devices that the other two leave.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    hosts = len({device.process_index for device in devices})
    shape = mesh_shape(len(devices), slice_count(devices), hosts, data=data, fsdp=fsdp, tensor=tensor)
    # linen annotates nothing, so the axes must be Auto; jax.make_mesh's own default is Explicit
    return Mesh(arrange(devices[: math.prod(shape)], shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: its first axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def place(tree, sharding):
    """The arrays of a tree, laid out over all hosts as `sharding` says.

    Args:
      tree: of arrays that each host has whole, or that are spread over all of them already.
      sharding: one for all, or a tree of them.
    """
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)

    def put(x, one):
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, one)
        x = np.asarray(x)  # device_put would have all hosts compare it
        return jax.make_array_from_callback(x.shape, one, lambda index: x[index])

    return jax.tree.map(put, tree, sharding)


@functools.cache
def _replicate(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def whole(tree, mesh: Mesh):
    """The arrays of a tree as NumPy arrays, whole on every host, however they are spread over the mesh."""
    return jax.device_get(_replicate(NamedSharding(mesh, P()))(tree))


def batch_shares(mesh: Mesh) -> int:
    """How many parts a batch is split into; its size must be a multiple of that."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def microbatches(batch, count: int, mesh: Mesh):
    """A batch in `count` parts: arrays [N,...] as [count,N/count,...], of which every device keeps what it has.

    A part takes some of each device's rows, not the first N/count: those would have to be sent around.
    """
    shares = batch_shares(mesh)

    def cut(x):
        parts = x.reshape(shares, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(
            parts.reshape(count, -1, *x.shape[1:]), NamedSharding(mesh, P(None, BATCH_AXES))
        )

    return jax.tree.map(cut, batch)


def spec_of(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The row of `RULES` for an array, less the axes of the mesh that do not divide its own, or are 1.

    Args:
      path: of the array in the state, such as "opt_state/0/mu/encoder/block_3/mlp/in/kernel".
      shape: of the array.

    Raises:
      ValueError: there is none.
    """

    def kept(axis, n):
        return axis if axis and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0 else None

    axes = [kept(axis, n) for axis, n in zip(_rule_for(path), shape, strict=False)]
    while axes and axes[-1] is None:  # XLA's own spelling: for another one, jit would compile again
        axes.pop()
    return P(*axes)


def _rule_for(path: str) -> P:
    for pattern, spec in RULES:
        if re.search(f"(^|/)({pattern})$", path):
            return spec
    raise ValueError(f"no rule in training/sharding.py says how {path} lies on the mesh")


def undivided(tree, mesh: Mesh) -> list[str]:
    """What an axis of the mesh should split but does not divide, so that each device along it has the whole.

    Args:
      tree: as in `state_sharding`.

    Returns:
      A few words for each array and axis, such as "encoder/block_3/mlp/in/kernel (36, 144) by fsdp=8".
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for axis, n in zip(_rule_for(name), leaf.shape, strict=False):
            if axis and n % mesh.shape[axis]:
                found.append(f"{name} {leaf.shape} by {axis}={mesh.shape[axis]}")
    return found


def state_sharding(state, mesh: Mesh):
    """How the train state, or any part of it that has its paths' ends, lies on the mesh: as `RULES` say.

    Args:
      state: a tree of arrays or of their shapes.

    Raises:
      ValueError: there is no rule for some of it.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)
