"""The steps of the GPU report about single stages: ceilings, the grid barrier, answers, times, the tuner's choices."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from bench.gpu import timing as gpu_time
from bench.gpu.cases import STAGES, Case, Unit, tuned_cases, tuned_units, units
from bench.gpu.cases import cases as all_cases
from bench.gpu.problem import Problem, shape_of
from tdeconv import ops
from tdeconv.bench import roofline

Row = dict[str, Any]
DIRECTIONS = ("forward", "backward")
KEPT = 8 << 30  # bytes
BARRIER = {"96": (2, 96), "147": (1, 147), "576": (1, 576)}  # batch, D


@dataclass(frozen=True)
class Options:
    """What a child was told: whether it is a smoke run, the ceilings as JSON, where its rows go."""

    smoke: bool
    ceilings: str
    rows: Path


def release() -> bool:
    """Give memory back, if it is much: others use the device too. Whether the device still answers."""
    if gpu_time.device().type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > KEPT:
            _problem.cache_clear()
            _truth.cache_clear()
            gc.collect()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------- the device


def device_row(unit: str, options: Options) -> Iterator[Row]:
    """What it is, and its ceilings."""
    device = gpu_time.device()
    yield {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip or "none",
    }
    yield {"ceilings": ceilings(device, options.smoke)}


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """Bytes a second, operations a second by dtype, seconds a launch; float32 as fast as tf32 goes, the higher roof."""
    sizes = {"size": 1 << 16, "matrix": 32} if smoke else {}
    found = roofline.measure_ceilings(device, **sizes)
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in found.matmul.items()}
    launch = found.launch
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["float32"] = max(rates["float32"], _product_rate(device))
        torch.backends.cuda.matmul.allow_tf32 = False
        launch = min(launch, gpu_time.launch_seconds())
    return {"memory": found.memory, "launch": launch, **rates}


def _product_rate(device: torch.device, matrix: int = 8192) -> float:
    a = torch.ones(matrix, matrix, device=device)
    return 2 * matrix**3 / roofline._seconds(lambda: torch.mm(a, a), device)


def _ceilings(text: str) -> roofline.Ceilings | None:
    known = json.loads(text)
    if not known:
        return None
    rates = {getattr(torch, name): rate for name, rate in known.items() if name not in ("memory", "launch")}
    return roofline.Ceilings(known["memory"], rates, known["launch"])


# ------------------------------------------------------------------------------------------------------ grid barrier


@contextmanager
def _cooperative(active: bool) -> Iterator[None]:
    """One launch whose programs wait for each other, or a launch for each phase."""
    with mock.patch.dict(os.environ, {"TDECONV_COOPERATIVE": "1" if active else "0"}):
        yield


def barrier(unit: str, options: Options) -> Iterator[Row]:
    """The inverse root of ``unit`` features in one launch, both directions: bitwise as phase by phase, 20 times."""
    stages, device = ops.stages("triton"), gpu_time.device()
    batch, d = (1, 5) if options.smoke else BARRIER[unit]
    generator = torch.Generator(device).manual_seed(0)
    rows, grad = (torch.randn(batch, n, d, generator=generator, device=device) for n in (4 * d, d))
    cov, grad = rows.mT @ rows / rows.shape[1], grad + grad.mT

    def both() -> list[torch.Tensor]:
        root, basis, norm = stages.inverse_sqrt(cov, 5)
        return [root, stages.inverse_sqrt_backward(grad, basis, norm, 5)]

    with _cooperative(False):
        expected = both()
    with _cooperative(True):
        for run in range(1 if options.smoke else 20):
            for direction, got, wanted in zip(DIRECTIONS, both(), expected, strict=True):
                if not torch.equal(got, wanted):
                    error = float((got - wanted).norm() / wanted.norm())
                    raise ValueError(f"{direction} differs from the phases' in run {run}, relatively by {error:.2e}")
    outcome = "as phase by phase, bitwise" if device.type == "cuda" else "tried without one: a CPU has none"
    yield {"what": f"{batch} x {d} x {d}", "outcome": outcome}


# ---------------------------------------------------------------------------------------------------- single stages


def _named(options: Options) -> dict[str, Unit]:
    found = [*units(all_cases(options.smoke), barrier=True), *tuned_units(options.smoke)]
    return {unit.name: unit for unit in found}


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> Problem:
    return Problem(case, gpu_time.device())


@functools.lru_cache(maxsize=1)
def _truth(case: Case, stage: str) -> Any:
    return _problem(case).truth(stage)


@contextmanager
def _as(way: str) -> Iterator[None]:
    """Within it, stages are done in this way."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cooperative(way == "barrier"))
        if way in ("library", "triton"):
            convolution = importlib.import_module("tdeconv.kernels.convolve")
            stack.enter_context(convolution.use(way))
        yield


