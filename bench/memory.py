"""How much memory a training step takes: what its forward keeps for backward, and what the allocator is asked for.

Both are exact: the same code and the same shapes give the same numbers on every machine, so they are held exactly
(:mod:`tdeconv.bench.guard`). What libraries (MKL, oneDNN) allocate past torch is not seen.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity

import tdeconv
from tdeconv import running
from tdeconv.bench.cases import IN_TORCHVISION
from tdeconv.vision import torchvision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("conv_bn_relu", "torch")


# ---------------------------------------------------------------------------------------------- kept for backward


class _Kept:
    """The storages that backward needs, each once, without those of ``own``."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        # held, so that no address is used twice; by the storage's own address, as one on the meta device has no data
        self._own = {s._cdata: s for s in (t.untyped_storage() for t in own)}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return t

    def nbytes(self, *without: Tensor) -> int:
        left = {t.untyped_storage()._cdata for t in without}
        return sum(storage.nbytes() for key, storage in self._storages.items() if key not in left)


def forward_counted(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """A module's output, and the bytes that its forward keeps for backward.

    Each storage counts once, the input too if it is kept. The module's parameters and buffers do not count, nor does
    the output: it is the next layer's input and counts there if that keeps it, so that a network's layers add up. Any
    device, meta too.
    """
    kept = _Kept((*module.parameters(), *module.buffers()))
    with kept.hooks():
        y = module(x)
    return y, kept.nbytes(y)


def model_saved_bytes(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: str = "meta") -> int:
    """The bytes that a training forward of a whole network and its loss keep for backward.

    All count, the input too, but for the model's own parameters and buffers. The loss is the mean of the output's
    squares. The model is left as it is: copies of its parameters are used.

    Args:
        model: on any device.
        shape: of the input, ``(N, C, H, W)`` for images.
        dtype: float32, or a half precision for a float32 model under autocast.
        device: where to run. ``"meta"`` works with shapes only: it allocates and computes nothing, and counts what a
            CPU would keep (of batch norm's own statistics under autocast it sees half: a few bytes per channel).

    Raises:
        ValueError: the dtype is not a floating one, or the model's output is not one tensor.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one, got {dtype}")
    shapes_only = device == "meta"
    run_on = "cpu" if shapes_only else device
    with contextlib.ExitStack() as stack:
        if shapes_only:  # autocast, which knows no meta device, takes a fake CPU tensor for a real one
            stack.enter_context(FakeTensorMode())
            # without data, no layer can see whether its new running statistics are finite
            stack.enter_context(mock.patch.object(running, "update_"))
        own = itertools.chain(model.named_parameters(), model.named_buffers())
        state = {name: _copy(t, run_on, shapes_only) for name, t in own}
        x = torch.randn(*shape, device=run_on)
        kept = _Kept(state.values())
        training = {module: module.training for module in model.modules()}
        try:
            model.train()
            with torch.autocast(run_on, dtype, enabled=dtype != torch.float32), kept.hooks():
                y = torch.func.functional_call(model, state, (x,))
                if not isinstance(y, Tensor):
                    raise ValueError(f"model must return one tensor, {type(model).__name__} gave {type(y).__name__}")
                y.square().mean()
        finally:
            for module, mode in training.items():
                module.training = mode
        return kept.nbytes()


def _copy(t: Tensor, device: str, shape_only: bool) -> Tensor:
    if shape_only:
        copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    else:
        copy = t.detach().to(device, copy=True)
    return copy.requires_grad_(t.requires_grad)


def network_memory(
    models: Sequence[str] = ("vgg11", "resnet50"),
    batches: Sequence[int] = (1, 8, 64, 256),
    size: int = 224,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> list[dict[str, Any]]:
    """What torchvision's networks keep for backward, with batch norm and converted, from shapes alone.

    Args:
        models: torchvision's names (``"vgg11"`` is the one with batch norm).
        batches: batch sizes.
        size: the images' height and width.
        dtypes: ``"float32"``, or ``"bfloat16"`` for autocast.

    Returns:
        A row for each: ``{"model", "batch", "size", "dtype", "implementation", "saved_bytes"}``, with the
        implementations ``"conv_bn_relu"`` (the network as it is) and ``"torch"`` (after ``convert_deconv``).

    Raises:
        ImportError: torchvision is not installed.
        ValueError: it has no such model, or a dtype that is not one of the two.
    """
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes must be among {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    rows = []
    for name in models:
        for implementation in IMPLEMENTATIONS:
            model = _network(name, implementation)
            for dtype in dtypes:
                for batch in batches:
                    saved = model_saved_bytes(model, (batch, 3, size, size), DTYPES[dtype])
                    row = {"model": name, "batch": batch, "size": size, "dtype": dtype}
                    rows.append({**row, "implementation": implementation, "saved_bytes": saved})
    return rows


def _network(name: str, implementation: str) -> nn.Module:
    models = torchvision().models
    try:
        with torch.device("meta"):
            model = models.get_model(IN_TORCHVISION.get(name, name), weights=None)
    except ValueError:
        raise ValueError(f"models must be names of torchvision's models, got {name!r}") from None
    return model if implementation == "conv_bn_relu" else tdeconv.convert_deconv(model, backend=implementation)


# ------------------------------------------------------------------------------------------------- the allocator


class Allocations(NamedTuple):
    """What was asked of torch's allocator: how often, bytes in all, and the most of these bytes held at one time."""

    count: int
    bytes: int
    peak: int


def allocations(run: Callable[[], object], device: str = "cpu") -> Allocations:
    """What one call asks of torch's allocator.

    Exact, and the same again for the same number of threads. What was there before does not count, nor does its
    release in ``run`` (on a GPU that lowers the peak). Let ``run`` run once before, so that caches are filled.

    Args:
        run: what to look at; it may leave tensors behind. On a CPU, what it writes to stderr is lost.
        device: ``"cpu"`` or a CUDA device. A GPU's allocator rounds sizes up.
    """
    return _cuda_allocations(run, device) if device.startswith("cuda") else _cpu_allocations(run)


def _cuda_allocations(run: Callable[[], object], device: str) -> Allocations:
    keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_stats(device), torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    # a key is missing until the first allocation
    count, total = (after.get(key, 0) - before.get(key, 0) for key in keys)
    return Allocations(count, total, torch.cuda.max_memory_allocated(device) - start)


def _cpu_allocations(run: Callable[[], object]) -> Allocations:
    profiler = profiled(run, memory=True)
    live: dict[int, int] = {}  # bytes by address: what was allocated before is not in it
    count = total = level = peak = 0
    for address, size in _memory_events(profiler):
        if size > 0:
            live[address] = size
            count, total, level = count + 1, total + size, level + size
            peak = max(peak, level)
        else:
            level -= live.pop(address, 0)
    return Allocations(count, total, peak)


def profiled(run: Callable[[], object], *, memory: bool = False) -> torch.profiler.profile:
    """One call under torch's profiler, which says nothing on stderr; nor can the call."""
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=memory)
    with no_stderr(), profiler:
        run()
    return profiler


def _memory_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """Address and bytes of every allocation (positive) and release (negative), in order of time.

    From the trace: ``profiler.events()`` only has the sums of each operator.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(memory, key=lambda e: e["ts"])]


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """The profiler's library writes to the process's stderr that it starts and stops, and has no switch for it."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
