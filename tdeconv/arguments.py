"""Types of the commands' arguments."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """A whole number from 1 on, for ``add_argument(type=...)``.

    Raises:
        argparse.ArgumentTypeError, ValueError: it is below 1, or no whole number.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
