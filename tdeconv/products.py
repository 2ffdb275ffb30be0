"""Matrix products that ``torch.set_float32_matmul_precision`` and the TF32 switches do not lower.

A deconvolution multiplies the weight by a root whose largest entries belong to the directions with the least signal: an
error of 1e-3 in a product (TF32, or bfloat16 on a CPU that has it) was 7% of a first layer's output. So moments, roots
and folds are computed in the operands' own precision, whatever the setting; convolutions follow torch's rules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SWITCHES: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
_lock = threading.Lock()  # the switches are the process's: the first thread turns them, the last one turns them back
_inside = 0
_turned: list[tuple[Any, str]] = []


def _lowering() -> list[tuple[Any, str]]:
    """The switches that let a float32 product be computed in less, and what they are set to."""
    return [(switch, was) for switch in _SWITCHES if (was := switch.fp32_precision) not in ("none", "ieee")]


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the block, float32 products are computed in float32."""
    global _inside, _turned
    with _lock:
        if _inside == 0:
            _turned = _lowering()
            for switch, _ in _turned:
                switch.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for switch, was in _turned:
                    if switch.fp32_precision == "ieee":  # else another thread has set it meanwhile
                        switch.fp32_precision = was


def _lowered() -> bool:
    return _inside > 0 or bool(_lowering())


# As torch.compiler.assume_constant_result does: asked while a graph is compiled, and part of it.
_lowered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _exactly(a: Tensor, b: Tensor) -> Tensor:
    with exact_products():
        return a @ b


class _Product(torch.autograd.Function):
    """For eager mode, where a function of autograd goes through every transform and has second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _exactly(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(product, grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _exactly(da, b) + _exactly(a, db)


def _gradients(times: Any, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return times(grad, b.mT).sum_to_size(a.shape), times(a.mT, grad).sum_to_size(b.shape)


@torch.library.custom_op("tdeconv::product", mutates_args=())
def _opaque(a: Tensor, b: Tensor) -> Tensor:
    """For compiled graphs, which cannot turn the switches."""
    return _exactly(a, b)


@_opaque.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


_opaque.register_autograd(
    lambda ctx, grad: _gradients(_opaque, grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices or batches of them, in the operands' own precision in forward and backward."""
    if a.dtype != torch.float32 or not _lowered():
        return a @ b
    return _opaque(a, b) if torch.compiler.is_compiling() else _Product.apply(a, b)  # type: ignore[no-untyped-call]
