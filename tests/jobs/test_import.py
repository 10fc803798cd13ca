"""The import job: its flags, what it changes on the way, and that other jobs take what it writes."""

import os
import signal
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import mae_jax
from mae_jax.__main__ import main
from mae_jax.data.sources import digits
from mae_jax.interchange import original
from mae_jax.jobs import classification, import_
from mae_jax.jobs.foreign import adapt
from mae_jax.training import checkpoint

DIGITS = ("--config.data.source=digits", "--config.data.split=train[:203]", "--config.data.held_out=test[:149]")
DIGITS += ("--config.data.batch_size=64",)


def block(name, width, hidden):
    shapes = {}
    for part, rows, columns in (
        *(("attn.qkv", 3 * width, width), ("attn.proj", width, width)),
        *(("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)),
    ):
        shapes |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes


def write(path, grid=(4, 4), channels=1, head=False, decoder=False, fixed=(), seed=0):
    """A random ViT of width 16 and patches of 2x2 under the names of the original code, and its tensors."""
    patches, width = grid[0] * grid[1], 16
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width), "norm.weight": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, channels, 2, 2), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.bias": (width,), **block("blocks.0", width, 40)}
    if head:
        shapes |= {"head.weight": (10, width), "head.bias": (10,)}
    if decoder:
        shapes |= {"decoder_embed.weight": (12, width), "decoder_embed.bias": (12,), "mask_token": (1, 1, 12)}
        shapes |= {"decoder_pos_embed": (1, 1 + patches, 12), **block("decoder_blocks.0", 12, 24)}
        shapes |= {"decoder_norm.weight": (12,), "decoder_norm.bias": (12,)}
        shapes |= {"decoder_pred.weight": (4 * channels, 12), "decoder_pred.bias": (4 * channels,)}
    rng = np.random.default_rng(seed)
    tensors = {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in fixed:
        tensors[name] = table(grid, shapes[name][-1])
    safetensors.numpy.save_file(tensors, path)
    return tensors


def table(grid, width):
    """Sine-cosine positions as in util/pos_embed.py of the original code, f32[1,1+L,D]."""
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = (x.reshape(-1, 1) * omega for x in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    values = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return np.pad(values, ((1, 0), (0, 0)))[None].astype(np.float32)


def imported(source, workdir, *flags, heads="2"):
    assert main(["import", f"--from={source}", f"--workdir={workdir}", f"--heads={heads}", *flags]) == 0
    return workdir


def held(workdir, tools):
    return tools.part_of(tools.state_of(workdir, 0), "params/")


@pytest.fixture
def classifier(tmp_path):
    """A classifier of digits, untrained, and its tensors."""
    tensors = write(tmp_path / "classifier.safetensors", head=True)
    return tmp_path / "classifier.safetensors", tensors


@pytest.fixture
def autoencoder(tmp_path):
    """One of images 8x8 with positions that are not the fixed ones, and its tensors."""
    tensors = write(tmp_path / "autoencoder.safetensors", decoder=True)
    return tmp_path / "autoencoder.safetensors", tensors


# What it writes


def test_it_says_what_it_did_and_leaves_a_workdir(autoencoder, tmp_path, tools, capsys):
    source, tensors = autoencoder
    workdir = imported(source, tmp_path / "new" / "ours", heads="2,3")
    told = capsys.readouterr().out
    count = sum(x.size for x in tensors.values())
    assert f"imported    autoencoder of {count:,} parameters, from {source}\n" in told
    assert f"checkpoint  {workdir}/checkpoints/0\n" in told
    assert "note        pixels are normalised by mean" in told
    assert sorted(p.name for p in workdir.iterdir()) == ["checkpoints", "config.json"]
    config = tools.read_json(workdir / "config.json")
    assert config == checkpoint.load_config(workdir)
    assert config["imported"] == {"from": str(source), "heads": "2,3"}
    assert (config["encoder"]["heads"], config["decoder"]["heads"]) == (2, 3)
    assert held(workdir, tools)["encoder/cls_token"].dtype == np.float32


@pytest.mark.parametrize("what", ["encoder", "classifier"])
def test_it_says_what_the_model_is(what, tmp_path, capsys):
    write(tmp_path / "x.safetensors", head=what == "classifier")
    imported(tmp_path / "x.safetensors", tmp_path / "ours")
    assert f"imported    {what} of " in capsys.readouterr().out


def test_an_empty_workdir_may_be_there_and_any_other_is_left_alone(classifier, tmp_path, tools, capsys):
    source, _ = classifier
    (tmp_path / "ours").mkdir()
    imported(source, tmp_path / "ours")
    before = tools.state_of(tmp_path / "ours", 0)
    write(tmp_path / "other.safetensors", head=True, seed=1)
    code = main(["import", f"--from={tmp_path}/other.safetensors", f"--workdir={tmp_path}/ours", "--heads=2"])
    tools.refused(capsys, code, 2, f"{tmp_path}/ours: is there already; name another, or delete it")
    tools.assert_equal(tools.state_of(tmp_path / "ours", 0), before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_while_writing_leaves_nothing(error, classifier, tmp_path, tools, monkeypatch, capsys):
    def fail(path, value):
        path.write_text("{")
        raise error

    monkeypatch.setattr(import_, "write_json", fail)
    code = main(["import", f"--from={classifier[0]}", f"--workdir={tmp_path}/ours", "--heads=2"])
    if isinstance(error, OSError):
        tools.refused(capsys, code, 2, f"{tmp_path}/ours: cannot be written (No space left on device)")
    else:
        assert code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["classifier.safetensors"]


def test_names_of_classes_are_those_of_a_data_set(classifier, tmp_path, tools, capsys):
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"]
    workdir = imported(classifier[0], tmp_path / "ours", "--classes=fashion_mnist")
    assert mae_jax.load_config(workdir).classes == [*names, "Ankle boot"]
    assert mae_jax.load_config(imported(classifier[0], tmp_path / "bare")).classes == [str(i) for i in range(10)]
    for name, words in {
        "fashion_mnsit": "--classes=fashion_mnsit: no data set of TFDS with classes; did you mean fashion_mnist?",
        "wikipedia": "--classes=wikipedia: no data set of TFDS with classes",
        "cifar100": "has 10 classes, not 100",
    }.items():
        code = main(["import", f"--from={classifier[0]}", f"--workdir={tmp_path}/x", "--heads=2", f"--classes={name}"])
        tools.refused(capsys, code, 2, words)
        assert not (tmp_path / "x").exists()


# What it changes


def interpolated(positions, grid, new_grid):
    """util/pos_embed.py of the original code: positions f32[1,1+L,D] of one grid, for another."""
    torch = pytest.importorskip("torch")
    positions = torch.from_numpy(positions)
    patches = positions[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1).numpy()


@pytest.mark.parametrize(
    ("grid", "new_grid"), [((4, 4), (7, 7)), ((4, 4), (3, 5)), ((3, 5), (4, 4)), ((2, 6), (4, 12)), ((6, 6), (2, 2))]
)
def test_learned_positions_are_interpolated_as_in_the_original_code(grid, new_grid, tmp_path, tools):
    tensors = write(tmp_path / "x.safetensors", grid=grid, decoder=True)
    size, new_size = ("{},{}".format(*(2 * side for side in sides)) for sides in (grid, new_grid))
    flags = (f"--image_size={size}", f"--resize={new_size}")
    workdir = imported(tmp_path / "x.safetensors", tmp_path / "ours", *flags, heads="2,3")
    got = held(workdir, tools)
    for leaf, name in {"encoder/positions": "pos_embed", "decoder/positions": "decoder_pos_embed"}.items():
        np.testing.assert_allclose(got[leaf], interpolated(tensors[name], grid, new_grid), atol=1e-6)
    assert ",".join(map(str, mae_jax.load_config(workdir).data.image_size)) == new_size
    np.testing.assert_array_equal(got["encoder/norm/bias"], tensors["norm.bias"])


def test_fixed_positions_are_computed_anew(tmp_path, tools):
    write(tmp_path / "x.safetensors", decoder=True, fixed=("pos_embed", "decoder_pos_embed"))
    workdir = imported(tmp_path / "x.safetensors", tmp_path / "ours", "--resize=6,12", heads="2,3")
    assert not [leaf for leaf in held(workdir, tools) if leaf.endswith("positions")]
    config = mae_jax.load_config(workdir)
    assert config.data.image_size == [6, 12]
    assert config.encoder.positions == config.decoder.positions == "sincos"
    encoder, params = mae_jax.load_encoder(workdir)
    learned = encoder.clone(positions="learned")
    images = np.random.default_rng(0).standard_normal((2, 6, 12, 1), np.float32)
    got = encoder.apply({"params": params}, images)
    want = learned.apply({"params": {**params, "positions": table((3, 6), 16)}}, images)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_how_positions_are_resized_may_be_said(tmp_path, tools):
    tensors = write(tmp_path / "x.safetensors", decoder=True, fixed=("pos_embed",))
    flags = ("--resize=12", "--positions=bicubic")
    got = held(imported(tmp_path / "x.safetensors", tmp_path / "a", *flags, heads="2,3"), tools)
    for leaf, name in {"encoder/positions": "pos_embed", "decoder/positions": "decoder_pos_embed"}.items():
        np.testing.assert_allclose(got[leaf], interpolated(tensors[name], (4, 4), (6, 6)), atol=1e-6)
    workdir = imported(tmp_path / "x.safetensors", tmp_path / "b", "--resize=12", "--positions=sincos", heads="2,3")
    assert not [leaf for leaf in held(workdir, tools) if leaf.endswith("positions")]
    assert mae_jax.load_config(workdir).decoder.positions == "sincos"


def test_resizing_to_the_same_size_changes_nothing(autoencoder, tmp_path, tools):
    source, _ = autoencoder
    before, after = (
        held(imported(source, tmp_path / name, *flags, heads="2,3"), tools)
        for name, flags in {"a": (), "b": ("--resize=8,8",)}.items()
    )
    tools.assert_equal(after, before)


def test_the_weights_of_channels_are_summed_into_one(tmp_path, tools, capsys):
    """So that a grey image gives what three equal channels gave."""
    tensors = write(tmp_path / "x.safetensors", channels=3)
    grey = imported(tmp_path / "x.safetensors", tmp_path / "grey", "--channels=1", "--adapt=sum")
    coloured = imported(tmp_path / "x.safetensors", tmp_path / "coloured")
    weight = tensors["patch_embed.proj.weight"].sum(axis=1)  # [D,P,P]
    got = held(grey, tools)["encoder/patch_embedding/kernel"]
    np.testing.assert_allclose(got, weight.transpose(1, 2, 0).reshape(4, 16), atol=1e-6)
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)
    (encoder, params), (same, theirs) = mae_jax.load_encoder(grey), mae_jax.load_encoder(coloured)
    want = same.apply({"params": theirs}, images.repeat(3, axis=-1))
    np.testing.assert_allclose(encoder.apply({"params": params}, images), want, atol=1e-5)
    config = mae_jax.load_config(grey)
    assert config.data.channels == 1
    assert config.pixels.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert config.pixels.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


@pytest.mark.parametrize(("before", "after"), [(3, 4), (3, 8), (3, 2), (3, 1), (1, 3)])
def test_the_weights_of_channels_are_repeated_as_timm_does(before, after, tmp_path, tools):
    tensors = write(tmp_path / "x.safetensors", channels=before)
    workdir = imported(tmp_path / "x.safetensors", tmp_path / "ours", f"--channels={after}", "--adapt=repeat")
    weight = tensors["patch_embed.proj.weight"]
    repeated = np.tile(weight, (1, -(-after // before), 1, 1))[:, :after] * (before / after)
    got = held(workdir, tools)["encoder/patch_embedding/kernel"].reshape(2, 2, after, 16)
    np.testing.assert_allclose(got, repeated.transpose(2, 3, 1, 0), rtol=1e-6)
    config, was = (
        mae_jax.load_config(workdir),
        mae_jax.load_config(imported(tmp_path / "x.safetensors", tmp_path / "b")),
    )
    assert list(config.pixels.mean) == [was.pixels.mean[i % before] for i in range(after)]
    assert list(config.pixels.std) == [was.pixels.std[i % before] for i in range(after)]


def test_another_number_of_channels_costs_the_decoder(tmp_path, tools, capsys):
    write(tmp_path / "x.safetensors", channels=3, decoder=True)
    flags = ("--channels=1", "--adapt=sum", "--resize=4,6")
    workdir = imported(tmp_path / "x.safetensors", tmp_path / "ours", *flags, heads="2,3")
    told = capsys.readouterr().out
    assert "note        the decoder, which predicts 3 channels, is left out" in told
    assert "imported    encoder of " in told
    assert not [leaf for leaf in held(workdir, tools) if not leaf.startswith("encoder/")]
    assert not {"decoder", "target", "mask"} & {*mae_jax.load_config(workdir)}
    encoder, params = mae_jax.load_encoder(workdir)
    assert encoder.apply({"params": params}, np.zeros((1, 4, 6, 1), np.float32)).shape == (1, 7, 16)


def test_the_same_number_of_channels_changes_nothing(autoencoder, tmp_path, tools):
    source, _ = autoencoder
    flags = ("--channels=1", "--adapt=sum")
    after = held(imported(source, tmp_path / "b", *flags, heads="2,3"), tools)
    tools.assert_equal(after, held(imported(source, tmp_path / "a", heads="2,3"), tools))


def test_to_sum_and_to_repeat_into_one_channel_are_different():
    """The first of three, three times as large, is not their sum."""
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = {}
    for how in ("sum", "repeat"):
        config = {"data": {"channels": 3}, "encoder": {"width": 4}, "pixels": {"mean": (1, 2, 6), "std": (1, 1, 1)}}
        params = {"encoder": {"patch_embedding": {"kernel": kernel}}}
        assert adapt(config, params, 1, how) == []
        found[how] = params["encoder"]["patch_embedding"]["kernel"], config["pixels"]["mean"]
    np.testing.assert_array_equal(found["sum"][0], [[12, 15, 18, 21]])
    np.testing.assert_array_equal(found["repeat"][0], [[0, 3, 6, 9]])
    assert (found["sum"][1], found["repeat"][1]) == ((3.0,), (1,))


# What other jobs make of it


def test_neighbours(classifier, tmp_path, tools):
    workdir = imported(classifier[0], tmp_path / "ours")
    assert tools.run("knn", tmp_path / "out", f"--config.init={workdir}", "--config.k=(5,)", *DIGITS, recipe="") == 0
    results = tools.read_json(tmp_path / "out" / "results.json")
    assert results["checkpoint"] == f"{workdir}/checkpoints/0"
    assert (results["bank"]["examples"], results["examples"]) == (203, 149)
    assert results["top1"]["5"] > 0.3, "even of random features neighbours are alike"


@pytest.mark.parametrize("job", ["knn", "probe", "evaluate", "reconstruct"])
def test_jobs_want_a_workdir_and_say_so(job, tmp_path, tools, monkeypatch, capsys):
    """Of a file that says all else, as it is one of ViT's sizes; here these are few."""
    monkeypatch.setitem(original.HEADS, 16, 2)
    monkeypatch.setitem(original.DECODER_HEADS, 12, 3)
    write(tmp_path / "x.safetensors", head=job == "evaluate", decoder=job == "reconstruct")
    arguments = (f"--config.init={tmp_path}/x.safetensors", *(() if job == "reconstruct" else DIGITS[:1]))
    if job != "reconstruct":
        arguments += ("--config.data.split=test[:149]",)
    if job in ("knn", "probe"):
        arguments += ("--config.data.held_out=test[:149]",)
    code = tools.run(job, tmp_path / "out", *arguments, recipe="digits,tiny" if job == "probe" else "")
    assert code in (2, 4)
    tools.refused(capsys, code, code)


@pytest.mark.parametrize("job", ["probe", pytest.param("finetune", marks=pytest.mark.slow)])
def test_training_begins_with_it(job, autoencoder, tmp_path, tools):
    workdir = imported(autoencoder[0], tmp_path / "ours", heads="2,3")
    assert tools.run(job, tmp_path / "out", f"--config.init={workdir}", "--config.train.steps=2") == 0
    assert tools.read_json(tmp_path / "out" / "results.json")["init"] == str(workdir)
    trained = tools.part_of(tools.state_of(tmp_path / "out", 2), "params/encoder/")
    before = tools.part_of(held(workdir, tools), "encoder/")
    if job == "probe":
        tools.assert_equal(trained, before)
    else:
        assert trained.keys() == before.keys() - {"norm/scale", "norm/bias"}
        np.testing.assert_allclose(trained["cls_token"], before["cls_token"], atol=0.1)


def test_reconstructions_of_files(autoencoder, tmp_path, tools):
    workdir = imported(autoencoder[0], tmp_path / "ours", heads="2,3")
    images, _ = digits(split="test[:3]").read(np.arange(3))
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    arguments = (f"--config.init={workdir}", f"--config.images={tmp_path}/*.png")
    assert tools.run("reconstruct", tmp_path / "out", *arguments, recipe="") == 0
    assert tools.read_json(tmp_path / "out" / "results.json")["examples"] == 3
    assert (tmp_path / "out" / "reconstructions" / "ratio_0.75.png").exists()


def test_evaluation(classifier, tmp_path, tools):
    source, tensors = classifier
    workdir = imported(source, tmp_path / "ours")
    arguments = ("--config.data.source=digits", "--config.data.split=test[:149]", "--config.data.held_out_augment=none")
    assert tools.run("evaluate", tmp_path / "out", f"--config.init={workdir}", *arguments, recipe="") == 0
    images, labels = tools.held_out()
    encoder, params = mae_jax.load_encoder(workdir)
    x = mae_jax.normalize(images, **mae_jax.load_config(workdir).pixels)
    cls = np.asarray(jax.jit(encoder.apply)({"params": params}, x))[:, 0]
    logits = cls @ tensors["head.weight"].T + tensors["head.bias"]
    tools.check_numbers(tools.read_json(tmp_path / "out" / "results.json"), logits, labels, list("0123456789"))
    model, _, variables = classification.load(workdir)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), logits, atol=1e-5)


def test_where_its_data_are_not_prepared_one_line_says_so(classifier, tmp_path, tools, capsys):
    workdir = imported(classifier[0], tmp_path / "ours")
    capsys.readouterr()
    code = tools.run("evaluate", tmp_path / "out", f"--config.init={workdir}", recipe="")
    tools.refused(capsys, code, 2, "imagenet2012")


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--from is missing; usage: mae-jax import --from=... --workdir=..."]),
        (("--from=x.pth",), ["--workdir is missing; usage: mae-jax import --from=... --workdir=..."]),
        (("--from=", "--workdir=x"), ["--from has no value; write --from=..."]),
        (("--form=x", "--from=x", "--workdir=x"), ["--form=x: no such flag; did you mean --from?"]),
        (
            ("--from=x", "--workdir=x", "y", "--config=z"),
            ["y: no such flag", "--config=z: no such flag"],
        ),
        (
            (
                *("--from=x", "--workdir=x", "--heads=two", "--image_size=8,8,8", "--resize=0", "--channels=-1"),
                *("--target=pixel", "--adapt=mean"),
            ),
            [
                "--heads=two: is not a number above 0, or two",
                "--image_size=8,8,8: is not HEIGHT,WIDTH",
                "--resize=0: is not HEIGHT,WIDTH",
                "--channels=-1: is not a number above 0",
                "--target=pixel: is not one of pixels, normalized_pixels",
                "--adapt=mean: is not one of sum, repeat",
            ],
        ),
        (("--from=x", "--workdir=x", "--heads=1,2,3"), ["--heads=1,2,3: is not a number above 0, or two"]),
        (("--from=x", "--workdir=x", "--channels=3,1", "--adapt=repeat"), ["--channels=3,1: is not a number above 0"]),
        (
            ("--from=x", "--workdir=x", "--positions=linear", "--channels=3"),
            [
                "--positions=linear: is not one of bicubic, sincos",
                "--channels and --adapt go together: say how, sum or repeat, and how many",
                "--positions says how to --resize, which is not given",
            ],
        ),
        (("--from=x", "--workdir=x", "--adapt=sum"), ["--channels and --adapt go together"]),
    ],
)
def test_flags_that_are_wrong_are_told_all_together(flags, words, tools, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = tools.refused(capsys, main(["import", *flags]), 2, *words)
    assert len(lines) == len(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--resize=9",), "--resize=9,9: is not divisible into patches of 2"),
        (("--resize=100000000000",), "--resize=100000000000,100000000000: is larger than any image may be"),
        (("--channels=100000000000", "--adapt=repeat"), "--channels=100000000000: are more than any image may have"),
        (("--channels=2", "--adapt=sum"), "--adapt=sum: is for one channel, not 2; use repeat"),
    ],
)
def test_changes_that_cannot_be_made(flags, words, classifier, tmp_path, tools, capsys):
    code = main(["import", f"--from={classifier[0]}", f"--workdir={tmp_path}/ours", "--heads=2", *flags])
    tools.refused(capsys, code, 2, words)
    assert [p.name for p in tmp_path.iterdir()] == ["classifier.safetensors"]


def test_a_truncated_file_is_one_line(classifier, tmp_path, tools, capsys):
    source, _ = classifier
    source.write_bytes(source.read_bytes()[:-1])
    code = main(["import", f"--from={source}", f"--workdir={tmp_path}/ours", "--heads=2"])
    (line,) = tools.refused(capsys, code, 4, f"{source}: not a whole safetensors file (")
    assert [p.name for p in tmp_path.iterdir()] == ["classifier.safetensors"], line


def test_without_pytorch_one_line_names_the_extra(tmp_path, tools, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"PK")
    code = main(["import", f"--from={tmp_path}/x.pth", f"--workdir={tmp_path}/ours"])
    (line,) = tools.refused(capsys, code, 2, 'which is not installed: pip install "mae_jax[torch]"')
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"], line


class Code:
    """What a file may hold that runs when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_file_is_named_and_not_run(tmp_path, tools, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 16)}, "x": Code(f"{tmp_path}/sprung")}, tmp_path / "x.pth")
    code = main(["import", f"--from={tmp_path}/x.pth", f"--workdir={tmp_path}/ours"])
    tools.refused(capsys, code, 4, "x.pth: holds more than tensors: it would run posix.mkdir; not loaded")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("source", ["nowhere", "nowhere.pth", "nowhere.safetensors", "~nosuchuser/x.pth", "x" * 300])
def test_what_is_not_there_is_one_line(source, tmp_path, tools, capsys):
    code = main(["import", f"--from={source}", f"--workdir={tmp_path}/ours"])
    tools.refused(capsys, code, 4, source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workdir", ["~nosuchuser/ours", "x" * 300, "classifier.safetensors/ours", "."])
def test_where_nothing_can_be_written_is_one_line(workdir, classifier, tmp_path, tools, capsys, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty if workdir == "." else tmp_path)
    code = main(["import", f"--from={classifier[0]}", f"--workdir={workdir}", "--heads=2"])
    tools.refused(capsys, code, 2, "empty: is the current folder" if workdir == "." else workdir)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classifier.safetensors", "empty"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_it_writes_leaves_nothing(number, code, classifier, tmp_path, monkeypatch, capsys):
    save = checkpoint.ocp.CheckpointManager.save
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it

    def save_disturbed(self, *args, **options):
        signal.raise_signal(number)
        return save(self, *args, **options)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save_disturbed)
    try:
        assert main(["import", f"--from={classifier[0]}", f"--workdir={tmp_path}/ours", "--heads=2"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "ours" in p.name]
