"""Batches by number: step -> positions -> shuffled indexes -> images -> one array sharded over the mesh.

The state of the pipeline is one integer, the step. Nothing is drawn from a generator that remembers, so the batch
of any step can be made again, at once, and on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epy
from jax.sharding import Sharding

from mae_jax.data.augment import DRAWING_NOTHING, augment_file, crops_of_jpegs, decode
from mae_jax.data.augment import augment as augment_image
from mae_jax.data.cache import decoded
from mae_jax.data.jitter import jitter
from mae_jax.data.randaugment import rand_augment
from mae_jax.data.sources import SOURCES, Source, balanced, in_memory
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
      jitter: how much brightness, contrast and saturation change at random, of what was cropped and flipped; 0: not.
      randaugment: magnitude of RandAugment's two operations, up to 10, on what comes of all that; 0: none.
      repeats: so many samples of a batch are crops of one image, which is read once. Where reading is what limits
        the speed, two to four cost little accuracy (Hoffer et al. 2020, arXiv 1901.09335).
      held_out_augment: what is done to held-out images, a row of `augment.AUGMENTATIONS` that draws nothing.
      per_class: keep only so many images of each class for training, the same ones in every run; 0: all.
      subset_seed: which ones.
      cache: keep decoded images: "memory", or a folder to keep them in. For data sets that fit; empty: decode again.
        (Of a JPEG, random resized crops alone are decoded then, whose edges may differ by a grey level or two.)
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
    jitter: float = 0.0
    randaugment: float = 0.0
    repeats: int = 1
    held_out_augment: str = "none"
    per_class: int = 0
    subset_seed: int = 0
    cache: str = ""

    @functools.cached_property
    def opened(self) -> Source:
        """The source itself, opened once.

        Raises:
          ConfigError: it is missing, empty or not prepared.
        """
        source = SOURCES[self.source](**dataclasses.asdict(self))
        return balanced(source, self.per_class, self.subset_seed) if self.per_class else source

    @functools.cached_property
    def examples(self) -> Source:
        """The source, with its images decoded where `cache` says so: then this takes time."""
        keep = self.cache and self.opened.encoded
        return decoded(self.opened, self.channels, self.cache) if keep else self.opened

    @functools.cached_property
    def ready(self) -> bool:
        """Whether there is nothing to decode, crop or change: batches are rows of one array then."""
        if self.examples.rows:
            return True
        fits = self.examples.shape == (*self.image_size, self.channels)
        return fits and self.augment == "none" and not (self.flip or self.jitter or self.randaugment)

    def but(self, **changes) -> Dataset:
        """The same data set with other settings."""
        other = dataclasses.replace(self, **changes)
        if changes.keys() <= {"augment", "flip", "jitter", "randaugment", "repeats", "batch_size"}:  # the same images
            read = {key: self.__dict__[key] for key in ("opened", "examples") if key in self.__dict__}
            other.__dict__.update(read)  # not read again
        return other

    def plain(self) -> Dataset:
        """The same images as they are seen in evaluation."""
        return self.but(augment=self.held_out_augment, flip=False, jitter=0.0, randaugment=0.0, repeats=1)

    def held_out_set(self) -> Dataset:
        """The images to evaluate on."""
        return self.plain().but(split=self.held_out, per_class=0)  # another split, so opened anew

    @property
    def augmented(self) -> bool:
        """Whether an image is another one each time that it is seen in training."""
        return self.augment not in DRAWING_NOTHING or self.flip or self.jitter > 0 or self.randaugment > 0

    def holding(self, rows: np.ndarray, labels: np.ndarray) -> Dataset:
        """A data set of rows [n,...] of any kind in place of images, to which nothing is done; of the same classes."""
        source = dataclasses.replace(in_memory(rows, labels, self.split, self.opened.labels), rows=True)
        other = dataclasses.replace(self, cache="", per_class=0)
        other.__dict__.update(opened=source, examples=source)
        return other

    def shuffled(self, seed: int, start: int, sharding: Sharding | None) -> Iterator[dict]:
        """Batches `start`, `start` + 1, ... of an endless run over the data, each epoch in an order of its own."""
        return self._batches(range(start, FOREVER), self._shuffle(seed), FOREVER, seed, sharding)

    def indexes(self, seed: int, step: int) -> np.ndarray:
        """Which images batch `step` of `shuffled` consists of, i64[n]; repeats are told once."""
        count = self.batch_size // self.repeats
        return self._shuffle(seed)(step * count + np.arange(count))

    def _shuffle(self, seed: int) -> Callable:
        """From places in an endless run to indexes, i64[n] both."""
        size = self.examples.size

        @functools.lru_cache(maxsize=2)
        def order(epoch):
            # of all of NumPy's generators, the one that is promised never to change
            return np.random.RandomState([seed, epoch]).permutation(size)

        def index_of(place):
            epoch = place // size
            return np.concatenate([order(e)[place[epoch == e] % size] for e in np.unique(epoch)])

        return index_of

    def once(self, sharding: Sharding | None, limit: int | None = None) -> Iterator[dict]:
        """The data in order, once, or only its first `limit` examples; the last batch is padded with weight 0.

        Without `sharding`, batches are NumPy arrays, whole on every host.
        """
        size = min(self.examples.size, limit or FOREVER)
        steps = range(-(-size // self.batch_size))
        return self.but(repeats=1)._batches(steps, lambda place: np.minimum(place, size - 1), size, 0, sharding)

    def _batches(self, steps: range, index_of: Callable, end: int, seed: int, sharding) -> Iterator[dict]:
        rows = np.arange(self.batch_size) if sharding is None else _rows_here(sharding, self.batch_size)
        images = np.unique(rows // self.repeats)  # of a batch's, those that this host reads
        made = np.searchsorted(images, rows // self.repeats) * self.repeats + rows % self.repeats  # of them, its rows

        def places(step) -> np.ndarray:
            """The images this host reads for a batch, numbered i64[n] over the whole run; repeats do not count."""
            return step * (self.batch_size // self.repeats) + images

        def read(step) -> dict:
            place = places(step)
            index = index_of(place)
            image, label = self.examples.read(index)
            weight = (place < end).astype(np.float32)
            return {"place": place, "index": index, "image": image, "label": label.astype(np.int32), "weight": weight}

        ready = self.ready
        named = set()
        for batch in map(read, steps) if ready else self._prepared(read, places, steps, seed):
            image = batch["image"]
            if not ready:
                unreadable = batch["index"][~batch["readable"] & (batch["place"] < end)].tolist()
                for i in set(unreadable) - named:
                    logging.warning("cannot read %s; it counts for nothing", self.examples.name(i))
                named.update(unreadable)
                image = image.reshape(-1, *image.shape[2:])
            elif self.repeats > 1:
                image = image.repeat(self.repeats, axis=0)
            parts = {"image": image} | {key: batch[key].repeat(self.repeats) for key in ("label", "weight")}
            if len(image) > len(rows):  # one's repeats lie on two hosts
                parts = {key: x[made] for key, x in parts.items()}
            if sharding is not None:
                parts = {key: _spread(x, rows, self.batch_size, sharding) for key, x in parts.items()}
            yield parts

    def _prepared(self, read: Callable, places: Callable, steps: range, seed: int) -> Iterator[dict]:
        """What `read` gives for each step, with images decoded and augmented: uint8[n,repeats,H,W,C].

        An image that cannot be is black, and weighs nothing; `readable` bool[n] tells which.
        """
        tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
        encoded = self.examples.encoded
        types = {"place": tf.int64, "index": tf.int64, "label": tf.int32, "weight": tf.float32}
        types |= {"image": tf.string} if encoded else {"image": tf.string, "shape": tf.int32}

        def read_all(step):
            """Decoded images travel as their bytes and shapes, as they may differ in size."""
            parts = read(step)
            if not encoded:
                parts["shape"] = np.array([image.shape[:2] for image in parts["image"]], np.int32)
                parts["image"] = [image.tobytes() for image in parts["image"]]
            parts["image"] = np.array(parts["image"], object)
            return [parts[key] for key in types]

        # there is no Python in these for TensorFlow to convert, and to look for some takes it seconds
        as_it_is = tf.autograph.experimental.do_not_convert

        @as_it_is
        def read_step(step):
            parts = tf.numpy_function(read_all, [step], list(types.values()), stateful=False)
            parts = dict(zip(types, parts, strict=True))
            parts = {key: tf.ensure_shape(x, (None, 2) if key == "shape" else (None,)) for key, x in parts.items()}
            return parts | {"readable": tf.ones_like(parts["weight"], tf.bool)}

        def prepare_chunk(chunk):
            image = self._prepare_all(chunk, seed)
            changes = self.jitter or self.randaugment
            return {**chunk, "image": self._changed(image, chunk, seed) if changes else image}

        def mend(chunk):
            return self._mended(chunk, seed)

        @as_it_is
        def attempt(chunk):
            """A data set of one element: the chunk prepared or, only where that fails, the mended chunk prepared."""
            alone = tf.data.Dataset.from_tensors(chunk)
            return alone.concatenate(alone.map(mend)).map(prepare_chunk).ignore_errors().take(1)

        batches = (
            tf.data.Dataset.range(steps.start, steps.stop)
            .map(read_step, num_parallel_calls=2)
            .rebatch(CHUNK)
            .interleave(attempt, cycle_length=16, block_length=1, num_parallel_calls=tf.data.AUTOTUNE)
            .rebatch(len(places(steps.start)), drop_remainder=True)
            .prefetch(2)
        )
        options = tf.data.Options()
        options.deterministic = True
        for step, batch in zip(steps, batches.with_options(options).as_numpy_iterator(), strict=True):
            if not np.array_equal(batch["place"], places(step)):
                raise DataError(f"images before step {step} were lost; is there enough memory?")
            yield batch

    def _mended(self, chunk: dict, seed: int) -> dict:
        """The chunk with a black picture, which weighs nothing, in place of each image that cannot be prepared."""
        if "shape" in chunk:
            readable = tf.reduce_all(chunk["shape"] > 0, axis=1)
            black = tf.constant(bytes(self.channels))  # one pixel
            chunk = {**chunk, "shape": tf.where(readable[:, None], chunk["shape"], 1)}
        else:
            readable = functools.partial(self._readable, seed=seed)
            readable = tf.numpy_function(readable, [chunk["image"], chunk["place"]], tf.bool, stateful=False)
            readable = tf.ensure_shape(readable, (None,))
            black = tf.io.encode_png(tf.zeros((1, 1, 3), tf.uint8))
        image = tf.where(readable, chunk["image"], black)
        weight = chunk["weight"] * tf.cast(readable, tf.float32)
        return {**chunk, "image": image, "weight": weight, "readable": readable}

    def _readable(self, images: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
        """Whether each of some encoded files can be prepared: bool[n]."""

        def can_be(image, place):
            try:
                self._prepare({"image": tf.constant(image), "place": tf.constant(place)}, seed)
            except Exception:  # of TensorFlow or Pillow, and there are many
                return False
            return True

        return np.array([can_be(*example) for example in zip(images, places, strict=True)])

    def _prepare_all(self, chunk: dict, seed: int):
        """The samples made of each image of a chunk: uint8[n,repeats,H,W,C]."""
        one_by_one = functools.partial(tf.map_fn, fn_output_signature=tf.uint8)
        together = None
        if self.augment == "random_resized_crop" and self.channels == 3 and "shape" not in chunk:
            settings = {"size": tuple(self.image_size), "scale": self.scale, "ratio": self.ratio, "flip": self.flip}
            together = crops_of_jpegs(chunk["image"], self._seeds(chunk["place"], seed), **settings)
        if together is None:
            return one_by_one(lambda x: self._prepare(x, seed), chunk)
        crops, done = together

        def others():
            prepare = lambda x: tf.cond(x[2], lambda: x[1], lambda: self._prepare(x[0], seed))  # noqa: E731
            return one_by_one(prepare, (chunk, crops, done))

        return tf.cond(tf.reduce_all(done), lambda: crops, others)

    def _seeds(self, place, seed: int):
        """Of the samples made of each image: i64[...,repeats,2] for i64[...]."""
        number = place[..., None] * self.repeats + tf.range(self.repeats, dtype=tf.int64)
        return tf.stack([tf.fill(tf.shape(number), tf.constant(seed, tf.int64)), number], axis=-1)

    def _prepare(self, example: dict, seed: int):
        """The samples made of one image, a file or bytes and their shape: uint8[repeats,H,W,C]."""
        settings = {"size": tuple(self.image_size), "name": self.augment, "flip": self.flip}
        settings |= {"scale": self.scale, "ratio": self.ratio}
        seeds = tf.unstack(self._seeds(example["place"], seed))
        if "shape" in example:
            height, width = tf.unstack(example["shape"])
            image = tf.reshape(tf.io.decode_raw(example["image"], tf.uint8), (height, width, self.channels))
        elif self.repeats == 1:
            return augment_file(example["image"], self.channels, seeds[0], **settings)[None]
        else:
            image = decode(example["image"], self.channels)
        return tf.stack([augment_image(image, one, **settings) for one in seeds])

    def _changed(self, image, chunk: dict, seed: int):
        """Jitter and RandAugment of the samples of each image, uint8[n,repeats,H,W,C]; what cannot be read stays black.

        By Pillow, on uint8[H,W,C] of one sample after the other.
        """
        changes = [functools.partial(jitter, strength=self.jitter)] if self.jitter else []
        if self.randaugment:
            changes.append(functools.partial(rand_augment, layers=2, magnitude=self.randaugment))

        def operate(image, place, readable):
            out = image.copy()
            for i, j in itertools.product(np.flatnonzero(readable), range(self.repeats)):
                number = place[i] * self.repeats + j
                for change in changes:
                    out[i, j] = change(out[i, j], np.array([seed, number]))
            return out

        parts = [image, chunk["place"], chunk["readable"]]
        return tf.ensure_shape(tf.numpy_function(operate, parts, tf.uint8, stateful=False), image.shape)


def _rows_here(sharding: Sharding, size: int) -> np.ndarray:
    """Which rows of a batch of `size` the devices of this host hold, in order: any, as the mesh has it."""
    held = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def _spread(x: np.ndarray, rows: np.ndarray, size: int, sharding: Sharding) -> jax.Array:
    """The array of `size` rows over all hosts of which this one holds `rows`: those of `x`."""

    def part(index):
        start, stop, _ = index[0].indices(size)
        first = np.searchsorted(rows, start)
        return x[first : first + stop - start]

    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)
