"""Every source has a size, reads any index, and says in one line what is missing."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from mae_jax.data import sources
from mae_jax.data.sources import MAX_BYTES, SOURCES, balanced, in_memory, subset
from mae_jax.errors import ConfigError


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """12 pictures in nested folders of three classes, and one at the top: the first pixel of each tells its number."""
    root = tmp_path_factory.mktemp("tree")
    places = ["top.png"] + [
        f"{label}/{'deep/er/' * (i % 2)}{i}.PNG" for label in ("cat", "dog", "eel") for i in range(4)
    ]
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / place)
    (root / "cat/notes.txt").write_text("not a picture")
    (root / "not_a_file.png").mkdir()
    return root


@pytest.fixture(scope="session")
def settings(tree, tfds_dir):
    """By source: settings that open it, and the same for another split, with no example in common."""
    size = {"image_size": (8, 8), "channels": 1}
    mini = {"name": "mini_pictures", "data_dir": tfds_dir}
    settings = {
        "digits": (size | {"split": "train"}, size | {"split": "test"}),
        "synthetic": (size | {"split": "train"}, size | {"split": "test"}),
        "folder": ({"path": str(tree), "split": "all[:70%]"}, {"path": str(tree), "split": "all[70%:]"}),
        "files": (
            {"path": f"{tree}/cat/*.PNG", "split": ""},
            {"path": f"{tree}/dog/*.PNG,{tree}/top.png", "split": ""},
        ),
        "tfds": (mini | {"split": "train[:15]"}, mini | {"split": "train[15:]"}),
    }
    assert set(settings) == set(SOURCES)
    return settings


def first_pixel(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))[0]


def problem(source: str, /, **settings) -> str:
    """The one line that opening a source fails with."""
    with pytest.raises(ConfigError) as error:
        SOURCES[source](**settings)
    (line,) = error.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_source_promises(name, settings):
    source = SOURCES[name](**settings[name][0])
    images, labels = source.read(np.arange(source.size))
    assert len(images) == len(labels) == source.size > 1
    assert labels.dtype == np.int64 and labels.shape == (source.size,)
    if source.labels:
        assert labels.min() >= 0 and labels.max() < len(source.labels)
    else:
        assert (labels == -1).all()
    if source.encoded:
        assert all(isinstance(image, bytes) and image for image in images)
    else:
        assert images.dtype == np.uint8 and images.shape == (source.size, 8, 8, source.shape[-1])
    assert len({source.name(i) for i in range(source.size)}) == source.size


@pytest.mark.parametrize("name", SOURCES)
def test_reads_any_index_in_any_order_again_and_again(name, settings):
    source = SOURCES[name](**settings[name][0])
    images, labels = source.read(np.arange(source.size))
    order = np.array([source.size - 1, 0, 1, 0])
    again, labels_again = SOURCES[name](**settings[name][0]).read(order)
    assert all(np.array_equal(x, images[i]) for x, i in zip(again, order, strict=True))
    assert labels_again.tolist() == labels[order].tolist()


@pytest.mark.parametrize("name", SOURCES)
def test_the_other_split_shares_no_example(name, settings):
    def contents(options):
        source = SOURCES[name](**options)
        return {x if isinstance(x, bytes) else x.tobytes() for x in source.read(np.arange(source.size))[0]}

    first, second = map(contents, settings[name])
    assert first and second and not first & second


@pytest.mark.parametrize("name", sorted({*SOURCES} - {"files"}))
@pytest.mark.parametrize("split", ["nope", "", "train[", "all[:5", "all[::2]", "all[x:]", "train test"])
def test_an_unknown_split_is_refused_with_what_there_is(name, split, settings):
    line = problem(name, **settings[name][0] | {"split": split})
    assert "split" in line and repr(split) in line and ("all" if name in ("folder", "synthetic") else "train") in line


@pytest.mark.parametrize("size", [1, 2, 7, 10, 99, 1438])
@pytest.mark.parametrize("cut", ["0%", "1%", "33%", "50%", "90%", "99%", "100%", "0", "1", "5", "-1", "-10%", "5000"])
def test_a_cut_parts_the_set(size, cut):
    parts = [subset(f"all{part}", {"all": size}) for part in (f"[:{cut}]", f"[{cut}:]")]
    assert np.concatenate(parts).tolist() == list(range(size))


def test_percent_slices_in_a_row_part_the_set():
    edges = [f"{p}%" for p in range(0, 101, 7)] + ["100%"]
    parts = [subset(f"all[{a}:{b}]", {"all": 83}) for a, b in itertools.pairwise(edges)]
    assert np.concatenate(parts).tolist() == list(range(83))


@pytest.mark.parametrize(
    ("split", "want"),
    {
        "a": [*range(10)],
        "a[:]": [*range(10)],
        "a[:25%]": [0, 1],  # rounded down
        "a[75%:]": [7, 8, 9],
        "a[2:4]": [2, 3],
        "a[-2:]": [8, 9],
        "a[-20%:-1]": [8],
        "a[20%:5]": [2, 3, 4],
        "a[5:3]": [],
        "a[20:30]": [],
    }.items(),
)
def test_split_expressions(split, want):
    assert subset(split, {"a": 10, "b": 3}).tolist() == want


def test_digits_are_those_of_scikit_learn_with_every_fifth_held_out():
    data = load_digits()
    train, test = (SOURCES["digits"](split=split) for split in ("train", "test"))
    assert (train.size, test.size) == (1438, 359)
    is_test = np.arange(1797) % 5 == 4
    for source, which in ((train, ~is_test), (test, is_test)):
        images, labels = source.read(np.arange(source.size))
        assert labels.tolist() == data.target[which].tolist()
        assert np.array_equal(np.round(images[..., 0] / 255 * 16), data.images[which])
        assert images.max() == 255
    assert train.labels == tuple("0123456789")


def test_digits_can_be_sliced():
    whole = SOURCES["digits"](split="test")
    part = SOURCES["digits"](split="test[300:]")
    assert part.size == 59
    assert np.array_equal(part.read(np.arange(59))[0], whole.read(np.arange(300, 359))[0])


@pytest.mark.parametrize(("image_size", "channels"), [((16, 24), 3), ((4, 4), 1), ((7, 3), 5)])
def test_synthetic_images_have_the_size_asked_for(image_size, channels):
    source = SOURCES["synthetic"](split="validation[:10]", image_size=image_size, channels=channels)
    images, labels = source.read(np.arange(10))
    assert source.size == 10 and source.shape == (*image_size, channels) and images.shape == (10, *image_size, channels)
    assert len(np.unique(images[0])) > 2 and {*labels} <= {0, 1}


def test_a_folder_holds_every_image_at_any_depth_labelled_by_its_first_folder(tree):
    source = SOURCES["folder"](path=str(tree), split="all")
    images, labels = source.read(np.arange(source.size))
    assert source.labels == ("", "cat", "dog", "eel")
    number = [first_pixel(image) for image in images]
    assert sorted(number) == list(range(13))
    assert labels.tolist() == [(n + 3) // 4 for n in number]
    assert all(source.labels[label] in source.name(i) for i, label in enumerate(labels))


def test_a_folder_is_in_one_fixed_mixed_order(tree):
    once, again = (SOURCES["folder"](path=str(tree), split="all") for _ in range(2))
    names = [once.name(i) for i in range(13)]
    assert names == [again.name(i) for i in range(13)]
    assert names != sorted(names)
    labels = once.read(np.arange(13))[1]
    assert len(set(labels[:6])) > 2  # not class by class


@pytest.mark.parametrize("cut", ["90%", "10%", "5", "-3"])
def test_slices_of_a_folder_part_it(tree, cut):
    names = []
    for part in (f"all[:{cut}]", f"all[{cut}:]"):
        source = SOURCES["folder"](path=str(tree), split=part)
        names += [source.name(i) for i in range(source.size)]
    assert len(names) == len(set(names)) == 13


def test_a_slice_of_a_folder_has_the_labels_of_the_whole(tree):
    part = SOURCES["folder"](path=str(tree), split="all[:2]")
    assert part.labels == SOURCES["folder"](path=str(tree), split="all").labels


@pytest.mark.parametrize("split", ["train", "train[:50%]", "val-2"])
def test_a_split_of_a_folder_may_be_a_folder_in_it(tmp_path, split):
    for place in ("train/a/1.png", "train/b/2.png", "val-2/a/3.png", "val-2/b/4.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    source = SOURCES["folder"](path=str(tmp_path), split=split)
    assert source.size == (1 if "%" in split else 2) and source.labels == ("a", "b")
    assert all(split.split("[")[0] in source.name(i) for i in range(source.size))


def test_a_folder_without_folders_has_no_labels(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    source = SOURCES["folder"](path=str(tmp_path), split="all")
    assert source.labels == () and source.read(np.array([0]))[1].tolist() == [-1]


def test_links_to_folders_are_followed_but_never_in_a_circle(tmp_path):
    for place in ("tree/cat/1.png", "tree/dog/2.png", "elsewhere/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    tree = tmp_path / "tree"
    (tree / "eel").symlink_to(tmp_path / "elsewhere")
    (tree / "cat/up").symlink_to(tree)
    (tree / "cat/dogs").symlink_to(tree / "dog")
    (tree / "dog/cats").symlink_to(tree / "cat")
    (tree / "gone.png").symlink_to(tmp_path / "gone.png")
    source = SOURCES["folder"](path=str(tree), split="all")
    names = [Path(source.name(i)) for i in range(source.size)]
    assert sorted(name.name for name in names) == ["1.png", "2.png", "3.png"]
    assert "eel" in source.labels


@pytest.mark.parametrize("path", ["", "gone", "~no_such_user_here/x", "file.png", "x" * 5000])
def test_a_missing_folder_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    line = problem("folder", path=path, split="all")
    assert "config.data.path" in line and repr(path) in line


def test_an_empty_folder_is_named_with_what_was_looked_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("")
    line = problem("folder", path=str(tmp_path), split="all")
    assert "config.data.path" in line and str(tmp_path) in line and ".png" in line


def test_an_unreadable_file_comes_as_no_bytes(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    source = SOURCES["folder"](path=str(tmp_path), split="all")
    gone = 1
    Path(source.name(gone)).unlink()
    images, labels = source.read(np.arange(3))
    assert [bool(image) for image in images] == [i != gone for i in range(3)] and len(labels) == 3


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 300 * 2**30], ids=["one byte too many", "300 GiB"])
def test_a_file_of_more_bytes_than_a_picture_has_comes_as_none(size, tmp_path):
    picture, sparse = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (4, 4)).save(picture)
    sparse.touch()
    os.truncate(sparse, size)
    images, _ = SOURCES["files"](path=f"{picture},{sparse}").read(np.arange(2))
    assert images == [picture.read_bytes(), b""]


def test_files_come_in_the_order_named(tree):
    def numbers(path):
        source = SOURCES["files"](path=path)
        return [first_pixel(image) for image in source.read(np.arange(source.size))[0]]

    assert numbers(f"{tree}/top.png") == [0]
    assert numbers(f"{tree}/dog/0.PNG, {tree}/top.png") == [5, 0]
    assert numbers(f"{tree}/cat/*.PNG") == [1, 3]
    assert sorted(numbers(f"{tree}/**/*.PNG")) == list(range(1, 13))
    assert numbers(f"{tree}/*.png") == [0]  # and not the folder of that name


@pytest.mark.parametrize("bad", ["gone.png", "*.jpg", "", ".", "~no_such_user_here/x.png"])
def test_files_that_are_not_there_are_named(tree, monkeypatch, bad):
    monkeypatch.chdir(tree)
    assert repr(bad) in problem("files", path=f"top.png,{bad}")


def test_tfds_reads_what_was_prepared(tfds_dir):
    source = SOURCES["tfds"](name="mini_pictures", data_dir=tfds_dir, split="train")
    images, labels = source.read(np.arange(20))
    assert sorted(labels) == list(range(20)) and source.labels == tuple(map(str, range(20)))
    assert [first_pixel(image) for image in images] == [10 * label for label in labels]
    assert "mini_pictures" in source.name(3) and "3" in source.name(3)


@pytest.mark.parametrize(
    ("split", "size"), {"train[:50%]": 10, "train[-3:]": 3, "train+test": 25, "test[1:3]": 2}.items()
)
def test_tfds_takes_the_split_expressions_of_tfds(tfds_dir, split, size):
    assert SOURCES["tfds"](name="mini_pictures", data_dir=tfds_dir, split=split).size == size


@pytest.mark.parametrize("split", ["train[5:3]", "train[:101%]", "train[200:300]"])
def test_tfds_refuses_impossible_slices(tfds_dir, split):
    assert repr(split) in problem("tfds", name="mini_pictures", data_dir=tfds_dir, split=split)


def test_an_unknown_tfds_set_gets_the_nearest_name(tmp_path):
    line = problem("tfds", name="fashion_mnst", data_dir=str(tmp_path), split="train")
    assert "config.data.name" in line and "did you mean fashion_mnist?" in line


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b/c", "mini_pictures:9.9.9", "mini_pictures/huge"])
def test_an_impossible_tfds_name_is_one_line(tfds_dir, name):
    line = problem("tfds", name=name, data_dir=tfds_dir, split="train")
    assert "config.data.name" in line and repr(name) in line


def test_an_unprepared_tfds_set_gets_the_command_that_prepares_it(tmp_path, capfd):
    line = problem("tfds", name="fashion_mnist", data_dir=str(tmp_path), split="train")
    command = f"mae-jax prepare --config=configs/prepare.py:fashion_mnist --config.data.data_dir={tmp_path}"
    assert "config.data.name" in line and line.endswith(command)
    assert capfd.readouterr() == ("", "")


def test_a_tfds_set_in_another_format_is_refused(tmp_path):
    tfds.builder("mini_pictures", data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    line = problem("tfds", name="mini_pictures", data_dir=str(tmp_path), split="train")
    assert "config.data.name" in line and "config.data.data_dir" in line and "format" in line


def test_a_tfds_set_must_have_one_image_an_example(tfds_dir):
    line = problem("tfds", name="mini_pairs", data_dir=tfds_dir, split="train")
    assert "2 image features" in line and "left, right" in line


def pixels_of(source):
    return source.read(np.arange(source.size))[0]


@pytest.mark.parametrize("per_class", [1, 7, 127])
def test_a_balanced_part_has_as_many_of_each_class_and_none_twice(per_class):
    whole = SOURCES["digits"](split="train")
    part = balanced(whole, per_class, seed=0)
    images, labels = part.read(np.arange(part.size))
    assert part.size == 10 * per_class and part.labels == whole.labels
    assert np.bincount(labels).tolist() == [per_class] * 10
    names = [part.name(i) for i in range(part.size)]
    assert len(set(names)) == part.size
    where = {whole.name(i): i for i in range(whole.size)}
    index = np.array([where[name] for name in names])
    assert (np.diff(index) > 0).all(), "in the order of the whole"
    for got, want in zip((images, labels), whole.read(index), strict=True):
        assert np.array_equal(got, want), "the name is that of the image"


def test_a_balanced_part_is_that_of_its_seed():
    whole = SOURCES["digits"](split="train")
    first, again, other = (pixels_of(balanced(whole, 20, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    # with chance alone at work, a twelfth or so of one part is in the other
    assert len({x.tobytes() for x in first} & {x.tobytes() for x in other}) < 100
    parts = [balanced(whole, 20, seed).identity for seed in (0, 1)]
    assert parts == [None, None], "made in memory"


def test_a_larger_balanced_part_holds_the_smaller_one():
    whole = SOURCES["digits"](split="train")
    small, large = ({x.tobytes() for x in pixels_of(balanced(whole, n, seed=3))} for n in (5, 50))
    assert small < large


def test_labels_of_a_balanced_part_are_read_some_at_a_time(monkeypatch):
    whole = SOURCES["digits"](split="train")
    want = pixels_of(balanced(whole, 20, seed=0))
    monkeypatch.setattr(sources, "LABELS_AT_ONCE", 100)
    assert np.array_equal(pixels_of(balanced(whole, 20, seed=0)), want)


def test_a_balanced_part_of_files_reads_those_alone_and_is_told_from_others(tree):
    source = SOURCES["folder"](path=f"{tree}", split="all")
    parts = {(n, seed): balanced(source, n, seed) for n, seed in ((1, 0), (1, 1))}
    part = parts[1, 0]
    images, labels = part.read(np.arange(part.size))
    assert labels.tolist() in [list(order) for order in itertools.permutations(range(4))]
    assert [first_pixel(image) for image in images] == [
        first_pixel(Path(part.name(i)).read_bytes()) for i in range(part.size)
    ]
    assert len({source.identity(), *(other.identity() for other in parts.values())}) == 3


def test_images_without_a_label_are_in_no_balanced_part():
    images = np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1)
    source = in_memory(images, np.array([0, -1, 1, -1, 0, 1, -1, 1, 0]), "all", ("a", "b"))
    for seed in range(5):
        part = balanced(source, 3, seed)
        assert part.read(np.arange(6))[0].ravel().tolist() == [0, 2, 4, 5, 7, 8]


def test_too_few_images_of_a_class_for_a_balanced_part_are_named():
    whole = SOURCES["digits"](split="train[:60]")
    labels = whole.read(np.arange(60))[1]
    fewest = np.bincount(labels, minlength=10).min()
    balanced(whole, fewest, seed=0)
    with pytest.raises(ConfigError) as error:
        balanced(whole, fewest + 1, seed=0)
    (line,) = error.value.problems
    rare = int(np.bincount(labels, minlength=10).argmin())
    assert line == f"config.data.per_class: {fewest + 1}, but class '{rare}' has {fewest} images"


def test_without_labels_there_is_no_balanced_part(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match=r"config.data.per_class: .* no labels"):
        balanced(SOURCES["folder"](path=str(tmp_path), split="all"), 1, seed=0)
