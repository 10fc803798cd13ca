"""Read a whole data set once, and say what is in it and what of it cannot be read; nothing is trained.

    mae-jax check-data --config=configs/pretrain.py:folder --config.data.path=DIR

Reads the config of pretrain, probe or finetune: its groups data, pixels and guard, and all images of the training and
the held-out split, as they are read in evaluation. Prints how many there are; which cannot be read, and why; their
sizes, kinds and classes; mean and standard deviation of the pixels, beside those of config.pixels; images/s. Writes
nothing. Ends with exit code 3 where more than config.guard.unreadable of a split cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.config import complete
from mae_jax.data.pipeline import Dataset
from mae_jax.data.survey import Survey, survey
from mae_jax.errors import ConfigError, DataError
from mae_jax.jobs import checks
from mae_jax.model.patches import normalize
from mae_jax.training.guard import Guard

WRITES_WORKDIR = False
SCHEMA = {"data": Dataset, "pixels": normalize, "guard": Guard}


def run(config: ConfigDict, workdir: Path) -> None:
    """Look at the data that `config` describes."""
    config, *splits = check(config)
    problems = []
    for name, data in zip(("training", "held-out"), splits, strict=True):
        found = survey(data)
        print(f"{name} split {data.split!r} of {data.source}", *report(found, config), sep="\n", flush=True)
        if len(found.unreadable) > config.guard.unreadable * found.size:
            problems.append(
                f"{len(found.unreadable)} of {found.size} images of the {name} split {data.split!r} cannot be read, "
                f"more than config.guard.unreadable {config.guard.unreadable:g}"
            )
    if problems:
        raise DataError(problems)


def check(config: ConfigDict) -> tuple[ConfigDict, Dataset, Dataset]:
    """What is read of the config, with its defaults, and the training and the held-out data that it describes.

    Raises:
      ConfigError: with all that is wrong.
    """
    config, problems = complete(ConfigDict({key: config[key] for key in SCHEMA if key in config}), SCHEMA, {})
    if config is None:
        raise ConfigError(problems)
    data, size = config.data, config.data.image_size
    wrong = checks.source_problems(data)
    if len(size) != 2 or min(size) < 1:
        wrong.append(f"config.data.image_size: {tuple(size)} is not (height, width)")
    wrong += checks.count_problems(config)
    problems += checks.untold(problems, wrong)
    checks.raise_if_no_data(problems)
    data = Dataset(**config.data)
    held_out = data.held_out_set()
    problems += checks.data_problems(config, data, held_out)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config, data, held_out


def report(found: Survey, config: ConfigDict) -> list[str]:
    """All that was found in a split, a line each."""
    bad = len(found.unreadable)
    lines = [("images", f"{found.size:,}, {found.size / found.seconds:,.0f} a second")]
    lines.append(("unreadable", f"{bad:,}, {bad / found.size:.2%}"))
    told = zip(found.unreadable, found.reasons, strict=False)
    lines += [("", f"{name.encode(errors='backslashreplace').decode()!r}: {reason}") for name, reason in told]
    if bad > len(found.reasons):
        lines.append(("", f"and {bad - len(found.reasons):,} more"))
    if len(found.sizes):
        few, middle, most = (found.sizes[i] for i in (0, len(found.sizes) // 2, -1))
        sizes = [f"{high}x{wide}" for high, wide in (few, middle, most)]
        lines.append(("height x width", "smallest {}, median {}, largest {}".format(*sizes)))
        lines.append(("kinds", ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.items())))
    if found.per_class:
        least, most = (choose(found.per_class, key=found.per_class.get) for choose in (min, max))
        lines.append(
            (
                "classes",
                f"{len(found.per_class):,}; fewest images {found.per_class[least]:,} ({least!r}), "
                f"most {found.per_class[most]:,} ({most!r})",
            )
        )
    if bad < found.size:
        for key in ("mean", "std"):
            lines.append(
                (f"pixels.{key}", f"{numbers(getattr(found, key))}; the config says {numbers(config.pixels[key])}")
            )
    return [f"  {name:15} {text}".rstrip() for name, text in lines]


def numbers(values: Sequence[float]) -> str:
    """(0.485, 0.456, 0.406)."""
    return f"({', '.join(f'{value:.3f}' for value in values)})"
