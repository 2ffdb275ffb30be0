"""Code that runs a model in order to record it: torch.fx, torch.jit, torch.export, ONNX, fake tensors.

A deconvolution layer, and each of the package's functions, is a single operation to torch.fx. To torch.jit.trace it is
plain tensor operations in evaluation, and refused in training.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

P = ParamSpec("P")
R = TypeVar("R")


class Layer(nn.Module):
    """The base of every deconvolution layer: ``forward``, of which a subclass gives the arithmetic in ``_forward``."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return self._as_one_operation(input)  # a proxy stands for a tensor
        no_training_step(self.training)
        return self._forward(input)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _as_one_operation(self, proxy: fx.Proxy) -> fx.Proxy:
        """Record a call of this module, as torch.fx does by itself for torch's own layers."""
        path = proxy.tracer.path_of_module(self)  # type: ignore[attr-defined]  # of every tracer that runs modules
        name = type(self).__name__
        if not path:
            raise RuntimeError(
                f"torch.fx cannot trace a {name} alone, which is a single operation to it; trace a model that holds "
                "the layer, for instance torch.nn.Sequential(layer)"
            )
        # what torch.fx has run just now the layer would run again
        if self._forward_hooks or self._forward_pre_hooks:
            raise RuntimeError(
                f"torch.fx would make the forward hooks of the {name} at {path!r} run twice; remove them before "
                "tracing (those of pruning by prune.remove), or register them on a module around the layer"
            )
        if has_own_forward(self):
            raise RuntimeError(
                f"torch.fx would run the {name} at {path!r} twice, which has a forward of its own; put what it does "
                "into a module around the layer"
            )
        return proxy.tracer.create_proxy("call_module", path, (proxy,), {})

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}; script tdeconv.fuse_deconv_eval(model.eval()), "
            "which has plain layers instead, or use torch.compile"
        )


def has_own_forward(layer: Layer) -> bool:
    """Whether a subclass, or whoever patched the layer, has given it another forward than the package's."""
    return type(layer).forward is not Layer.forward or "forward" in layer.__dict__


def one_operation(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.fx record a call of this function as one operation, as it does for torch's own functions."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                recorded: Any = value.tracer.create_proxy("call_function", call, args, kwargs)
                return recorded
        return function(*args, **kwargs)

    return call


def no_training_step(training: bool) -> None:
    """Neither ONNX nor TorchScript can hold a training step: say what to do instead of failing somewhere inside.

    Raises:
        RuntimeError: in training, under ``torch.onnx.export`` or ``torch.jit.trace``.
    """
    if not training or not (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "a deconvolution layer in training mode cannot be exported to ONNX; export "
            "tdeconv.fuse_deconv_eval(model.eval()), which has plain convolutions only"
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record a deconvolution layer in training mode, whose statistics change with every "
            "batch; call model.eval() first, or use torch.compile for training"
        )


def sizes(t: Tensor) -> tuple[int, ...]:
    """A tensor's shape in plain ints, also under torch.jit.trace, where ``t.shape`` holds tensors.

    For sizes that belong to the layer, such as channels; a trace has to take the batch's own from ``t.shape``, or it
    would serve that batch's alone.
    """
    if not torch.jit.is_tracing():
        return tuple(t.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(n) for n in t.shape)


def has_value(t: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not at a fake or meta tensor's, nor while a compiler or a dispatch
    mode (fake tensors, make_fx) records what is done with them.
    """
    if torch.compiler.is_compiling() or type(t) is not Tensor:
        return False
    return not t.is_meta and torch._C._len_torch_dispatch_stack() == 0
