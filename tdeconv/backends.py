"""Which implementation runs: ``"triton"``, ``"torch"`` or ``"reference"``, asked for by name or chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tdeconv import checks

_REQUESTS = ("auto", *checks.BACKENDS)
# A plain global, not a ContextVar: torch.compile reads and guards the one and cannot trace the other.
_context: str | None = None


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run here; the message says why."""


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, layers and functions whose own ``backend`` is None use this one, in every thread.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: another name.
    """
    global _context
    before, _context = _context, checks.one_of("backend", backend, _REQUESTS)
    try:
        yield
    finally:
        _context = before


def _requested(backend: str | None) -> tuple[str, str]:
    """The name asked for and who asked: the argument, the context, the environment, or nobody."""
    if backend is not None:
        return checks.one_of("backend", backend, _REQUESTS), "the backend argument"
    if _context is not None:
        return _context, "tdeconv.use_backend"
    env = os.environ.get("TDECONV_BACKEND")
    if env:
        return checks.one_of("environment variable TDECONV_BACKEND", env, _REQUESTS), "TDECONV_BACKEND"
    return "auto", "nothing"


def why_no_triton(device: torch.device) -> str | None:
    """None if the Triton kernels can run tensors on ``device``, else the reason they cannot."""
    return "this version of tdeconv has no Triton kernels yet"


def choose(backend: str | None, device: torch.device) -> Choice:
    """Resolve a request for tensors on ``device``.

    Raises:
        ValueError: the name is none of the backends.
        BackendUnavailable: a backend was asked for by name and cannot run.
    """
    name, asker = _requested(backend)
    if name == "auto":
        missing = why_no_triton(device)
        if missing is None:
            return Choice("triton", f"automatic: a {device.type} device with Triton")
        return Choice("torch", f"automatic: triton cannot run here ({missing})")
    if name == "triton" and (missing := why_no_triton(device)) is not None:
        raise BackendUnavailable(f"backend 'triton' was asked for by {asker} but cannot run: {missing}")
    return Choice(name, f"asked for by {asker}")
