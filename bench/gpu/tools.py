"""NVIDIA's own tools on a few launches, where they are installed: compute-sanitizer and Nsight Compute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.cases import STAGES, cases, units
from bench.gpu.kernels import Options, Row
from bench.gpu.tree import ROOT
from bench.gpu.worker import tail

SECONDS = 60
COMMANDS = {
    "compute-sanitizer memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"],
    "compute-sanitizer racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"],
    "ncu": ["ncu", "--set", "basic", "--launch-count", "60", "--kernel-name-base", "function"],
}


def _units() -> list[str]:
    """A small case of each stage: the sanitizer slows everything down a hundredfold."""
    found = units(cases(True), barrier=False)
    return [next(u.name for u in found if u.stage == stage and u.way != "library") for stage in STAGES]


def tool(unit: str, options: Options) -> Iterator[Row]:
    """Run one of them on a child that checks small cases; its output goes to a file."""
    command = COMMANDS[unit]
    if shutil.which(command[0]) is None:
        yield {"outcome": f"{command[0]} is not installed"}
        return
    name = unit.replace(" ", "-")
    log, rows = options.rows.with_name(f"{name}.txt"), options.rows.with_name(f"{name}.jsonl")
    rows.unlink(missing_ok=True)
    child = [sys.executable, "-m", "bench.gpu.child", "check", "--smoke", "--rows", str(rows)]
    child += ["--units", *_units()]
    with log.open("w") as file:
        run = subprocess.run([*command, *child], cwd=ROOT, stdout=file, stderr=file, timeout=SECONDS, check=False)
    last = tail(Path(log)).splitlines()[-1:]
    yield {"outcome": f"status {run.returncode}: {' '.join(last)[:200]}", "output": log.name}
