"""How a kernel is started: on the tensors' own device, without waiting for it."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton import knobs

from tdeconv.kernels.configs import Config

# Triton decides when a kernel is decorated, that is when its module is imported, whether it will be interpreted.
_INTERPRETED = bool(knobs.runtime.interpret)
_OLDEST = (8, 0)  # bfloat16 and tf32 products, asynchronous copies


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (on CPU tensors, in numpy) instead of being compiled."""
    return _INTERPRETED


def why_not(device: torch.device) -> str | None:
    """None if the kernels can run tensors on ``device``, else the reason they cannot."""
    if device.type == "cpu":
        return None if interpreted() else "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    if platform.system() != "Linux":
        return f"Triton's GPU backends need Linux, not {platform.system()}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one, where there is such a thing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *, config: Config, device: torch.device, **arguments: Any) -> None:
    """Start ``kernel`` on ``grid`` programs; never waits. An empty grid starts nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along each axis.
        config: its blocks are passed as constexprs, its warps and stages as launch options.
        device: the tensors' device.
        arguments: everything else, by keyword.
    """
    if 0 in grid:
        return
    with guard(device):
        kernel[grid](**arguments, **dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages)
