"""The losses as pictures: one for each setting, a field for each network, a line for each kind of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tdeconv.bench.learning.report import Side, settings
from tdeconv.bench.learning.store import Run

COLUMNS = 4


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``digits-64-px-batch-32-40-steps.svg`` and the like; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for setting, sides in settings(runs).items():
        rows = math.ceil(len(sides) / COLUMNS)
        figure = Figure((3 * COLUMNS, 2.2 * rows + 0.6), layout="constrained")
        fields = list(figure.subplots(rows, COLUMNS, sharex=True, squeeze=False).flat)
        for axes, (network, of) in zip(fields, sides.items(), strict=False):
            for colour, (name, side) in enumerate(sorted(of.items())):
                _line(axes, side, f"C{colour}", name)
            axes.set_title(network, fontsize=9)
            axes.legend(fontsize=6, frameon=False)
        for axes in fields[len(sides) :]:
            axes.set_axis_off()
        figure.suptitle(f"{setting}: loss by step, mean over seeds and their range", fontsize=10)
        paths.append(folder / (re.sub(r"[^a-z0-9]+", "-", str(setting)) + ".svg"))
        figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _line(axes: Any, side: Side, colour: str, name: str) -> None:
    """A line breaks off where a run diverges."""
    curves = np.full((len(side.runs), max(len(run["losses"]) for run in side.runs.values())), np.nan)
    for curve, run in zip(curves, side.runs.values(), strict=True):
        curve[: len(run["losses"])] = [math.nan if loss is None else loss for loss in run["losses"]]
    width = max(1, curves.shape[1] // 40)  # of long runs, means over some steps
    smooth = np.stack([np.convolve(curve, np.ones(width) / width, "valid") for curve in curves])
    steps = np.arange(width, curves.shape[1] + 1)
    axes.plot(steps, smooth.mean(0), color=colour, label=f"{name}, {side.rate:g}")
    axes.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, linewidth=0)
