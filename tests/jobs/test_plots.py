"""The figures: confusion matrices and training curves, as files and as what is drawn in them."""

import numpy as np
import pytest
from PIL import Image

from mae_jax.jobs import plots


@pytest.mark.parametrize("classes", [2, 10, 12, 13, 30, 31, 200])
def test_confusion_matrices_of_any_number_of_classes_are_pictures(classes, tmp_path, tools):
    counts = np.random.default_rng(0).integers(0, 50, (classes, classes)).astype(float)
    counts[0] = 0  # a class without examples
    plots.confusion(tmp_path / "confusion.png", counts, [f"class number {i}" for i in range(classes)])
    tools.check_picture(tmp_path / "confusion.png")


def test_class_names_are_free_text(tmp_path, tools):
    plots.confusion(tmp_path / "confusion.png", np.eye(2), ["$5_$10", "\\frac{"])
    tools.check_picture(tmp_path / "confusion.png")


def test_the_diagonal_is_dark_where_all_is_right(tmp_path):
    dark = {}
    for name, counts in {"right": np.eye(4), "wrong": np.eye(4)[::-1]}.items():
        plots.confusion(tmp_path / f"{name}.png", 100 * counts, list("abcd"))
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB"), int)
        navy = (np.abs(pixels - [8, 48, 107]).sum(axis=-1) < 10) & (np.arange(pixels.shape[1]) < 0.75 * pixels.shape[1])
        rows, columns = np.nonzero(navy)
        dark[name] = np.corrcoef(rows, columns)[0, 1]
    assert dark["right"] > 0.9 and dark["wrong"] < -0.9


def test_curves_show_losses_and_accuracies_side_by_side(tmp_path, tools):
    lines = [{"step": i, "train/loss": 2.0 / i, "perf/x": 1.0} for i in range(1, 60)]
    losses_only, both = tmp_path / "losses.png", tmp_path / "both.png"
    plots.curves(losses_only, lines)
    plots.curves(both, [*lines, {"step": 59, "eval/top1": 0.5, "eval/top5": 0.9, "eval/loss": 1.0}])
    for path in (losses_only, both):
        tools.check_picture(path)
    with Image.open(losses_only) as one, Image.open(both) as two:
        assert two.size == (2 * one.width, one.height), "a second panel"


def test_curves_of_a_single_step(tmp_path, tools):
    plots.curves(tmp_path / "one.png", [{"step": 1, "train/loss": 1.0}])
    tools.check_picture(tmp_path / "one.png")


@pytest.mark.parametrize("at", [(10.0, 50.0, 90.0), (None, None, None)])
def test_a_sweep_has_a_panel_for_each_column(tmp_path, tools, at):
    ours = [np.array([60.0, 62.0]), np.array([61.0]), np.array([])]
    published = {"linear": [54.6, None, 66.1], "20-NN": [None] * 3, "tuned": [1.0, 2.0, 3.0]}
    columns = {column: (ours, theirs, "top-1 %") for column, theirs in published.items()}
    for count in (1, 3):
        some = dict(list(columns.items())[:count])
        path = tmp_path / f"{count}.png"
        plots.sweep(path, "Mask $ratio", "hidden, %", ["10", "$50", "ninety"], at, some)
        tools.check_picture(path)
    with Image.open(tmp_path / "1.png") as one, Image.open(tmp_path / "3.png") as three:
        assert three.width > 2 * one.width
