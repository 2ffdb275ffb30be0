"""How exactly the kernels multiply: policy, never tuned. ``"default"`` or, asked for, ``"strict"``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

POLICIES = ("default", "strict")
# Beyond either the rounding of three bfloat16 passes costs too much, or saves nothing.
_FEW_STEPS = 7
_SMALL = 128

_context: str | None = None


def policy() -> str:
    """The context's, else environment variable ``TDECONV_PRECISION``, else ``"default"``."""
    return _context or _checked(os.environ.get("TDECONV_PRECISION") or "default")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block every kernel multiplies by this policy, in every thread."""
    global _context
    before, _context = _context, _checked(name)
    try:
        yield
    finally:
        _context = before


def _checked(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"the precision must be one of 'default', 'strict', got {name!r}")
    return name


def float32_products(device: torch.device) -> str:
    """The ``input_precision`` of products as exact as float32's: three tf32 passes on NVIDIA's matrix units."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if nvidia else "ieee"


def root_products(device: torch.device, features: int, n_iter: int) -> str:
    """How the inverse root multiplies."""
    exact = policy() == "strict" or n_iter > _FEW_STEPS or features <= _SMALL
    return float32_products(device) if exact else "bf16x3"
