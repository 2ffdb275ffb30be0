"""Which configuration a kernel runs with: the heuristic one, or the fastest as once measured on this kind of GPU.

Nothing is measured unless asked for (:func:`tune`). What was measured is kept on disk, a file for each GPU and versions
of torch and Triton, in ``$TDECONV_CACHE``, else ``$XDG_CACHE_HOME/tdeconv``, else ``~/.cache/tdeconv``. Candidates
differ in speed alone: precision and order of summation are policy.
"""

from __future__ import annotations

import contextlib
import fcntl  # Linux, as Triton
import functools
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import OutOfResources

from tdeconv.kernels.configs import Config
from tdeconv.kernels.launch import guard

Run = Callable[[Config], object]
Entries = dict[str, dict[str, Any]]

_FORMAT = 1
_WARMUP, _REPEATS = 3, 15

_tuning = False
_known: dict[Path, Entries] = {}  # what the files held when first needed, and what was measured since
_dropped: set[tuple[torch.device, str, Config]] = set()  # did not fit the device


@contextmanager
def tune(active: bool = True) -> Iterator[None]:
    """Within the block, kernels met for the first time at some size are measured, and the winner is kept on disk."""
    global _tuning
    before, _tuning = _tuning, active
    try:
        yield
    finally:
        _tuning = before


def bucket(size: int) -> int:
    """The power of two at or above ``size``; sizes within a bucket share a measurement."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def key(**sizes: int | str | bool) -> str:
    """``key(rows=100, dtype="float32")`` -> ``"rows=128 dtype=float32"``."""
    return " ".join(f"{k}={bucket(v) if type(v) is int else v}" for k, v in sizes.items())


def choose(kernel: str, sizes: str, candidates: Sequence[Config], run: Run, device: torch.device) -> Config:
    """The configuration to launch with.

    Args:
        kernel: the kernel's name.
        sizes: what the speed depends on, from :func:`key`.
        candidates: legal configurations, the heuristic choice first.
        run: launches the kernel with a configuration; may be repeated, so it must not add to what it finds.
        device: where the tensors are.
    """
    fitting = [c for c in candidates if (device, kernel, c) not in _dropped] if _dropped else candidates
    if len(fitting) < 2:
        return (fitting or candidates)[0]
    path, name = _file(device), f"{kernel}: {sizes}"
    entries = _entries(path)
    found = _configured(entries.get(name), fitting)
    if found is None and _tuning and _measurable(device):
        found = _fastest(kernel, fitting, run, device)
        if found is not None:
            entries[name] = _written(found)
            _save(path, {name: entries[name]})
    return found or fitting[0]


def run_best(kernel: str, sizes: str, candidates: Sequence[Config], run: Run, device: torch.device) -> Config:
    """Choose and run. A configuration that does not fit the device is dropped for good, and the next one tried."""
    while True:
        config = choose(kernel, sizes, candidates, run, device)
        try:
            run(config)
        except OutOfResources:
            if (device, kernel, config) in _dropped:  # the last resort does not fit either
                raise
            _dropped.add((device, kernel, config))
        else:
            return config


def _fastest(kernel: str, candidates: Sequence[Config], run: Run, device: torch.device) -> Config | None:
    times = {}
    for config in candidates:
        try:
            times[config] = _measure(functools.partial(run, config), device)
        except OutOfResources:
            _dropped.add((device, kernel, config))
    return min(times, key=times.__getitem__, default=None)


def _measurable(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _measure(run: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a launch."""
    with guard(device):
        for _ in range(_WARMUP):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in events)


# ------------------------------------------------------------------------------------------------------------ on disk


def folder() -> Path:
    """Where measurements are kept."""
    return _folder(os.environ.get("TDECONV_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _folder(own: str | None, shared: str | None) -> Path:
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "tdeconv"


def _file(device: torch.device) -> Path:
    return _in_folder(folder(), device)


@functools.cache
def _in_folder(where: Path, device: torch.device) -> Path:
    return where / f"{_kind(device)}.json"


@functools.cache
def _kind(device: torch.device) -> str:
    """The GPU's name and the versions that make its code, fit for a file name."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (gpu, f"torch-{torch.__version__}", f"triton-{triton.__version__}")
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part) for part in parts)


def _entries(path: Path) -> Entries:
    if path not in _known:
        _known[path] = _load(path)
    return _known[path]


def _load(path: Path) -> Entries:
    """The file's entries; none if there is no such file, or it is not one of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != path.stem:
        return {}
    entries = content.get("entries")
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def _save(path: Path, new: Entries) -> None:
    """Add to the file as it is by now; it is replaced in one step. A disk that refuses costs the next process time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            content = {"format": _FORMAT, "kind": path.stem, "entries": {**_load(path), **new}}
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time reads, merges and replaces."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _written(config: Config) -> dict[str, Any]:
    return {"blocks": dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages}


def _configured(entry: dict[str, Any] | None, candidates: Sequence[Config]) -> Config | None:
    """The candidate an entry names; None if it is no candidate any more."""
    return next((c for c in candidates if _written(c) == entry), None)