def _directions(unit: Unit) -> list[roofline.Work]:
    return [work for work in roofline.works(shape_of(unit.case)) if work.stage == unit.stage]


def _about(unit: Unit, direction: str) -> Row:
    case = unit.case
    return {
        "network": case.network,
        "shape": case.layer,
        "batch": case.batch,
        "dtype": case.dtype,
        "layout": case.layout,
        "stage": unit.stage,
        "way": unit.way,
        "direction": direction,
    }


def check(unit: str, options: Options) -> Iterator[Row]:
    """Answers against float64; a row for each direction, an exception for a wrong one."""
    what = _named(options)[unit]
    for work in _directions(what):
        yield {**_about(what, work.direction), "error_measured": _checked(what, work.direction)}


def _checked(unit: Unit, direction: str) -> float:
    problem = _problem(unit.case)
    with _as(unit.way):
        got = problem.call(ops.stages("triton"), unit.stage, direction)()
    return problem.error(unit.stage, direction, got, _truth(unit.case, unit.stage))


def kernels(unit: str, options: Options) -> Iterator[Row]:
    """Times, and their share of the floor that the device's ceilings set. What was tuned since is checked again."""
    what, known = _named(options)[unit], _ceilings(options.ceilings)
    for work in _directions(what):
        row = _about(what, work.direction)
        if what.way == "tuned":
            row["error_measured"] = _checked(what, work.direction)
        run = _problem(what.case).call(ops.stages("triton"), what.stage, work.direction)
        with _as(what.way):
            run()
            row |= {"peak_bytes": gpu_time.peak(run), **gpu_time.kernel(run)}
        if known is not None:
            floor = 1e3 * work.floor(known)
            row |= {"floor_ms": floor, "share": floor / row["p50_ms"], "bound": work.bound(known)}
        yield row


# ------------------------------------------------------------------------------------------------------------ tuning


def _once(run: Any, device: torch.device) -> float:
    """In place of a measurement: compile and run."""
    run()
    return 0.0


def candidates(unit: str, options: Options) -> None:
    """Compile every candidate of a case, so that the tuner, alone on the device, need not; nothing is kept."""
    tuning = importlib.import_module("tdeconv.kernels.tuning")
    with mock.patch.object(tuning, "_measure", _once), mock.patch.object(tuning, "_save"):
        _tune(unit, options)


def tune(unit: str, options: Options) -> Iterator[Row]:
    """Measure the candidates of a case; the winners go to the folder of ``TDECONV_CACHE``."""
    start = time.perf_counter()
    _tune(unit, options)
    yield {"seconds": round(time.perf_counter() - start, 2)}


def _tune(unit: str, options: Options) -> None:
    tuning = importlib.import_module("tdeconv.kernels.tuning")
    (case,) = [case for case in tuned_cases(options.smoke) if case.name == unit]
    problem, stages = _problem(case), ops.stages("triton")
    with tuning.tune():
        for stage in STAGES:
            for work in _directions(Unit(case, stage, "tuned")):
                problem.call(stages, stage, work.direction)()
