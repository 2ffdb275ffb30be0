"""Clocks: the CPU's, and a GPU's own, which times what the device did and not when it was asked to."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks in time; what lies between two is asked for when the work is done."""

    def ready(self) -> None:
        """Before each piece of work: nothing of an earlier one is still running, or lies in a GPU's cache."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class CpuClock:
    def ready(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events in the device's queue. Its L2 cache is overwritten before each piece of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flood = torch.empty(2 * size, dtype=torch.int8, device=device)

    def ready(self) -> None:
        self._flood.zero_()
        torch.cuda.synchronize(self._device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on ``device``.

    Raises:
        ValueError: it is neither a CPU nor a CUDA or ROCm device.
    """
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ValueError(f"device must be a cpu or cuda device, got {device}: there is no clock for it")
