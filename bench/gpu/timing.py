"""Times on a GPU by its own events, with the L2 cache flushed; on a CPU (a smoke run) by the clock, meaning nothing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.testing import do_bench

QUANTILES = (0.2, 0.5, 0.8)
WARMUP_MS, REPEAT_MS = 2, 12


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """``p20_ms``, ``p50_ms``, ``p80_ms``."""
    values = sorted(seconds)
    found = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {f"p{10 * tenth}_ms": 1e3 * found[tenth - 1] for tenth in (2, 5, 8)}


def kernel(run: Callable[[], Any]) -> dict[str, Any]:
    """Quantiles of a stage's time: of a captured graph's replay, in which the launches' cost on the CPU is not."""
    if device().type != "cuda":
        return {**quantiles(_clock(run, 1)), "timed": "CPU clock"}
    eager = _do_bench(run)
    row: dict[str, Any] = {**eager, "timed": "eager"}
    try:
        row |= {**_do_bench(_graph(run).replay), "timed": "graph", "eager_p50_ms": eager["p50_ms"]}
    except Exception as error:  # a stage that cannot be captured is a finding, not an end
        torch.cuda.synchronize()
        row["not_captured"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _do_bench(run: Callable[[], Any]) -> dict[str, float]:
    found = do_bench(run, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=list(QUANTILES))
    return {f"p{round(100 * q)}_ms": float(ms) for q, ms in zip(QUANTILES, found, strict=True)}


def _graph(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def steps(run: Callable[[], Any], seconds: float = 1.5, most: int = 20, least: int = 3) -> dict[str, Any]:
    """Quantiles over runs that follow each other as in training: nothing waits for the device in between.

    About as many as fit into the seconds; half as many warm up.
    """
    if device().type != "cuda":
        return {**quantiles(_clock(run, 1)), "timed": "CPU clock"}
    (once,) = _clock(lambda: (run(), torch.cuda.synchronize()), 1)
    rounds = max(least, min(most, int(seconds / once)))
    for _ in range(rounds // 2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return {**quantiles(times), "timed": "events", "rounds": rounds}


def _clock(run: Callable[[], Any], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def peak(run: Callable[[], Any]) -> int | None:
    """Bytes that the device's allocator held at most beyond what it held before; None on a CPU."""
    if device().type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launch_seconds(launches: int = 64) -> float:
    """From one dependent launch to the next within a graph."""
    one = torch.zeros(1, device=device())

    def chain() -> None:
        for _ in range(launches):
            one.add_(1)

    return float(_do_bench(_graph(chain).replay)["p50_ms"]) / 1e3 / launches
