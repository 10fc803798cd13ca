"""Reading ImageNet-like JPEGs against the usual ways, interleaved: random resized crop to 224, flip, batches of 64.

    pip install -e ".[parity]"
    python tests/benchmarks/input.py [--rounds 5]

The pictures are made up: 500x375 pixels, about 71 KB, in a temporary folder, so that they come from the page cache.
Every row gives batches to the training loop of its framework: this project uint8 arrays on the device, the usual ways
normalised float32. `decode only` is the limit: the same crops decoded and nothing else done. Medians over rounds.
"""

import argparse
import io
import itertools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from PIL import Image

from mae_jax.data.augment import random_crop_box
from mae_jax.data.pipeline import Dataset
from mae_jax.training.sharding import batch_sharding, make_mesh

BATCH, SIDE, SCALE, RATIO = 64, 224, (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)


def make_pictures(folder, count):
    for i in range(count):
        rng = np.random.default_rng(i)
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(smooth, int) + rng.integers(-14, 15, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)


# A way is `f(folder) -> iterator of batches`.


def ours(folder, **settings):
    """The pipeline of the ImageNet recipes."""
    data = Dataset(
        source="folder",
        path=str(folder),
        split="all",
        batch_size=BATCH,
        image_size=(SIDE, SIDE),
        augment="random_resized_crop",
        flip=True,
        **settings,
    )
    return data.shuffled(0, 0, batch_sharding(make_mesh(data=1)))


def ours_twice(folder):
    """Two crops of each image that is read."""
    return ours(folder, repeats=2)


def tf_usual(folder):
    """tf.data as its guides have it."""

    def prepare(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=RATIO,
            area_range=SCALE,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.slice(image, begin, size)
        image = tf.image.resize(image, (SIDE, SIDE), "bicubic", antialias=True)
        image = tf.image.random_flip_left_right(image) / 255.0
        return (image - MEAN) / STD

    files = tf.data.Dataset.list_files(f"{folder}/*.jpg", shuffle=True).repeat()
    return files.map(prepare, tf.data.AUTOTUNE).batch(BATCH).prefetch(2).as_numpy_iterator()


def decode_only(folder):
    """Crops, drawn beforehand, decoded and thrown away: what no pipeline can beat."""
    paths = sorted(map(str, folder.glob("*.jpg")))
    seeds = tf.stack([tf.zeros(len(paths), tf.int64), tf.range(len(paths), dtype=tf.int64)], axis=1)
    boxes = random_crop_box(tf.constant([[375, 500]] * len(paths)), seeds, SCALE, RATIO)

    def decode(path, box):
        return tf.image.decode_and_crop_jpeg(tf.io.read_file(path), box, channels=3)[0, 0]

    files = tf.data.Dataset.from_tensor_slices((paths, boxes)).shuffle(len(paths)).repeat()
    return files.map(decode, tf.data.AUTOTUNE).batch(BATCH).prefetch(2).as_numpy_iterator()


class Pictures:
    """A map-style dataset of PyTorch with Pillow: torchvision's RandomResizedCrop and flip, written out."""

    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        image = Image.open(io.BytesIO(self.paths[i % len(self.paths)].read_bytes())).convert("RGB")
        for _ in range(10):
            area = image.width * image.height * rng.uniform(*SCALE)
            aspect = np.exp(rng.uniform(*np.log(RATIO)))
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if w <= image.width and h <= image.height:
                break
        left, top = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
        image = image.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), Image.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255.0 - MEAN) / STD
        return (pixels[:, ::-1] if rng.random() < 0.5 else pixels).transpose(2, 0, 1).copy()


def torch_pil(folder):
    """Pillow in a PyTorch DataLoader with two worker processes."""
    import torch

    return iter(torch.utils.data.DataLoader(Pictures(folder), batch_size=BATCH, num_workers=2))


WAYS = {"decode only": decode_only, "ours": ours, "ours, repeats=2": ours_twice, "tf.data": tf_usual}
WAYS |= {"PIL, 2 workers": torch_pil}


def rate_of(way, folder, batches):
    iterator = way(folder)
    for _ in range(3):  # what was read ahead while nobody waited does not count
        next(iterator)
    began = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    return batches * BATCH / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=25)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, 512)
        size = sum(p.stat().st_size for p in folder.iterdir()) / 512
        print(f"512 pictures of 500x375, {size / 1e3:.0f} KB each")
        rates = {name: [] for name in WAYS}
        for _ in range(given.rounds):
            for name, way in WAYS.items():
                rates[name].append(rate_of(way, folder, given.batches))
    limit = np.array(rates["decode only"])
    usual = np.array(rates["PIL, 2 workers"])
    print(f"{'':18} {'images/s':>9} {'of decode only':>15} {'of PIL':>7}")
    for name, values in rates.items():
        of_limit, of_usual = (np.median(np.array(values) / other) for other in (limit, usual))
        print(f"{name:18} {np.median(values):9.0f} {of_limit:15.2f} {of_usual:7.2f}")


if __name__ == "__main__":
    main()
