"""Folders of Hugging Face's: what transformers computes from one is computed here, and one comes back as it was."""

import copy
import json
import os
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import mae_jax
from mae_jax.interchange.huggingface import DEFAULTS, describe, pixels_of
from mae_jax.jobs import classification
from mae_jax.model import losses, masking, targets
from mae_jax.model.masking import Mask
from mae_jax.model.patches import grid_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS, IMAGE = "MAE_JAX_HF_VIT_MAE_BASE", "MAE_JAX_HF_TEST_IMAGE"
POSITIONS = {"encoder": "vit.embeddings.position_embeddings", "decoder": "decoder.decoder_pos_embed"}


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def export(worlds, workdir, out, *flags):
    arguments = [f"--checkpoint={workdir}", "--format=huggingface", f"--out={out}", *flags]
    assert worlds.main(["export", *arguments]) == 0
    return out


# There and back


@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_an_autoencoder_comes_back_to_the_bit(case, positions, worlds, tmp_path):
    tensors = worlds.draw(worlds.hugging_face_shapes(case, "ViTMAEForPreTraining"))
    if positions == "fixed":
        for part, name in POSITIONS.items():
            tensors[name] = worlds.fixed_positions(case, case[part]["width"])
    worlds.write_hugging_face(tmp_path / "theirs", case, "ViTMAEForPreTraining", tensors)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    held = {name for name in worlds.names_in(workdir) if name.endswith("positions")}
    assert held == (set() if positions == "fixed" else {"encoder/positions", "decoder/positions"})
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), tensors)


@pytest.mark.parametrize("name", ["tiny", "rectangular", "one_channel"])
def test_every_architecture_comes_back_to_the_bit_with_its_config(architecture, name, worlds, tmp_path):
    case = worlds.cases[name]
    tensors = worlds.write_hugging_face(tmp_path / "theirs", case, architecture)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    back = export(worlds, workdir, tmp_path / "back")
    worlds.assert_bits(tensors_of(back), tensors)
    got = json.loads((back / "config.json").read_text())
    want = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if architecture == "ViTMAEModel":  # its encoder is a ViTModel without a pooler
        want |= {"architectures": ["ViTModel"], "model_type": "vit"}
    assert {key: got[key] for key in want} == want


def test_every_bit_pattern_comes_back(worlds, tmp_path):
    tensors = worlds.draw(worlds.hugging_face_shapes(worlds.cases["tiny"], "ViTMAEForPreTraining"))
    bits = np.random.default_rng(0)
    tensors = {n: bits.integers(0, 2**32, x.shape, np.uint32).view(np.float32) for n, x in tensors.items()}
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["tiny"], "ViTMAEForPreTraining", tensors)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), tensors)


def test_a_preprocessor_without_sense_is_not_heard():
    said = {"image_mean": [0.5], "image_std": [0.5]}
    assert pixels_of(said, 1, "vit")[1]
    for wrong in ({"rescale_factor": 0}, {"rescale_factor": 10**400}, {"image_mean": [float("nan")]}):
        assert not pixels_of(said | wrong, 1, "vit")[1]


def test_what_a_preprocessor_says_comes_back(worlds, tmp_path):
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["tiny"], "ViTModel")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 8, "width": 8}}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(said))
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    assert mae_jax.load_config(workdir).pixels.to_dict() == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    back = json.loads((export(worlds, workdir, tmp_path / "back") / "preprocessor_config.json").read_text())
    assert {key: back[key] for key in said} == said
    assert (back["do_rescale"], back["rescale_factor"], back["do_normalize"]) == (True, 1 / 255, True)


@pytest.mark.parametrize(
    ("architecture", "name", "mean", "std"),
    [
        ("ViTMAEForPreTraining", "tiny", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("ViTModel", "tiny", [0.5] * 3, [0.5] * 3),
        ("ViTModel", "one_channel", [0.5], [0.5]),
    ],
)
def test_without_a_preprocessor_an_assumption_is_told(architecture, name, mean, std, worlds, tmp_path, capsys):
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases[name], architecture)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    assert mae_jax.load_config(workdir).pixels.to_dict() == {"mean": mean, "std": std}
    assert f"note        pixels are normalised by mean {tuple(mean)} and std {tuple(std)}" in capsys.readouterr().out


# What is read


