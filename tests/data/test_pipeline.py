"""Batches by number: any step again, each epoch once through, the same on any devices and hosts, whatever is broken."""

import collections
import dataclasses
import io
import itertools
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax.data import augment
from mae_jax.data.jitter import jitter
from mae_jax.data.pipeline import CHUNK, Dataset
from mae_jax.data.randaugment import rand_augment
from mae_jax.data.sources import SOURCES, Source
from mae_jax.errors import DataError
from mae_jax.training.sharding import batch_sharding, make_mesh

AUGMENTED = {"augment": "random_resized_crop", "flip": True}
SYNTHETIC = {"source": "synthetic", "image_size": (8, 12), "channels": 3, "split": "train[:40]"}
BAD = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "garbage": lambda data: bytes(range(256)) * 4,
    "a lie": lambda data: b"\xff\xd8\xff" + b"?" * 500,
    "truncated webp": lambda data: as_file(Image.open(io.BytesIO(data)), "WEBP")[:-200],
}


def as_file(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def jpeg(number):
    """A picture that tells its number by its brightness, with detail enough that a truncated file misses some."""
    noise = np.random.default_rng(number).integers(-2, 3, (40, 40, 3))
    return as_file(Image.fromarray((3 * number + 20 + noise).astype(np.uint8)), "JPEG", quality=95)


def make_folder(root, count, bad=()):
    """`count` JPEGs; at the places `bad`, in the order of the folder's source, files that cannot be read."""
    root.mkdir()
    for i in range(count):
        (root / f"{i:03}.jpg").write_bytes(jpeg(i))
    data = folder(root)
    damages = itertools.cycle(BAD.values())
    for place in bad:
        path = Path(data.examples.name(place))
        path.write_bytes(next(damages)(path.read_bytes()))
    return data


def folder(root, **options):
    defaults = {"split": "all", "held_out": "all", "batch_size": 8, "image_size": (16, 16)}
    return Dataset(source="folder", path=str(root), **defaults | options)


def numbers(data):
    """Of the images of a folder, in order."""
    source = data.examples
    return [int(Path(source.name(i)).stem) for i in range(source.size)]


def sharding(devices=8):
    return batch_sharding(make_mesh(data=devices))


def take(batches, count):
    return [jax.device_get(batch) for batch in itertools.islice(batches, count)]


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def complaints(caplog):
    """How often each file was said to be unreadable."""
    texts = [record.getMessage() for record in caplog.records if "cannot read" in record.getMessage()]
    return collections.Counter(text.split("cannot read ")[1].split(";")[0] for text in texts)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tfds_dir):
    """A data set of every kind of source, augmented in all ways."""
    root = tmp_path_factory.mktemp("pictures") / "all"
    make_folder(root, 21, bad=(5,))
    mini = {"name": "mini_pictures", "data_dir": tfds_dir, "split": "train"}
    digits = {"source": "digits", "batch_size": 56, "image_size": (8, 8), "channels": 1, "split": "train"}
    return {
        "digits": Dataset(**digits),
        "synthetic": Dataset(**SYNTHETIC, batch_size=16, **AUGMENTED),
        "folder": folder(root, **AUGMENTED),
        "files": Dataset(source="files", path=f"{root}/*.jpg", batch_size=8, image_size=(16, 16), augment="fixed_crop"),
        "tfds": Dataset(source="tfds", **mini, batch_size=8, image_size=(4, 4), channels=1, **AUGMENTED),
    }


