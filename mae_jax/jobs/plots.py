"""Figures as PNG files: training curves and confusion matrices."""

from __future__ import annotations

import io
from collections.abc import Sequence
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
            steps, values = np.array(points).T
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
    what: str,
    labels: Sequence[str],
    at: Sequence[float | None],
    ours: Sequence[np.ndarray],
    theirs: Sequence[float | None],
) -> None:
    """What the settings of a sweep have shown: means over seeds with their standard deviations, and what is published.

    Published numbers are of other data and models; they have an axis of their own, on the right.

    Args:
      at: where each setting stands; with any None, all stand side by side.
      ours: the values of each setting's seeds.
      theirs: the published value of each; None: there is none.
    """
    figure = figures.Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    ordered = all(x is not None for x in at)
    x = np.array(at if ordered else range(len(labels)), float)
    means = np.array([np.mean(values) if len(values) else np.nan for values in ours])
    spreads = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in ours])
    axes.errorbar(x, means, spreads, fmt="o-" if ordered else "o", capsize=3, label="here")
    there = [i for i, value in enumerate(theirs) if value is not None]
    if there:
        right = axes.twinx()
        right.plot(x[there], [theirs[i] for i in there], "s--" if ordered else "s", color="tab:gray", label="paper")
        right.set_ylabel("paper (ViT-L/16, ImageNet-1k)", color="tab:gray")
        axes.plot([], [], "s--" if ordered else "s", color="tab:gray", label="paper, on the right")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    level = ordered or max(map(len, labels)) < 8
    axes.set_xticks(x, labels, rotation=0 if level else 20, ha="center" if level else "right", parse_math=False)
    axes.set(xlabel=axis, ylabel=what, title=title)
    axes.grid(alpha=0.3)
    _write(path, figure)


def _write(path: Path, figure) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=100)
    write(path, data.getvalue())
