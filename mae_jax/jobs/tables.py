"""What comes out of a sweep: a line for each trial and seed, a table in the form of the paper's, and a plot."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mae_jax.files import write
from mae_jax.jobs import plots
from mae_jax.jobs.trials import FLOPS, Trial

RATE = "/s"  # how columns end that are no shares, but so many in a second


def collect(sweep: ConfigDict, chain: ConfigDict, found: Sequence[Trial], workdir: Path) -> list[str]:
    """Write sweep.csv, sweep.md and sweep.png from the trials that are done; what there is to say of that."""
    shows = {job["name"]: job.get("shows", {}) for job in chain.jobs}
    rows = [row(trial, shows) for trial in found if trial.done]
    if not rows:
        return ["no trial is done yet, so there is no table"]
    write(workdir / "sweep.csv", as_csv(rows))
    columns = {column: where for shown in shows.values() for column, where in shown.items()}
    table = markdown(sweep, columns, rows)
    write(workdir / "sweep.md", "\n".join([*table, ""]).encode())
    settings = settings_of(sweep, rows)
    shown = {
        column: (
            [np.array(values(rows, name, column)) * (100 if is_share(where) else 1) for name in settings],
            [setting.get("published", {}).get(column) for setting in settings.values()],
            "top-1 %" if is_share(where) else column,
        )
        for column, where in columns.items()
        if not column.endswith(RATE)
    }
    at = [setting.get("at") for setting in settings.values()]
    labels = [setting.get("label", name) for name, setting in settings.items()]
    plots.sweep(workdir / "sweep.png", sweep.title, sweep.axis, labels, at, shown)
    return [*table, "", f"results     {workdir}/sweep.csv, sweep.md, sweep.png"]


def settings_of(sweep: ConfigDict, rows: Sequence[dict]) -> dict[str, Mapping]:
    """What the sweep says of the settings that have rows, by name, in its order."""
    there = {one["trial"] for one in rows}
    return {setting["name"]: setting for setting in sweep.trials if setting["name"] in there}


def row(trial: Trial, shows: Mapping[str, Mapping[str, str]]) -> dict:
    """What a trial that is done has shown, by column; `shows` of each job where its results have them."""
    shown = {"trial": trial.name, "label": trial.label, "seed": trial.seed}
    for link in trial.chain:
        for column, where in shows[link.name].items():
            shown[column] = result(link.folder, where)
        shown[f"seconds of {link.name}"] = link.done["seconds"]
    try:
        return shown | json.loads((trial.folder / FLOPS).read_text())
    except FileNotFoundError:  # of a chain without pre-training
        return shown


def result(folder: Path, where: str) -> float | None:
    """A number of a job: what results.json, or of pre-training summary.json, has at `where`, a dotted path."""
    file = folder / "results.json"
    value = json.loads((file if file.exists() else folder / "summary.json").read_text())
    for key in where.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def as_csv(rows: Sequence[dict]) -> bytes:
    """All rows, with a line of names above."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for one in rows for key in one)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def values(rows: Sequence[dict], name: str, column: str) -> list[float]:
    """Those of the seeds of a setting."""
    return [one[column] for one in rows if one["trial"] == name and one.get(column) is not None]


def is_share(where: str) -> bool:
    """Whether what jobs keep at `where` is an accuracy, from 0 to 1, which is told in percent."""
    return re.search(r"(^|[./])(top\d|knn)\b", where) is not None


def markdown(sweep: ConfigDict, columns: Mapping[str, str], rows: Sequence[dict]) -> list[str]:
    """The table: a line for each setting, with means and standard deviations over seeds, and what is published.

    Of each column, `columns` says where jobs keep it. FLOPs and images/s are also told relative to the setting that is
    the paper's own, `sweep.reference`.
    """
    settings = settings_of(sweep, rows)
    theirs = list(dict.fromkeys(key for setting in settings.values() for key in setting.get("published", {})))
    flops = ["MFLOP an image"] if any("needed" in one for one in rows) else []
    heads = [sweep.axis, "seeds", *columns, *flops, *(f"{column}, paper" for column in theirs)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def relative(number: float, of: Sequence[float]) -> str:
        return f" ({number / np.mean(of):.2f}x)" if len(of) else ""

    for name, setting in settings.items():
        cells = [setting.get("label", name), str(sum(one["trial"] == name for one in rows))]
        reference = sweep.get("reference", "")
        for column, where in columns.items():
            ours = values(rows, name, column)
            if column.endswith(RATE):
                rate = np.mean(ours or [0])
                cells.append(f"{rate:,.0f}" + relative(rate, values(rows, reference, column)))
            else:
                cells.append(with_spread(np.array(ours) * 100, ".1f") if is_share(where) else with_spread(ours, ".4g"))
        if flops:
            needed = values(rows, name, "needed")[0]
            cells.append(f"{needed / 1e6:,.1f}" + relative(needed, values(rows, reference, "needed")))
        cells += [str(setting.get("published", {}).get(column, "")) for column in theirs]
        lines.append("| " + " | ".join(f"**{cell}**" if name == reference and cell else cell for cell in cells) + " |")
    return lines


def with_spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation of numbers, each written as `form` says."""
    if not len(values):
        return ""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"
