"""Where something was measured: the device, its ceilings, and the versions of what ran on it."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import replace
from importlib import import_module, metadata
from typing import Any

import torch

from tdeconv.bench import roofline

EMULATED = {"size": 1 << 20, "matrix": 256}  # products in half precision may take a hundred times float32's


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """Device, cores, threads, driver and versions; None for what there is not. Results of equal ones are comparable."""
    return {
        "device": _name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = import_module("cpuinfo").get_cpu_info()  # pytest-benchmark's own way; slow, and of no use on a GPU
    return found.get("brand_raw") or platform.processor() or "unknown CPU"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


@functools.cache
def ceilings(device: torch.device, dtypes: tuple[str, ...]) -> roofline.Ceilings:
    """Measured once a session, of float32 and of these dtypes.

    Most CPUs only emulate half precision, by small products here; what it is slower at can be done in float32.
    """
    found = roofline.measure_ceilings(device, [torch.float32])
    half = [getattr(torch, dtype) for dtype in dict.fromkeys(dtypes) if dtype != "float32"]
    if not half:
        return found
    sizes = {} if device.type == "cuda" else EMULATED
    rates = roofline.measure_ceilings(device, half, **sizes).matmul
    least = found.matmul[torch.float32]
    return replace(found, matmul={**found.matmul, **{dtype: max(rate, least) for dtype, rate in rates.items()}})


def as_json(found: roofline.Ceilings) -> dict[str, Any]:
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in found.matmul.items()}
    return {"memory": found.memory, "launch": found.launch, "matmul": rates}
