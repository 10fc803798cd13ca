"""Files of the original code and of timm: what is told from their tensors, what is asked for, and both ways."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import mae_jax
from mae_jax.__main__ import main
from mae_jax.errors import CheckpointError, ConfigError
from mae_jax.interchange import original
from mae_jax.jobs import classification

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
POSITIONS = {"encoder": "pos_embed", "decoder": "decoder_pos_embed"}


def random_weights(worlds, case, architecture="ViTMAEForPreTraining"):
    return worlds.as_original(worlds.draw(worlds.hugging_face_shapes(case, architecture)))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def write_pytorch(torch, path, tensors, **others):
    torch.save({"model": {name: torch.from_numpy(value) for name, value in tensors.items()}, **others}, path)


def export(worlds, workdir, kind, out, *flags):
    assert worlds.main(["export", f"--checkpoint={workdir}", f"--format={kind}", f"--out={out}", *flags]) == 0
    return out


# There and back


@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_a_checkpoint_of_the_original_code_comes_back_to_the_bit(case, positions, worlds, torch, tmp_path):
    tensors = random_weights(worlds, case)
    if positions == "fixed":
        for part, name in POSITIONS.items():
            tensors[name] = worlds.fixed_positions(case, case[part]["width"])
    write_pytorch(torch, tmp_path / "theirs.pth", tensors, epoch=799)
    workdir = worlds.import_(tmp_path / "theirs.pth", tmp_path / "ours", *worlds.flags_for(case))
    held = {name for name in worlds.names_in(workdir) if name.endswith("positions")}
    assert held == (set() if positions == "fixed" else {"encoder/positions", "decoder/positions"})
    back = torch.load(export(worlds, workdir, "original", tmp_path / "back.pth"), weights_only=True)["model"]
    worlds.assert_bits({name: value.numpy() for name, value in back.items()}, tensors)


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTForImageClassification", "BeitForImageClassification"])
def test_a_model_of_timms_comes_back_to_the_bit(case, kind, worlds, tmp_path):
    tensors = {n: x for n, x in random_weights(worlds, case, kind).items() if not n.startswith("pooler")}
    if kind == "ViTMAEModel":  # which has no prefix that could be renamed
        tensors = random_weights(worlds, case, "ViTForImageClassification")
        tensors = {n: x for n, x in tensors.items() if not n.startswith("head")}
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    flags = worlds.flags_for(case, decoder=False)
    workdir = worlds.import_(tmp_path / "theirs.safetensors", tmp_path / "ours", *flags)
    back = safetensors.numpy.load_file(export(worlds, workdir, "timm", tmp_path / "back.safetensors"))
    worlds.assert_bits(back, tensors)


def test_a_decoder_without_blocks_is_refused(worlds, torch, tmp_path, capsys):
    """The original's has an embedding, mask tokens and a norm, and cannot tell what is hidden; ours is one layer."""
    case = {**worlds.cases["tiny"], "decoder": {**worlds.cases["tiny"]["decoder"], "depth": 0}}
    write_pytorch(torch, tmp_path / "theirs.pth", random_weights(worlds, case))
    assert main(["import", f"--from={tmp_path}/theirs.pth", f"--workdir={tmp_path}/ours", "--heads=2"]) == 4
    assert "a linear head predicts patches from their own latents" in capsys.readouterr().err


def test_from_one_world_to_another(worlds, tmp_path):
    """The tensors of a folder of Hugging Face's, renamed, are those of a file of timm's."""
    case = worlds.cases["rectangular"]
    theirs = worlds.write_hugging_face(tmp_path / "theirs", case, "ViTForImageClassification", layer_norm_eps=1e-6)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    timm = safetensors.numpy.load_file(export(worlds, workdir, "timm", tmp_path / "timm.safetensors"))
    worlds.assert_bits(timm, worlds.as_original(theirs))
    workdir = worlds.import_(tmp_path / "timm.safetensors", tmp_path / "again", "--heads=4", "--image_size=16,24")
    back = export(worlds, workdir, "huggingface", tmp_path / "back")
    worlds.assert_bits(safetensors.numpy.load_file(back / "model.safetensors"), theirs)


