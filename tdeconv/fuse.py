"""Deployment: a trained model without this package's layers.

Without annotations of the future, which torch.jit.script cannot read.
"""

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tdeconv import checks
from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.functional import fold_deconv
from tdeconv.holders import held_calls
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.layout import beside
from tdeconv.precision import statistics_dtype
from tdeconv.tracing import sizes

_CONVS: dict[type, Any] = {FastDeconv1d: nn.Conv1d, FastDeconv: nn.Conv2d, FastDeconv3d: nn.Conv3d}
_LAYERS = (*_CONVS, Delinear, ChannelDeconv)

# What a call in evaluation runs of a layer itself: a subclass that overrides one of these computes something else.
_OF_A_CALL = (
    *("__call__", "_call_impl", "forward", "_forward", "_statistics_options", "_pad"),
    *("_buffers_averaged", "_apply_statistics"),
)
# torch's forward pre-hooks that only compute a layer's weight or bias, anew in each call.
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)

Model = TypeVar("Model", bound=nn.Module)


def fuse_deconv_eval(model: Model) -> Model:
    """A copy of a model in evaluation mode, with its deconvolution layers folded into plain ones.

    A :class:`tdeconv.FastDeconv` (1d, 3d) becomes the ``torch.nn.Conv2d`` (1d, 3d) and a :class:`tdeconv.Delinear`
    the ``torch.nn.Linear`` that it equals in evaluation. A :class:`tdeconv.ChannelDeconv` has no such layer, as it does
    not know how many channels it will be given: it becomes a small module of plain tensor operations. The copy needs
    nothing of this package to be exported (``torch.export``, ONNX) or compiled.

    What is folded is the weight that a call would use: parametrisations (``torch.nn.utils.parametrizations``) and the
    hooks of ``weight_norm``, ``spectral_norm`` and ``prune`` in ``torch.nn.utils`` are computed, and gone from the
    copy. All other forward and backward hooks of a folded layer are in the copy, as are attributes that were hung on
    it. They meet the plain layer as their module, so a hook of your own must not change the layer's weight.

    Quantise a model, or merge adapters (LoRA) into its weights, after folding it: the weight of a deconvolution layer
    is not what multiplies its input, but the folded weight is.

    Args:
        model: in evaluation mode (``model.eval()``); left as it is.

    Returns:
        The copy, with the same outputs. A parameter in it requires gradients where the layer's did. State-dict hooks of
        the folded layers, and parameters, buffers and modules that were added to them, are not in it.

    Raises:
        TypeError: the model is no ``nn.Module``, is a ScriptModule, or is sharded; or a layer's weight is quantised.
        ValueError: the model, or a deconvolution layer in it, is in training mode; or a layer is of a subclass with a
            forward of its own, or its weight is computed by a hook that is not torch's.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module that is not scripted, got {type(model).__name__}")
    _refuse_sharded(model)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    modes = ((name, inner.training) for name, layer in layers.items() for inner in layer.modules())
    training = next((name for name, on in (*modes, ("", model.training)) if on), None)
    if training is not None:
        where = f"its layer {training!r}" if training else "it"
        raise ValueError(f"model must be in evaluation mode, but {where} is in training mode; call model.eval() first")
    for name, layer in layers.items():
        _refuse_own_forward(name, layer)
    # what deepcopy finds in its memo it takes for copied already: every reference to a layer gets the folded one
    with torch.inference_mode(False), torch.no_grad():
        memo: dict[int, Any] = {id(layer): _fold(name, layer) for name, layer in layers.items()}
        for call in held_calls(model, layers.values()):
            memo[id(call)] = getattr(memo[id(call.__self__)], call.__name__)
        folded = copy.deepcopy(model, memo)
        for layer in layers.values():
            _carry_over(layer, memo[id(layer)], memo)
    return folded


def _refuse_sharded(model: nn.Module) -> None:
    for module in model.modules():
        # by name: what torch.distributed.fsdp imports takes longer than this whole package
        sharding = {c.__name__ for c in type(module).__mro__} & {"FSDPModule", "FullyShardedDataParallel"}
        if sharding or any(hasattr(t, "placements") for t in module.parameters(recurse=False)):
            what = "by fully_shard or FullyShardedDataParallel" if sharding else "into DTensor parameters"
            raise TypeError(
                f"model is sharded {what}, and no process has its whole weights; gather these on all processes with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load them into a model that is not sharded, and fold "
                "that one"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.process_group != c10d.GroupMember.WORLD:
            raise TypeError(
                "model is wrapped in DistributedDataParallel for some of the processes, which torch cannot copy; fold "
                "the model inside, model.module"
            )


def _base(layer: nn.Module) -> Any:
    return next(base for base in _LAYERS if isinstance(layer, base))


def _refuse_own_forward(name: str, layer: nn.Module) -> None:
    base = _base(layer)
    for method in _OF_A_CALL:
        if method in vars(layer) or getattr(type(layer), method, None) is not getattr(base, method, None):
            raise ValueError(
                f"model must have the package's own deconvolution layers, but its layer {name!r} has a forward of its "
                f"own, which would be lost: {type(layer).__name__} is given another {method}; put what that does into "
                f"a module around a {base.__name__}"
            )


def _weight_and_bias(name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Those that a call would use. They require gradients if what they are computed from does."""
    called = object.__new__(type(layer))  # what the hooks set is set here, and not on the layer
    vars(called).update(vars(layer))
    with torch.enable_grad():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _COMPUTING):
                hook(called, ())
        weight, bias = called.weight, called.bias
    others = [hook for hook in layer._forward_pre_hooks.values() if not isinstance(hook, _COMPUTING)]
    for kind, value in (("weight", weight), ("bias", bias)):
        if others and value is not None and vars(layer).get(kind) is value:  # a plain attribute, set by none of torch's
            raise ValueError(
                f"the {kind} of layer {name!r} is no Parameter, and a forward pre-hook of the layer may compute it "
                f"({others[0]!r}); compute it by torch.nn.utils.parametrize instead, or make it a Parameter and remove "
                "the hook"
            )
    return checks.plain_weight(f"weight of layer {name!r}", weight), bias