def test_names_in_memory_are_read_too(worlds, tmp_path):
    case = worlds.cases["tiny"]
    tensors = worlds.write_hugging_face(tmp_path / "files", case, "ViTMAEForPreTraining")
    replaced = {
        "vit.encoder.layer.": "vit.layers.",
        "decoder.decoder_encoder.layer.": "decoder.decoder_layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    modern = {}
    for name, value in tensors.items():
        for old, new in replaced.items():
            name = name.replace(old, new)
        modern[name] = value
    assert "vit.layers.0.attention.q_proj.weight" in modern and "decoder.decoder_layers.0.mlp.fc2.bias" in modern
    worlds.write_hugging_face(tmp_path / "memory", case, "ViTMAEForPreTraining", modern)
    workdir = worlds.import_(tmp_path / "memory", tmp_path / "ours")
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), tensors)


def test_several_files_are_read_as_one(worlds, tmp_path):
    case, folder = worlds.cases["tiny"], tmp_path / "theirs"
    tensors = worlds.write_hugging_face(folder, case, "ViTForImageClassification")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in {*files.values()}:
        safetensors.numpy.save_file({n: tensors[n] for n in tensors if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    workdir = worlds.import_(folder, tmp_path / "ours")
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, worlds, tmp_path):
    case = worlds.cases["one_channel"]
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    tensors = {n: x.astype(kind) for n, x in worlds.draw(worlds.hugging_face_shapes(case, "ViTModel")).items()}
    worlds.write_hugging_face(tmp_path / "theirs", case, "ViTModel", tensors, dtype=dtype)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    want = {name: x.astype(np.float32) for name, x in tensors.items()}
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), want)


def test_the_folder_itself_gives_an_encoder(architecture, worlds, tmp_path):
    case = worlds.cases["rectangular"]
    worlds.write_hugging_face(tmp_path / "theirs", case, architecture)
    encoder, params = mae_jax.load_encoder(tmp_path / "theirs")
    again, same = mae_jax.load_encoder(worlds.import_(tmp_path / "theirs", tmp_path / "ours"))
    assert encoder == again.clone(**{key: getattr(encoder, key) for key in ("positions", "drop_path", "dtype")})
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def test_what_a_config_leaves_out_is_as_in_transformers(transformers):
    for name in ("ViTMAEConfig", "ViTConfig", "BeitConfig"):
        theirs = getattr(transformers, name)().to_dict()
        differ = {key: (value, theirs[key]) for key, value in DEFAULTS.items() if theirs.get(key, value) != value}
        assert not differ, name
    config, _ = describe({"architectures": ["ViTForImageClassification"]}, "config.json")
    assert config["classes"] == tuple(transformers.ViTConfig().id2label.values())


# The same numbers as transformers


def load(transformers, architecture, folder):
    """A model, all of whose tensors are in `folder`, and no others."""
    options = {"add_pooling_layer": False} if architecture == "ViTModel" else {}
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True, **options)
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith("pooler.")}
    assert not (info["missing_keys"] or unexpected or info["mismatched_keys"]), info
    return model.eval()


def load_autoencoder(folder, grid, monkeypatch):
    """As `load`, of images that need not be square: positions are drawn for that grid, and a check is left out."""
    import transformers
    from transformers.models.vit_mae import modeling_vit_mae

    table = modeling_vit_mae.build_2d_sinusoidal_position_embedding
    of_this_grid = lambda height, width, **others: table(height=grid[0], width=grid[1], **others)  # noqa: E731
    monkeypatch.setattr(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", of_this_grid)
    model = load(transformers, "ViTMAEForPreTraining", folder)
    patchify = type(model).patchify
    model.patchify = lambda pixels, **_: patchify(model, pixels, interpolate_pos_encoding=True)
    return model


def theirs(model, images, **others):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), **others)


@pytest.mark.parametrize(("norm_pix_loss", "epsilon"), [(False, 1e-12), (True, 1e-6)])
def test_loss_and_predictions_are_those_of_transformers(
    case, norm_pix_loss, epsilon, worlds, transformers, tmp_path, monkeypatch
):
    import torch

    others = {"norm_pix_loss": norm_pix_loss, "layer_norm_eps": epsilon, "mask_ratio": 0.6}
    worlds.write_hugging_face(tmp_path / "theirs", case, "ViTMAEForPreTraining", **others)
    noise, images = worlds.noise_and_images(case, 8)
    grid = grid_of(case["image_size"], case["patch"])
    reference = load_autoencoder(tmp_path / "theirs", grid, monkeypatch)
    want = theirs(reference, images, noise=torch.from_numpy(noise))

    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    config = mae_jax.load_config(workdir)
    assert config.mask.ratio == 0.6
    model, params = mae_jax.load(workdir)
    mask = worlds.mask_of(noise, config.mask.ratio)
    predictions = jax.jit(lambda p: model.apply({"params": p}, images, mask, every_patch=True))(params)
    encoded = targets.make(case["patch"], **config.target).encode(images)
    loss = losses.mse(masking.take(predictions, mask.hidden), masking.take(encoded, mask.hidden)).mean()

    np.testing.assert_array_equal(mask.removed, want.mask.numpy())
    np.testing.assert_allclose(predictions, want.logits.numpy(), atol=1e-4)
    assert float(loss) == pytest.approx(float(want.loss), abs=1e-4)


