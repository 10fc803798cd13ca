"""Figures as PNG files: training curves, confusion matrices, and sweeps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epy

from mae_jax.files import write

with epy.lazy_imports():
    from matplotlib import figure as figures  # takes a second

NAMED_UP_TO = 30  # classes whose names fit beside a confusion matrix
NUMBERED_UP_TO = 12  # classes whose counts fit into its cells


def curves(path: Path, lines: Sequence[dict]) -> None:
    """What metrics.jsonl holds over the steps: the losses on the left, accuracies on the right where there are any."""
    names = dict.fromkeys(name for line in lines for name in line)
    panels = {
        "loss": [name for name in names if name.endswith("loss")],
        "accuracy, %": [name for name in names if name.startswith("eval/top")],
    }
    panels = {title: shown for title, shown in panels.items() if shown}
    figure = figures.Figure(figsize=(5.5 * max(len(panels), 1), 3.6), layout="constrained")
    for axes, (title, shown) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for name in shown:
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = np.array(points, float).T  # null was no number, and is drawn as none
            scale = 100 if "accuracy" in title else 1
            axes.plot(steps, values * scale, ".-" if len(points) < 40 else "-", label=name)
        axes.set(xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    _write(path, figure)


def confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """How often each class (row) was taken for each other (column), as shares of the row; counts [C,C]."""
    classes = len(counts)
    side = np.clip(0.5 * classes + 2, 5, 12)
    figure = figures.Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    right = np.trace(counts) / max(counts.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{right:.2%} of {int(counts.sum())} right")
    if classes <= NAMED_UP_TO:
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= NUMBERED_UP_TO:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(count)}", ha="center", va="center", color=colour, fontsize=8)
    _write(path, figure)


def sweep(
    path: Path,
    title: str,
    axis: str,
    labels: Sequence[str],
    at: Sequence[float | None],
    columns: Mapping[str, tuple[Sequence[np.ndarray], Sequence[float | None], str]],
) -> None:
    """What the settings of a sweep have shown, a panel for each column: means over seeds, and standard deviations.

    What is published is of other data and models, and has an axis of its own, on the right.

    Args:
      at: where each setting stands; with any None, all stand side by side.
      columns: by name: the values of each setting's seeds, what is published of it (None: nothing is), and the unit.
    """
    figure = figures.Figure(figsize=(1 + 4.2 * len(columns), 3.8), layout="constrained")
    figure.suptitle(title)
    ordered = all(x is not None for x in at)
    x = np.array(at if ordered else range(len(labels)), float)
    level = ordered or max(map(len, labels)) * len(labels) < 40
    entries = {}
    for axes, (column, (ours, theirs, unit)) in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True
    ):
        means = np.array([np.mean(values) if len(values) else np.nan for values in ours])
        spreads = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in ours])
        entries["here"] = axes.errorbar(x, means, spreads, fmt="o-" if ordered else "o", capsize=3)
        there = [i for i, value in enumerate(theirs) if value is not None]
        if there:
            right, style = axes.twinx(), "s--" if ordered else "s"
            published = [theirs[i] for i in there]
            (entries["paper (ViT-L/16, ImageNet-1k), on the right"],) = right.plot(
                x[there], published, style, color="tab:gray", alpha=0.7
            )
            right.tick_params(axis="y", labelcolor="tab:gray")
        axes.set_xticks(x, labels, rotation=0 if level else 30, ha="center" if level else "right", parse_math=False)
        axes.set(xlabel=axis, ylabel=unit, title=column)
        axes.grid(alpha=0.3)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2, fontsize=9)
    _write(path, figure)


def _write(path: Path, figure) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=100)
    write(path, data.getvalue())
