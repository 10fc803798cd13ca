"""Decoded images, kept in memory or in a folder, for data sets that fit: reading one is then a copy."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epy

from mae_jax.data.augment import decode
from mae_jax.data.sources import Source
from mae_jax.errors import ConfigError, DataError

with epy.lazy_imports():
    import tensorflow as tf

CHUNK = 256  # images read at once


def decoded(source: Source, channels: int, where: str) -> Source:
    """`source` with all its images decoded, each once, to uint8[h,w,C] of the size it has.

    Args:
      where: "memory", or a folder that will hold a file of h * w * C bytes an image; another run finds it there,
        unless the image files have changed.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    if where == "memory":
        file = io.BytesIO()
        shapes, labels = _decode_all(source, channels, file)
        pixels = np.frombuffer(file.getbuffer(), np.uint8)
    else:
        folder = Path(os.path.expanduser(where)) / _digest(source, channels)
        try:
            if not folder.exists():
                _write(source, channels, folder)
            with (folder / "table.npz").open("rb") as file:
                table = np.load(file)
                shapes, labels = table["shapes"], table["labels"]
            pixels = np.memmap(folder / "pixels", np.uint8, "r") if shapes.any() else np.zeros(0, np.uint8)
            if len(pixels) != shapes.prod(axis=1).sum() * channels or len(shapes) != source.size:
                raise ValueError("the files are not whole")
        except OSError as error:
            raise ConfigError(f"config.data.cache: {error}; name a folder with room for the decoded images") from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"config.data.cache: {folder} is damaged ({error}); delete it") from error
    alike = bool(len(shapes)) and bool((shapes == shapes[0]).all()) and bool(shapes[0].all())
    if alike:
        images = pixels.reshape(len(shapes), *shapes[0], channels)
    else:
        ends = np.cumsum(shapes.prod(axis=1) * channels)

    def read(index):
        if alike:
            return images[index], labels[index]
        starts = ends[index] - shapes[index].prod(axis=1) * channels
        found = [pixels[a:b] for a, b in zip(starts, ends[index], strict=True)]
        return [x.reshape(*s, channels) for x, s in zip(found, shapes[index], strict=True)], labels[index]

    shape = (*shapes[0].tolist(), channels) if alike else (None, None, channels)
    return Source(source.size, read, False, source.name, shape, source.labels)


def _digest(source: Source, channels: int) -> str:
    text = f"{source.size} {channels} {source.identity()}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _write(source: Source, channels: int, folder: Path) -> None:
    """Decode into `folder`, which is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as name:
        unfinished = Path(name) / "whole"
        unfinished.mkdir()
        with (unfinished / "pixels").open("wb") as file:
            shapes, labels = _decode_all(source, channels, file)
        np.savez(unfinished / "table.npz", shapes=shapes, labels=labels)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def _decode_all(source: Source, channels: int, file) -> tuple[np.ndarray, np.ndarray]:
    """Write the pixels of all images to `file`; their (h, w) i64[n,2], (0, 0) where it cannot be read, and labels."""
    print(f"decoding {source.size} images, to keep them", flush=True)
    shapes, labels = [], []
    for image, label in _decode_each(source, channels):
        shapes.append(image.shape[:2])
        labels.append(label)
        file.write(image.tobytes())
    if len(shapes) != source.size:
        raise DataError(f"of {source.size} images only {len(shapes)} could be decoded; is there enough memory?")
    return np.array(shapes, np.int64).reshape(-1, 2), np.array(labels, np.int64)


def _decode_each(source: Source, channels: int) -> Iterator[tuple[np.ndarray, int]]:
    tf.config.set_visible_devices([], "GPU")

    def read(start):
        images, labels = source.read(np.arange(start, min(start + CHUNK, source.size)))
        return np.array(images, object), labels

    examples = (
        tf.data.Dataset.range(0, source.size, CHUNK)
        .map(lambda start: tf.numpy_function(read, [start], (tf.string, tf.int64), stateful=False))
        .map(lambda images, labels: (tf.ensure_shape(images, (None,)), tf.ensure_shape(labels, (None,))))
        .unbatch()
        .map(lambda image, label: (decode(image, channels), label), tf.data.AUTOTUNE, deterministic=True)
        .prefetch(CHUNK)
        .as_numpy_iterator()
    )
    while True:
        try:
            yield next(examples)
        except StopIteration:
            return
        except Exception:  # of TensorFlow or Pillow, and there are many; who reads this image will report it
            yield np.zeros((0, 0, channels), np.uint8), -1
