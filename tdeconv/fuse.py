"""Deployment: a trained model without this package's layers.

Without annotations of the future, which torch.jit.script cannot read.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.functional import fold_deconv
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.layout import beside
from tdeconv.precision import statistics_dtype
from tdeconv.tracing import has_own_forward, sizes

_CONVS: dict[type, Any] = {FastDeconv1d: nn.Conv1d, FastDeconv: nn.Conv2d, FastDeconv3d: nn.Conv3d}
_LAYERS = (*_CONVS, Delinear, ChannelDeconv)

Model = TypeVar("Model", bound=nn.Module)


def fuse_deconv_eval(model: Model) -> Model:
    """A copy of a model in evaluation mode, with its deconvolution layers folded into plain ones.

    A :class:`tdeconv.FastDeconv` (1d, 3d) becomes the ``torch.nn.Conv2d`` (1d, 3d) and a :class:`tdeconv.Delinear`
    the ``torch.nn.Linear`` that it equals in evaluation. A :class:`tdeconv.ChannelDeconv` has no such layer, as it does
    not know how many channels it will be given: it becomes a small module of plain tensor operations. The copy needs
    nothing of this package to be exported (``torch.export``, ONNX) or compiled.

    Args:
        model: in evaluation mode (``model.eval()``); left as it is.

    Returns:
        The copy, with the same outputs. Hooks and parametrisations of the layers that were folded are not in it.

    Raises:
        TypeError: the model is no ``nn.Module``, or is a ScriptModule.
        ValueError: the model, or a deconvolution layer in it, is in training mode; or a layer is of a subclass with a
            forward of its own.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module that is not scripted, got {type(model).__name__}")
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    training = next((name for name, module in (*layers.items(), ("", model)) if module.training), None)
    if training is not None:
        where = f"its layer {training!r}" if training else "it"
        raise ValueError(f"model must be in evaluation mode, but {where} is in training mode; call model.eval() first")
    own = next((name for name, layer in layers.items() if has_own_forward(layer)), None)
    if own is not None:
        raise ValueError(
            f"model must have the package's own deconvolution layers, but its layer {own!r} has a forward of its own, "
            "which would be lost"
        )
    # what deepcopy finds in its memo it takes for copied already: every reference to a layer gets the folded one
    with torch.inference_mode(False), torch.no_grad():
        folded = {id(layer): _fold(layer) for layer in layers.values()}
        return copy.deepcopy(model, folded)


def _fold(layer: Any) -> nn.Module:
    if isinstance(layer, ChannelDeconv):
        return _ChannelWhitening(layer).eval()
    if isinstance(layer, Delinear):
        weight, bias = fold_deconv(
            layer.weight, layer.bias, layer.running_mean, layer.running_deconv, grouping="contiguous"
        )
        plain: Any = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        weight, bias = fold_deconv(
            *(layer.weight, layer.bias, layer.running_mean, layer.running_deconv),
            groups=layer.groups,
            grouping=layer.grouping,
        )
        conv = next(conv for deconv, conv in _CONVS.items() if isinstance(layer, deconv))
        plain = conv(
            *(layer.in_channels, layer.out_channels, layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, layer.groups),
            padding_mode=layer.padding_mode,
            device="meta",
        )
    plain.weight = nn.Parameter(beside(weight, weight), layer.weight.requires_grad)
    plain.bias = nn.Parameter(bias, layer.weight.requires_grad)
    return plain.eval()


class _ChannelWhitening(nn.Module):
    """A ChannelDeconv with fixed statistics: an affine map of each run of channels, and a scale of those left over."""

    root: Tensor
    shift: Tensor
    scale: Tensor
    rest_shift: Tensor

    def __init__(self, layer: ChannelDeconv) -> None:
        super().__init__()
        work = statistics_dtype(layer.running_deconv.dtype)
        root, var = layer.running_deconv.to(work, copy=True), layer.running_var.to(work)
        scale = (var + layer.eps).rsqrt()
        self.block = layer.block
        self.register_buffer("root", root)
        self.register_buffer("shift", -(root @ layer.running_mean1.to(work)))
        self.register_buffer("scale", scale)
        self.register_buffer("rest_shift", -layer.running_mean2.to(work) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` or ``(N, C)`` to the same."""
        channels = x.shape[1] if torch.jit.is_scripting() else sizes(x)[1]  # which torch.jit.script cannot compile
        c = channels // self.block * self.block
        y = x.to(self.root.dtype)
        blocks = y[:, :c]
        whitened = self.root @ blocks.flatten(1).unflatten(1, (self.block, -1)) + self.shift
        whitened = whitened.reshape(blocks.shape)
        if c < channels:
            whitened = torch.cat([whitened, y[:, c:] * self.scale + self.rest_shift], dim=1)
        return whitened.to(x.dtype)