@pytest.mark.parametrize("name", ["tiny", "rectangular", "one_channel"])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "BeitForImageClassification"])
def test_features_and_logits_are_those_of_transformers(kind, name, worlds, transformers, tmp_path):
    if kind.startswith("Beit") and name == "rectangular":
        name = "tiny"
    case = worlds.cases[name]
    worlds.write_hugging_face(tmp_path / "theirs", case, kind)
    _, images = worlds.noise_and_images(case, 8)
    want = theirs(load(transformers, kind, tmp_path / "theirs"), images, output_hidden_states=True)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    encoder, params = mae_jax.load_encoder(workdir)
    got = jax.jit(encoder.apply)({"params": params}, images)
    if kind == "ViTModel":
        np.testing.assert_allclose(got, want.last_hidden_state.numpy(), atol=1e-4)
        return
    if kind.startswith("Beit"):
        np.testing.assert_allclose(got, want.hidden_states[-1].numpy(), atol=1e-4)
    model, config, variables = classification.load(workdir)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), want.logits.numpy(), atol=1e-4)
    assert tuple(config.classes) == tuple(f"class {c}" for c in "edcba")


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "BeitForImageClassification"])
def test_the_epsilon_of_norms_counts_where_tokens_hardly_vary(kind, worlds, transformers, tmp_path):
    case = worlds.cases["tiny"]
    tensors = worlds.draw(worlds.hugging_face_shapes(case, kind))
    tensors = {n: x * np.float32(3e-4) if "embeddings" in n else x for n, x in tensors.items()}
    worlds.write_hugging_face(tmp_path / "theirs", case, kind, tensors, layer_norm_eps=1e-12)
    worlds.write_hugging_face(tmp_path / "usual", case, kind, tensors, layer_norm_eps=1e-6)
    _, images = worlds.noise_and_images(case, 8)
    want, other = (theirs(load(transformers, kind, tmp_path / name), images)[0].numpy() for name in ("theirs", "usual"))
    assert np.abs(want - other).max() > 0.1, "it does count"
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    if kind == "ViTModel":
        encoder, params = mae_jax.load_encoder(workdir)
        got = jax.jit(encoder.apply)({"params": params}, images)
    else:
        model, _, variables = classification.load(workdir)
        got = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_transformers_itself_writes_is_read(architecture, worlds, transformers, tmp_path):
    case = worlds.cases["tiny"]
    model_class = getattr(transformers, architecture)
    said = worlds.settings(case, architecture)
    model_class(model_class.config_class(**said)).save_pretrained(tmp_path / "theirs")
    written = tensors_of(tmp_path / "theirs")
    assert {n: x.shape for n, x in written.items()} == worlds.hugging_face_shapes(case, architecture)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), written)


def test_a_folder_with_a_file_of_pytorchs(worlds, transformers, tmp_path):
    import torch

    folder = tmp_path / "theirs"
    tensors = worlds.write_hugging_face(folder, worlds.cases["tiny"], "ViTModel")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, folder / "pytorch_model.bin")
    workdir = worlds.import_(folder, tmp_path / "ours")
    worlds.assert_bits(tensors_of(export(worlds, workdir, tmp_path / "back")), tensors)


def test_the_published_model_gives_the_published_numbers(worlds, tmp_path):
    """transformers' own integration test, without transformers."""
    folder, picture = os.environ.get(WEIGHTS), os.environ.get(IMAGE)
    if not (folder and picture):
        pytest.skip(f"{WEIGHTS} names no folder of facebook/vit-mae-base, or {IMAGE} no COCO/000000039769.png")
    with open("tests/golden/vit_mae_base.json") as file:
        published = json.load(file)
    workdir = worlds.import_(folder, tmp_path / "ours")
    config = mae_jax.load_config(workdir)
    model, params = mae_jax.load(workdir)
    with Image.open(picture) as image:
        image = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    images = mae_jax.normalize(np.asarray(image)[None], **config.pixels)
    order = np.argsort(np.random.RandomState(published["seed"]).uniform(size=(1, 196)), axis=1)
    mask = Mask(visible=order[:, :49], hidden=order[:, 49:])
    logits = np.asarray(jax.jit(lambda p: model.apply({"params": p}, images, mask, every_patch=True))(params))
    assert logits.shape == tuple(published["shape"])
    tolerance = published["tolerance"]
    np.testing.assert_allclose(logits[0, :3, :3], published["logits"], rtol=tolerance, atol=tolerance)


