"""What each stage of a layer must cost at least: bytes, operations, and the floor in time that a device's ceilings set.

Two numbers come before any kernel: the arithmetic it must do and the bytes it must move; the larger of the two times is
the floor. Counted here as if every tensor crossed memory once and nothing of a stage's own did; a chain of dependent
launches adds its latency. Ceilings are a device's own, measured or from its maker; none is known here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdeconv.geometry import Geometry, resolve_block
from tdeconv.precision import statistics_dtype

STAGES = ("patch_moments", "inverse_sqrt", "fold", "convolve")


@dataclass(frozen=True)
class Ceilings:
    """A device's ceilings.

    Attributes:
        memory: bytes a second, read plus written.
        matmul: operations a second (a multiplication and an addition are two) by dtype; of float32, as the products
            are done (three tf32 passes have a third of tf32's).
        launch: seconds from one dependent launch to the next.
    """

    memory: float
    matmul: Mapping[torch.dtype, float]
    launch: float = 0.0


@dataclass(frozen=True)
class Shape:
    """A layer and its input; ``size`` and ``kernel`` have one number per spatial axis."""

    batch: int
    channels: int
    size: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None  # None: half the kernel
    dilation: tuple[int, ...] | None = None
    groups: int = 1
    block: int = 64
    sampling_stride: int = 3
    n_iter: int = 5
    dtype: torch.dtype = torch.bfloat16
    input_grad: bool = True

    @property
    def geo(self) -> Geometry:
        ones = (1,) * len(self.size)
        return Geometry(
            channels=self.channels,
            kernel_size=self.kernel,
            stride=self.stride or ones,
            padding=tuple(k // 2 for k in self.kernel) if self.padding is None else self.padding,
            dilation=self.dilation or ones,
            groups=self.groups,
            block=resolve_block(self.block, self.channels, self.groups),
            grouping="interleaved",
            sampling_stride=self.sampling_stride,
        )

    @property
    def samples(self) -> int:
        """``M``: sampled patches."""
        geo = self.geo
        if geo.pointwise:
            return -(-self.batch * math.prod(self.size) // geo.flat_stride)
        return self.batch * math.prod(geo.positions(self.size))

    @property
    def sampled_values(self) -> int:
        """Values of the input that some sample reads."""
        geo = self.geo
        if geo.pointwise:
            return self.samples * self.channels
        return self.batch * self.channels * math.prod(map(len, self._pixels(geo)))

    def _pixels(self, geo: Geometry) -> list[set[int]]:
        """Along each axis, the pixels that some sampled patch reads."""
        axes = zip(
            self.size,
            geo.positions(self.size),
            geo.sample_stride,
            geo.kernel_size,
            geo.dilation,
            geo.padding,
            strict=True,
        )
        return [{i * s + t * d - p for i in range(m) for t in range(k)} & set(range(n)) for n, m, s, k, d, p in axes]

    @property
    def outputs(self) -> int:
        """Values of the output."""
        return self.batch * self.out * math.prod(self.geo.every().positions(self.size))

    @property
    def inputs(self) -> int:
        return self.batch * self.channels * math.prod(self.size)

    @property
    def weights(self) -> int:
        return self.out * self.channels // self.groups * self.geo.taps


@dataclass(frozen=True)
class Work:
    """What one stage must do in one direction: bytes, operations in a dtype, the longest chain of launches."""

    stage: str
    direction: str
    bytes: int
    operations: int
    dtype: torch.dtype
    chain: int = 1

    def times(self, ceilings: Ceilings) -> dict[str, float]:
        """Seconds that each of memory, arithmetic and latency needs."""
        return {
            "memory": self.bytes / ceilings.memory,
            "arithmetic": self.operations / ceilings.matmul[self.dtype] if self.operations else 0.0,
            "latency": self.chain * ceilings.launch,
        }

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds: the largest of those."""
        return max(self.times(ceilings).values())

    def bound(self, ceilings: Ceilings) -> str:
        """Which of them it is."""
        times = self.times(ceilings)
        return max(times, key=times.__getitem__)


def products(n_iter: int) -> tuple[int, int]:
    """Symmetric products of an ``n_iter``-step inverse root in the paired form, and how many depend on each other."""
    count = 5 * (n_iter - 1) // 2 if n_iter % 2 else 5 * n_iter // 2 - 3
    return count, max(0, 2 * n_iter - 1)


def triangle(features: int) -> int:
    """Operations of a symmetric D x D product from D x D factors: half of ``2 D^3``, diagonal included."""
    return features * features * (features + 1)


def works(shape: Shape, stale: bool = False) -> list[Work]:
    """Every stage, forward and backward (performance.md's table); of a stale step there are the fold and the
    convolution, and no gradient goes through the statistics."""
    statistics = [] if stale else [*_moments(shape), *_root(shape)]
    return [*statistics, *_fold(shape, shape.input_grad and not stale), *_convolve(shape)]


def _moments(shape: Shape) -> list[Work]:
    """Backward: patches times a full matrix, and read-modify-write of the sampled pixels of the input's gradient."""
    geo, d = shape.geo, shape.geo.features
    rows, size = shape.samples * geo.pooled * geo.groups, shape.dtype.itemsize
    stat = geo.groups * d * (d + 1) * statistics_dtype(shape.dtype).itemsize
    read = shape.sampled_values * size
    forward = Work("patch_moments", "forward", read + stat, rows * d * (d + 1), shape.dtype, 2)
    if not shape.input_grad:
        return [forward]
    return [forward, Work("patch_moments", "backward", 3 * read + stat, 2 * rows * d * d, shape.dtype)]


def _root(shape: Shape) -> list[Work]:
    """Backward: the tangent of the same products, twice as many."""
    geo, stat = shape.geo, statistics_dtype(shape.dtype)
    matrix = geo.groups * geo.features**2 * stat.itemsize
    count, chain = products(shape.n_iter)
    each = geo.groups * triangle(geo.features)
    forward = Work("inverse_sqrt", "forward", 2 * matrix, count * each, stat, chain)
    if not shape.input_grad:
        return [forward]
    return [forward, Work("inverse_sqrt", "backward", 3 * matrix, 2 * count * each, stat, chain)]


def _fold(shape: Shape, statistics: bool) -> list[Work]:
    """Backward: the weight's gradient, and the root's where one goes through the statistics."""
    geo, stat = shape.geo, statistics_dtype(shape.dtype)
    matrix, weights = geo.groups * geo.features**2 * stat.itemsize, shape.weights
    operations = 2 * weights * geo.features
    forward = Work("fold", "forward", weights * (shape.dtype.itemsize + stat.itemsize) + matrix, operations, stat)
    sides = 2 if statistics else 1
    moved = weights * (stat.itemsize + sides * shape.dtype.itemsize) + sides * matrix
    return [forward, Work("fold", "backward", moved, sides * operations, stat)]


def _convolve(shape: Shape) -> list[Work]:
    """Backward: the gradients of the weight and, where it has one, of the input; each reads the output's once."""
    size = shape.dtype.itemsize
    x, y, w = shape.inputs * size, shape.outputs * size, shape.weights * size
    operations = 2 * shape.outputs * shape.channels // shape.groups * shape.geo.taps
    forward = Work("convolve", "forward", x + y + w, operations, shape.dtype)
    weight_side, input_side = x + y + w, (x + y + w) if shape.input_grad else 0
    sides = 2 if shape.input_grad else 1
    return [forward, Work("convolve", "backward", weight_side + input_side, sides * operations, shape.dtype)]


def conv_bn_relu(shape: Shape) -> list[Work]:
    """What is replaced: the convolution, then three passes over its output forward, five backward, all fused."""
    size = shape.dtype.itemsize
    passes = {"forward": 3, "backward": 5}
    return [
        *_convolve(shape),
        *(Work("batch_norm", way, n * shape.outputs * size, 0, shape.dtype) for way, n in passes.items()),
    ]


def total(found: Sequence[Work], ceilings: Ceilings) -> dict[str, Any]:
    """Of works one after the other: bytes, operations, ``floor_s`` in seconds, and what bounds most of that time."""
    seconds: dict[str, float] = {}
    for work in found:
        seconds[work.bound(ceilings)] = seconds.get(work.bound(ceilings), 0.0) + work.floor(ceilings)
    return {
        "bytes": sum(work.bytes for work in found),
        "operations": sum(work.operations for work in found),
        "floor_s": sum(seconds.values()),
        "bound": max(seconds, key=seconds.__getitem__),
    }


def floor(shape: Shape, ceilings: Ceilings) -> dict[tuple[str, str], float]:
    """Seconds that each stage and direction needs at least."""
    return {(work.stage, work.direction): work.floor(ceilings) for work in works(shape)}


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    size: int | None = None,
    matrix: int | None = None,
) -> Ceilings:
    """The device's own, by PyTorch's copy, products and a chain of tiny launches; the best of a few runs each.

    ``size`` bytes are copied, and ``matrix`` x ``matrix`` products done: large ones on a GPU, middling ones on a CPU.
    """
    gpu = device.type == "cuda"
    size, matrix = size or (1 << 28 if gpu else 1 << 27), matrix or (8192 if gpu else 1536)
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    memory = 2 * size / _seconds(lambda: target.copy_(source), device)
    matmul = {}
    for dtype in dtypes:
        a = torch.ones(matrix, matrix, dtype=dtype, device=device)
        out = torch.empty_like(a)
        matmul[dtype] = 2 * matrix**3 / _seconds(lambda a=a, out=out: torch.mm(a, a, out=out), device)
    one = torch.zeros(1, device=device)
    launches = 64

    def chain() -> None:
        for _ in range(launches):
            one.add_(1)

    return Ceilings(memory, matmul, _seconds(chain, device) / launches)


def _seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of a few runs, waited for; the first, which warms up, does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
