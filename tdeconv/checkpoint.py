"""Gradient checkpointing: the recomputation is the kind of step its forward was, and sees the statistics it saw."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tdeconv.schedule import Scheduled

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def checkpoint_contexts(module: nn.Module) -> Callable[[], Contexts]:
    """What to pass ``torch.utils.checkpoint.checkpoint`` as ``context_fn``, so that every recomputation is exact.

    ::

        y = checkpoint(block, x, use_reentrant=False, context_fn=tdeconv.checkpoint_contexts(block))

    Backward runs a checkpointed module's forward a second time. That neither updates running statistics nor counts as a
    step, but without this it is taken for the same kind of step (``freeze``, ``stats_interval``) as the layer's last
    forward was, and reads the running statistics as they are by then. Where there are several forwards before a
    backward, these may be another's. With this, the layers' buffers have the values of the forward's beginning while it
    is recomputed, and get back what they had. The gradients are those without checkpointing. A module that is compiled
    and checkpointed from outside always needs it: its recomputations count as steps otherwise.

    Within ``torch.compile`` the call is the same. A recomputation never writes there, but it would read the running
    statistics after they were written: with this, a step that uses them keeps its own. Other modules' buffers (batch
    norm's) are not covered.

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


def _save_buffers(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Recompute everything but what comes of running statistics or of a counter, which are others by the time of the
    backward."""
    counted = any(isinstance(a, Tensor) and a.ndim == 0 and not a.is_floating_point() for a in args)
    if counted or operator is torch.ops.tdeconv.constants.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _compiled_contexts() -> Contexts:
    return create_selective_checkpoint_contexts(_save_buffers)


def _contexts(module: nn.Module) -> Contexts:
    if torch.compiler.is_compiling():  # made outside of the compiled function, and used within
        return _compiled_contexts()
    forward = _Remember(module)
    return forward, _Return(module, forward)


def _layers(module: nn.Module) -> list[Scheduled]:
    """Those of today: conversion replaces layers."""
    return [layer for layer in module.modules() if isinstance(layer, Scheduled)]


def _buffers(layers: list[Scheduled]) -> list[Tensor]:
    """Those of today: a change of dtype replaces them."""
    return [b for layer in layers for b in layer.buffers(recurse=False)]


def _copies(buffers: list[Tensor]) -> list[Tensor]:
    return [b.detach().clone() for b in buffers]


@torch.no_grad()
def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def _go(layers: list[Scheduled], places: list[Any]) -> None:
    """To these places in the schedules: of the next step, which a compiled layer goes by, and of the recomputation."""
    for layer, both in zip(layers, places, strict=True):
        layer._places, layer._replayed = both


class _Remember(AbstractContextManager[None]):
    """The forward: keeps what the buffers and the places in the schedules were at its beginning."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        layers = _layers(self.module)
        self.places, self.values = [(layer._places, layer._places) for layer in layers], _copies(_buffers(layers))

    def __exit__(self, *_: object) -> None:
        pass


class _Return(AbstractContextManager[None]):
    """A recomputation, of which there may be several: back to the forward's beginning and forth again."""

    def __init__(self, module: nn.Module, forward: _Remember) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.layers = _layers(self.module)
        self.buffers = _buffers(self.layers)
        self.places = [(layer._places, layer._replayed) for layer in self.layers]
        self.values = _copies(self.buffers)
        _fill(self.buffers, self.forward.values)
        _go(self.layers, self.forward.places)

    def __exit__(self, *_: object) -> None:
        _fill(self.buffers, self.values)
        _go(self.layers, self.places)
