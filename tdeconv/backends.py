"""Which implementation runs: ``"triton"``, ``"torch"`` or ``"reference"``, asked for by name or chosen."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tdeconv import checks

_REQUESTS = ("auto", *checks.BACKENDS)
_YES = ("1", "true", "on", "yes", "y")  # as Triton reads it
_warned: set[str] = set()
# A plain global, not a ContextVar: torch.compile reads and guards the one and cannot trace the other.
_context: str | None = None


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str

    @property
    def automatic(self) -> bool:
        """Whether nobody asked for it by name."""
        return self.reason.startswith("automatic")


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
    if platform.system() != "Linux":
        return f"the kernels need Linux, not {platform.system()}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() not in _YES:
        return "on CPU tensors the kernels run only under Triton's interpreter (TRITON_INTERPRET=1, slow)"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {device.type} devices"
    try:
        launch = importlib.import_module("tdeconv.kernels.launch")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return launch.why_not(device)


def _why_not_automatically(device: torch.device) -> str | None:
    """As above; and never the interpreter. A GPU that goes without its kernels is worth a warning, once."""
    if device.type == "cpu":
        return why_no_triton(device) or "on CPU tensors the kernels would only be interpreted"
    missing = why_no_triton(device)
    if missing is not None and device.type == "cuda" and missing not in _warned:
        _warned.add(missing)
        warnings.warn(f"tdeconv runs its slower torch backend on {device}: {missing}", RuntimeWarning, stacklevel=3)
    return missing


# What torch.compiler.assume_constant_result does, without importing the compiler: the answer is found while a graph is
# compiled and is part of it.
why_no_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_automatically._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(backend: str | None, device: torch.device) -> Choice:
    """Resolve a request for tensors on ``device``.

    Raises:
        ValueError: the name is none of the backends.
        BackendUnavailable: a backend was asked for by name and cannot run.
    """
    name, asker = _requested(backend)
    if name == "auto":
        missing = _why_not_automatically(device)
        if missing is None:
            return Choice("triton", f"automatic: a {device.type} device with Triton")
        return Choice("torch", f"automatic: triton cannot run here ({missing})")
    if name == "triton" and (missing := why_no_triton(device)) is not None:
        raise BackendUnavailable(f"backend 'triton' was asked for by {asker} but cannot run: {missing}")
    return Choice(name, f"asked for by {asker}")