@pytest.fixture(scope="module")
def running(sets):
    """The first batches of each of these sets under seed 3, on 8 devices."""
    return {name: list(itertools.islice(data.shuffled(3, 0, sharding()), 8)) for name, data in sets.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_batch_is(name, sets, running):
    data, batch = sets[name], running[name][0]
    shapes = {key: (value.shape, str(value.dtype)) for key, value in batch.items()}
    assert shapes == {
        "image": ((data.batch_size, *data.image_size, data.channels), "uint8"),
        "label": ((data.batch_size,), "int32"),
        "weight": ((data.batch_size,), "float32"),
    }
    assert all(value.sharding == sharding() for value in batch.values())


@pytest.mark.parametrize("name", SOURCES)
def test_any_step_can_be_made_again_bit_for_bit(name, sets, running):
    for step in (1, 6):
        again, after = take(sets[name].shuffled(3, step, sharding()), 2)
        assert same(again, running[name][step]) and same(after, running[name][step + 1])


def test_a_step_far_away_is_there_at_once(sets):
    data = sets["synthetic"]
    (far,) = take(data.shuffled(0, 10_000_000, sharding()), 1)
    near, far_again = take(data.shuffled(0, 9_999_999, sharding()), 2)
    assert same(far, far_again) and not same(far, near)
    assert far["weight"].all()


@pytest.mark.parametrize("batch_size", [8, 16, 40])
def test_every_epoch_has_every_image_once_in_an_order_of_its_own(batch_size):
    data = Dataset(**SYNTHETIC, batch_size=batch_size)
    images = data.examples.read(np.arange(40))[0]
    place = {image.tobytes(): i for i, image in enumerate(images)}
    epochs = 4
    seen = joined(take(data.shuffled(0, 0, sharding()), epochs * 40 // batch_size))
    orders = np.array([place[image.tobytes()] for image in seen["image"]]).reshape(epochs, 40)
    assert (np.sort(orders, axis=1) == np.arange(40)).all()
    assert len({tuple(order) for order in orders}) == epochs
    assert tuple(range(40)) not in {tuple(order) for order in orders}
    labels = data.examples.read(orders.ravel())[1]
    assert seen["label"].tolist() == labels.tolist() and seen["weight"].all()


@pytest.mark.parametrize("size", [1000, 10_000])
def test_epochs_are_mixed_well(size, monkeypatch):
    """Where an example stands in one epoch says nothing about where it stands in another, nor what stands beside it."""

    def numbered(**_):
        read = lambda index: (np.zeros((len(index), 1, 1, 1), np.uint8), index)  # noqa: E731
        return Source(size, read, False, str, (1, 1, 1))

    monkeypatch.setitem(SOURCES, "numbered", numbered)
    data = Dataset(source="numbered", batch_size=size // 5, image_size=(1, 1), channels=1)
    orders = joined(take(data.shuffled(0, 0, sharding()), 15))["label"].reshape(3, size)
    assert (np.sort(orders, axis=1) == np.arange(size)).all()
    limit = 4 / size**0.5  # four standard deviations of a correlation
    for a, b in itertools.combinations([np.arange(size), *orders], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit


def test_seeds_give_other_batches():
    data = Dataset(**SYNTHETIC, batch_size=40)
    orders = [take(data.shuffled(seed, 0, sharding()), 1)[0] for seed in (0, 1, 2**32 - 1)]
    for a, b in itertools.combinations(orders, 2):
        assert not same(a, b)


def test_augmentation_is_drawn_anew_every_epoch(tmp_path):
    data = make_folder(tmp_path / "one", 1)
    wide = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    (tmp_path / "one/000.jpg").write_bytes(as_file(wide, "PNG"))
    data = folder(tmp_path / "one", batch_size=8, **AUGMENTED)
    images = take(data.shuffled(0, 0, sharding()), 1)[0]["image"]
    assert len({image.tobytes() for image in images}) == 8


@pytest.mark.parametrize("name", ["digits", "synthetic", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("repeats", [2, 4])
def test_repeats_are_samples_of_one_image_that_is_read_once(name, repeats, sets):
    data = dataclasses.replace(sets[name], repeats=repeats, batch_size=8)
    read, indexes = data.examples.read, []
    object.__setattr__(data.examples, "read", lambda index: (indexes.append(index), read(index))[1])
    batches = take(data.shuffled(3, 0, sharding()), 4)
    assert {len(index) for index in indexes} == {8 // repeats}
    once = take(dataclasses.replace(data, repeats=1, batch_size=8 // repeats).shuffled(3, 0, sharding(1)), 4)
    for batch, plain in zip(batches, once, strict=True):
        assert batch["image"].shape == (8, *data.image_size, data.channels)
        for key in ("label", "weight"):
            assert np.array_equal(batch[key], plain[key].repeat(repeats))
        groups = batch["image"].reshape(8 // repeats, repeats, -1)
        if data.augment == "none":
            assert np.array_equal(groups, plain["image"].reshape(8 // repeats, 1, -1).repeat(repeats, axis=1))
    if data.augment != "none":
        assert all(len({image.tobytes() for image in group}) > 1 for group in groups[plain["weight"] > 0])


def test_repeats_are_for_training_alone(sets):
    data = dataclasses.replace(sets["synthetic"], repeats=4)
    assert joined(data.once(sharding()))["weight"].sum() == 40
    assert data.held_out_set().repeats == 1


@pytest.mark.parametrize(
    ("name", "repeats"),
    [("digits", 1), ("digits", 2), ("synthetic", 1), pytest.param("folder", 2, marks=pytest.mark.slow)],
)
def test_randaugment_comes_last_and_changes_each_sample_by_its_number(name, repeats, sets, caplog):
    plain = dataclasses.replace(sets[name], repeats=repeats, batch_size=8)
    data = dataclasses.replace(plain, randaugment=9.0)
    before, after = (take(x.shuffled(3, 5, sharding()), 2) for x in (plain, data))
    changed = []
    for step, (a, b) in enumerate(zip(before, after, strict=True), 5):
        assert np.array_equal(a["label"], b["label"]) and np.array_equal(a["weight"], b["weight"])
        for i, (image, out, weight) in enumerate(zip(a["image"], b["image"], a["weight"], strict=True)):
            want = rand_augment(image, np.array([3, 8 * step + i]), layers=2, magnitude=9.0) if weight else image
            assert np.array_equal(out, want)
            changed.append(not np.array_equal(out, image))
    assert sum(changed) > len(changed) / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "folder", "tfds"])
def test_jitter_changes_what_was_cropped_and_flipped_before_randaugment_does(name, sets, caplog):
    plain = dataclasses.replace(sets[name], repeats=2, batch_size=8)
    jittered = dataclasses.replace(plain, jitter=0.4)
    both = dataclasses.replace(jittered, randaugment=9.0)
    batches = [take(data.shuffled(3, 5, sharding()), 2) for data in (plain, jittered, both)]
    changed = []
    for step, (a, b, c) in enumerate(zip(*batches, strict=True), 5):
        assert np.array_equal(a["weight"], b["weight"])
        for i, weight in enumerate(a["weight"]):
            seed = np.array([3, 8 * step + i])
            want = jitter(a["image"][i], seed, strength=0.4) if weight else a["image"][i]
            assert np.array_equal(b["image"][i], want)
            changed.append(not np.array_equal(want, a["image"][i]))
            want = rand_augment(want, seed, layers=2, magnitude=9.0) if weight else want
            assert np.array_equal(c["image"][i], want)
    assert sum(changed) > len(changed) / 2
    (again,) = take(jittered.shuffled(3, 6, sharding(1)), 1)
    assert same(again, batches[1][1]), "on any number of devices, and again"


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_jitter_goes_with_every_augmentation(name, sets):
    plain = dataclasses.replace(sets["synthetic"], augment=name, batch_size=8)
    before, after = (
        take(x.shuffled(0, 0, sharding()), 1)[0]["image"] for x in (plain, dataclasses.replace(plain, jitter=0.4))
    )
    for i, (image, out) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(out, jitter(image, np.array([0, i]), strength=0.4))


def test_jitter_is_for_training_alone(sets):
    data = dataclasses.replace(sets["digits"], jitter=0.4)
    assert not data.ready and data.plain().ready
    assert data.held_out_set().jitter == 0
    examples = data.examples
    assert data.but(jitter=0.0).examples is examples


def test_an_image_that_cannot_be_read_stays_black_whatever_randaugment_does(tmp_path, caplog):
    data = dataclasses.replace(make_folder(tmp_path / "tree", 20, bad=range(0, 20, 2)), randaugment=10.0)
    whole = joined(take(data.shuffled(0, 0, sharding()), 5))
    bad = whole["weight"] == 0
    assert bad.sum() == 20 and not whole["image"][bad].any()
    assert len({image.tobytes() for image in whole["image"][~bad]}) > 10


def test_randaugment_is_for_training_alone(sets):
    data = dataclasses.replace(sets["synthetic"], augment="none", flip=False, randaugment=9.0)
    assert data.held_out_set().randaugment == 0
    examples = data.examples
    assert data.but(randaugment=0.0).examples is examples


@pytest.mark.parametrize(("size", "limit"), [(40, None), (13, None), (1, None), (40, 11), (40, 8), (13, 500)])
def test_once_is_every_example_once_in_order(size, limit):
    data = Dataset(**SYNTHETIC | {"split": f"train[:{size}]"}, batch_size=8)
    batches = take(data.once(sharding(), limit), 100)
    count = min(size, limit or size)
    assert len(batches) == -(-count // 8)
    whole = joined(batches)
    images, labels = data.examples.read(np.arange(count))
    assert whole["weight"].tolist() == [1] * count + [0] * (-count % 8)
    assert np.array_equal(whole["image"][:count], images)
    assert whole["label"][:count].tolist() == labels.tolist()


def test_held_out_images_are_not_augmented():
    data = Dataset(**SYNTHETIC | {"split": "train"}, held_out="validation[:16]", batch_size=16, **AUGMENTED)
    (batch,) = take(data.held_out_set().once(sharding()), 5)
    plain = Dataset(**SYNTHETIC | {"split": "validation[:16]"}, batch_size=16)
    assert np.array_equal(batch["image"], plain.examples.read(np.arange(16))[0])


@pytest.mark.parametrize(("name", "devices"), [("digits", 1), ("folder", 1), ("synthetic", 2)])
def test_the_same_batches_on_any_number_of_devices(name, devices, sets, running):
    few = take(sets[name].shuffled(3, 0, sharding(devices)), 3)
    assert all(same(a, b) for a, b in zip(few, running[name], strict=False))


class Held:
    """A sharding, as far as this host sees it: its devices hold these slices of a batch."""

    def __init__(self, slices):
        self.slices = slices

    def addressable_devices_indices_map(self, shape):
        return {f"device {i}": (part,) for i, part in enumerate(self.slices)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("synthetic", [[(0, 4), (4, 8)], [(8, 12), (12, 16)]]),
        ("folder", [[(8, 12), (0, 4)], [(4, 8), (12, 16)]]),  # as the links of a pod have it
        ("synthetic", [[(0, 8), (8, 16)], [(0, 8), (8, 16)]]),  # tensor parallelism from one host to the other
        ("repeated", [[(0, 1), (1, 2)], [(2, 3), (3, 16)]]),  # repeats of one image on two hosts
    ],
)
def test_hosts_make_their_parts_of_the_same_batches(name, hosts, sets, monkeypatch):
    data = sets["folder"].but(repeats=4) if name == "repeated" else sets[name]
    data = data.but(batch_size=16)
    whole = {"shuffled": take(data.shuffled(3, 5, sharding()), 2), "once": take(data.once(sharding()), 10)}

    def parts_of(shape, sharding, part):
        return [part((held, *[slice(None)] * (len(shape) - 1))) for held in sharding.slices]

    monkeypatch.setattr(jax, "make_array_from_callback", parts_of)
    for held in hosts:
        slices = [slice(*bounds) for bounds in held]
        got = {"shuffled": take(data.shuffled(3, 5, Held(slices)), 2), "once": take(data.once(Held(slices)), 10)}
        for kind, want in whole.items():
            assert len(got[kind]) == len(want)
            for batch, parts in zip(want, got[kind], strict=True):
                for key, value in batch.items():
                    for part, rows in zip(parts[key], slices, strict=True):
                        np.testing.assert_array_equal(part, np.asarray(value)[rows])
        assert same(joined(data.once(None)), joined(whole["once"])), "without a sharding, each host has all"


@pytest.mark.parametrize(
    "bad",
    {
        "none": (),
        "a few": (2, 7, 8, 20, 33),
        "the first": (0,),
        "the last, which is padded with": (36,),
        "around the edge of a chunk": (CHUNK - 1, CHUNK, 2 * CHUNK - 1),
        "a whole chunk and more": tuple(range(CHUNK - 3, 2 * CHUNK + 2)),
    }.values(),
    ids=len,
)
def test_what_cannot_be_read_weighs_nothing_and_all_else_stays_in_its_place(bad, tmp_path, caplog):
    data = make_folder(tmp_path / "tree", 37, bad)
    want = numbers(data)
    with caplog.at_level(logging.WARNING):
        whole = joined(take(data.once(sharding()), 100))
    assert whole["weight"].tolist() == [float(i not in bad) for i in range(37)] + [0] * 3
    for i, image in enumerate(whole["image"][:37]):
        if i in bad:
            assert not image.any()
        else:
            assert abs(image.mean() - (3 * want[i] + 20)) < 1
    assert complaints(caplog) == {data.examples.name(i): 1 for i in bad}


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_damage_is_noticed(kind, tmp_path, caplog):
    data = make_folder(tmp_path / "tree", 8)
    path = Path(data.examples.name(3))
    path.write_bytes(BAD[kind](path.read_bytes()))
    whole = joined(take(data.once(sharding()), 2))
    assert whole["weight"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert complaints(caplog) == {str(path): 1}


def test_a_bad_file_changes_nothing_else_in_training(tmp_path, caplog):
    """Not even the augmentation of the images that share its chunk. It is named once, not at every visit."""
    good = make_folder(tmp_path / "good", 24)
    bad = make_folder(tmp_path / "bad", 24, bad=(4, 9))
    good, bad = (folder(tmp_path / name, **AUGMENTED, image_size=(12, 12)) for name in ("good", "bad"))
    a, b = (joined(take(data.shuffled(0, 0, sharding()), 6)) for data in (good, bad))  # two epochs
    assert a["weight"].all() and (b["weight"] == 0).sum() == 4
    kept = b["weight"] == 1
    assert np.array_equal(a["image"][kept], b["image"][kept]) and not b["image"][~kept].any()
    assert np.array_equal(a["label"], b["label"])
    assert complaints(caplog) == {bad.examples.name(i): 1 for i in (4, 9)}


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_compiler_changes_nothing(repeats, tmp_path, monkeypatch):
    make_folder(tmp_path / "tree", 24, bad=(4,))
    Path(tmp_path / "tree/007.jpg").write_bytes(as_file(Image.open(tmp_path / "tree/007.jpg"), "PNG"))
    data = folder(tmp_path / "tree", **AUGMENTED, repeats=repeats)
    batches = []
    for operations in (augment._operations(), None):
        monkeypatch.setattr(augment, "_operations", lambda result=operations: result)
        batches.append(joined(take(data.shuffled(0, 0, sharding()), 3)))
    assert same(*batches)


def test_a_set_in_which_nothing_can_be_read_goes_on(tmp_path, caplog):
    data = make_folder(tmp_path / "tree", 20, bad=range(20))
    batches = take(data.shuffled(0, 0, sharding()), 5)
    assert all(not batch["weight"].any() and not batch["image"].any() for batch in batches)
    assert len(complaints(caplog)) == 20
    assert not joined(take(data.once(sharding()), 9))["weight"].any()


@pytest.mark.slow
def test_a_file_deleted_while_training_weighs_nothing(tmp_path, caplog):
    data = make_folder(tmp_path / "tree", 8)
    batches = data.shuffled(0, 0, sharding())
    assert next(batches)["weight"].all()
    gone = data.examples.name(2)
    Path(gone).unlink()
    later = take(batches, 250)  # what was read ahead is still whole
    assert (later[-1]["weight"] == 0).sum() == 1
    assert set(complaints(caplog)) == {gone}


def test_images_that_get_lost_are_an_error(tmp_path, monkeypatch):
    """As when there is no memory to prepare them, even with what cannot be decoded replaced."""
    data = make_folder(tmp_path / "tree", 40, bad=(20,))
    monkeypatch.setattr(Dataset, "_readable", lambda self, images, places, seed: np.ones(len(images), bool))
    with pytest.raises(DataError, match="lost"):
        take(data.once(sharding()), 10)


def test_big_images_among_small_ones(tmp_path):
    data = make_folder(tmp_path / "tree", 18)
    big = Image.new("RGB", (3000, 2000), (200, 0, 0))
    path = Path(data.examples.name(7))
    path.write_bytes(as_file(big, "JPEG"))
    whole = joined(take(data.once(sharding()), 9))
    assert whole["weight"][:18].all()
    assert abs(whole["image"][7].mean((0, 1)) - (200, 0, 0)).max() < 3
    for i, number in enumerate(numbers(data)):
        assert i == 7 or abs(whole["image"][i].mean() - (3 * number + 20)) < 1


MIXED = {
    "a.jpg": ("JPEG", "RGB"),
    "grey.jpeg": ("JPEG", "L"),
    "cmyk.JPG": ("JPEG", "CMYK"),
    "one/b.png": ("PNG", "RGB"),
    "one/grey.png": ("PNG", "L"),
    "one/two/rgba.png": ("PNG", "RGBA"),
    "one/two/palette.png": ("PNG", "P"),
    "one/two/sixteen.png": ("PNG", "I;16"),
    "one/two/bits.png": ("PNG", "1"),
    "c.gif": ("GIF", "P"),
    "d.webp": ("WEBP", "RGB"),
    "rgba.webp": ("WEBP", "RGBA"),
    "f.tif": ("TIFF", "RGB"),
    "sixteen.TIFF": ("TIFF", "I;16"),
    "e.bmp": ("BMP", "RGB"),
    "really_a_png.jpg": ("PNG", "RGB"),
    "really_a_jpeg.png": ("JPEG", "RGB"),
    "really_a_gif.jpg": ("GIF", "P"),
    "really_a_webp.png": ("WEBP", "RGB"),
}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tree_of_all_kinds_of_files(channels, tmp_path, caplog):
    for i, (place, (fmt, mode)) in enumerate(MIXED.items()):
        grey = np.full((30 + i, 40), 255, np.uint8)
        image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / place, fmt)
    (tmp_path / "readme.txt").write_text("not a picture")
    data = folder(tmp_path, channels=channels)
    whole = joined(take(data.once(sharding()), 9))
    assert whole["weight"].sum() == len(MIXED) and not complaints(caplog)
    assert whole["image"].shape[1:] == (16, 16, channels)
    assert (whole["image"][: len(MIXED)] >= 250).all()
    random = folder(tmp_path, channels=channels, **AUGMENTED)
    assert all(batch["weight"].all() for batch in take(random.shuffled(0, 0, sharding()), 4))


def test_tfds_images_have_their_labels(tfds_dir):
    data = Dataset(
        source="tfds",
        name="mini_pictures",
        data_dir=tfds_dir,
        batch_size=8,
        image_size=(5, 7),
        channels=1,
        split="train",
    )
    whole = joined(take(data.once(sharding()), 9))
    kept = whole["weight"] == 1
    assert sorted(whole["label"][kept]) == list(range(20))
    assert (whole["image"][kept] == 10 * whole["label"][kept][:, None, None, None]).all()


def test_settings_may_be_lists_as_in_a_config_read_from_json():
    plain = Dataset(**SYNTHETIC, batch_size=8, **AUGMENTED)
    lists = Dataset(
        **SYNTHETIC | {"image_size": [8, 12]},
        batch_size=8,
        **AUGMENTED,
        scale=list(plain.scale),
        ratio=list(plain.ratio),
    )
    a, b = (take(data.shuffled(0, 0, sharding()), 1)[0] for data in (plain, lists))
    assert same(a, b)


def all_of(data):
    return joined(take(data.once(sharding()), 1000))


def test_plain_images_are_those_of_evaluation_and_are_not_read_again(sets):
    data = dataclasses.replace(sets["folder"], repeats=4, held_out_augment="centre_crop")
    unread, size, plain = data.plain(), data.examples.size, data.plain()
    assert (plain.augment, plain.flip, plain.randaugment, plain.repeats) == ("centre_crop", False, 0, 1)
    assert plain.split == data.split and plain.opened is data.opened and plain.examples is data.examples
    assert unread == plain and "opened" not in vars(unread) and size == 21
    assert same(all_of(plain), all_of(folder(data.path, augment="centre_crop")))
    assert not same(all_of(plain), all_of(folder(data.path)))


def test_held_out_images_are_seen_as_the_setting_says_and_all_of_them():
    settings = SYNTHETIC | {"image_size": (8, 8), "held_out": "validation[:16]"}
    data = Dataset(**settings, batch_size=16, held_out_augment="centre_crop", per_class=3, **AUGMENTED)
    assert data.opened.size == 6
    held_out = data.held_out_set()
    assert held_out.opened.size == 16, "only the training images are fewer"
    want = Dataset(**settings | {"split": "validation[:16]"}, batch_size=16, augment="centre_crop")
    assert same(all_of(held_out), all_of(want))
    whole = Dataset(**settings | {"split": "validation[:16]"}, batch_size=16)
    assert not same(all_of(held_out), all_of(whole))


@pytest.mark.parametrize(
    ("settings", "augmented"),
    [
        ({}, False),
        ({"augment": "centre_crop"}, False),
        ({"repeats": 2}, False),
        ({"flip": True}, True),
        ({"jitter": 0.4}, True),
        ({"randaugment": 9.0}, True),
        ({"augment": "fixed_crop"}, True),
        ({"augment": "random_resized_crop"}, True),
        ({"augment": "random_resized_crop", "flip": True, "randaugment": 9.0}, True),
    ],
    ids=str,
)
def test_whether_images_are_augmented(settings, augmented):
    data = Dataset(**SYNTHETIC, batch_size=4, **settings)
    assert data.augmented == augmented
    assert not data.plain().augmented and not data.held_out_set().augmented


def test_a_set_that_holds_rows_gives_them_as_they_are_with_the_names_of_its_classes():
    data = Dataset(**SYNTHETIC, batch_size=16, per_class=5, repeats=1, **AUGMENTED)
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(37, 3)).astype(np.float32), rng.integers(0, 2, 37)
    held = data.holding(rows, labels)
    assert held.opened.labels == data.opened.labels
    assert held.ready and held.examples.size == held.opened.size == 37
    whole = all_of(held)
    assert whole["image"].dtype == np.float32 and whole["weight"].sum() == 37
    assert np.array_equal(whole["image"][:37], rows) and whole["label"][:37].tolist() == labels.tolist()
    place = {row.tobytes(): i for i, row in enumerate(rows)}
    epoch = joined(take(held.shuffled(0, 0, sharding()), 37))  # 16 epochs
    order = np.array([place[row.tobytes()] for row in epoch["image"]]).reshape(16, 37)
    assert (np.sort(order, axis=1) == np.arange(37)).all() and len({tuple(row) for row in order}) == 16
    assert np.array_equal(epoch["label"], labels[order.ravel()])


def test_rows_come_in_the_order_of_the_images_they_were_made_of(sets):
    """Training on features is training on these images: the same ones in every batch."""
    data = dataclasses.replace(sets["digits"], batch_size=8)
    images, labels = data.opened.read(np.arange(data.opened.size))
    held = data.holding(images.reshape(len(images), -1)[:, :5].astype(np.float64), labels)
    for of_images, of_rows in zip(
        take(data.shuffled(3, 4, sharding()), 5), take(held.shuffled(3, 4, sharding()), 5), strict=True
    ):
        assert np.array_equal(of_images["image"].reshape(8, -1)[:, :5], of_rows["image"])
        assert np.array_equal(of_images["label"], of_rows["label"])


def test_so_many_images_of_each_class_are_trained_on():
    data = Dataset(source="digits", batch_size=16, image_size=(8, 8), channels=1, per_class=8)
    epoch = joined(take(data.shuffled(0, 0, sharding()), 5))
    assert np.bincount(epoch["label"]).tolist() == [8] * 10
    assert len({image.tobytes() for image in epoch["image"]}) == 80
    other = Dataset(source="digits", batch_size=16, image_size=(8, 8), channels=1, per_class=8, subset_seed=1)
    assert not np.array_equal(all_of(data)["image"], all_of(other)["image"])
    assert not np.array_equal(all_of(data.but(subset_seed=1))["image"], all_of(data)["image"])
