"""``python -m tdeconv demo``: a small network trained with batch norm and with deconvolution, and drawings of it."""

from __future__ import annotations

import argparse
from importlib import import_module

from tdeconv.demo.options import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train, draw and write as asked for by the options of :func:`add_arguments`.

    Returns:
        0 when all files are written; 2 for a request that cannot be served, with a message on stderr; 130 (Ctrl-C) or
        143 (SIGTERM) if interrupted. In the last three cases no file is written or changed.

    Raises:
        ModuleNotFoundError: a package of the extra ``demo`` or ``vision`` is not installed.
    """
    return import_module("tdeconv.demo.main").run(args)
