"""Batches by number: step -> positions -> shuffled indexes -> images -> one array sharded over the mesh.

The state of the pipeline is one integer, the step. Nothing is drawn from a generator that remembers, so the batch
of any step can be made again, at once, and on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epy
from jax.sharding import Sharding

from mae_jax.data.augment import augment as augment_image
from mae_jax.data.augment import decode
from mae_jax.data.sources import SOURCES, Source
from mae_jax.errors import DataError

with epy.lazy_imports():
    import tensorflow as tf

CHUNK = 16  # images decoded by one thread at a time
FOREVER = 2**62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A split of a source, and how its images are prepared: the `data` group of a config.

    A batch is a dict of arrays over all hosts and devices: `image` uint8[N,H,W,C]; `label` i32[N], -1 where there
    is none; `weight` f32[N], 0 for padding and for images that could not be read, else 1.

    Attributes:
      source: a row of `SOURCES`.
      batch_size: N, over all hosts.
      image_size: (H, W).
      channels: C.
      split: a split expression of TFDS, such as "train[:90%]".
      held_out: the split to evaluate on.
      name: of a TFDS data set.
      data_dir: where TFDS prepared it; empty for TFDS's own default.
      path: of a folder of image files.
      augment: a row of `augment.AUGMENTATIONS`.
      scale, ratio: of random resized crops.
      flip: whether to flip every other image left to right.
    """

    source: str
    batch_size: int
    image_size: Sequence[int]
    channels: int = 3
    split: str = "train"
    held_out: str = "test"
    name: str = ""
    data_dir: str = ""
    path: str = ""
    augment: str = "none"
    scale: Sequence[float] = (0.2, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: bool = False

    def open(self) -> Source:
        """The source itself.

        Raises:
          ConfigError: it is missing, empty or not prepared.
        """
        return SOURCES[self.source](**dataclasses.asdict(self))

    def held_out_set(self) -> Dataset:
        """The images to evaluate on: never augmented."""
        return dataclasses.replace(self, split=self.held_out, augment="none", flip=False)

    def shuffled(self, seed: int, start: int, sharding: Sharding) -> Iterator[dict]:
        """Batches `start`, `start` + 1, ... of an endless run over the data, each epoch in an order of its own."""
        size = self.open().size

        def index_of(position):
            epoch = tf.cast(position // size, tf.uint32)
            seeds = tf.stack([tf.fill(tf.shape(epoch), tf.constant(seed, tf.uint32)), epoch, tf.zeros_like(epoch)], 1)
            return tf.raw_ops.RandomIndexShuffle(
                index=position % size,
                seed=seeds,
                max_index=tf.fill(tf.shape(position), tf.constant(size - 1, tf.int64)),
                rounds=24,  # with TensorFlow's default of 4, epochs of 60000 are correlated by 0.9
            )

        return self._batches(range(start, FOREVER), index_of, FOREVER, seed, sharding)

    def once(self, sharding: Sharding, limit: int | None = None) -> Iterator[dict]:
        """The data in order, once, or only its first `limit` examples; the last batch is padded with weight 0."""
        size = min(self.open().size, limit or FOREVER)
        return self._batches(range(-(-size // self.batch_size)), lambda p: tf.minimum(p, size - 1), size, 0, sharding)

    def _batches(self, steps: range, index_of, end: int, seed: int, sharding: Sharding) -> Iterator[dict]:
        tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
        source = self.open()
        share = self.batch_size // jax.process_count()
        offset = jax.process_index() * share

        def read(step):
            position = step * self.batch_size + offset + tf.range(share, dtype=tf.int64)
            index = index_of(position)
            image, label = tf.numpy_function(
                lambda i: _read(source, i),
                [index],
                (tf.string if source.encoded else tf.uint8, tf.int64),
                stateful=False,
            )
            image = tf.ensure_shape(image, (share,) if source.encoded else (share, None, None, self.channels))
            label = tf.cast(tf.ensure_shape(label, (share,)), tf.int32)
            weight = tf.cast(position < end, tf.float32)
            readable = tf.ones_like(weight, tf.bool)
            chunk = {"image": image, "label": label, "weight": weight}
            return chunk | {"position": position, "index": index, "readable": readable}

        def prepare(image, position):
            image = decode(image, self.channels) if source.encoded else image
            return augment_image(
                image,
                tf.stack([tf.constant(seed, tf.int64), position]),
                size=tuple(self.image_size),
                name=self.augment,
                scale=self.scale,
                ratio=self.ratio,
                flip=self.flip,
            )

        def prepare_chunk(chunk):
            image = tf.map_fn(lambda x: prepare(*x), (chunk["image"], chunk["position"]), fn_output_signature=tf.uint8)
            return {**chunk, "image": image}

        def mend(chunk):
            """A black picture, which weighs nothing, in place of each file that cannot be decoded."""
            readable = tf.ensure_shape(
                tf.numpy_function(_decodable, [chunk["image"]], tf.bool, stateful=False), (None,)
            )
            image = tf.where(readable, chunk["image"], tf.io.encode_png(tf.zeros((1, 1, 3), tf.uint8)))
            weight = chunk["weight"] * tf.cast(readable, tf.float32)
            return {**chunk, "image": image, "weight": weight, "readable": readable}

        def attempt(chunk):
            """A data set of one element: the chunk prepared or, only where that fails, the mended chunk prepared."""
            alone = tf.data.Dataset.from_tensors(chunk)
            if not source.encoded:
                return alone.map(prepare_chunk)
            return alone.concatenate(alone.map(mend)).map(prepare_chunk).ignore_errors().take(1)

        batches = (
            tf.data.Dataset.range(steps.start, steps.stop)
            .map(read, num_parallel_calls=2)
            .unbatch()
            .batch(CHUNK)
            .interleave(attempt, cycle_length=16, block_length=1, num_parallel_calls=tf.data.AUTOTUNE)
            .unbatch()
            .batch(share, drop_remainder=True)
            .prefetch(2)
        )
        options = tf.data.Options()
        options.deterministic = True
        named = set()
        for step, batch in zip(steps, batches.with_options(options).as_numpy_iterator(), strict=True):
            position = batch.pop("position")
            if not np.array_equal(position, step * self.batch_size + offset + np.arange(share)):
                raise DataError(f"images before step {step} were lost; is there enough memory?")
            unreadable = batch.pop("index")[~batch.pop("readable") & (position < end)].tolist()
            for i in set(unreadable) - named:
                logging.warning("cannot read %s; it counts for nothing", source.name(i))
            named.update(unreadable)
            yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _read(source: Source, index: np.ndarray):
    images, labels = source.read(index)
    return np.array(images, object) if source.encoded else images, labels


def _decodable(images: np.ndarray) -> np.ndarray:
    """Whether each of some encoded files can be decoded: bool[n]."""

    def can_be(data):
        try:
            decode(tf.constant(data), 3)
        except Exception:  # of TensorFlow or Pillow, and there are many
            return False
        return True

    return np.array([can_be(data) for data in images])
