"""Which of a model's layers become deconvolution layers, which batch norms these make unnecessary, and why."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tdeconv.dataflow import INPUT, LINEAR_MAPS, UNKNOWN, End, Links, links
from tdeconv.holders import held_fast
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d

DECONVS = (FastDeconv, FastDeconv1d, FastDeconv3d, Delinear)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Known by name, since neither package is needed here. Those of timm apply a dropout and an activation too.
_FOREIGN_NORMS = {
    ("timm", "BatchNormAct2d"),
    ("timm", "FrozenBatchNormAct2d"),
    ("timm", "SyncBatchNormAct"),
}
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
# Norms of other kinds, for the report; those of other packages are known by "Norm" in their names.
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, _InstanceNorm)
BLOCK = 64  # channels that are whitened together, as in the paper
# Of a covariance: the time of a root grows with their cube, and the samples that it needs with their number.
MOST_FEATURES = 1024
_LARGE_KERNEL = MOST_FEATURES // BLOCK  # taps: a block of more would have more features than that
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# In evaluation their fast paths use the weights of the layers inside without calling these.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or _is_foreign_norm(module)


def _is_foreign_norm(module: nn.Module) -> bool:
    return (type(module).__module__.partition(".")[0], type(module).__name__) in _FOREIGN_NORMS or _is_frozen(module)


def _is_frozen(module: nn.Module) -> bool:
    """The frozen batch norm that torchvision, detectron2, DETR and others have each of their own.

    Its name and its buffers, which others hold as parameters, leave it nothing else to compute.
    """
    if not type(module).__name__.endswith("FrozenBatchNorm2d"):
        return False
    buffers = {"weight", "bias", "running_mean", "running_var"}
    return not module._parameters and module._buffers.keys() - {"num_batches_tracked"} == buffers


def _is_other_norm(module: nn.Module) -> bool:
    if isinstance(module, _OTHER_NORMS):
        return True
    return "Norm" in type(module).__name__ and not any(map(_is_layer, module.modules()))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear, torch.jit.ScriptModule)) or is_norm(module)


class Plan:
    """What goes and what stays.

    Attributes:
        layers: every convolution, batch norm and linear layer, with its name, in the order of registration; and the
            norms of other kinds that normalise what a deconvolution layer has whitened.
        whitening: the deconvolution layers, those there are and those to be.
        removed: the batch norms that go, and why.
        first: the convolutions that see the model's input, or the first one if it is computed with before.
        norm_of: for a convolution, the batch norm that goes and was all that read it, if its weight is its own.
    """

    def __init__(self, model: nn.Module, linear: bool, excluded: set[nn.Module], unnormalised: bool) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        inner = {m for layer in self._names if _is_layer(layer) for m in layer.modules() if m is not layer}
        self.layers = {m: name for m, name in self._names.items() if _is_layer(m) and m not in inner}
        self._linear, self._excluded = linear, excluded
        self._bypassed = {m for b in self._names if isinstance(b, _BYPASSING) for m in b.modules()}
        self._behind: dict[nn.Module, str] = {}
        others = {m for m in self._names if m not in inner and m not in self.layers and _is_other_norm(m)}
        self.links = links(model, lambda m: m in self.layers or m in others)
        self._held_fast = held_fast(model, self.layers)  # now, as a traced forward may have filled a cache
        norms = [m for m in self.layers if is_norm(m)]
        # without any batch norm, and none taken out before, there is nothing to go by
        without_norms = not norms and not any(isinstance(m, DECONVS) for m in self.layers)
        self._plain = {} if unnormalised or without_norms else self._unnormalised(norms)
        self.whitening = {m for m in self.layers if isinstance(m, DECONVS) or not (is_norm(m) or self.why_left(m))}
        self.removed: dict[nn.Module, str] = {}
        self._remove_norms()
        self.norm_of = self._norms_behind()
        convs: list[Any] = [m for m in self.links if isinstance(m, _ConvNd)]  # in the order of calls
        self.first = {m for m in convs if self._ends(m, "sources") == [INPUT]} or set(convs[:1])
        self._behind = {m: why for m in others if (why := self._why_listed(m))}
        self.layers = {m: name for m, name in self._names.items() if m in self.layers or m in self._behind}

    def _unnormalised(self, norms: list[nn.Module]) -> dict[nn.Module, str]:
        """The convolutions with a batch norm neither behind nor before them, and which of the two it is that they lack.

        A batch norm before a map's mean, as the squeeze of squeeze-and-excitation has it, is none: that sees one value
        per channel and image. Neither is one before a large kernel, as the linear layers of a VGG have it, when they
        are written as convolutions: it sees few patches of many features.
        """
        behind = {end for norm in norms for end in self.links[norm].sources}
        plain: dict[nn.Module, str] = {}
        for module in self.layers:
            if not isinstance(module, _ConvNd) or module in behind:
                continue
            before = set(self.links[module].sources) - self.links[module].pooled
            if before.isdisjoint(norms):
                plain[module] = "no batch norm before or behind it"
            elif math.prod(_expected_shape(module)[2:]) > _LARGE_KERNEL:
                plain[module] = "no batch norm behind it, and a large kernel"
        return plain

    def _norms_behind(self) -> dict[nn.Module, nn.Module]:
        """Of each convolution the batch norm that goes from directly behind it, where each has the other alone.

        One whose weight is, or shares memory with, another's is not among these: its scale is the other's, too.
        """
        parameters = {(m, name): p for m in self._names for name, p in m._parameters.items() if p is not None}
        owners = Counter(map(_memory, parameters.values()))
        found: dict[nn.Module, nn.Module] = {}
        for norm in self.removed:
            (conv, *others) = self.links[norm].sources or [UNKNOWN]
            if not isinstance(conv, _ConvNd) or isinstance(conv, DECONVS) or others or not self.links[norm].direct:
                continue
            own = all(owners[_memory(p)] == 1 and _is_dense(p) for p in conv.parameters(recurse=False))
            if own and self.links[conv].sinks == [norm] and conv.out_channels == num_features(norm):
                found[conv] = norm
        return found

    def _remove_norms(self) -> None:
        """Each batch norm that goes brings what it fed closer to the layer that fed it."""
        todo = [m for m in self.layers if is_norm(m) and not self._why_norm_stays(m)]
        while True:
            needless = {norm: why for norm in todo if (why := self._why_needless(norm))}
            self.removed |= needless
            todo = [norm for norm in todo if norm not in needless]
            if not needless:
                return

    def why_left(self, module: nn.Module) -> str:
        """Empty if it goes."""
        if module in self._behind:
            return self._behind[module]
        if isinstance(module, DECONVS):
            return "a deconvolution layer already"
        if module in self._excluded:
            return "excluded"
        if isinstance(module, torch.jit.ScriptModule):
            return "a ScriptModule, whose layers cannot be replaced"
        if isinstance(module, _ConvTransposeNd):
            return "a transposed convolution"
        if isinstance(module, nn.Linear) and not self._linear:
            return "linear=False"
        if not is_norm(module):
            unsafe = _why_unsafe(module, self.links[module], module in self._bypassed)
            return unsafe or self._why_lost(module) or self._plain.get(module, "")
        return "" if module in self.removed else self._why_norm_stays(module) or self._why_needed(module)

    def _why_norm_stays(self, norm: nn.Module) -> str:
        """Whatever feeds it; empty if that decides."""
        if norm in self._excluded:
            return "excluded"
        if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
            return "not initialised: run the model once before"
        if plain_class(norm, _NORMS) is None and not _is_foreign_norm(norm):
            return f"a subclass of {_base(norm)} with a forward of its own"
        if self.links[norm].weight_read:
            return "its parameters or statistics are used without calling it"
        return self._why_lost(norm)

    def _why_lost(self, module: nn.Module) -> str:
        """What a new layer in its place would not have or do; empty for nothing."""
        held = (
            f"also held by {self._held_fast[module]}, where it cannot be replaced" if module in self._held_fast else ""
        )
        return _why_own(module) or held

    def _why_listed(self, norm: nn.Module) -> str:
        """Empty if no deconvolution layer feeds this norm of another kind."""
        sources = [end for end in self._ends(norm, "sources") if end in self.whitening]
        return f"no batch norm; it normalises what {self._list(sources)} has whitened already" if sources else ""

    def _why_needless(self, norm: nn.Module) -> str:
        """Empty if it is not."""
        sources, sinks = self._ends(norm, "sources"), self._ends(norm, "sinks")
        if sources and all(self._whitens(end, norm, "sources") for end in sources):
            return f"behind {self._list(sources)}{self._guess(norm, 'sources')}"
        if any(_is_linear_map(end) and end not in self.whitening for end in sources):
            return ""
        if sinks and all(self._whitens(end, norm, "sinks") for end in sinks):
            return f"before {self._list(sinks)}{self._guess(norm, 'sinks')}"
        return ""

    def _why_needed(self, norm: nn.Module) -> str:
        sources = self._ends(norm, "sources")
        others = [end for end in sources if end not in self.whitening]
        return f"fed by {self._list(others or sources)}, and feeds {self._list(self._ends(norm, 'sinks'))}"

    def _ends(self, module: nn.Module, side: str) -> list[End]:
        """Where the data comes from, or goes to, through the batch norms that go."""
        ends: dict[End, None] = {}
        todo, seen = list(getattr(self.links[module], side)), set()
        while todo:
            end = todo.pop(0)
            if end in self.removed and end not in seen:
                todo += getattr(self.links[end], side)
            elif end not in seen:
                ends[end] = None
            seen.add(end)
        return list(ends)

    def _whitens(self, end: End, norm: nn.Module, side: str) -> bool:
        """Whether a deconvolution layer is at this end; where that is only guessed, it must fit in its channels."""
        if end not in self.whitening:
            return False
        return not self._guess(norm, side) or _size(end, side) == num_features(norm)

    def _guess(self, norm: nn.Module, side: str) -> str:
        link = self.links[norm]
        return "" if link.guessed.isdisjoint(getattr(link, side)) else ", by the order of modules"

    def _list(self, ends: list[End]) -> str:
        names = [end if isinstance(end, str) else self._names[end] or type(end).__name__ for end in ends]
        return ", ".join([*names[:2], *([f"{len(names) - 2} more"] if len(names) > 2 else [])]) or "nothing"

    def remark(self, module: nn.Module, norm: nn.Module | None) -> str:
        """What kind of layer is converted, and whose weight and bias it takes over."""
        calls = self.links[module].calls
        kind = "linear" if isinstance(module, nn.Linear) else kind_of(module)
        kind = f"first {kind}" if module in self.first else kind
        kind = f"{kind}, one set of statistics for its {calls} calls" if calls > 1 else kind
        return kind if norm is None else f"{kind}, with the weight and bias of {self._list([norm])}"


def _is_linear_map(end: End) -> bool:
    """Whether its output has the scale of a weight, which a batch norm behind it divides out."""
    return end in LINEAR_MAPS if isinstance(end, str) else isinstance(end, (_ConvNd, nn.Linear))


def _memory(t: Tensor) -> int:
    """What tensors that share memory have in common."""
    without = t.is_meta or isinstance(t, FakeTensor) or nn.parameter.is_lazy(t)
    return id(t) if without else t.untyped_storage().data_ptr() or id(t)


def _is_dense(t: Tensor) -> bool:
    """Whether its elements have memory of their own each, as those of an expanded tensor have not."""
    return not any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def _why_unsafe(module: Any, link: Links, bypassed: bool) -> str:
    """What would go wrong if this convolution or linear layer were replaced; empty for nothing."""
    if nn.parameter.is_lazy(module.weight):
        return "not initialised: run the model once before"
    if plain_class(module, (*CONVS, nn.Linear)) is None:
        return f"a subclass of {_base(module)} with a forward of its own"
    if not {"weight", "bias"} <= module._parameters.keys():
        return "its weight or bias is computed from others"
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}"
    if isinstance(module, _ConvNd) and tuple(module.weight.shape) != _expected_shape(module):
        return f"its weight is of shape {tuple(module.weight.shape)}, which is not what its attributes say"
    if bypassed or link.weight_read:
        return "its weight is used without calling it"
    return ""


def _expected_shape(conv: Any) -> tuple[int, ...]:
    kernel = conv.kernel_size if isinstance(conv.kernel_size, tuple) else ()
    return (conv.out_channels, conv.in_channels // conv.groups, *kernel)


def plain_class(module: nn.Module, classes: Iterable[type]) -> type | None:
    """Which of these torch.nn classes computes what the module does: its own, or one whose whole call it inherits."""
    for base in classes:
        if isinstance(module, base):
            methods = ("__call__", "forward", "_conv_forward")
            if all(getattr(type(module), name, None) is getattr(base, name, None) for name in methods):
                return base
    return None


def _base(module: nn.Module) -> str:
    return next(c.__name__ for c in type(module).__mro__[1:] if c.__module__.startswith("torch.nn"))


def _why_own(module: Any) -> str:
    """What somebody has given this very layer, and another in its place would not have; empty for nothing."""
    kind = type(module)
    if any(value for name, value in vars(module).items() if name.endswith("_hooks")):
        return "has hooks, which would be lost"
    for name, value in vars(module).items():
        if callable(value) and hasattr(kind, name):
            return f"has a {name} of its own, set on the layer itself"
    if not _is_foreign_norm(module) and (name := _own_of_class(kind)):
        return f"a subclass of {_base(module)} with a {name} of its own"
    usual = {"weight", "bias"}
    if is_norm(module):
        usual |= _STATISTICS | ({"act", "drop"} if _is_foreign_norm(module) else set())
    if own := {*module._parameters, *module._buffers, *module._modules} - usual:
        return f"has a parameter, buffer or module of its own, {min(own)}"
    clash = set() if is_norm(module) else vars(module).keys() & _new_names(isinstance(module, nn.Linear))
    return f"has an attribute {min(clash)}, as a deconvolution layer has, of another meaning" if clash else ""


def _own_of_class(kind: type) -> str:
    """A method or attribute that a subclass of torch's class defines, and might be asked for; empty for none. What made
    the layer, static methods among it, has done its work, and special methods have to do with Python."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            return ""
        for name, value in vars(base).items():
            special = name.startswith("__") or name in ("reset_parameters", "extra_repr")
            if not special and not isinstance(value, staticmethod):
                return name
    return ""


@functools.cache
def _new_names(linear: bool) -> set[str]:
    """The attributes that a deconvolution layer has and the layer before it has not."""
    old: nn.Module = nn.Linear(1, 1, device="meta") if linear else nn.Conv2d(1, 1, 1, device="meta")
    new: nn.Module = Delinear(1, 1, device="meta") if linear else FastDeconv(1, 1, 1, device="meta")
    return set(dir(new)) - set(dir(old))


def _size(layer: Any, side: str) -> int:
    """Channels of what a layer gives, seen as a source, or takes, seen as a sink."""
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "sources" else layer.in_features
    return layer.out_channels if side == "sources" else layer.in_channels


def num_features(norm: Any) -> int:
    return norm.num_features if isinstance(norm, _BatchNorm) else norm.running_mean.numel()


def kind_of(conv: Any) -> str:
    if conv.groups == 1:
        return "convolution"
    return "depthwise convolution" if conv.groups == conv.in_channels else "group convolution"
