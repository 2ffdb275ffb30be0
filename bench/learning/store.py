"""Files of runs: one JSON object, a run a line, each with where and with what it was made."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tdeconv.arguments import read
from tdeconv.bench.learning.train import Plan
from tdeconv.bench.machine import describe
from tdeconv.bench.results import publish

Run = dict[str, Any]
_PLAN = [field.name for field in fields(Plan)]
_RESULT = ("losses", "train_accuracies", "last_loss", "gradient", "diverged", "evaluations", "step_seconds")


def key(run: Plan | Run) -> str:
    """What tells a run apart from others: equal for a run and its plan."""
    plan = asdict(run) if isinstance(run, Plan) else {name: run[name] for name in _PLAN}
    return json.dumps(plan, sort_keys=True)


def load(paths: Iterable[Path], argument: str) -> dict[str, Run]:
    """The runs of all files by :func:`key`; of equal ones, the last file's.

    Raises:
        ValueError: a file cannot be read, or is none of :func:`save`'s.
    """
    runs = {}
    for path in paths:
        try:
            found = json.loads(read(path, argument))["runs"]
            missing = [name for run in found for name in (*_PLAN, *_RESULT) if name not in run]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{argument} {path} is no file of tdeconv.bench.learning: {error!r}") from None
        if missing:
            raise ValueError(f"{argument} {path} is no file of tdeconv.bench.learning: a run lacks {missing[0]!r}")
        runs.update({key(run): run for run in found})
    return runs


def save(path: Path, runs: Mapping[str, Run]) -> None:
    """Write the runs, a line each; the file is complete or stays what it was."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs.values())
    publish({path: f'{{"runs":[\n{lines}\n]}}\n'})


def made(plan: Plan, result: Run, device: torch.device) -> Run:
    """A run as it is kept: its plan, what came out, and what made it."""
    return {**asdict(plan), **result, "machine": describe(device), "versions": _versions(), "commit": commit()}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("timm", "torchvision")}


@functools.cache
def commit() -> str | None:
    """That of the checkout this is in, with ``-dirty`` if files differ from it; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None
