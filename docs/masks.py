"""Draw docs/masks.png: each way to choose patches, as in figure 6 of the paper.

    python docs/masks.py [docs/masks.png]

The rows are 224x224 pixels in patches of 16, and 28x28 in patches of 4. Hidden patches are grey.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from mae_jax.files import write_picture
from mae_jax.jobs.panels import GREY
from mae_jax.model import masking

CHOICES = [  # what config.mask says
    {"name": "random", "ratio": 0.75},
    {"name": "random", "ratio": 0.75, "unit": 2},
    {"name": "block", "ratio": 0.75},
    {"name": "block", "ratio": 0.5},
    {"name": "grid", "ratio": 0.75},
    {"name": "centre", "ratio": 0.75},
]
SIDE, GAP, HEADER = 224, 6, 22
SIZES = [(224, 16), (28, 4)]  # of an image, of a patch


def main(path="docs/masks.png"):
    china, flower = (Image.fromarray(photo) for photo in load_sample_images().images)  # come with scikit-learn
    photos = [china.crop((180, 40, 540, 400)), flower.crop((150, 0, 570, 420))]
    width = (SIDE + GAP) * (1 + len(CHOICES)) + GAP
    picture = Image.new("RGB", (width, HEADER + (SIDE + GAP) * len(SIZES) * len(photos)), "white")
    pen, font, row = ImageDraw.Draw(picture), ImageFont.load_default(15), 0
    for size, patch in SIZES:
        for number, photo in enumerate(photos):
            image = np.asarray(photo.resize((size, size), Image.Resampling.LANCZOS))
            for column, choice in enumerate([None, *CHOICES]):
                left, top = GAP + column * (SIDE + GAP), HEADER + row * (SIDE + GAP)
                shown = image if choice is None else hidden(image, patch, jax.random.key(number), choice)
                picture.paste(Image.fromarray(shown).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
                title = "image" if choice is None else f"{choice['name']} {choice['ratio']:.0%}"
                title += f", unit {choice['unit']}" if choice and "unit" in choice else ""
                pen.text((left, 2), title, fill="black", font=font)
            row += 1
    write_picture(Path(path), np.asarray(picture))


def hidden(image, patch, key, choice):
    """uint8[H,W,3] with its hidden patches in grey."""
    side = len(image) // patch
    removed = np.asarray(masking.sample(key, 1, (side, side), **choice).removed, bool).reshape(side, side, 1)
    return np.where(removed.repeat(patch, axis=0).repeat(patch, axis=1), np.uint8(GREY), image)


if __name__ == "__main__":
    main(*sys.argv[1:])
