"""The export job: what was trained here computes the same elsewhere, and comes back as it was."""

import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

import mae_jax
from mae_jax.__main__ import main
from mae_jax.config import load as load_recipe
from mae_jax.config import to_json
from mae_jax.data.sources import digits
from mae_jax.errors import CheckpointError
from mae_jax.jobs import classification, export, finetune, models, pretrain
from mae_jax.model import losses, masking, targets
from mae_jax.model.positions import POSITIONS, sincos_positions
from mae_jax.training.checkpoint import Checkpoints
from mae_jax.training.loop import State

RUNS = ("pretrained", "probed", "tuned")


def exported(run, kind, out, *flags):
    assert main(["export", f"--checkpoint={run}", f"--format={kind}", f"--out={out}", *flags]) == 0
    return out


def imported(source, workdir, *flags):
    assert main(["import", f"--from={source}", f"--workdir={workdir}", *flags]) == 0
    return workdir


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def images_of(run, count=8):
    """Some held-out digits, normalised for the model of a run: f32[N,8,8,1]."""
    images, _ = digits(split="test").read(np.arange(count))
    return np.asarray(mae_jax.normalize(images, **mae_jax.load_config(run).pixels))


def tokens_of(run, images):
    encoder, params = mae_jax.load_encoder(run)
    return np.asarray(jax.jit(encoder.apply)({"params": params}, images))


def logits_of(run, images):
    model, _, variables = classification.load(run)
    return np.asarray(jax.jit(model.apply)(variables, images))


def predictions_of(run, images):
    """Of an autoencoder, for all patches: f32[N,L,T]."""
    model, params = mae_jax.load(run)
    noise = np.random.default_rng(0).random((len(images), 16), np.float32)
    mask = masking.from_scores(noise, 0.75)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, images, mask, every_patch=True))(params))


@pytest.fixture
def run(request):
    """The workdir of the run that a test is parametrized with."""
    return request.getfixturevalue(request.param)


def of_runs(*names):
    return pytest.mark.parametrize("run", names, indirect=True)


# There and back


@of_runs("pretrained")
def test_an_autoencoder_comes_back_from_hugging_face_as_it_was(run, tmp_path, tools):
    back = imported(exported(run, "huggingface", tmp_path / "out"), tmp_path / "back")
    model, params = mae_jax.load(run)
    again, same = mae_jax.load(back)
    tools.assert_equal(tools.flat(same), tools.flat(params))
    assert again == model, "positions, epsilon and all"
    was, config = mae_jax.load_config(run), mae_jax.load_config(back)
    for key in ("target", "mask"):  # what an import does not say is the default, as it was here
        assert dict(config[key]).items() <= dict(was[key]).items() and config[key].name == was[key].name
    assert list(config.pixels.mean) == list(was.pixels.mean) and list(config.pixels.std) == list(was.pixels.std)
    assert list(config.data.image_size) == [8, 8] and config.data.channels == 1


@of_runs("probed", "tuned")
def test_a_classifier_comes_back_from_hugging_face_as_the_same_function(run, tmp_path, tools):
    back = imported(exported(run, "huggingface", tmp_path / "out"), tmp_path / "back")
    images = images_of(run)
    np.testing.assert_allclose(logits_of(back, images), logits_of(run, images), atol=1e-4)
    assert list(mae_jax.load_config(back).classes) == list(mae_jax.load_config(run).classes)


@of_runs("pretrained", "probed")
@pytest.mark.parametrize("kind", ["huggingface", "timm", "original"])
def test_an_encoder_alone_comes_back(run, kind, tmp_path, capsys):
    if kind == "original":
        pytest.importorskip("torch")
    suffix = {"timm": ".safetensors", "original": ".pth"}.get(kind, "")
    out = exported(run, kind, tmp_path / f"out{suffix}", "--part=encoder")
    back = imported(out, tmp_path / "back", *(["--heads=2"] if suffix else []))
    assert "imported    encoder of " in capsys.readouterr().out
    images = images_of(run)
    np.testing.assert_allclose(tokens_of(back, images), tokens_of(run, images), atol=1e-5)
    assert not {"head", "decoder"} & {*mae_jax.load_config(back)}


