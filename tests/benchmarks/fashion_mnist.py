"""The chain that judges an encoder on Fashion-MNIST: pre-training, k-NN, linear probe, fine-tuning whole and in part.

    mae-jax prepare --config=configs/prepare.py:fashion_mnist
    python tests/benchmarks/fashion_mnist.py --workdir runs/judge [--seeds 0,1,2]

Each row is one command of mae-jax, which it prints; what is complete in the workdir is not run again. At the end a
table in Markdown and, for partial fine-tuning, a plot. The same network "from nothing" gets the same recipe, budget and
labels. Few labels: mean and spread (max - min) / 2 over the seeds, each with labels and initial weights of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

RECIPES = {"10": "fashion_mnist_10", "60": "fashion_mnist_60", "all": "fashion_mnist"}


def result(root, name, job, recipe, *changes):
    """results.json of a job, which is run if it is not there; None of pretrain."""
    workdir = root / name
    command = [job, f"--config=configs/{job}.py{recipe}", f"--workdir={workdir}", *changes]
    done = workdir / ("summary.json" if job == "pretrain" else "results.json")
    print("mae-jax", *command, "" if not done.exists() else "   (there already)", flush=True)
    if not done.exists():
        with (root / f"{name}.log").open("w") as log:
            subprocess.run([sys.executable, "-m", "mae_jax", *command], stdout=log, check=True)
    return None if job == "pretrain" else json.loads(done.read_text())


def raw_pixels():
    """Logistic regression of scikit-learn on standardised pixels, on all training images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mae_jax.data.pipeline import Dataset

    data = Dataset(
        source="tfds", name="fashion_mnist", image_size=(28, 28), channels=1, batch_size=1000, cache="memory"
    )
    parts = []
    for part in (data, data.held_out_set()):
        batches = list(part.once(None))
        kept = np.concatenate([batch["weight"] for batch in batches]) > 0
        pixels, labels = (np.concatenate([batch[key] for batch in batches])[kept] for key in ("image", "label"))
        parts.append((pixels.reshape(len(pixels), -1) / 255.0, labels))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200, tol=1e-3))
    return model.fit(*parts[0]).score(*parts[1])


def shown(values):
    """Mean and spread of shares, in percent."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f}" + (f" ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else "")


def draw(path, partial):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(partial)), [100 * share for share in partial.values()], "o-")
    axes.set_xticks(range(len(partial)), ["head" if what == "head" else what for what in partial])
    axes.set(xlabel="blocks fine-tuned (0.5: the last MLP)", ylabel="top-1, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/judge"))
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    root, seeds = given.workdir, given.seeds.split(",")
    root.mkdir(parents=True, exist_ok=True)
    result(root, "pretrain", "pretrain", ":fashion_mnist")
    init = f"--config.init={root}/pretrain"
    depth = json.loads((root / "pretrain" / "config.json").read_text())["encoder"]["depth"]
    near = result(root, "knn", "knn", "", init)["top1"]
    near_pixels = result(root, "knn_pixels", "knn", "", init, "--config.features=pixels")["top1"]
    probe = result(root, "probe", "probe", ":fashion_mnist", init)["top1"]
    tuned, nothing = {}, {}
    for labels, recipe in RECIPES.items():
        for seed in seeds if labels != "all" else seeds[:1]:
            own = [f"--config.seed={seed}"] + [f"--config.data.subset_seed={seed}"] * (labels != "all")
            one = result(root, f"tuned_{labels}_{seed}", "finetune", f":{recipe}", init, *own)
            other = result(root, f"nothing_{labels}_{seed}", "finetune", f":{recipe},scratch", *own)
            tuned.setdefault(labels, []).append(one["top1"])
            nothing.setdefault(labels, []).append(other["top1"])
    partial = {}
    for what in ("head", "0.5", *map(str, range(1, depth + 1)), "all"):
        name, change = f"partial_{what}", f"--config.trainable={what}"
        partial[what] = result(root, name, "finetune", ":fashion_mnist_partial", init, change)["top1"]
    draw(root / "partial.png", partial)
    floor = raw_pixels()
    print("\n| judged by | pre-trained | from nothing | raw pixels |\n|---|---|---|---|")
    print(f"| 20-NN | {shown([near['20']])} | | {shown([near_pixels['20']])} |")
    print(f"| linear probe | {shown([probe])} | | {shown([floor])} |")
    for labels in RECIPES:
        what = "all labels" if labels == "all" else f"{labels} labels a class"
        print(f"| fine-tuning, {what} | {shown(tuned[labels])} | {shown(nothing[labels])} | |")
    print("\n| fine-tuned | " + " | ".join(partial) + " |\n|---" + "|---" * len(partial) + "|")
    print("| top-1 | " + " | ".join(shown([share]) for share in partial.values()) + " |")


if __name__ == "__main__":
    main()