def test_another_epsilon_is_not_lost_without_a_word(worlds, tmp_path, capsys):
    """timm and the original code have 1e-6 in their code and not in their files."""
    worlds.write_hugging_face(tmp_path / "theirs", worlds.cases["tiny"], "ViTModel", layer_norm_eps=1e-12)
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours")
    capsys.readouterr()
    code = worlds.main(["export", f"--checkpoint={workdir}", "--format=timm", f"--out={tmp_path}/x.safetensors"])
    told = capsys.readouterr()
    assert "1e-12" in (told.out if code == 0 else told.err)


# The same numbers


def test_an_autoencoder_computes_what_it_did_in_transformers(worlds, tmp_path):
    """Whose own script makes ViTMAEForPreTraining of the original: the two are one model under other names."""
    case = worlds.cases["rectangular"]
    theirs = worlds.write_hugging_face(tmp_path / "folder", case, "ViTMAEForPreTraining", layer_norm_eps=1e-6)
    safetensors.numpy.save_file(worlds.as_original(theirs), tmp_path / "file.safetensors")
    noise, images = worlds.noise_and_images(case, 2)
    found = []
    for source, flags in (("folder", []), ("file.safetensors", worlds.flags_for(case))):
        model, params = mae_jax.load(worlds.import_(tmp_path / source, tmp_path / f"{source}_ours", *flags))
        mask = worlds.mask_of(noise)
        found.append(jax.jit(lambda p, m=model, k=mask: m.apply({"params": p}, images, k, every_patch=True))(params))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_of_timms_pools_as_its_config_says(pool, worlds, tmp_path):
    """A folder of timm's on the hub. Without fc_norm: the norm, then the cls token or the mean of the others."""
    case = worlds.cases["tiny"]
    tensors = random_weights(worlds, case, "ViTForImageClassification")
    (tmp_path / "theirs").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    said = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "global_pool": pool}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(said))
    workdir = worlds.import_(tmp_path / "theirs", tmp_path / "ours", "--heads=2")
    _, images = worlds.noise_and_images(case, 8)
    encoder, params = mae_jax.load_encoder(workdir)
    tokens = np.asarray(jax.jit(encoder.apply)({"params": params}, images))
    pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(axis=1)
    want = pooled @ tensors["head.weight"].T + tensors["head.bias"]
    model, _, variables = classification.load(workdir)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), want, atol=1e-4)


def test_a_mean_without_a_norm_behind_it_does_not_become_another_model_without_a_word(worlds, tmp_path, capsys):
    """Tensors alone do not tell it from a classifier on the cls token."""
    case, folder = worlds.cases["tiny"], tmp_path / "theirs"
    tensors = random_weights(worlds, case, "ViTForImageClassification")
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"global_pool": "avg"}))
    workdir = worlds.import_(folder, tmp_path / "ours", "--heads=2")
    file = export(worlds, workdir, "timm", tmp_path / "back.safetensors")
    capsys.readouterr()
    worlds.import_(file, tmp_path / "again", "--heads=2")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert mae_jax.load_config(tmp_path / "again").head.pool == "mean" or any("cls" in note for note in notes)


# What a model is, told from its tensors


def published(worlds, width, depth, heads, patch, decoder=True):
    """Shapes of tensors as in the published files, mae_pretrain_vit_*_full.pth and, without a decoder, others."""
    case = {"image_size": (224, 224), "channels": 3, "patch": patch}
    case["encoder"] = {"width": width, "depth": depth, "heads": heads, "hidden": 4 * width}
    case["decoder"] = {"width": 512, "depth": 8, "heads": 16, "hidden": 2048}
    shapes = worlds.original_shapes(case)
    return {n: s for n, s in shapes.items() if decoder or not n.startswith(("decoder", "mask"))}


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch"),
    [(192, 12, 3, 16), (384, 12, 6, 16), (768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14)],
)
def test_sizes_of_vit_need_no_flags(width, depth, heads, patch, worlds):
    config = original.describe(published(worlds, width, depth, heads, patch), "runs/mae_pretrain_full.pth")
    assert config == {
        "image_size": (224, 224),
        "channels": 3,
        "encoder": {
            **{"patch_size": patch, "width": width, "depth": depth, "heads": heads, "mlp_ratio": 4.0},
            **{"positions": "learned", "epsilon": 1e-6},
        },
        "decoder": {
            **{"width": 512, "depth": 8, "heads": 16, "mlp_ratio": 4.0},
            **{"positions": "learned", "epsilon": 1e-6},
        },
        "target": {"name": "normalized_pixels"},
        "mask": {"name": "random", "ratio": 0.75},
    }
    config = original.describe(published(worlds, width, depth, heads, patch, decoder=False), "mae_pretrain.pth")
    assert config.keys() == {"image_size", "channels", "encoder"}


