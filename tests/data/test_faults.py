"""Files as the world breaks them, thrown at random through the whole pipeline: nothing crashes, hangs or moves."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.pipeline import Dataset
from mae_jax.data.sources import SOURCES

BATCH = 16
CROPS = {"augment": "random_resized_crop", "flip": True}
SETTINGS = [{}, CROPS, {**CROPS, "repeats": 2, "cache": "memory"}]


def picture(number, mode="RGB"):
    noise = np.random.default_rng(number).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


WHOLE = [
    encoded(picture(0), "JPEG", quality=90),
    encoded(picture(1), "JPEG", progressive=True),
    encoded(picture(2, "L"), "JPEG"),
    encoded(picture(3, "CMYK"), "JPEG"),
    encoded(picture(4), "PNG"),
    encoded(picture(5, "RGBA"), "PNG"),
    encoded(picture(6, "P"), "PNG"),
    encoded(picture(7), "WEBP"),
    encoded(picture(8, "RGBA"), "WEBP", lossless=True),
    encoded(picture(9, "P"), "GIF"),
    encoded(picture(10, "P"), "GIF", save_all=True, append_images=[picture(11, "P"), picture(12, "P")]),
]


def broken(choose, data):
    """`data` with one to four things done to it."""
    data = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4])):
        at, some, what = choose.randrange(len(data) + 1), choose.randrange(1, 64), choose.randrange(7)
        if what == 0:  # a flipped bit
            data[at : at + 1] = bytes(byte ^ 1 << choose.randrange(8) for byte in data[at : at + 1])
        elif what == 1:  # the end is missing
            del data[at:]
        elif what == 2:  # a piece is
            del data[at : at + some]
        elif what == 3:  # one too much
            data[at:at] = choose.randbytes(some)
        elif what == 4:  # a piece twice
            data[at:at] = data[at : at + some]
        elif what == 5:  # the beginning of another
            data[:some] = choose.choice(WHOLE)[:some]
        else:  # a number of the header
            data[at % 64 : at % 64 + 1] = choose.randbytes(1)
    return bytes(data)


def make(root, count, seed=0):
    """`count` files, every third of which is whole; the same ones alone in another folder, all others empty."""
    choose = random.Random(seed)
    for name in ("bad", "good"):
        (root / name).mkdir()
    for i in range(count):
        data = WHOLE[i % len(WHOLE)]
        whole = i % 3 == 0
        (root / "bad" / f"{i:05}.png").write_bytes(data if whole else broken(choose, data))
        (root / "good" / f"{i:05}.png").write_bytes(data if whole else b"")


PROGRAM = """
import itertools, json, logging, resource, sys
import numpy as np
from mae_jax.data.pipeline import Dataset
logging.disable(logging.WARNING)
settings, file = json.loads(sys.argv[1]), sys.argv[2]
data = Dataset(**settings)
steps = -(-data.opened.size // data.batch_size)
batches = list(itertools.islice(data.shuffled(0, 0, None), steps) if data.augmented else data.once(None))
np.savez(file, **{key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def read_all(folder, file, **settings):
    """An epoch in a process of its own: its arrays, and the most memory that it took, in MiB."""
    common = {"source": "folder", "path": str(folder), "split": "all", "batch_size": BATCH, "image_size": [24, 24]}
    words = [sys.executable, "-c", PROGRAM, json.dumps(common | settings), str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(file)), int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("seed, settings", list(enumerate(SETTINGS)), ids=["none", "crops", "repeats"])
def test_thousands_of_broken_files_move_nothing(seed, settings, tmp_path):
    count = 2999
    make(tmp_path, count, seed)
    source = SOURCES["folder"](path=str(tmp_path / "bad"), split="all")
    whole = np.array([int(Path(source.name(i)).stem) % 3 == 0 for i in range(count)])
    bad, memory = read_all(tmp_path / "bad", tmp_path / "bad.npz", **settings)
    good, _ = read_all(tmp_path / "good", tmp_path / "good.npz", **settings)
    assert len(bad["weight"]) == len(good["weight"]) >= count
    kept = good["weight"] > 0
    assert kept.sum() >= whole.sum() - BATCH  # of a shuffled epoch, what comes again is in the last batch
    assert bad["weight"][kept].all() and np.array_equal(bad["image"][kept], good["image"][kept])
    assert np.array_equal(bad["label"], good["label"])
    lost = np.flatnonzero(bad["weight"][:-BATCH] == 0)  # what pads the last batch weighs nothing either
    assert lost.size and not bad["image"][lost].any()
    assert memory < 8 * 1024  # two pictures at a time of up to `MAX_PIXELS`, and some copies of each


def test_names_of_every_kind(tmp_path):
    """Line breaks, bytes that are no text, a folder named like a file, links to files, to folders and to nowhere."""
    names = [b"a\nb.png", b"\xff\xfe.png", b"folder.png/c.png", b"caf\xc3\xa9.png"]
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path / "tree"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(encoded(Image.new("RGB", (4, 4), (50 * i + 20,) * 3), "PNG"))
    (tmp_path / "tree" / "link.png").symlink_to(tmp_path / "tree" / "folder.png" / "c.png")
    (tmp_path / "tree" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    settings = {"source": "folder", "path": str(tmp_path / "tree"), "split": "all"}
    data = Dataset(**settings, batch_size=8, image_size=(4, 4))
    (batch,) = data.once(None)
    assert sorted(batch["image"][: data.opened.size, 0, 0, 0].tolist()) == [20, 70, 120, 120, 170]
    kept = data.but(cache=str(tmp_path / "kept"))
    (again,) = kept.once(None)
    assert np.array_equal(batch["image"], again["image"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_weigh_nothing(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").chmod(0)
    data = Dataset(source="folder", path=str(tmp_path), split="all", batch_size=3, image_size=(8, 8))
    (batch,) = itertools.islice(data.once(None), 1)
    readable = [Path(data.opened.name(i)).name != "1.png" for i in range(3)]
    assert batch["weight"].tolist() == readable
