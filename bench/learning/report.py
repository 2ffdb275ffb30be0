"""What the runs say: tables of both sides, and in how many networks the converted one keeps up."""

from __future__ import annotations

import argparse
import math

from tdeconv.bench.learning.store import Run


def last_loss(run: Run) -> float:
    """The mean loss of the last steps; infinite if the run diverged."""
    value = run["last_loss"]
    return math.inf if value is None else value


def write(args: argparse.Namespace) -> int:
    raise ValueError("--report: not there yet")