@pytest.mark.parametrize(
    ("where", "flag", "target"),
    [
        ("x/mae_pretrain_vit_base_full.pth", "", "normalized_pixels"),
        ("x/mae_visualize_vit_large.pth", "", "pixels"),
        ("x/mae_visualize_vit_large_ganloss.pth", "", "pixels"),
        ("mae_visualize_x/full.pth", "", "normalized_pixels"),
        ("x/mae_visualize_vit_large.pth", "normalized_pixels", "normalized_pixels"),
        ("x/mae_pretrain_vit_base_full.pth", "pixels", "pixels"),
    ],
)
def test_what_the_decoder_predicts_is_told_by_a_flag_or_the_published_names(where, flag, target, worlds):
    config = original.describe(published(worlds, 768, 12, 12, 16), where, target=flag)
    assert config["target"] == {"name": target}


@pytest.mark.parametrize(
    ("kind", "head", "final_norm"),
    [
        ("ViTForImageClassification", {"pool": "cls", "norm": "none"}, True),
        ("BeitForImageClassification", {"pool": "mean", "norm": "layer"}, False),
    ],
)
def test_a_classifier_takes_the_mean_where_a_norm_stands_before_its_head(kind, head, final_norm, worlds):
    config = original.describe(worlds.original_shapes(worlds.cases["tiny"], kind), "x.pth", heads=(2,))
    assert config["head"] == head
    assert config["encoder"]["final_norm"] is final_norm
    assert config["classes"] == ("0", "1", "2", "3", "4")


def test_pixels_are_imagenets(worlds, tmp_path, capsys):
    for name in ("tiny", "one_channel"):
        tensors = random_weights(worlds, worlds.cases[name], "ViTForImageClassification")
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
        flags = worlds.flags_for(worlds.cases[name], decoder=False)
        worlds.import_(tmp_path / f"{name}.safetensors", tmp_path / name, *flags)
        assert "note        pixels are normalised by mean " in capsys.readouterr().out
    assert mae_jax.load_config(tmp_path / "tiny").pixels.to_dict() == IMAGENET
    grey = mae_jax.load_config(tmp_path / "one_channel").pixels
    assert grey.mean == pytest.approx([0.449], abs=1e-3) and grey.std == pytest.approx([0.226], abs=1e-3)


def test_a_file_gives_an_encoder_with_what_it_does_not_say(worlds, tmp_path):
    case = worlds.cases["rectangular"]
    tensors = random_weights(worlds, case)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    encoder, params = mae_jax.load_encoder(tmp_path / "x.safetensors", heads=(4, 2), image_size=(16, 24))
    assert (encoder.heads, encoder.width, encoder.depth, encoder.patch_size) == (4, 24, 2, 4)
    np.testing.assert_array_equal(params["block_1"]["mlp"]["in"]["kernel"], tensors["blocks.1.mlp.fc1.weight"].T)
    with pytest.raises(ConfigError, match="give --image_size=HEIGHT,WIDTH"):
        mae_jax.load_encoder(tmp_path / "x.safetensors")


