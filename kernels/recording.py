"""Launches of tensors without memory (``device="meta"``) are recorded instead: what is compiled ahead of time.

So a kernel is compiled with the very arguments its launcher gives it, specialised as Triton specialises them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdeconv.kernels.configs import Config, Limits, Variant
from tdeconv.kernels.launch import launch
from tdeconv.kernels.shipped import LIMITS

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}

Legal = Callable[[Config, Limits, int], bool]


def _any(config: Config, within: Limits, itemsize: int) -> bool:
    return True


class Launch(NamedTuple):
    kernel: Any
    config: Config
    arguments: dict[str, Any]


_recorded: list[Launch] = []


def start(kernel: Any, grid: tuple[int, ...], *, config: Config, device: torch.device, **arguments: Any) -> None:
    """As :func:`launch`, on tensors that have memory."""
    if device.type == "meta":
        _recorded.append(Launch(kernel, config, arguments))
    else:
        launch(kernel, grid, config=config, device=device, **arguments)


def recorded(function: Callable[[], object]) -> list[Launch]:
    """What ``function`` would have launched."""
    _recorded.clear()
    function()
    launches = list(_recorded)
    _recorded.clear()
    return launches


def _specialised(launched: Launch) -> tuple[dict[str, str], dict[str, object], tuple[str, ...]]:
    """Types of the arguments, the constants among them, and those divisible by 16."""
    signature, constants, aligned = {}, {}, []
    for name, value in launched.arguments.items():
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned.append(name)
        elif name.isupper():
            constants[name] = value
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    return signature, constants, tuple(aligned)


def variants_of(
    label: str,
    launches: Iterable[Launch],
    candidates: Callable[[bool], Iterable[Config]] | None = None,
    legal: Legal = _any,
) -> Iterator[Variant]:
    """Every precision of the recorded launches, with every candidate for exact products or for rounded values (or
    as launched, without candidates), for the targets on which each is legal.
    """
    for launched in launches:
        signature, constants, aligned = _specialised(launched)
        name = f"{launched.kernel.fn.__name__.strip('_').removesuffix('_kernel')} {label}"
        x = launched.arguments.get("x_ptr")
        size = 4 if x is None else x.element_size()
        ways: list[dict[str, object]] = [{}]
        if "INPUT_PRECISION" in constants:
            ways = [{"ROUND": p == "tf32", "INPUT_PRECISION": p} for p in ("tf32", "tf32x3", "ieee")]
        elif "ROUND" in constants:
            ways = [{"ROUND": r} for r in (False, True)]
        for way in ways:
            exact = way.get("INPUT_PRECISION") != "tf32"
            for config in [launched.config] if candidates is None else candidates(exact):
                targets = tuple(t for t, within in LIMITS.items() if legal(config, within, size))
                # NVIDIA's are the tf32 products, AMD's the plain ones
                kind = way.get("INPUT_PRECISION")
                if kind is not None:
                    targets = tuple(t for t in targets if (kind == "ieee") == t.startswith("gfx"))
                if targets:
                    precise = "".join(f" {v}" for k, v in way.items() if k == "INPUT_PRECISION")
                    expected = {"sm_90": "wgmma"} if kind is not None and config["BLOCK_D"] >= 64 else {}
                    yield Variant(
                        f"{name}{precise} [{config}]", launched.kernel, signature, constants | way, config,
                        expected, targets, aligned=aligned,
                    )  # fmt: skip
