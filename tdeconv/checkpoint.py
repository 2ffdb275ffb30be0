"""Gradient checkpointing: the recomputation sees the statistics its forward saw, and leaves none of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def checkpoint_contexts(module: nn.Module) -> Callable[[], Contexts]:
    """What to pass ``torch.utils.checkpoint.checkpoint`` as ``context_fn``, so that statistics are counted once.

    ::

        y = checkpoint(block, x, use_reentrant=False, context_fn=tdeconv.checkpoint_contexts(block))

    Backward runs a checkpointed module's forward a second time. Without this, that updates the running statistics
    again with the same batch, and a freezing layer counts the step twice, so that its recomputation may use other
    statistics than its forward did. With it, the layers' buffers have the values of the forward's beginning while it is
    recomputed, and get back what they had. The gradients are those without checkpointing.

    Within ``torch.compile`` the call is the same. A recomputation never writes there, but it reads the buffers after
    they were written: without this, a freezing layer's gradients can be wrong where a phase ends. Other modules'
    buffers (batch norm's) are not covered.

    Args:
        module: what is checkpointed, or any module that holds all of its deconvolution layers. A compiled one will do.

    Returns:
        A function without arguments that returns two context managers, for the forward and for its recomputation.
        Either keeps a copy of the buffers until backward. It may be made early, as in a model's ``__init__``: it looks
        for the module's layers and buffers whenever it is used. Copies of a model that holds it have their own.
    """
    if torch.compiler.is_compiling():
        return _compiled_contexts  # not the module's own, for which the compiler would make a graph for each module
    return functools.partial(_contexts, module)


def _save_counters(_: Any, __: Any, *args: Any, **___: Any) -> CheckpointPolicy:
    """Recompute everything but what follows from a step counter, which has gone on by the time of the backward."""
    if any(isinstance(a, Tensor) and a.ndim == 0 and not a.is_floating_point() for a in args):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _compiled_contexts() -> Contexts:
    return create_selective_checkpoint_contexts(_save_counters)


def _contexts(module: nn.Module) -> Contexts:
    if torch.compiler.is_compiling():  # made outside of the compiled function, and used within
        return _compiled_contexts()
    forward = _Remember(module)
    return forward, _Return(module, forward)


def _buffers(module: nn.Module) -> list[Tensor]:
    """Those of its deconvolution layers, as they are now: conversion replaces layers, a change of dtype buffers."""
    layers = [layer for layer in module.modules() if hasattr(layer, "running_deconv")]
    return [b for layer in layers for b in layer.buffers(recurse=False)]


def _copies(buffers: list[Tensor]) -> list[Tensor]:
    return [b.detach().clone() for b in buffers]


@torch.no_grad()
def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


class _Remember(AbstractContextManager[None]):
    """The forward: keeps what the buffers were at its beginning."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.values = _copies(_buffers(self.module))

    def __exit__(self, *_: object) -> None:
        pass


class _Return(AbstractContextManager[None]):
    """A recomputation, of which there may be several: back to the forward's beginning and forth again."""

    def __init__(self, module: nn.Module, forward: _Remember) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.buffers = _buffers(self.module)
        self.present = _copies(self.buffers)
        _fill(self.buffers, self.forward.values)

    def __exit__(self, *_: object) -> None:
        _fill(self.buffers, self.present)
