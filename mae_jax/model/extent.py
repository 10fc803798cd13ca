"""What no model here is larger than, and how large one would be: told from its numbers alone, before any of it is made.

Tracing every block and computing a table of positions comes before the first error that a model too large would meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_BLOCKS = 256  # each is traced and compiled by itself; published ViTs have up to 64
MOST_NUMBERS = 2**29  # of an image, and of a table of positions: 2 GiB as float32
MOST_PARAMETERS = 2**40  # fifty times the largest ViT there is


def parameter_count(depth: int, width: int, mlp_ratio: float, patch_values: int = 0) -> float:
    """About how many parameters `depth` blocks have, and the embedding of patches of so many values."""
    width = float(width)  # whatever is asked for, it has to end in a number
    return depth * width * width * (4 + 2 * mlp_ratio) + width * patch_values


def table_size(image_size: Sequence[int], patch: int, width: int, positions: str = "sincos") -> int:
    """How many numbers the positions of all patches and the cls token are: rows, or of "relative" also pairs."""
    tokens = 1 + math.prod(side // patch for side in image_size)
    return tokens * max(width, tokens if positions == "relative" else 0)
