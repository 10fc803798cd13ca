"""The classifier: a fine-tuning step against PyTorch, BatchNorm against PyTorch's, and which parameter is which."""

import math
from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.model import losses, masking
from mae_jax.model.classifier import (
    NORMS,
    POOLS,
    UNDECAYED,
    BatchNorm,
    Classifier,
    check_trainable,
    layer_of,
    trainable,
)
from mae_jax.model.mae import MAE, Decoder
from mae_jax.model.vit import ViT
from mae_jax.training import optim

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEPTH, CLASSES = 3, 5
ENCODER = ViT(patch_size=4, width=32, depth=DEPTH, heads=2)
FINETUNED = Classifier(ENCODER.clone(positions="learned", final_norm=False), CLASSES)
PROBE = Classifier(ENCODER, CLASSES, pool="cls", norm="batch")


def flat(tree) -> dict:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def shapes_of(model, size: int = 16) -> dict:
    """The variables of `model` as shapes, collection by collection."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def random_params(model) -> dict:
    """Parameters of `model` of which none is 0 or 1: matrices keep the scale of their inputs, norms stay near 1."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        value = rng.standard_normal(shape)
        return 1.5 * value * shape[0] ** -0.5 if len(shape) == 2 else 0.3 * value + path.endswith("scale")

    params = {path: draw(path, x.shape).astype(np.float32) for path, x in flat(shapes_of(model)["params"]).items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((8, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(2).dirichlet(np.ones(CLASSES), 8).astype(np.float32)


# --- One step of fine-tuning, against PyTorch.

# timm's names of what each leaf of ours holds; {i} is a block
LAYOUT = {
    "encoder/cls_token": "cls_token",
    "encoder/positions": "pos_embed",
    "encoder/patch_embedding": "patch_embed.proj",
    "encoder/block_{i}/attention_norm": "blocks.{i}.norm1",
    "encoder/block_{i}/attention/qkv": "blocks.{i}.attn.qkv",
    "encoder/block_{i}/attention/out": "blocks.{i}.attn.proj",
    "encoder/block_{i}/mlp_norm": "blocks.{i}.norm2",
    "encoder/block_{i}/mlp/in": "blocks.{i}.mlp.fc1",
    "encoder/block_{i}/mlp/out": "blocks.{i}.mlp.fc2",
    "norm": "fc_norm",
    "head": "head",
}


def to_timm(path: str) -> str:
    """timm's name of a leaf."""
    for i in range(DEPTH):
        for ours, theirs in LAYOUT.items():
            ours, theirs = ours.format(i=i), theirs.format(i=i)
            if path == ours:
                return theirs
            if path in (f"{ours}/kernel", f"{ours}/scale"):
                return f"{theirs}.weight"
            if path == f"{ours}/bias":
                return f"{theirs}.bias"
    raise KeyError(path)


def to_tensor(name: str, value):
    """The parameter `name` of timm's: a matrix [out,in], for patches a convolution [D,C,P,P]."""
    if name == "patch_embed.proj.weight":
        value = value.reshape(4, 4, 3, -1).transpose(3, 2, 0, 1)
    return np.ascontiguousarray(value.T if value.ndim == 2 else value)


def plain_vit(torch, p: dict, images):
    """Logits of a ViT that averages its patch tokens, in PyTorch's own operations: images [N,C,H,W]."""

    def linear(x, name):
        return torch.nn.functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    x = torch.nn.functional.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4)
    x = x.flatten(2).mT
    n, patches, width = x.shape
    x = torch.cat([p["cls_token"].expand(n, -1, -1), x], dim=1) + p["pos_embed"]
    for i in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(n, 1 + patches, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.mT / math.sqrt(width // 2), dim=-1) @ v
        x = x + linear(attended.transpose(1, 2).reshape(n, 1 + patches, width), f"blocks.{i}.attn.proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return linear(norm(x[:, 1:].mean(dim=1), "fc_norm"), "head")


def timm_layer(name: str) -> int:
    """Counted from the bottom, as util/lr_decay.py of the original code has it."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else DEPTH + 1


RATE, WEIGHT_DECAY, LAYER_DECAY = 4e-3, 0.3, 0.65
# Of what has more than one dimension, main_finetune.py exempts what the model itself names in no_weight_decay().
EXEMPT = {"cls_token", "pos_embed"}


@pytest.fixture(scope="module")
def step(images, targets):
    """Logits, loss, gradients and updated parameters of one step, ours and PyTorch's, by timm's names and layout."""
    torch = pytest.importorskip("torch")
    params = random_params(FINETUNED)

    tensors = {
        to_timm(path): torch.nn.Parameter(torch.tensor(to_tensor(to_timm(path), x))) for path, x in flat(params).items()
    }
    logits = plain_vit(torch, tensors, torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    loss.backward()
    groups = [
        {
            "params": [tensor],
            "lr": RATE * LAYER_DECAY ** (DEPTH + 1 - timm_layer(name)),
            "weight_decay": 0.0 if tensor.ndim == 1 or name in EXEMPT else WEIGHT_DECAY,
        }
        for name, tensor in tensors.items()
    ]
    torch.optim.AdamW(groups, betas=(0.9, 0.999)).step()
    theirs = {
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
        "gradients": {name: tensor.grad.numpy() for name, tensor in tensors.items()},
        "params": {name: tensor.detach().numpy() for name, tensor in tensors.items()},
    }

    tx, _ = optim.make(
        256,
        100,
        10,
        lambda path: layer_of(path, DEPTH),
        UNDECAYED,
        base_learning_rate=RATE,
        warmup_epochs=0.0,
        weight_decay=WEIGHT_DECAY,
        b2=0.999,
        layer_decay=LAYER_DECAY,
    )

    def loss_fn(params):
        logits = FINETUNED.apply({"params": params}, images)
        return losses.cross_entropy(logits, targets).mean(), logits

    @jax.jit
    def update(params):
        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return logits, loss, gradients, optax.apply_updates(params, updates)

    logits, loss, *trees = update(params)
    gradients, updated = ({to_timm(k): to_tensor(to_timm(k), np.asarray(x)) for k, x in flat(t).items()} for t in trees)
    return {"logits": logits, "loss": float(loss), "gradients": gradients, "params": updated}, theirs


def test_logits_and_loss_are_those_of_pytorch(step):
    ours, theirs = step
    assert np.abs(theirs["logits"]).max() > 1
    np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=0, atol=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_gradients_are_those_of_pytorch(step):
    ours, theirs = (s["gradients"] for s in step)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert np.linalg.norm(ours[name] - want) <= 1e-4 * np.linalg.norm(want), name


def moved_elsewhere(step, names) -> dict:
    """How far from PyTorch's the updated parameters are, by name; where the gradient is more than rounding.

    Adam's first step is the sign of the gradient, which rounding tosses like a coin where there is none: in the
    biases of keys, of which the softmax takes no notice, and in hardly any other place.
    """
    ours, theirs = step
    gradients = {name: np.abs(theirs["gradients"][name]) for name in names}
    clear = {name: gradient > 1e-5 * gradient.max() for name, gradient in gradients.items()}
    keys = [clear[name][32:64] for name in names if name.endswith("qkv.bias")]
    unclear = sum((~c).sum() for c in clear.values()) - sum((~k).sum() for k in keys)
    assert unclear <= 1e-3 * sum(c.size for c in clear.values())
    return {name: np.abs(ours["params"][name] - theirs["params"][name])[clear[name]].max() for name in names}


def test_updated_parameters_are_those_of_pytorch(step):
    for name, apart in moved_elsewhere(step, step[1]["params"].keys() - EXEMPT).items():
        assert apart <= 1e-5, name


def test_cls_token_and_positions_are_updated_without_decay_as_in_the_original(step):
    for name, apart in moved_elsewhere(step, EXEMPT).items():
        assert apart <= 1e-5, name


# --- The model.


@pytest.mark.parametrize("norm", NORMS)
def test_parameters_are_the_encoder_s_own_then_norm_and_head(norm):
    variables = shapes_of(Classifier(ENCODER, CLASSES, norm=norm))
    mae = MAE(ENCODER, Decoder(48, width=16, depth=1, heads=2))
    mask = masking.sample(jax.random.key(0), 1, (4, 4))
    pretrained = jax.eval_shape(mae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), mask)["params"]["encoder"]
    assert variables["params"]["encoder"] == pretrained
    rest = {path: x.shape for path, x in flat(variables["params"]).items() if not path.startswith("encoder/")}
    scale = {"norm/scale": (32,), "norm/bias": (32,)} if norm == "layer" else {}
    assert rest == scale | {"head/kernel": (32, CLASSES), "head/bias": (CLASSES,)}
    statistics = {path: x.shape for path, x in flat(variables.get("batch_stats", {})).items()}
    assert statistics == ({"norm/mean": (32,), "norm/var": (32,)} if norm == "batch" else {})


@pytest.mark.parametrize("std", [0.01, 2e-5])
def test_head_begins_as_small_as_told_with_bias_0(std):
    model = Classifier(ENCODER, 1000, norm="none", head_std=std)
    make = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32)), method=model.classify))
    head = make(jax.random.key(0))["params"]["head"]
    np.testing.assert_allclose(np.std(head["kernel"]), std, rtol=0.02)
    assert 3.5 * std < np.abs(head["kernel"]).max() < 6 * std  # not cut at 2 deviations
    assert not head["bias"].any()


@pytest.mark.parametrize("pool", POOLS)
def test_features_are_the_cls_token_or_the_mean_of_the_patches(images, pool):
    model = Classifier(ENCODER, CLASSES, pool=pool)
    params = random_params(model)
    features = jax.jit(lambda params: model.apply({"params": params}, images, method=model.features))(params)
    tokens = jax.jit(lambda params: ENCODER.apply({"params": params}, images))(params["encoder"])
    tokens = np.asarray(tokens, np.float64)
    want = {"cls": tokens[:, 0], "mean": tokens[:, 1:].sum(axis=1) / 16}[pool]
    np.testing.assert_allclose(features, want, rtol=0, atol=1e-5)


def test_what_follows_a_bfloat16_encoder_is_float32(images):
    model = Classifier(ENCODER.clone(dtype="bfloat16"), CLASSES)
    features, logits = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, method=lambda m, x: (m.features(x), m(x)))[0]
    )
    assert (features.shape, features.dtype) == ((8, 32), jnp.float32)
    assert (logits.shape, logits.dtype) == ((8, CLASSES), jnp.float32)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="one of layer, batch, none, not 'group'"):
        shapes_of(Classifier(ENCODER, CLASSES, norm="group"))


# --- BatchNorm.

norm_batch = jax.jit(lambda stats, x, weight=None: BatchNorm().apply(stats, x, weight, True, mutable=["batch_stats"]))
norm_running = jax.jit(lambda stats, x: BatchNorm().apply(stats, x))


def random_features(steps: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((steps, n, 6)) * np.logspace(-0.5, 0.5, 6) + rng.uniform(-1, 1, 6)).astype(np.float32)


def test_batch_norm_is_that_of_pytorch_in_training_and_after():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    stats = BatchNorm().init(jax.random.key(0), jnp.zeros((1, 6)))
    for x in random_features(steps=5, n=12):
        theirs.eval()
        np.testing.assert_allclose(norm_running(stats, x), theirs(torch.tensor(x)), rtol=1e-6, atol=1e-6)
        theirs.train()
        got, stats = norm_batch(stats, x)
        np.testing.assert_allclose(got, theirs(torch.tensor(x)), rtol=0, atol=1e-6)
        np.testing.assert_allclose(stats["batch_stats"]["mean"], theirs.running_mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(stats["batch_stats"]["var"], theirs.running_var, rtol=0, atol=1e-6)


def test_rows_that_weigh_nothing_are_as_good_as_not_there():
    x = random_features(steps=1, n=12)[0]
    weight = np.array([1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    x[weight == 0] *= 50
    stats = BatchNorm().init(jax.random.key(0), jnp.zeros((1, 6)))
    got, got_stats = norm_batch(stats, x, weight)
    want, want_stats = norm_batch(stats, x[weight == 1])
    np.testing.assert_allclose(got[weight == 1], want, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), got_stats, want_stats)


def test_a_batch_of_nothing_teaches_nothing():
    x = random_features(steps=2, n=12)
    _, stats = norm_batch(BatchNorm().init(jax.random.key(0), jnp.zeros((1, 6))), x[0])
    got, after = norm_batch(stats, x[1], np.zeros(12, np.float32))
    assert np.isfinite(got).all()
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_weight_and_update_reach_the_norm_of_a_probe():
    x = np.random.default_rng(0).standard_normal((12, 32)).astype(np.float32)
    weight = (np.arange(12) % 3 > 0).astype(np.float32)
    params = {"head": {"kernel": jnp.eye(32, CLASSES), "bias": jnp.zeros(CLASSES)}}
    stats = {"batch_stats": {"norm": {"mean": jnp.ones(32), "var": jnp.full(32, 4.0)}}}
    classify = partial(PROBE.apply, {"params": params, **stats}, x, weight, method=PROBE.classify)
    still = jax.jit(classify)()
    np.testing.assert_allclose(still, (x[:, :CLASSES] - 1) / 2, rtol=0, atol=1e-5)
    got, moved = jax.jit(lambda: classify(update=True, mutable=["batch_stats"]))()
    seen = x[weight > 0]
    np.testing.assert_allclose(got, ((x - seen.mean(axis=0)) / seen.std(axis=0))[:, :CLASSES], rtol=0, atol=1e-4)
    norm = moved["batch_stats"]["norm"]
    np.testing.assert_allclose(norm["mean"], 0.9 + 0.1 * seen.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(norm["var"], 3.6 + 0.1 * seen.var(axis=0, ddof=1), rtol=0, atol=1e-6)


# --- Which parameter is which.

PATHS = sorted({*flat(shapes_of(FINETUNED)["params"]), *flat(shapes_of(Classifier(ENCODER, CLASSES))["params"])})


def test_layer_of_every_parameter_counts_down_from_the_head():
    layers = {0: {"head", "norm", "encoder/norm"}, DEPTH + 1: {"encoder/cls_token", "encoder/positions"}}
    layers[DEPTH + 1] |= {"encoder/patch_embedding"}
    layers |= {DEPTH - i: {f"encoder/block_{i}"} for i in range(DEPTH)}
    assert {path: layer_of(path, DEPTH) for path in PATHS} == {
        path: layer
        for path in PATHS
        for layer, groups in layers.items()
        if any(path == group or path.startswith(group + "/") for group in groups)
    }


def test_layer_of_counts_as_the_original_does_from_the_other_end():
    for path in flat(shapes_of(FINETUNED)["params"]):
        assert layer_of(path, DEPTH) == DEPTH + 1 - timm_layer(to_timm(path)), path


@pytest.mark.parametrize("path", ["decoder/block_0/mlp/in/kernel", "encoder/mask_token", "positions", "heads/kernel"])
def test_what_no_classifier_has_is_in_no_layer(path):
    with pytest.raises(ValueError, match=f"{path} is no parameter"):
        layer_of(path, DEPTH)


TOP = {"head/kernel", "head/bias", "norm/scale", "norm/bias"}
FINAL = TOP | {"encoder/norm/scale", "encoder/norm/bias"}
HALF = {
    f"encoder/block_2/{leaf}"
    for leaf in ("mlp_norm/scale", "mlp_norm/bias", "mlp/in/kernel", "mlp/in/bias", "mlp/out/kernel", "mlp/out/bias")
}
CHOICES = {
    "all": set(PATHS),
    "head": TOP,
    "norms": {path for path in PATHS if path.endswith("scale")}
    | {path.removesuffix("scale") + "bias" for path in PATHS if path.endswith("scale")}
    | TOP,
    "0.5": FINAL | HALF,
    "1": FINAL | {path for path in PATHS if "block_2" in path},
    "2": FINAL | {path for path in PATHS if "block_2" in path or "block_1" in path},
    "3": FINAL | {path for path in PATHS if "block_" in path},
}


@pytest.mark.parametrize("what", CHOICES)
def test_trainable_chooses_exactly(what):
    assert {path for path in PATHS if trainable(path, DEPTH, what)} == CHOICES[what]


def test_blocks_are_counted_as_numbers():
    assert trainable("encoder/block_10/mlp/in/kernel", 12, "2")
    assert not trainable("encoder/block_1/mlp/in/kernel", 12, "10")
    assert trainable("encoder/block_2/mlp/in/kernel", 12, "10")


@pytest.mark.parametrize("what", ["-1", "0", "1.5", "4", "abc", "", "1 ", "+1", "01", "blocks", "0.50"])
def test_other_choices_are_refused(what):
    for refuse in (lambda: check_trainable(what, DEPTH), lambda: trainable("head/kernel", DEPTH, what)):
        with pytest.raises(ValueError, match=r"none of all, head, norms, 0\.5, or a number of blocks from 1 to 3"):
            refuse()