# What is asked for, and what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "24 patches are no square; give --image_size=HEIGHT,WIDTH"),
        (
            ("--image_size=16,24",),
            "no tensor says how many heads the encoder, 24 wide, has; give --heads=ENCODER,DECODER",
        ),
        (
            ("--image_size=16,24", "--heads=4"),
            "no tensor says how many heads the decoder, 16 wide, has; give --heads=ENCODER,DECODER",
        ),
        (("--image_size=18,24", "--heads=4,2"), "18,24"),
        (("--image_size=16,24", "--heads=5,2"), "heads"),
        (("--image_size=16,24", "--heads=4,3"), "heads"),
    ],
)
def test_what_no_tensor_says_is_asked_for(flags, words, worlds, tmp_path, capsys):
    safetensors.numpy.save_file(random_weights(worlds, worlds.cases["rectangular"]), tmp_path / "x.safetensors")
    code = worlds.main(["import", f"--from={tmp_path}/x.safetensors", f"--workdir={tmp_path}/ours", *flags])
    (line,) = worlds.refused(capsys, code, 2, words)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"], line


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_another_architecture(kind, worlds, tmp_path, capsys):
    resnet = {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "layer1.0.conv1.weight": (64, 64, 1, 1)}
    resnet |= {"fc.weight": (10, 64), "fc.bias": (10,)}
    tensors = worlds.draw(resnet)
    if kind == "pth":
        write_pytorch(pytest.importorskip("torch"), tmp_path / "x.pth", tensors)
    else:
        safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    code = worlds.main(["import", f"--from={tmp_path}/x.{kind}", f"--workdir={tmp_path}/ours"])
    words = "no ViT of the original code or of timm (it has bn1.running_mean, conv1.weight, fc.bias, fc.weight, ...)"
    (line,) = worlds.refused(capsys, code, 4, words)
    assert [p.name for p in tmp_path.iterdir()] == [f"x.{kind}"], line


def test_a_swin_transformer_begins_alike(worlds, tmp_path, capsys):
    tensors = worlds.draw({"patch_embed.proj.weight": (96, 3, 4, 4), "layers.0.blocks.0.attn.qkv.weight": (288, 96)})
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    code = worlds.main(["import", f"--from={tmp_path}/x.safetensors", f"--workdir={tmp_path}/ours"])
    lines = worlds.refused(capsys, code, 4, "missing: pos_embed", "missing: blocks.0.mlp.fc1.weight")
    assert len(lines) == 2


def test_all_that_is_missing_unused_and_misshapen_is_named(worlds, tmp_path, capsys):
    tensors = random_weights(worlds, worlds.cases["tiny"], "ViTForImageClassification")
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.0.ls1.gamma"] = np.ones(32, np.float32)
    tensors["head.bias"] = np.ones(6, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    code = worlds.main(["import", f"--from={tmp_path}/x.safetensors", f"--workdir={tmp_path}/ours", "--heads=2"])
    lines = worlds.refused(capsys, code, 4)
    assert [line.partition("x.safetensors: ")[2] for line in lines] == [
        "missing: blocks.1.norm2.bias (32,)",
        "unused: blocks.0.ls1.gamma (32,)",
        "misshapen: head.bias is (6,), not (5,)",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("patch_embed.proj.weight", (32, 12), r"patch_embed.proj.weight is \(32, 12\)"),
        ("patch_embed.proj.weight", (32, 3, 2, 4), r"patch_embed.proj.weight is \(32, 3, 2, 4\)"),
        (
            "patch_embed.proj.weight",
            (32, 3, 0, 0),
            r"\(32, 3, 0, 0\), not \(width, .*, side\), all above 0",
        ),
        ("patch_embed.proj.weight", (32, 0, 2, 2), r"patch_embed.proj.weight is \(32, 0, 2, 2\)"),
        ("pos_embed", (1, 5, 0), r"pos_embed is \(1, 5, 0\)"),
        ("blocks.0.mlp.fc1.weight", (0, 32), r"blocks.0.mlp.fc1.weight is \(0, 32\)"),
        ("decoder_embed.weight", (0, 32), r"decoder_embed.weight is \(0, 32\)"),
        ("pos_embed", (17, 32), r"pos_embed is \(17, 32\), not \(1, 1 \+ patches, width\)"),
        ("pos_embed", (1, 1, 32), r"pos_embed is \(1, 1, 32\), not \(1, 1 \+ patches, width\)"),
        ("blocks.0.mlp.fc1.weight", (), r"blocks.0.mlp.fc1.weight is \(\)"),
        ("head.weight", (), r"head.weight is \(\)"),
        ("decoder_embed.weight", (), r"decoder_embed.weight is \(\)"),
    ],
)
def test_what_is_told_from_a_shape_needs_that_shape(name, shape, words, worlds):
    kind = "ViTMAEForPreTraining" if name.startswith("decoder") else "ViTForImageClassification"
    shapes = worlds.original_shapes(worlds.cases["tiny"], kind)
    with pytest.raises(CheckpointError, match=words):
        original.describe({**shapes, name: shape}, "x.pth", heads=(2, 4))
