"""What the demo says: a line per epoch, the summary, and the results as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import tdeconv
from tdeconv.demo.data import DataSet
from tdeconv.demo.models import METHODS, TITLES
from tdeconv.demo.options import Settings
from tdeconv.demo.train import MOMENTUM, WEIGHT_DECAY, Epoch, Run

FORMAT = "tdeconv-demo/1"
COLUMN = 36


def header() -> str:
    """The head of the table of epochs."""
    names = "".join(f"{TITLES[method]:>{COLUMN}}" for method in METHODS)
    columns = f"{'loss':>14}{'test acc.':>12}{'step':>10}"
    return f"{'':11}{names}\n{'seed epoch':<11}{columns * len(METHODS)}"


def line(seed: int, epochs: int, records: dict[str, Epoch]) -> str:
    """An epoch's row: training loss, test accuracy and median time of a step for each method."""
    cells = [
        f"{r.train_loss:14.3f}{100 * r.test_accuracy:10.1f} %{1e3 * r.median_step_seconds:7.1f} ms"
        for r in (records[method] for method in METHODS)
    ]
    number = records[METHODS[0]].number
    return f"{seed:>4} {f'{number}/{epochs}':<6}{''.join(cells)}"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of a single value) and the values themselves."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The last epochs over seeds, per method, and the difference between the methods seed by seed."""
    summary: dict[str, Any] = {}
    for method in METHODS:
        last = [run.epochs[-1] for run in runs if run.method == method]
        names = ("test_accuracy", "test_loss", "train_loss", "median_step_seconds", "seconds")
        summary[method] = {name: spread([getattr(epoch, name) for epoch in last]) for name in names}
    base, ours = (summary[method] for method in METHODS)
    pairs = zip(base["test_accuracy"]["values"], ours["test_accuracy"]["values"], strict=True)
    summary["deconvolution_minus_batch_norm"] = {"test_accuracy": spread([b - a for a, b in pairs])}
    times = [entry["median_step_seconds"]["mean"] for entry in (base, ours)]
    summary["step_time_ratio"] = times[1] / times[0]
    return summary


def conclusion(summary: dict[str, Any], settings: Settings) -> str:
    """The summary in words: what was measured, whichever way it came out."""
    count = len(settings.seeds)
    over = f"{count} seeds, mean +- standard deviation" if count > 1 else "a single seed, so no spread is known"
    rows = [f"After {settings.epochs} epochs ({over}):"]
    for method in METHODS:
        entry = summary[method]
        rows.append(
            f"  {TITLES[method]:<22} test accuracy {_pm(entry['test_accuracy'], 100, 1)} %   "
            f"training loss {_pm(entry['train_loss'], 1, 3)}   step {_pm(entry['median_step_seconds'], 1e3, 1)} ms"
        )
    gain = summary["deconvolution_minus_batch_norm"]["test_accuracy"]
    rows.append(
        f"  Deconvolution minus batch norm, seed by seed: {_pm(gain, 100, 1, sign='+')} points of accuracy, "
        f"at {summary['step_time_ratio']:.2f} times the time of a step."
    )
    rows.append("  A small network trained briefly: these runs, not a general rule.")
    return "\n".join(rows)


def _pm(entry: dict[str, Any], scale: float, digits: int, sign: str = "") -> str:
    mean = f"{scale * entry['mean']:{sign}.{digits}f}"
    return mean if entry["std"] is None else f"{mean} +- {scale * entry['std']:.{digits}f}"


def as_json(
    runs: Sequence[Run], summary: dict[str, Any], data: DataSet, settings: Settings, files: Sequence[str]
) -> bytes:
    """Everything measured, and what it was measured with. A number that is not finite (a diverged run) is null."""
    images = data.test[0]
    described = {"name": data.name, "classes": data.classes, "image": images.shape[1:], "test_images": len(images)}
    content = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"tdeconv": tdeconv.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": settings.device, "processor": platform.machine(), "threads": torch.get_num_threads()},
        "settings": {**asdict(settings), "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
        "data": described,
        "runs": [asdict(run) for run in runs],
        "summary": summary,
        "files": list(files),
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files: each under a temporary name first, and only when all are complete under their own."""
    waiting = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, temporary in waiting.items():
            temporary.write_bytes(files[name])
        for name, temporary in waiting.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)