@of_runs("probed", "tuned")
@pytest.mark.parametrize("kind", ["timm", "original"])
def test_a_classifier_comes_back_from_a_file_as_the_same_function(run, kind, tmp_path):
    if kind == "original":
        pytest.importorskip("torch")
    out = exported(run, kind, tmp_path / {"timm": "out.safetensors", "original": "out.pth"}[kind])
    back = imported(out, tmp_path / "back", "--heads=2")
    images = images_of(run)
    np.testing.assert_allclose(logits_of(back, images), logits_of(run, images), atol=1e-4)


@of_runs("pretrained")
def test_an_autoencoder_comes_back_from_the_original_code(run, tmp_path, tools):
    pytest.importorskip("torch")
    target = mae_jax.load_config(run).target.name
    out = exported(run, "original", tmp_path / "out.pth")
    back = imported(out, tmp_path / "back", "--heads=2,2", f"--target={target}")
    _, params = mae_jax.load(run)
    _, same = mae_jax.load(back)
    tools.assert_equal(tools.flat(same), tools.flat(params))


def test_an_earlier_checkpoint(pretrained, tmp_path, tools):
    early = exported(f"{pretrained}/checkpoints/40", "huggingface", tmp_path / "early")
    want = tools.state_of(pretrained, 40)["params/encoder/norm/bias"]
    np.testing.assert_array_equal(tensors_of(early)["vit.layernorm.bias"], want)
    late = tensors_of(exported(pretrained, "huggingface", tmp_path / "late"))
    assert np.abs(late["vit.layernorm.bias"] - want).max() > 0


def test_moving_averages_are_what_is_written(tuned, tmp_path, tools):
    state = tools.state_of(tuned, 20)
    averages, latest = tools.part_of(state, "ema/"), tools.part_of(state, "params/")
    tensors = tensors_of(exported(tuned, "huggingface", tmp_path / "out"))
    for leaf, name in {
        "head/bias": "classifier.bias",
        "norm/scale": "beit.pooler.layernorm.weight",
        "encoder/block_0/mlp/in/bias": "beit.encoder.layer.0.intermediate.dense.bias",
    }.items():
        assert np.abs(averages[leaf] - latest[leaf]).max() > 0
        np.testing.assert_array_equal(tensors[name], averages[leaf])


def test_batchnorm_is_a_part_of_the_linear_layer(probed, tmp_path, tools):
    """(x - mean) / sqrt(var + 1e-6) W + b, written out in float64."""
    state = tools.state_of(probed, 100)
    kernel, bias = (state[f"params/head/{key}"].astype(np.float64) for key in ("kernel", "bias"))
    mean, var = (state[f"stats/batch_stats/norm/{key}"].astype(np.float64) for key in ("mean", "var"))
    tensors = tensors_of(exported(probed, "huggingface", tmp_path / "out"))
    scale = 1 / np.sqrt(var + 1e-6)
    np.testing.assert_allclose(tensors["classifier.weight"], (kernel * scale[:, None]).T, rtol=1e-5)
    np.testing.assert_allclose(tensors["classifier.bias"], bias - (mean * scale) @ kernel, rtol=1e-4, atol=1e-5)


def test_fixed_positions_are_among_the_tensors(pretrained, tmp_path):
    tensors = tensors_of(exported(pretrained, "huggingface", tmp_path / "out"))
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        found = tensors[name]
        assert not found[:, 0].any(), "cls has none"
        np.testing.assert_array_equal(found[0, 1:], sincos_positions((4, 4), found.shape[-1]))


