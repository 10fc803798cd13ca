"""What is in a split: every image of it read once, as evaluation reads it."""

from __future__ import annotations

import collections
import dataclasses
import io
import logging
import re
import time
from collections.abc import Sequence

import numpy as np
from etils import epy
from PIL import Image

from mae_jax.data.augment import decode
from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import MAX_BYTES

with epy.lazy_imports():
    import tensorflow as tf

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
      size: number of images.
      unreadable: what to call those that cannot be read.
      reasons: why that is, of the first of them.
      sizes: (h, w) of the others, i64[n,2], ascending by h * w.
      kinds: how many there are of each kind, such as "JPEG RGB".
      per_class: how many images each class has, those that cannot be read among them.
      mean, std: of the pixels by channel, between 0 and 1, as evaluation sees them.
      seconds: that reading took.
    """

    size: int
    unreadable: Sequence[str]
    reasons: Sequence[str]
    sizes: np.ndarray
    kinds: dict[str, int]
    per_class: dict[str, int]
    mean: np.ndarray
    std: np.ndarray
    seconds: float


def survey(data: Dataset, told: int = 20) -> Survey:
    """Read all of `data`, without its augmentation and its cache; of the first `told` unreadable images, say why."""
    data = data.plain().but(cache="")
    source, labels, headers = data.opened, {}, {}

    def read(index):
        images, classes = source.read(index)
        labels.update(zip(index.tolist(), classes.tolist(), strict=True))
        headers.update((i, _header(image)) for i, image in zip(index.tolist(), images, strict=True))
        return images, classes

    watched = data.but(batch_size=BATCH)
    watched.__dict__.update(opened=dataclasses.replace(source, read=read))
    weights, count, total, squares = [], 0, np.zeros(data.channels), np.zeros(data.channels)
    began, level = time.perf_counter(), logging.root.manager.disable
    logging.disable(logging.WARNING)  # what cannot be read is told below
    try:
        for batch in watched.once(None):
            weights.append(batch["weight"])
            pixels = batch["image"][batch["weight"] > 0].reshape(-1, data.channels).astype(np.int64)
            count, total, squares = count + len(pixels), total + pixels.sum(axis=0), squares + (pixels**2).sum(axis=0)
    finally:
        logging.disable(level)
    seconds = time.perf_counter() - began
    readable = np.concatenate(weights)[: source.size] > 0
    bad, good = np.flatnonzero(~readable).tolist(), np.flatnonzero(readable).tolist()
    known = [headers[i] for i in good if headers[i]]
    sizes = np.array(sorted((size for _, size in known), key=np.prod), np.int64).reshape(-1, 2)
    classes = collections.Counter(labels[i] for i in range(source.size))
    mean = total / max(count, 1) / 255
    return Survey(
        size=source.size,
        unreadable=[source.name(i) for i in bad],
        reasons=[_reason(source.read(np.array([i]))[0][0]) for i in bad[:told]],
        sizes=sizes,
        kinds=dict(collections.Counter(kind for kind, _ in known).most_common()),
        per_class={name: classes[i] for i, name in enumerate(source.labels)},
        mean=mean,
        std=np.sqrt(np.maximum(squares / max(count, 1) / 255**2 - mean**2, 0)),
        seconds=seconds,
    )


def _header(image: bytes | np.ndarray) -> tuple[str, tuple[int, int]] | None:
    """The kind and (h, w) of an image, without decoding it; None where that cannot be told."""
    if isinstance(image, np.ndarray):
        return f"array of {image.shape[-1]} channel(s)", image.shape[:2]
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return f"{opened.format} {opened.mode}", (opened.height, opened.width)
    except Exception:  # of Pillow, and there are many
        return None


def _reason(image: bytes | np.ndarray) -> str:
    """Why an image cannot be read, in one line."""
    if not len(image):
        return f"no file that can be opened, or an empty one, or one of more than {MAX_BYTES >> 20} MiB"
    try:
        decode(tf.constant(image), 3)
    except Exception as error:  # of TensorFlow or Pillow, and there are many
        text = re.sub(r".*}}|.*Summarized data: |\[Op:.*| <_io.BytesIO.*?>|b?'", "", str(error), flags=re.DOTALL)
        return " ".join(text.split())[:200] or type(error).__name__
    return "read when looked at again"
