"""Where images come from: a source is a count of examples and a way to read any of them by index."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import absl.logging
import numpy as np
from etils import epy

from mae_jax.errors import ConfigError, nearest

with epy.lazy_imports():
    import tensorflow_datasets as tfds  # imports TensorFlow, which takes seconds

LABELS_AT_ONCE = 4096  # read together where only labels are wanted
MAX_BYTES = 2**29  # of a file: the largest picture that is decoded (augment.MAX_PIXELS) has no more of them as RGB
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples that can be read in any order.

    Attributes:
      size: number of examples.
      read: indexes i64[n] -> (images, labels i64[n]). Images are n files as bytes, b"" where one cannot be read; or
        they are decoded already, n arrays uint8[h,w,C], with h = 0 for what could not be.
      encoded: whether images are files.
      name: index -> what to call that example in a log.
      shape: (h, w, C) where the source fixes them, with None for what differs from image to image; else None. Where
        all three are fixed, the images that are read are one array uint8[n,h,w,C].
      labels: the names of the classes; empty where there are none, and labels are then -1.
      rows: whether these are no images but rows of any shape and dtype, which are passed on as they are.
      identity: what tells these files from any others, as text; none where they are made in memory.
    """

    size: int
    read: Callable[[np.ndarray], tuple[Sequence, np.ndarray]]
    encoded: bool
    name: Callable[[int], str]
    shape: tuple[int | None, int | None, int] | None = None
    labels: tuple[str, ...] = ()
    identity: Callable[[], str] | None = None
    rows: bool = False


def subset(split: str, base_sizes: dict[str, int]) -> np.ndarray:
    """The indexes that a split expression of TFDS means: "train", "train[:90%]", "test[100:200]".

    Percentages are rounded down, so that [:90%] and [90%:] part a set between them.

    >>> subset("all[80%:]", {"all": 12})
    array([ 9, 10, 11])
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d{1,18}%?)?:(-?\d{1,18}%?)?\])?", split)
    if not match or match[1] not in base_sizes:
        split = split if len(split) <= 80 else f"{split[:80]}..."
        raise ConfigError(f"config.data: no split {split!r}; use {' or '.join(base_sizes)}, or a slice such as [:90%]")
    size = base_sizes[match[1]]

    def bound(text):
        return text and (size * int(text[:-1]) // 100 if text.endswith("%") else int(text))

    return np.arange(size)[slice(bound(match[2]), bound(match[3]))]


def in_memory(images: np.ndarray, labels: np.ndarray, split: str, names: Sequence[str]) -> Source:
    """A source of images uint8[n,h,w,C] and labels i64[n]."""
    return Source(
        size=len(images),
        read=lambda index: (images[index], labels[index]),
        encoded=False,
        name=lambda index: f"{split} image {index}",
        shape=images.shape[1:],
        labels=tuple(names),
    )


def balanced(source: Source, per_class: int, seed: int) -> Source:
    """`per_class` examples of each class of `source`, drawn without replacement; the same ones for the same `seed`.

    Raises:
      ConfigError: there are no classes, or one has fewer examples.
    """
    if not source.labels:
        raise ConfigError("config.data.per_class: this data set has no labels, of at least two classes; set it to 0")
    labels = labels_of(source)
    counts = np.bincount(labels[labels >= 0], minlength=len(source.labels))
    if counts.min() < per_class:
        fewest = int(counts.argmin())
        raise ConfigError(
            f"config.data.per_class: {per_class}, but class {source.labels[fewest]!r} has {counts[fewest]} images"
        )
    order = np.random.RandomState(seed).permutation(source.size)  # its numbers are promised never to change
    kept = [order[labels[order] == c][:per_class] for c in range(len(source.labels))]
    index = np.sort(np.concatenate(kept))
    identity = source.identity and (lambda: f"{source.identity()} {per_class} a class {seed}")
    return dataclasses.replace(
        source,
        size=len(index),
        read=lambda at: source.read(index[at]),
        name=lambda at: source.name(int(index[at])),
        identity=identity,
    )


def labels_of(source: Source) -> np.ndarray:
    """The label of each example, i64[n]; files are read for it, one and all."""
    chunks = [np.arange(i, min(i + LABELS_AT_ONCE, source.size)) for i in range(0, source.size, LABELS_AT_ONCE)]
    return np.concatenate([source.read(index)[1] for index in chunks])


def digits(*, split: str, **_) -> Source:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, in the package itself; every fifth one is for "test"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(images)) % 5 == 4
    parts = {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}
    base = split.split("[")[0]
    index = subset(split, {name: len(part) for name, part in parts.items()})
    index = parts[base][index]
    return in_memory(images[index], data.target[index].astype(np.int64), split, [str(i) for i in range(10)])


def synthetic(*, split: str, image_size: Sequence[int], channels: int, **_) -> Source:
    """1024 images of smooth random colour, for trials without data: the same at every call."""
    index = subset(split, {"train": 1024, "validation": 256, "test": 256, "all": 1024})
    rng = np.random.default_rng(sum(map(ord, split.split("[")[0])))
    coarse = rng.uniform(0, 255, (1024, 4, 4, channels))
    rows, cols = (np.arange(size) * 4 // size for size in image_size)
    images = coarse[index].astype(np.uint8)[:, rows][:, :, cols]  # bytes from the start: they are many
    labels = (coarse[index].mean(axis=(1, 2, 3)) > 127.5).astype(np.int64)
    return in_memory(images, labels, split, ["dark", "light"])


def folder(*, split: str, path: str, **_) -> Source:
    """Every image file below `path`, at any depth. The first folder of a file's path is its label.

    `path`/SPLIT is used where there is such a folder ("train", "val", ...); "all" is the whole tree. Files are
    put in one fixed random order, so that slices such as "all[:95%]" are fair samples.
    """
    root = Path(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise ConfigError(f"config.data.path: no folder {path!r}; set config.data.path to a folder of image files")
    base = split.split("[")[0]
    if base not in ("", "all") and (root / base).is_dir():
        root = root / base
    elif base != "all":
        raise ConfigError(f"config.data: no split {split!r}, a folder in {str(root)!r}; use 'all' for the whole tree")
    files = sorted(p for p in _walk(root) if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not files:
        raise ConfigError(f"config.data.path: no image file ({', '.join(sorted(EXTENSIONS))}) below {str(root)!r}")
    index = np.random.default_rng(0).permutation(len(files))[subset(split, {base: len(files)})]
    names = [file.relative_to(root).parts[0] if len(file.relative_to(root).parts) > 1 else "" for file in files]
    classes = sorted(set(names))
    if len(classes) < 2:
        return image_files([files[i] for i in index])
    return image_files([files[i] for i in index], np.array([classes.index(names[i]) for i in index]), classes)


def _walk(root: Path) -> Iterator[Path]:
    """All files below `root`. Links to folders are followed, as class folders often are links, but no folder twice."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(below)
        if real not in seen:
            seen.add(real)
            yield from (Path(folder) / name for name in names)


