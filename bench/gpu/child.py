"""A child of the GPU report: works through the units of one step. See :mod:`bench.gpu.worker` for what it writes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bench.gpu.tree  # noqa: F401  # before tdeconv.kernels
from bench.gpu import kernels as gpu_kernels
from bench.gpu import models as gpu_models
from bench.gpu import tools as gpu_tools
from bench.gpu.worker import begun, write

STEPS: dict[str, Callable[[str, gpu_kernels.Options], Iterable[dict[str, Any]]]] = {
    "device": gpu_kernels.device_row,
    "barrier": gpu_kernels.barrier,
    "check": gpu_kernels.check,
    "kernels": gpu_kernels.kernels,
    "compile": gpu_models.compile_ahead,
    "tune": gpu_kernels.tune,
    "tuned": gpu_kernels.kernels,
    "models": gpu_models.step,
    "tools": gpu_tools.tool,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.child")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--ceilings", default="{}", help="JSON")
    parser.add_argument("--units", nargs="*", default=[])
    args = parser.parse_args(argv)
    options = gpu_kernels.Options(args.smoke, args.ceilings, args.rows)
    before = begun(args.rows)
    with args.rows.open("a", encoding="utf-8") as file:
        for unit in args.units:
            if unit in before:
                continue
            write(file, {"begin": unit})
            try:
                for row in STEPS[args.step](unit, options):
                    write(file, {"unit": unit, **row})
            except Exception as error:  # whatever a kernel or a compiler may raise is a result
                traceback.print_exc()
                write(file, {"unit": unit, "error": f"{type(error).__name__}: {str(error).strip()[:500]}"})
            write(file, {"done": unit})
            if not gpu_kernels.release():
                return 3  # an error that stays: the rest is for a new process
        write(file, {"end": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