def _fold(name: str, layer: Any) -> nn.Module:
    if isinstance(layer, ChannelDeconv):
        return _ChannelWhitening(layer).eval()
    weight, bias = _weight_and_bias(name, layer)
    linear = isinstance(layer, Delinear)
    folded, shift = fold_deconv(
        *(weight, bias, layer.running_mean, layer.running_deconv),
        groups=1 if linear else layer.groups,
        grouping="contiguous" if linear else layer.grouping,
    )
    if linear:
        plain: Any = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        plain = _CONVS[_base(layer)](
            *(layer.in_channels, layer.out_channels, layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, layer.groups),
            padding_mode=layer.padding_mode,
            device="meta",
        )
        # which is what other modes pad by, even where the layer's padding has been set since
        plain._reversed_padding_repeated_twice = list(layer._reversed_padding_repeated_twice)
    plain.weight = nn.Parameter(beside(folded, folded), weight.requires_grad)
    plain.bias = nn.Parameter(shift, (weight if bias is None else bias).requires_grad)
    return plain.eval()


@functools.cache
def _own_attributes(base: Any) -> set[str]:
    """What a layer has by itself, so that all else was hung on it."""
    own = {"weight", "bias", "track_running_stats", "process_group", "_compiled_call_impl"}
    return own.union(vars(base(1, 1, 1, device="meta")))


def _carry_over(layer: nn.Module, plain: nn.Module, memo: dict[int, Any]) -> None:
    """Hooks, and what was hung on a layer, copied as deepcopy copies them: what refers to the model means the copy."""
    for kind in _HOOKS:
        vars(plain)[kind] = copy.deepcopy(vars(layer)[kind], memo)
    hooks = plain._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _COMPUTING)]:
        del hooks[key]
    for name in vars(layer).keys() - _own_attributes(_base(layer)):
        if not hasattr(plain, name):
            vars(plain)[name] = copy.deepcopy(vars(layer)[name], memo)


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
