"""The mesh, and how batches and states lie on it."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mae_jax.config import complete, load
from mae_jax.jobs import models, pretrain
from mae_jax.model import masking
from mae_jax.model.classifier import Classifier
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.positions import POSITIONS
from mae_jax.model.vit import ViT
from mae_jax.training import optim
from mae_jax.training.loop import create_state
from mae_jax.training.sharding import (
    AXES,
    arrange,
    batch_sharding,
    batch_shares,
    make_mesh,
    mesh_shape,
    spec_of,
    state_sharding,
    undivided,
)

MESHES = [
    {"data": 1},
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]
NAMES = ["-".join(f"{axis}{size}" for axis, size in sizes.items()) for sizes in MESHES]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 3}, (3, 1, 1)),
        ({"data": 1}, (1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 8)),
        ({"data": 1, "fsdp": 2}, (1, 2, 1)),
    ],
    ids=str,
)
def test_mesh_has_named_axes_over_the_first_devices(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.shape == shape == mesh_shape(8, **sizes)
    assert mesh.devices.ravel().tolist() == jax.devices()[: math.prod(shape)]
    assert batch_shares(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        *(({"data": size}, 1) for size in (0, -2, 9, 10**30)),
        *(({"data": -1, "fsdp": size}, 1) for size in (3, 16, -1, 0)),
        ({"data": 4, "fsdp": 4}, 1),
        ({"data": 1, "fsdp": 8}, 2),
        ({"data": 2, "fsdp": 2}, 2),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(sizes, slices):
    with pytest.raises(ValueError, match=r"do not fit 8 device\(s\)"):
        mesh_shape(8, slices, **sizes)


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 4, 1)], ids=str)
def test_only_the_data_axis_crosses_from_one_slice_to_the_next(shape):
    kind = SimpleNamespace(platform="cpu", device_kind="cpu")
    devices = [SimpleNamespace(id=i, slice_index=i % 2, process_index=0, **vars(kind)) for i in range(8)]
    mesh = arrange(devices, mesh_shape(8, 2, **dict(zip(AXES, shape, strict=True))))
    assert mesh.shape == shape
    assert sorted(device.id for device in mesh.flat) == list(range(8))
    for block, index in zip(np.split(mesh, 2), (0, 1), strict=True):
        assert {device.slice_index for device in block.flat} == {index}


@pytest.mark.parametrize("sizes", [*MESHES, {"data": 2}], ids=[*NAMES, "data2"])
def test_batches_are_split_evenly_along_their_first_axis(sizes):
    x = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    mesh = make_mesh(**sizes)
    array = jax.device_put(x, batch_sharding(mesh))
    parts = np.split(x, batch_shares(mesh))
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    for part, together in zip(parts, mesh.devices.reshape(len(parts), -1), strict=True):
        for device in together:  # those along tensor have the same images
            np.testing.assert_array_equal(shards[device], part)


def test_paths_end_in_a_rule_or_are_an_error():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    kernel = ("params/encoder/block_3/mlp/in/kernel", (8, 32))
    assert spec_of(*kernel, mesh) == P("fsdp", "tensor")
    assert spec_of("opt_state/0/mu/encoder/block_3/mlp/in/kernel", (8, 32), mesh) == P("fsdp", "tensor")
    assert spec_of("decoder/block_0/attention/out/kernel", (8, 32), mesh) == P("tensor", "fsdp")
    assert spec_of("head/kernel", (8, 3), mesh) == P("fsdp")
    assert spec_of("step", (), mesh) == P()
    for path in ("params/encoder/block_3/gate", "kernel", "params/ahead/kernel", "head/kernels", ""):
        with pytest.raises(ValueError, match=r"no rule in training/sharding\.py says how"):
            spec_of(path, (8, 8), mesh)


@pytest.mark.parametrize(
    ("shape", "spec"), [((6, 32), P(None, "tensor")), ((8, 31), P("fsdp")), ((6, 31), P())], ids=str
)
def test_an_axis_that_does_not_divide_is_dropped(shape, spec):
    assert spec_of("mlp/in/kernel", shape, make_mesh(data=1, fsdp=4, tensor=2)) == spec


def test_what_is_whole_although_it_should_be_split_is_named():
    shapes = {"in": (6, 32), "out": (32, 6)}
    mlp = {"mlp": {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}, "norm": jnp.zeros(3)}
    assert undivided(mlp, make_mesh(data=1, fsdp=2, tensor=4)) == []
    assert undivided(mlp, make_mesh(data=8)) == []
    found = ["mlp/in/kernel (6, 32) by fsdp=4", "mlp/out/kernel (32, 6) by fsdp=4"]
    assert undivided(mlp, make_mesh(data=1, fsdp=4, tensor=2)) == found


def autoencoder_state(mesh, recipe="digits", **options):
    """The state of a pre-training recipe as shapes on `mesh`, and the function that makes it."""
    config, _ = load(f"configs/pretrain.py:{recipe}")
    config, _ = complete(config, pretrain.SCHEMA, pretrain.VALUES)
    model, _ = models.build(config)
    tx, _ = optim.make(128, 100, 10, **config.optim)
    return create_state(lambda: (models.init(model, config, jax.random.key(0)), {}), tx, mesh, **options)


def flat(tree):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


KERNELS = {"qkv": ("fsdp", "tensor"), "in": ("fsdp", "tensor"), "out": ("tensor", "fsdp"), "head": ("fsdp", None)}
KERNELS |= {"embedding": (None, "fsdp"), "patch_embedding": (None, "fsdp")}


@pytest.mark.parametrize("sizes", MESHES, ids=NAMES)
def test_each_device_holds_its_part_of_the_state_and_no_more(sizes):
    """Bytes by device, counted here from the names of the layers: of parameters, moments and moving averages."""
    mesh = make_mesh(**sizes)
    abstract, new_state = autoencoder_state(mesh, ema=0.9)
    state = new_state()
    assert flat(state).keys() == flat(abstract).keys()
    held = dict.fromkeys(mesh.devices.flat, 0)
    expected = 0
    for name, leaf in flat(state).items():
        *_, layer, kind = ("", *name.split("/"))
        split = [mesh.shape[axis] if axis else 1 for axis in KERNELS[layer]] if kind == "kernel" else [1]
        if kind == "bias" and layer in ("qkv", "in"):
            split = [mesh.shape["tensor"]]
        if kind == "kernel":
            assert all(n % size == 0 for n, size in zip(leaf.shape, split, strict=True)), "this recipe divides"
            assert leaf.is_fully_replicated == (math.prod(split) == 1), name
        expected += leaf.nbytes // math.prod(split)
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {expected}
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert expected <= 1.15 * whole / parts, "what is on every device is small"


@pytest.mark.slow
def test_the_state_begins_the_same_on_every_mesh():
    first, *others = (jax.device_get(autoencoder_state(make_mesh(**sizes))[1]()) for sizes in MESHES)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


@pytest.mark.parametrize("recipe", ["vit_b16", "vit_l16", "vit_h14"])
def test_large_models_are_split_sixteen_ways_to_within_three_percent(recipe):
    """As shapes, for a described mesh of more devices than there are."""
    mesh = jax.sharding.AbstractMesh((16, 16, 1), AXES)
    abstract, _ = autoencoder_state(make_mesh(), recipe)
    whole = held = 0
    for name, leaf in flat(abstract).items():
        shard = jax.sharding.NamedSharding(mesh, spec_of(name, leaf.shape, mesh)).shard_shape(leaf.shape)
        whole, held = whole + leaf.size, held + math.prod(shard)
    assert held < 1.03 * whole / 16


@pytest.mark.parametrize("name", ["adamw", "lars"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_classifiers_and_all_optimizers_have_rules(name, norm):
    model = Classifier(ViT(patch_size=4, width=16, depth=2, heads=2, positions="learned"), 10, norm=norm)

    def init():
        variables = dict(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
        return variables.pop("params"), variables

    tx, _ = optim.make(8, 10, 10, lambda path: 1, name=name, layer_decay=0.5)
    abstract, new_state = create_state(init, tx, make_mesh(data=1, fsdp=4, tensor=2), ema=0.5)
    for described, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(new_state()), strict=True):
        assert described.sharding == leaf.sharding


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("options", [{}, {"kind": "cross"}, {"mask_tokens": "encoder"}], ids=str)
def test_all_positions_and_decoders_have_rules(kind, options):
    decoder = Decoder(16, width=16, depth=1, heads=2, positions=kind, **options)
    model = MAE(ViT(patch_size=4, width=16, depth=1, heads=2, positions=kind), decoder)
    mask = masking.sample(jax.random.key(0), 1, (2, 2), ratio=0.5)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), mask))["params"]
    specs = {path: x.spec for path, x in flat(state_sharding(params, make_mesh(data=1, fsdp=4, tensor=2))).items()}
    for path, spec in specs.items():
        first = path.endswith(("qkv/kernel", "/q/kernel", "/kv/kernel"))
        assert not first or spec == P("fsdp", "tensor"), path
    assert "decoder/block_0/attention/kv/kernel" in specs or options != {"kind": "cross"}


def test_state_sharding_takes_shapes_as_well_as_arrays_and_keeps_the_tree():
    mesh = make_mesh(fsdp=4)
    state = {"head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}, "none": None}
    shardings = state_sharding(state, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert state_sharding(jax.eval_shape(lambda: state), mesh) == shardings
