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
from tdeconv.kernels.shipped import AMD, NVIDIA, by_config

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


def _ways(constants: dict[str, object], full: bool) -> Iterator[tuple[dict[str, object], tuple[str, ...]]]:
    """How a launch may multiply, and for which targets; unless ``full``, only as by default on NVIDIA."""
    if "INPUT_PRECISION" not in constants:
        ways = (False, True) if "ROUND" in constants and full else (constants.get("ROUND"),)
        yield from (({} if way is None else {"ROUND": way}, NVIDIA + AMD) for way in ways)
        return
    if constants["ROUND"]:
        yield {"ROUND": True, "INPUT_PRECISION": "tf32"}, NVIDIA
    if full or not constants["ROUND"]:
        yield {"ROUND": False, "INPUT_PRECISION": "tf32x3"}, NVIDIA
    if full:
        yield {"ROUND": False, "INPUT_PRECISION": "ieee"}, AMD


def variants_of(
    label: str,
    launches: Iterable[Launch],
    candidates: Callable[[bool], Iterable[Config]] | None = None,
    legal: Legal = _any,
    full: bool = True,
) -> Iterator[Variant]:
    """The recorded launches for the ahead-of-time compiler.

    Args:
        label: what was launched, for the names.
        launches: from :func:`recorded`.
        candidates: configurations for exact products or for rounded values, the default first; None for as launched.
        legal: whether a target takes a configuration.
        full: with every precision, AMD's included, and, at the default one, every candidate; else the default alone.
    """
    for launched in launches:
        signature, constants, aligned = _specialised(launched)
        name = f"{launched.kernel.fn.__name__.strip('_').removesuffix('_kernel')} {label}"
        x = launched.arguments.get("x_ptr")
        size = 4 if x is None else x.element_size()
        for number, (way, targets) in enumerate(_ways(constants, full)):
            kind = way.get("INPUT_PRECISION")
            how = f" {kind}" if kind else " rounded" if way.get("ROUND") else ""
            own = [launched.config] if candidates is None else list(candidates(kind != "tf32"))

            def fitting(within: Limits, own: list[Config] = own) -> list[Config]:
                return [config for config in own if legal(config, within, size)]  # noqa: B023  (used at once)

            for config, default, where in by_config(fitting, targets):
                if default or (full and number == 0):
                    expected = {"sm_90": "wgmma"} if kind is not None and config["BLOCK_D"] >= 64 else {}
                    yield Variant(
                        f"{name}{how}", launched.kernel, signature, constants | way, config,
                        expected, where, aligned=aligned, default=default,
                    )  # fmt: skip
