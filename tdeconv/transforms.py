"""What the transforms of torch.func (grad, vjp, jvp, vmap) and forward-mode differentiation can go through, and a clear
word where they cannot.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from tdeconv.backends import Choice


def mapping() -> bool:
    """Whether this call is inside torch.vmap."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# As torch.compiler.assume_constant_result does. The compiler enters the transforms that it compiles and guards those
# around them, so that both answers are right while it compiles, and for the graph.
mapping._dynamo_marked_constant = True  # type: ignore[attr-defined]
_transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether a transform is around this call, or dual tensors may be."""
    # read here and not in a constant of the compiler's, which would not guard it
    return _transforms_active() or forward_ad._current_level >= 0


def backend_for(choice: Choice) -> str:
    """The chosen backend; under a transform and in forward mode, which cannot enter a fast backend's operators, the
    reference. (They have no tangents, and where no input requires a gradient torch would drop them silently.)

    Raises:
        RuntimeError: a fast backend was asked for by name there.
    """
    if choice.backend == "reference" or not transformed():
        return choice.backend
    if choice.automatic:
        return "reference"
    raise RuntimeError(
        "torch.func's transforms (grad, vmap, ...) and torch.autograd.forward_ad cannot go through backend "
        f"{choice.backend!r} ({choice.reason}); use backend='reference' or 'auto' there, or the layer in evaluation "
        "mode, where any backend will do"
    )


def no_collective() -> None:
    """Torch's collectives have no rule for a transform, and drop tangents without a word.

    Raises:
        RuntimeError: under a transform, or in forward mode.
    """
    if transformed():
        raise RuntimeError(
            "torch.func's transforms (grad, vmap, ...) and torch.autograd.forward_ad cannot go through statistics of "
            "several processes (convert_sync_deconv); call model.eval(), or set the layers' process_group to None"
        )


def no_vmap_in_training() -> None:
    """A training step's statistics are of a whole batch, and update buffers: there is nothing to map over.

    Raises:
        RuntimeError: under torch.vmap.
    """
    if mapping():
        raise RuntimeError(
            "torch.vmap cannot go through a deconvolution layer in training mode, whose statistics are those of the "
            "whole batch; call model.eval(), or loop instead"
        )