def files(*, path: str, **_) -> Source:
    """The image files that `path` names: paths and patterns such as photos/*.jpg, separated by commas."""
    found = []
    for pattern in path.split(","):
        matches = sorted(glob.glob(os.path.expanduser(pattern.strip()), recursive=True))
        matches = [Path(match) for match in matches if os.path.isfile(match)]
        if not matches:
            raise ConfigError(f"no image file {pattern.strip()!r}; name files, or patterns such as photos/*.png")
        found += matches
    return image_files(list(dict.fromkeys(found)))


def image_files(paths: Sequence[Path], labels: np.ndarray | None = None, classes: Sequence[str] = ()) -> Source:
    """The image files at the given paths, in that order."""
    labels = np.full(len(paths), -1) if labels is None else labels

    def read(index):
        return [_bytes(paths[i]) for i in index], labels[index].astype(np.int64)

    def identity():
        found = [(os.path.abspath(path), os.stat(path)) for path in paths]
        return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found)

    return Source(len(paths), read, True, lambda i: str(paths[i]), labels=tuple(classes), identity=identity)


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # half the time of Path.read_bytes
            # a sparse file of any size takes no room on a disk, and all of it in memory
            return file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else b""
    except OSError:
        return b""


def from_tfds(*, split: str, name: str, data_dir: str, **_) -> Source:
    """A data set of TensorFlow Datasets, prepared as array_record: the format that can be read by index.

    `split` is any expression of TFDS. The data set needs one feature of type Image; a `label` is used if there is one.
    """
    builder = tfds_builder(name, data_dir)
    if not is_prepared(builder):
        where = f" --config.data.data_dir={data_dir}" if data_dir else ""
        raise ConfigError(
            f"config.data.name: {name} is not prepared in {builder.data_path} as array_record; "
            f"prepare it with: mae-jax prepare --config=configs/prepare.py:{name}{where}"
        )
    images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    if len(images) != 1:
        known = ", ".join(builder.info.features)
        raise ConfigError(f"config.data.name: {name} has {len(images)} image features, not one; it has {known}")
    (image,) = images
    try:
        records = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        size = len(records)
    except (ValueError, NotImplementedError) as error:
        known = ", ".join(builder.info.splits)
        raise ConfigError(f"config.data: {name} has no split {split!r}; it has {known}, and slices of them") from error
    features = dict(builder.info.features)
    classes = tuple(features["label"].names) if isinstance(features.get("label"), tfds.features.ClassLabel) else ()

    def read(index):
        examples = records.__getitems__(index.tolist())
        return [e[image] for e in examples], np.array([e["label"] if classes else -1 for e in examples], np.int64)

    identity = lambda: f"{builder.data_path} {split}"  # noqa: E731
    return Source(size, read, True, lambda i: f"{name} {split} image {i}", labels=classes, identity=identity)


# Images of well-known data sets of TFDS, so that their number can be told where they are not.
SIZES = {
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
}


def known_size(name: str, split: str) -> int | None:
    """How many images a split of a data set of TFDS has, prepared or not; None where only looking would tell.

    >>> known_size("imagenet2012:5.1.0", "train[:10%]")
    128116
    """
    sizes = SIZES.get(re.split("[:/]", name)[0], {})
    return len(subset(split, sizes)) if split.partition("[")[0] in sizes else None


def tfds_builder(name: str, data_dir: str):
    """The TFDS builder of `name`, in `data_dir` (TFDS's own default if empty)."""
    try:
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise ConfigError(f"config.data.name: TFDS has no data set {name!r}{nearest(name, known)}") from error
    except Exception as error:  # no such version or configuration, no name at all, another file format
        reason = " ".join(str(error).split())
        if "File format is already set" in reason:
            reason = "it is there in a format that cannot be read by index; prepare it in another config.data.data_dir"
        raise ConfigError(f"config.data.name: TFDS cannot open {name!r}: {reason[:500]}") from error


def is_prepared(builder) -> bool:
    """Whether the files of a TFDS builder are there; where they are not, TFDS would print a warning too."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        return builder.is_prepared()
    finally:
        absl.logging.set_verbosity(verbosity)


# A source is opened by `f(*, split, **settings) -> Source`; it takes what it needs of the settings of `data`.
SOURCES = {"digits": digits, "tfds": from_tfds, "folder": folder, "files": files, "synthetic": synthetic}