# Of a large model


MEASURED = """
import sys
from importlib import import_module
from mae_jax.__main__ import main
from mae_jax.model import native

job, *arguments = sys.argv[1:]
import_module("mae_jax.jobs." + job + "_" * (job == "import"))
import safetensors.numpy, orbax.checkpoint, jax
jax.block_until_ready(jax.numpy.zeros(1))

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

before = status("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
code = main([job, *arguments])
print("PEAK", status("VmHWM:") - before)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory is told here")
def test_memory_is_no_more_than_twice_the_parameters(worlds, tmp_path):
    tensors = worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["vit_l16"], "ViTMAEForPreTraining")
    size = sum(x.nbytes for x in tensors.values())
    del tensors
    for job, arguments in {
        "import": [f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"],
        "export": [f"--checkpoint={tmp_path}/ours", "--format=huggingface", f"--out={tmp_path}/back"],
    }.items():
        command = [sys.executable, "-c", MEASURED, job, *arguments]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("PEAK ")[1])
        print(f"{job}: {time.time() - began:.1f} s, {peak / size:.2f} times the {size / 1e9:.2f} GB of parameters")
        assert peak <= 2 * size, f"{job}: {peak / size:.2f} times the parameters"
    back, theirs = (folder / "model.safetensors" for folder in (tmp_path / "back", tmp_path / "theirs"))
    with safetensors.safe_open(back, "np") as got, safetensors.safe_open(theirs, "np") as want:
        for name in want.keys():  # noqa: SIM118
            assert got.get_tensor(name).tobytes() == want.get_tensor(name).tobytes(), name


# What is refused: one line for each thing that is wrong, and nothing is left behind


@pytest.fixture
def attempt(worlds, tmp_path, capsys):
    """A function: import a folder like a good one but for its tensors and settings, and hand back what is told."""

    def import_changed(expected, *words, change=None, architecture="ViTMAEForPreTraining", **others):
        case = worlds.cases["rectangular"]
        tensors = worlds.draw(worlds.hugging_face_shapes(case, architecture))
        if change:
            change(tensors)
        worlds.write_hugging_face(tmp_path / "theirs", case, architecture, tensors, **others)
        capsys.readouterr()
        code = worlds.main(["import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"])
        lines = worlds.refused(capsys, code, expected, *words)
        assert [p.name for p in tmp_path.iterdir()] == ["theirs"]
        return [line.partition("theirs/")[2] for line in lines]

    return import_changed


@pytest.mark.parametrize(
    "kind", ["ResNetForImageClassification", "SwinModel", "BertModel", "ViTForMaskedImageModeling"]
)
def test_another_architecture(kind, attempt):
    (line,) = attempt(4, f"config.json: architecture {kind}; what can be read is ViTMAEForPr", architectures=[kind])
    assert line.startswith("config.json")


def test_no_architecture(attempt):
    attempt(4, "config.json: architecture none; what can be read is ", architectures=None, model_type="bert")


def test_an_architecture_that_is_left_out_is_told_by_the_tensors(worlds, tmp_path):
    """What older files have is a model_type alone."""
    for architecture in ("ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "ViTForImageClassification"):
        folder = tmp_path / architecture
        worlds.write_hugging_face(folder, worlds.cases["tiny"], architecture)
        settings = json.loads((folder / "config.json").read_text())
        said, _ = describe(settings, "config.json")
        del settings["architectures"]
        present = safetensors.numpy.load_file(folder / "model.safetensors")
        assert describe(settings, "config.json", present)[0] == said


def test_tensors_of_another_architecture_than_the_config_says(attempt):
    def change(tensors):
        tensors.clear()
        tensors["resnet.embedder.embedder.convolution.weight"] = np.zeros((64, 3, 7, 7), np.float32)

    lines = attempt(4, "unused: resnet.embedder.embedder.convolution.weight (64, 3, 7, 7)", change=change)
    assert "model.safetensors: missing: vit.embeddings.cls_token (1, 1, 24)" in lines


def test_all_that_is_missing_unused_and_misshapen_is_named(attempt):
    def change(tensors):
        del tensors["vit.encoder.layer.1.attention.attention.key.weight"], tensors["decoder.mask_token"]
        tensors["vit.encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)
        tensors["decoder.decoder_pred.weight"] = np.zeros((12, 16), np.float32)
        tensors["vit.layernorm.bias"] = np.zeros((24, 1), np.float32)

    lines = attempt(4, change=change)
    assert sorted(lines, key=lambda line: line.split()[2]) == [
        "model.safetensors: misshapen: decoder.decoder_pred.weight is (12, 16), not (48, 16)",
        "model.safetensors: missing: decoder.mask_token (1, 1, 16)",
        "model.safetensors: missing: vit.encoder.layer.1.attention.attention.key.weight (24, 24)",
        "model.safetensors: unused: vit.encoder.layer.2.output.dense.bias (24,)",
        "model.safetensors: misshapen: vit.layernorm.bias is (24, 1), not (24,)",
    ]


def test_a_config_of_another_size_names_what_does_not_fit(attempt):
    lines = attempt(4, num_hidden_layers=1, image_size=[16, 16])
    assert "model.safetensors: misshapen: vit.embeddings.position_embeddings is (1, 25, 24), not (1, 17, 24)" in lines
    assert sum("unused: vit.encoder.layer.1." in line for line in lines) == 16


def test_a_real_beit_is_none_that_can_be_read(attempt):
    def change(tensors):
        del tensors["beit.embeddings.position_embeddings"]
        tensors["beit.encoder.layer.0.lambda_1"] = np.ones(24, np.float32)

    lines = attempt(4, change=change, architecture="BeitForImageClassification")
    assert len(lines) == 2
    assert any("unused: beit.encoder.layer.0.lambda_1" in line for line in lines)
    assert any("missing: beit.embeddings.position_embeddings" in line for line in lines)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"hidden_act": "gelu_new"}, "config.json: hidden_act 'gelu_new'; only gelu can be read"),
        ({"patch_size": [4, 2]}, "config.json: patches of [4, 2]; only square ones can be read"),
        ({"num_attention_heads": 5}, "its sizes do not fit together"),
        ({"decoder_num_attention_heads": 3}, "its sizes do not fit together"),
        ({"image_size": [18, 24]}, "its sizes do not fit together"),
        ({"image_size": [16, 24, 3]}, "image_size is [16, 24, 3], not a number above 0"),
        ({"hidden_size": "wide"}, "theirs/"),
        ({"hidden_size": 0}, "theirs/"),
        ({"patch_size": 0}, "theirs/"),
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers is 1000000000000, not a number above 0 and below ",
        ),
        ({"num_hidden_layers": 10**9}, "its encoder would be 1000000000 blocks of width 24"),
        ({"decoder_num_hidden_layers": 10**9}, "its decoder would be 1000000000 blocks of width 16"),
        ({"image_size": 16 * 10**9}, "image_size is 16000000000, not"),
        ({"image_size": 10**9}, "for 1000000000x1000000000 pixels in patches of 4: too many for a file of "),
        ({"hidden_size": 2**30}, "of width 1073741824"),
        ({"intermediate_size": 10**400}, "intermediate_size is 1000000"),
        ({"patch_size": 2**30, "image_size": 2**30}, "in patches of 1073741824"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"id2label": {"²": "x"}}, "id2label is no table from numbers to names"),
    ],
    ids=str,
)
def test_settings_that_no_model_can_have(others, words, attempt):
    attempt(4, words, **others)


def test_a_width_that_fixed_positions_cannot_have(worlds, tmp_path, capsys):
    case = copy.deepcopy(worlds.cases["tiny"])
    case["encoder"]["width"] = 18
    worlds.write_hugging_face(tmp_path / "theirs", case, "ViTModel")
    capsys.readouterr()
    code = worlds.main(["import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"])
    worlds.refused(capsys, code, 4, "18")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 200_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_json_file(name, text, worlds, tmp_path, capsys):
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["tiny"], "ViTModel")
    (tmp_path / "theirs" / name).write_text(text)
    code = worlds.main(["import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"])
    (line,) = worlds.refused(capsys, code, 4, f"{tmp_path}/theirs/{name}: ")
    assert not (tmp_path / "ours").exists(), line


def test_a_folder_without_a_config(worlds, tmp_path, capsys):
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["tiny"], "ViTModel")
    (tmp_path / "theirs" / "config.json").unlink()
    code = worlds.main(["import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"])
    (line,) = worlds.refused(capsys, code, 4, "and no config.json beside it")
    assert "embeddings.cls_token" in line


def test_a_folder_without_tensors(worlds, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    code = worlds.main(["import", f"--from={tmp_path}/theirs", f"--workdir={tmp_path}/ours"])
    worlds.refused(capsys, code, 4, f"{tmp_path}/theirs: no model.safetensors, ")
