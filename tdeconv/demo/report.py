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
from tdeconv.demo.models import Line
from tdeconv.demo.options import Settings
from tdeconv.demo.train import MOMENTUM, WEIGHT_DECAY, Run, by_line

FORMAT = "tdeconv-demo/2"
COLUMN = 27


def header(lines: Sequence[Line]) -> str:
    """The head of the table of epochs."""
    heads = ("".join(f"{part:>{COLUMN}}" for part in parts) for parts in zip(*(of.heads for of in lines), strict=True))
    columns = f"{'loss':>9}{'accuracy':>9}{'step':>9}" * len(lines)
    return "\n".join([*(f"{'':11}{head}" for head in heads), f"{'seed epoch':<11}{columns}"])


def row(runs: Sequence[Run], epochs: int) -> str:
    """The last epoch of a seed's runs: training loss, test accuracy and mean time of a step for each line."""
    last = [run.epochs[-1] for run in runs]
    cells = [f"{r.train_loss:9.3f}{100 * r.test_accuracy:7.1f} %{1e3 * r.mean_step_seconds:6.1f} ms" for r in last]
    return f"{runs[0].seed:>4} {f'{last[0].number}/{epochs}':<6}{''.join(cells)}"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of a single value) and the values themselves."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The last epochs over seeds, for each line by its name, and what sets deconvolution apart from batch norm."""
    names = ("test_accuracy", "test_loss", "train_loss", "mean_step_seconds", "seconds")
    summary: dict[str, Any] = {}
    base, *_ = lines = list(by_line(runs).values())
    for of_line in lines:
        last = [run.epochs[-1] for run in of_line]
        entry: dict[str, Any] = {name: spread([getattr(epoch, name) for epoch in last]) for name in names}
        if of_line is not base:
            entry["against_batch_norm"] = _compare(base, of_line)
        summary[of_line[0].line.name] = entry
    return summary


def _compare(base: Sequence[Run], ours: Sequence[Run]) -> dict[str, Any]:
    """Seed by seed: the gain in accuracy at the end, the least lead on the way; and how many times a step's time."""
    pairs = list(zip(base, ours, strict=True))
    times = [statistics.fmean(run.epochs[-1].mean_step_seconds for run in runs) for runs in (base, ours)]
    return {
        "test_accuracy": spread([b.epochs[-1].test_accuracy - a.epochs[-1].test_accuracy for a, b in pairs]),
        "step_time_ratio": times[1] / times[0],
        "least_lead": {"of_means": least_lead(base, ours), "values": [least_lead([a], [b]) for a, b in pairs]},
    }


def least_lead(base: Sequence[Run], ours: Sequence[Run]) -> float:
    """How far ours is ahead in accuracy at the worst second of training behind the first epoch; negative: not ahead.

    At any second, a line has the accuracy of the last epoch that has ended by then: the mean of its seeds, at the mean
    of their times.
    """
    curves = [
        [
            (statistics.fmean(epoch.seconds for epoch in of_epoch), statistics.fmean(e.test_accuracy for e in of_epoch))
            for of_epoch in zip(*(run.epochs for run in runs), strict=True)
        ]
        for runs in (base, ours)
    ]
    begin = max(curve[0][0] for curve in curves)
    moments = [seconds for curve in curves for seconds, _ in curve if seconds >= begin]  # between these, none changes
    theirs, found = ([_accuracy_at(curve, moment) for moment in moments] for curve in curves)
    return min(b - a for a, b in zip(theirs, found, strict=True))


def _accuracy_at(curve: Sequence[tuple[float, float]], moment: float) -> float:
    return next(accuracy for seconds, accuracy in reversed(curve) if seconds <= moment)


def conclusion(summary: dict[str, Any], settings: Settings) -> str:
    """The summary in words: what was measured, whichever way it came out."""
    count = len(settings.seeds)
    over = f"{count} seeds, mean +- standard deviation" if count > 1 else "a single seed, so no spread is known"
    rows = [f"After {settings.epochs} epochs ({over}):"]
    width = max(len(line.title) for line in settings.lines)
    for line in settings.lines:
        entry = summary[line.name]
        rows.append(
            f"  {line.title:<{width}}  test accuracy {_pm(entry['test_accuracy'], 100, 1)} %   "
            f"training loss {_pm(entry['train_loss'], 1, 3)}   step {_pm(entry['mean_step_seconds'], 1e3, 1)} ms"
        )
    rows.append("Deconvolution against batch norm, seed by seed:")
    for line in settings.lines[1:]:
        entry = summary[line.name]["against_batch_norm"]
        lead = 100 * entry["least_lead"]["of_means"]
        ahead = f"ahead at every moment, by {lead:.1f} points at least"
        behind = f"not ahead at every moment: at worst {-lead:.1f} points behind"
        rows.append(
            f"  {line.title:<{width}}  {_pm(entry['test_accuracy'], 100, 1, sign='+')} points of accuracy, "
            f"at {entry['step_time_ratio']:.2f} times the time of a step;\n"
            f"  {'':<{width}}  at equal times after both first epochs {ahead if lead > 0 else behind}"
        )
    rows.append("A small network trained briefly: these runs, not a general rule.")
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
        "runs": [{**asdict(run), "line": run.line.name} for run in runs],
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