# The same numbers in transformers


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def load(folder, model_class, **options):
    """A model, all of whose tensors are in `folder`, and no others."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    return model.eval()


def theirs(model, images, **others):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), **others)


@pytest.mark.parametrize("kind", ["mean", "cls"])
def test_features_for_neighbours_are_those_of_transformers(kind, pretrained, transformers, tmp_path, tools):
    """All that the knn job looks at: features of 1003 and of 149 digits."""
    out = exported(pretrained, "huggingface", tmp_path / "out", "--part=encoder")
    model = load(out, transformers.ViTModel, add_pooling_layer=False)
    for split, count in (("train", 1003), ("test", 149)):
        images, _ = digits(split=split).read(np.arange(count))
        images = np.asarray(mae_jax.normalize(images, **mae_jax.load_config(pretrained).pixels))
        want, got = theirs(model, images).last_hidden_state.numpy(), tokens_of(pretrained, images)
        pooled = [x[:, 0] if kind == "cls" else x[:, 1:].mean(axis=1) for x in (got, want)]
        np.testing.assert_allclose(*pooled, atol=1e-4)


@of_runs("probed", "tuned")
def test_logits_are_those_of_transformers(run, transformers, tmp_path):
    out = exported(run, "huggingface", tmp_path / "out")
    kind = {"probed": "ViTForImageClassification", "tuned": "BeitForImageClassification"}[run.name]
    model = load(out, transformers.AutoModelForImageClassification)
    assert type(model).__name__ == kind
    images = images_of(run, 149)
    np.testing.assert_allclose(theirs(model, images).logits.numpy(), logits_of(run, images), atol=1e-4)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    assert model.config.label2id == {str(i): i for i in range(10)}


def test_transformers_makes_pixels_as_in_training(pretrained, transformers, tmp_path):
    out = exported(pretrained, "huggingface", tmp_path / "out")
    images, _ = digits(split="test").read(np.arange(3))
    said = json.loads((out / "preprocessor_config.json").read_text())
    mean, std = np.float32(said["image_mean"]), np.float32(said["image_std"])
    np.testing.assert_allclose((images * said["rescale_factor"] - mean) / std, images_of(pretrained, 3), atol=1e-5)
    try:
        processor = transformers.ViTImageProcessor.from_pretrained(out)
        pictures = [Image.fromarray(image[..., 0]) for image in images]
        pixels = processor(pictures, return_tensors="np", input_data_format="channels_last").pixel_values
    except (ImportError, ValueError) as error:
        pytest.skip(f"no image processor here: {error}")
    np.testing.assert_allclose(pixels.transpose(0, 2, 3, 1), images_of(pretrained, 3), atol=1e-5)


def test_pretraining_goes_on_in_transformers_with_the_same_loss(pretrained, transformers, tmp_path):
    """Before and after one step of gradient descent, with the same images and the same noise."""
    import torch

    model = load(exported(pretrained, "huggingface", tmp_path / "out"), transformers.ViTMAEForPreTraining).train()
    images = images_of(pretrained, 16)
    noise = np.random.default_rng(0).random((16, 16), np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    fixed = (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed)
    for positions in fixed:  # which they are no longer in a model that was loaded, in transformers 5.23
        positions.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.005)
    want = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(pixels, noise=torch.from_numpy(noise)).loss
        loss.backward()
        optimizer.step()
        want.append(loss.item())

    config = mae_jax.load_config(pretrained)
    ours, params = mae_jax.load(pretrained)
    mask = masking.from_scores(noise, config.mask.ratio)
    encoded = targets.make(config.encoder.patch_size, **config.target).encode(images)

    @jax.jit
    def loss_of(params):
        pred = ours.apply({"params": params}, images, mask)
        return losses.mse(pred, masking.take(encoded, mask.hidden)).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    stepped = loss_of(jax.tree.map(lambda p, g: p - 0.005 * g, params, gradients))
    assert want[1] < want[0]
    assert want == pytest.approx([float(loss), float(stepped)], rel=1e-5)


# What else is written


def test_the_original_code_reads_its_own_names(pretrained, tmp_path):
    torch = pytest.importorskip("torch")
    held = torch.load(exported(pretrained, "original", tmp_path / "out.pth"), weights_only=True)
    assert list(held) == ["model"]
    model = held["model"]
    around = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight"}
    around |= {"patch_embed.proj.bias", "norm.weight", "norm.bias", "decoder_embed.weight", "decoder_embed.bias"}
    around |= {"decoder_norm.weight", "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias"}
    parts = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2") for kind in ("weight", "bias")]
    parts += [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    config = mae_jax.load_config(pretrained)
    blocks = {f"blocks.{i}.{part}" for i in range(config.encoder.depth) for part in parts}
    blocks |= {f"decoder_blocks.{i}.{part}" for i in range(config.decoder.depth) for part in parts}
    assert {*model} == around | blocks
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in model.values())


def test_timm_is_told_which_model(tuned, tmp_path, capsys):
    exported(tuned, "timm", tmp_path / "out.safetensors")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("for  "))
    options = eval(line.split(maxsplit=1)[1], {"VisionTransformer": dict})
    width, depth, heads = (mae_jax.load_config(tuned).encoder[key] for key in ("width", "depth", "heads"))
    assert options == {
        **{"img_size": (8, 8), "patch_size": 2, "in_chans": 1, "embed_dim": width, "depth": depth, "num_heads": heads},
        **{"mlp_ratio": 4.0, "num_classes": 10, "global_pool": "avg", "fc_norm": True},
    }
    tensors = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert "fc_norm.weight" in tensors and "norm.weight" not in tensors


def test_timm_has_no_decoder(pretrained, tmp_path):
    tensors = safetensors.numpy.load_file(exported(pretrained, "timm", tmp_path / "out.safetensors"))
    assert not [name for name in tensors if name.startswith(("decoder", "mask"))]
    assert "norm.weight" in tensors


@of_runs(*RUNS)
def test_arrays_by_their_names_here(run, tmp_path, tools):
    with np.load(exported(run, "npz", tmp_path / "out.npz")) as file:
        found = dict(file)
    step = {"pretrained": 80, "probed": 100, "tuned": 20}[run.name]
    state = tools.state_of(run, step)
    want = tools.part_of(state, "params/") | tools.part_of(state, "ema/") | tools.part_of(state, "stats/")
    tools.assert_equal(found, want)


def test_the_card_says_what_the_model_is_and_how_good(probed, tmp_path, tools):
    out = exported(probed, "huggingface", tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    top1 = tools.read_json(probed / "results.json")["top1"]
    for words in (
        *("# ViTForImageClassification, exported by mae_jax", "8x8, 1 channel(s), patches of 2", "digits train[:1003]"),
        *("100 steps of 64 images", f"{top1:.4g}", "AutoModelForImageClassification.from_pretrained("),
    ):
        assert words in card
    assert str(probed.parent) not in card, "nobody's folders"


@pytest.mark.parametrize("kind", ["huggingface", "timm"])
def test_what_was_imported_is_exported_without_training_steps(kind, pretrained, tmp_path):
    back = imported(exported(pretrained, "huggingface", tmp_path / "out"), tmp_path / "back")
    again = exported(back, kind, tmp_path / "again")
    if kind == "huggingface":
        card = (again / "README.md").read_text()
        assert "imported from out" in card and "steps" not in card
        assert (again / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


def test_a_training_run_that_began_with_an_import(pretrained, tmp_path, tools):
    back = imported(exported(pretrained, "huggingface", tmp_path / "out"), tmp_path / "back")
    flags = (f"--config.init={back}", "--config.train.steps=2")
    assert tools.run("finetune", tmp_path / "tuned", *flags) == 0
    card = (exported(tmp_path / "tuned", "huggingface", tmp_path / "again") / "README.md").read_text()
    assert "2 steps of 64 images" in card


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--checkpoint is missing; usage: mae-jax export --checkpoint=... --format=... --out=..."]),
        (("--checkpoint=x", "--format=npz"), ["--out is missing"]),
        (
            ("--checkpoint=x", "--format=hugginface", "--part=encodr", "--out=x"),
            [
                "--format=hugginface: no such format; use one of huggingface, original, timm, npz, ",
                "--part=encodr: no such part; use one of all, encoder; did you mean encoder?",
            ],
        ),
        (
            ("--checkpoint=x", "--format=npz", "--out=x", "--parts=all"),
            ["--parts=all: no such flag; did you mean --part?"],
        ),
    ],
)
def test_flags_that_are_wrong_are_told_all_together(flags, words, tools, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(tools.refused(capsys, main(["export", *flags]), 2, *words)) == len(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["huggingface", "timm", "npz", "stablehlo"])
@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_already_stays(kind, there, pretrained, tmp_path, tools, capsys):
    out = tmp_path / "out"
    (out if there == "file" else tmp_path / "out" / "x").parent.mkdir(exist_ok=True)
    (out if there == "file" else out / "x").write_text("old")
    code = main(["export", f"--checkpoint={pretrained}", f"--format={kind}", f"--out={out}"])
    tools.refused(capsys, code, 2, f"{out}: is there already; name another, or delete it")
    assert (out if there == "file" else out / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["huggingface", "timm", "original", "npz", "stablehlo"])
def test_no_checkpoint_is_one_line(kind, tmp_path, tools, capsys):
    code = main(["export", f"--checkpoint={tmp_path}/x", f"--format={kind}", f"--out={tmp_path}/out"])
    tools.refused(capsys, code, 4, f"{tmp_path}/x: no checkpoint here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), CheckpointError("no")])
def test_what_fails_while_writing_leaves_nothing(error, pretrained, tmp_path, tools, monkeypatch, capsys):
    def fail(path, value):
        path.write_text("{")
        raise error

    monkeypatch.setattr(export, "write_json", fail)
    code = main(["export", f"--checkpoint={pretrained}", "--format=huggingface", f"--out={tmp_path}/out"])
    assert code == {OSError: 2, KeyboardInterrupt: 130, CheckpointError: 4}[type(error)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["~nosuchuser/out", "x" * 300])
@pytest.mark.parametrize("flag", ["out", "checkpoint"])
def test_paths_that_cannot_be_are_one_line(flag, path, pretrained, tmp_path, tools, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"checkpoint": pretrained, "format": "npz", "out": tmp_path / "out", flag: path}
    code = main(["export", *(f"--{key}={value}" for key, value in flags.items())])
    tools.refused(capsys, code, 2 if flag == "out" else 4, path)
    assert list(tmp_path.iterdir()) == []


def test_without_pytorch_one_line_names_the_extra(pretrained, tmp_path, tools, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code = main(["export", f"--checkpoint={pretrained}", "--format=original", f"--out={tmp_path}/out.pth"])
    (line,) = tools.refused(capsys, code, 2, 'by PyTorch, which is not installed: pip install "mae_jax[torch]"')
    assert list(tmp_path.iterdir()) == [], line


def test_hugging_face_has_no_encoder_without_a_norm(tuned, tmp_path, tools, capsys):
    arguments = (f"--checkpoint={tuned}", "--format=huggingface", "--part=encoder", f"--out={tmp_path}/out")
    tools.refused(capsys, main(["export", *arguments]), 4, "Hugging Face has no encoder without a final norm; export")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def classifier_config():
    """Of a classifier of digits; what it is made of is still to be changed."""
    return finetune.check(load_recipe("configs/finetune.py:digits,scratch,tiny")[0])[0]


def write_random(workdir, config, **settings):
    """A checkpoint of step 1 of a classifier with these settings of head and encoder, nothing in it 0 or 1."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(settings)
    params, stats = jax.eval_shape(lambda: classification.init(classification.build(config), config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    state = State(
        np.int32(1),
        opt_state=(),
        params=jax.tree.map(draw, params),
        stats=jax.tree.map(draw, stats),
        ema={},
        norm=np.float32(0),
    )
    checkpoints = Checkpoints(workdir, to_json(config))
    checkpoints.save(state, 1)
    checkpoints.close()
    return workdir


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_any_classifier_is_the_same_elsewhere_or_refused(
    pool, norm, final_norm, classifier_config, tmp_path, tools, capsys
):
    settings = {"head.pool": pool, "head.norm": norm, "encoder.final_norm": final_norm}
    run = write_random(tmp_path / "run", classifier_config, **settings)
    images = images_of(run)
    want = logits_of(run, images)
    wrong = []
    for kind, name, flags in (("huggingface", "out", ()), ("timm", "out.safetensors", ("--heads=2",))):
        capsys.readouterr()
        code = main(["export", f"--checkpoint={run}", f"--format={kind}", f"--out={tmp_path}/{name}"])
        if code:
            tools.refused(capsys, code, 4)
            continue
        back = tmp_path / f"back_{kind}"
        if main(["import", f"--from={tmp_path}/{name}", f"--workdir={back}", *flags]):
            wrong.append(f"{kind}: {capsys.readouterr().err}")
        elif np.abs(logits_of(back, images) - want).max() > 1e-4:
            told = capsys.readouterr().out.splitlines()
            wrong += [f"{kind}: another function"] * (not any("note " in line and "cls" in line for line in told))
    assert not wrong


@pytest.mark.parametrize("kind", [kind for kind in POSITIONS if kind not in ("sincos", "learned")])
def test_positions_that_others_have_no_table_for_are_refused_there_and_run_alone(
    kind, classifier_config, tmp_path, tools, capsys
):
    run = write_random(tmp_path / "run", classifier_config, **{"encoder.positions": kind})
    images = images_of(run)
    if kind == "none":  # a table of zeros
        exported(run, "timm", tmp_path / "out.safetensors")
        back = imported(tmp_path / "out.safetensors", tmp_path / "back", "--heads=2")
        np.testing.assert_allclose(logits_of(back, images), logits_of(run, images), rtol=0, atol=1e-4)
    else:
        for world in ("huggingface", "timm", "original"):
            code = main(["export", f"--checkpoint={run}", f"--format={world}", f"--out={tmp_path}/out"])
            tools.refused(capsys, code, 4, f"its encoder has {kind} positions; export as npz or stablehlo")
    forward = jax.export.deserialize(bytearray(exported(run, "stablehlo", tmp_path / "file").read_bytes()))
    np.testing.assert_allclose(forward.call(images), logits_of(run, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "cross"}, "kind cross"),
        ({"mask_tokens": "encoder", "depth": 0}, "mask_tokens encoder, depth 0"),
        ({"positions": "rotary"}, "positions rotary"),
    ],
)
def test_decoders_that_others_do_not_have_stay_here(changes, words, tmp_path, tools, capsys):
    config, _, _ = pretrain.check(load_recipe("configs/pretrain.py:digits,tiny")[0])
    config.decoder.update(changes)
    model, _ = models.build(config)
    params = jax.jit(lambda: models.init(model, config, jax.random.key(0)))()
    checkpoints = Checkpoints(tmp_path / "run", to_json(config))
    checkpoints.save(State(np.int32(1), opt_state=(), params=params, stats={}, ema={}, norm=np.float32(0)), 1)
    checkpoints.close()
    for world in ("huggingface", "original"):
        code = main(["export", f"--checkpoint={tmp_path}/run", f"--format={world}", f"--out={tmp_path}/out"])
        tools.refused(capsys, code, 4, f"its decoder has {words}; export --part=encoder, or as npz")
    tensors = safetensors.numpy.load_file(exported(tmp_path / "run", "timm", tmp_path / "out.safetensors"))
    assert not [name for name in tensors if name.startswith(("decoder", "mask"))]
    with np.load(exported(tmp_path / "run", "npz", tmp_path / "out.npz")) as file:
        assert ("mask_token" in file) == (changes.get("mask_tokens") == "encoder")
