"""What may be chosen about a kernel's launch, which choices fit a device, and what is compiled ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its block sizes by constexpr name, warps per program, stages of its pipelined loop.

    Block sizes are part of the result's rounding only where a kernel sums over a block; such sizes are policy and no
    candidate differs from another in them.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 1, **blocks: int) -> Config:
        """``Config.of(4, 3, BLOCK_M=64, BLOCK_K=32)``."""
        return cls(tuple(blocks.items()), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def __str__(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.blocks), f"warps={self.num_warps} stages={self.num_stages}"])


@dataclass(frozen=True)
class Limits:
    """What one program may use on a device: shared memory in bytes, registers per thread, threads per warp."""

    shared: int
    registers: int = 255
    warp: int = 32
    max_threads: int = 1024


# Rows, pixels and the offsets within a matrix are counted in 32 bits; a tile may reach past the end.
_COUNTED = 2**31 - 2**16


def counted(*sizes: int) -> bool:
    """Whether the kernels can count as far as each of these."""
    return max(sizes) < _COUNTED


def matrix_counted(features: int) -> bool:
    """Whether they can count the elements of a square matrix, filled up to whole tiles."""
    return counted((features + 64) ** 2)


def span(tensor: Tensor) -> int:
    """How far a tensor's last element is from its first, in elements."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


# Bytes of shared memory a program may ask for, by compute capability; an unknown device gets the least of its family.
_CUDA_SHARED = {(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448}
_LEAST = Limits(shared=65536)


@functools.cache
def limits(device: torch.device) -> Limits:
    """The device's limits, from tables; CPU tensors (the interpreter) get those of sm_90."""
    if device.type != "cuda":
        return Limits(shared=_CUDA_SHARED[9, 0])
    if torch.version.hip:
        return Limits(shared=65536, registers=512, warp=64)
    return cuda_limits(*torch.cuda.get_device_capability(device))


def cuda_limits(major: int, minor: int) -> Limits:
    return Limits(shared=_CUDA_SHARED.get((major, minor), 101376)) if major >= 8 else _LEAST


def legal(
    config: Config,
    within: Limits,
    *,
    staged: int = 0,
    kept: int = 0,
    held: int = 0,
    divisible: Iterable[tuple[int, int]] = (),
) -> bool:
    """Whether a device can run a configuration well: the one predicate of every kernel.

    Args:
        config: the configuration; its block sizes must be powers of two.
        within: the device's limits.
        staged: bytes of shared memory per stage of the pipelined loop (the operands' tiles).
        kept: bytes of shared memory besides.
        held: 32-bit values a program keeps in registers (accumulators and what lives beside them).
        divisible: pairs (size, block) of which the block must divide the size.
    """
    threads = config.num_warps * within.warp
    powers = all(v > 0 and v & (v - 1) == 0 for _, v in config.blocks) and config.num_warps.bit_count() == 1
    return (
        powers
        and threads <= within.max_threads
        and staged * config.num_stages + kept <= within.shared
        and held <= threads * (within.registers - 48)  # addresses, masks and loop counters take the rest
        and all(size % block == 0 for size, block in divisible)
    )


@dataclass(frozen=True)
class Variant:
    """A kernel as shipped, for the ahead-of-time compiler.

    Attributes:
        name: unique, e.g. ``"inverse_sqrt_small d=64 ieee"``.
        fn: the ``triton.jit`` function.
        signature: every argument that is no constexpr -> its type (``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``).
        constexprs: every other constexpr -> its value (the config's blocks need not be repeated).
        config: blocks, warps, stages.
        expected: target (``"sm_90"``) -> the matrix instruction that must be there (``"wgmma"``), or ``""`` for none.
        targets: the targets it is meant for; empty for all.
        options: further compile options, e.g. ``{"launch_cooperative_grid": True}``.
        aligned: names of the arguments known to be divisible by 16 at launch; None for every pointer.
        default: whether it is a heuristic choice; the others are candidates of the tuner.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    config: Config
    expected: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    aligned: tuple[str, ...] | None = None
    default: bool = True
