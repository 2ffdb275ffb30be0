"""The transforms of torch.func (grad, vjp, jvp, vmap): what they can go through, and a clear word where they cannot."""

from __future__ import annotations

from typing import Any

import torch

from tdeconv.backends import Choice


def _active() -> list[Any]:
    """The kinds of transform around this call, the outermost first."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]


def backend_for(choice: Choice) -> str:
    """The chosen backend; under a transform, which cannot enter a fast backend's operators, the reference.

    Raises:
        RuntimeError: a fast backend was asked for by name, under a transform.
    """
    if choice.backend == "reference" or not _active():
        return choice.backend
    if choice.automatic:
        return "reference"
    raise RuntimeError(
        f"torch.func's transforms (grad, vmap, ...) cannot go through backend {choice.backend!r} ({choice.reason}); "
        "use backend='reference' or 'auto' there, or the layer in evaluation mode, where any backend will do"
    )


def no_vmap_in_training() -> None:
    """A training step's statistics are of a whole batch, and update buffers: there is nothing to map over.

    Raises:
        RuntimeError: under torch.vmap.
    """
    if torch._C._functorch.TransformType.Vmap in _active():
        raise RuntimeError(
            "torch.vmap cannot go through a deconvolution layer in training mode, whose statistics are those of the "
            "whole batch; call model.eval(), or loop instead"
        )
