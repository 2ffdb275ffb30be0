"""How cost grows with each size: the sweeps, and the power law through what was measured beside the predicted one.

A fitted exponent lies below the predicted one where costs that do not grow (calls, kernels too short to fill the
machine) are a good part of the small sizes' time, and where larger products, which use a machine better, run at more of
its rate. It lies above where larger sizes leave the cache. And the prediction is of the products that the method's
formulas need: a backend that does otherwise (an eigendecomposition in place of Newton-Schulz steps, Winograd's
convolution) grows otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tdeconv.bench.cases import Layer

# All axes leave the middle of this: D = 288 features, so that neither roots nor convolutions are all of a step.
BASE, BATCH = Layer(64, 64, 24, block=32, network="scaling"), 16
_FEW = replace(BASE, in_channels=4, out_channels=16, block=4)  # D = 900 with a 15x15 kernel
_MANY = replace(BASE, in_channels=128, out_channels=128, size=12)

Sweep = list[tuple[int, Layer, int]]
AXES: dict[str, Sweep] = {  # value, layer and batch
    "batch": [(n, BASE, n) for n in (4, 8, 16, 32, 64, 128)],
    "channels": [(c, replace(BASE, in_channels=c, out_channels=c), BATCH) for c in (32, 64, 96, 128, 192, 256)],
    "kernel_size": [(k, replace(_FEW, kernel=k), 64) for k in (1, 3, 5, 7, 11, 15)],
    "image_size": [(n, replace(BASE, size=n), BATCH) for n in (6, 12, 24, 36, 48, 60)],
    "block": [(b, replace(_MANY, block=b), 64) for b in (4, 8, 16, 32, 64, 128)],
    "n_iter": [(n, replace(BASE, block=64, n_iter=n), BATCH) for n in (2, 3, 5, 7, 11, 15)],
    "sampling_stride": [(s, replace(BASE, sampling_stride=s), BATCH) for s in (1, 2, 3, 4, 6, 8)],
}


class Fit(NamedTuple):
    """A power law, ``seconds ~ value ** exponent``, through one axis' medians.

    Attributes:
        stage: a stage, forward and backward together, or ``"step"``, the whole training step.
        exponent: least squares on logarithms.
        predicted: the same of the floors; None where the rows have none.
        r2: share of the logarithms' variance that the law explains; 1 where nothing varies.
        values: what was fitted: value and seconds.
    """

    axis: str
    implementation: str
    stage: str
    exponent: float
    predicted: float | None
    r2: float
    values: tuple[tuple[int, float], ...]


class _Point(NamedTuple):
    seconds: float
    floor: float | None  # seconds, too


def fits(rows: Iterable[Mapping[str, Any]]) -> list[Fit]:
    """The power law of every axis, implementation and stage in the rows of the suite ``scaling``.

    Args:
        rows: benchmarks of a result file. Those of other suites, and forward passes alone, are passed over.

    Returns:
        In the rows' order; of two values at least, else no law goes through them.
    """
    points: dict[tuple[str, str, str], dict[int, dict[str, _Point]]] = {}
    for row in rows:
        info = row["extra_info"]
        stage = info.get("stage") or info.get("kind")
        if info["suite"] == "scaling" and stage != "forward":
            sweep = points.setdefault((info["axis"], info["implementation"], stage), {})
            point = _Point(row["stats"]["median"], info.get("floor_s"))
            sweep.setdefault(info["value"], {})[info.get("direction", "")] = point
    return [_fit(*key, dict(sorted(sweep.items()))) for key, sweep in points.items() if len(sweep) > 1]


def _fit(axis: str, implementation: str, stage: str, sweep: Mapping[int, Mapping[str, _Point]]) -> Fit:
    values = list(sweep)
    seconds = [sum(point.seconds for point in ways.values()) for ways in sweep.values()]
    floors = [_sum([point.floor for point in ways.values()]) for ways in sweep.values()]
    known = [floor for floor in floors if floor]
    exponent, r2 = _power_law(values, seconds)
    predicted = _power_law(values, known)[0] if len(known) == len(values) else None
    return Fit(axis, implementation, stage, exponent, predicted, r2, tuple(zip(values, seconds, strict=True)))


def _sum(floors: Sequence[float | None]) -> float | None:
    """Of both directions; None where one is unknown."""
    known = [floor for floor in floors if floor is not None]
    return sum(known) if len(known) == len(floors) else None


def _power_law(values: Sequence[int], results: Sequence[float]) -> tuple[float, float]:
    """Exponent, and the share of variance explained."""
    x, y = np.log(values), np.log(results)
    slope, offset = np.polyfit(x, y, 1)
    spread = float(np.square(y - y.mean()).sum())
    left = float(np.square(y - slope * x - offset).sum())
    return float(slope), 1.0 if math.isclose(spread, 0.0, abs_tol=1e-20) else 1.0 - left / spread
