"""Turning a model's convolutions and batch norms into deconvolution layers, whoever wrote the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tdeconv import checks
from tdeconv.dataflow import INPUT, End, Links, links
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d

_CONVS: dict[type, Any] = {nn.Conv1d: FastDeconv1d, nn.Conv2d: FastDeconv, nn.Conv3d: FastDeconv3d}
_DECONVS = (*_CONVS.values(), Delinear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Known by name, since neither package is needed here. Those of timm apply a dropout and an activation too.
_FOREIGN_NORMS = {
    ("torchvision", "FrozenBatchNorm2d"),
    ("timm", "BatchNormAct2d"),
    ("timm", "FrozenBatchNormAct2d"),
    ("timm", "SyncBatchNormAct"),
}
# In evaluation their fast paths use the weights of the layers inside without calling these.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class ConversionRow:
    """One layer of a :class:`ConversionReport`: its name, what it was and became, and why.

    ``action`` is ``"converted"`` (into a deconvolution layer), ``"removed"`` (a batch norm) or ``"left"``.
    """

    name: str
    was: str
    action: str
    became: str
    why: str


@dataclass
class ConversionReport:
    """What :func:`convert_deconv` did with every convolution, batch norm and linear layer, and why.

    ``print(report)`` shows a table; ``converted``, ``removed`` and ``left`` are the rows of each kind.
    """

    rows: list[ConversionRow] = field(default_factory=list)

    @property
    def converted(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "converted"]

    @property
    def removed(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "removed"]

    @property
    def left(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "left"]

    def __str__(self) -> str:
        total = (
            f"{len(self.converted)} layers converted, {len(self.removed)} batch norms removed, {len(self.left)} left"
        )
        if not self.rows:
            return f"{total}: the model has no convolution, batch norm or linear layer"
        cells = [("layer", "was", "became", "why"), *((r.name, r.was, r.became, r.why) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:], "", total])


@dataclass(frozen=True)
class _Options:
    """How the new layers are made."""

    block: int
    sampling_stride: int
    n_iter: int
    first_n_iter: int
    freeze_first: bool
    block_fc: int
    backend: str | None

    def check(self) -> None:
        checks.options(1e-5, self.n_iter, 0.1, self.block, self.sampling_stride)
        checks.positive_int("first_n_iter", self.first_n_iter)
        checks.positive_int("block_fc", self.block_fc)
        checks.backend(self.backend)


def convert_deconv(
    model: nn.Module,
    *,
    block: int = 64,
    sampling_stride: int = 3,
    n_iter: int = 5,
    first_n_iter: int = 15,
    freeze_first: bool = True,
    linear: bool = False,
    block_fc: int = 512,
    exclude: Iterable[str | type[nn.Module]] = (),
    backend: str | None = None,
    report: ConversionReport | None = None,
) -> nn.Module:
    """Replace a model's convolutions by deconvolution layers and take out the batch norms they make unnecessary.

    Call it before the optimiser is made (the layers get biases), before ``torch.compile`` and before wrappers such as
    ``DistributedDataParallel``. Calling it again changes nothing.

    A batch norm is taken out if deconvolution layers alone feed it, or if it feeds deconvolution layers alone (as in
    pre-activation networks); activations, dropout, pooling, reshaping and concatenation may stand between. One that
    normalises anything else, a sum of branches say, is left. What feeds what is traced by ``torch.fx``, and where the
    model's code cannot be traced, taken from the order in which its modules were registered.

    Args:
        model: changed in place.
        block, sampling_stride, backend: as in :class:`tdeconv.FastDeconv`.
        n_iter: Newton-Schulz steps; at most 3 in group convolutions and 1 in depthwise ones, as in the paper.
        first_n_iter: those of the convolutions that see the model's input.
        freeze_first: whether these freeze their statistics (``freeze`` of :class:`tdeconv.FastDeconv`).
        linear: convert every ``nn.Linear`` into a :class:`tdeconv.Delinear` too.
        block_fc: features that a :class:`tdeconv.Delinear` whitens together.
        exclude: names of modules as in ``model.named_modules()``, with shell-style wildcards, or classes of modules:
            these and all inside them stay as they are.
        report: filled with what was done, for the caller to print.

    Returns:
        The model (the new layer, if the model is a single one). A converted layer keeps its weight Parameter, device,
        dtype and mode; it gets a bias, zero if it had none.

    Raises:
        TypeError: the model is no ``nn.Module``, is a ScriptModule, or is wrapped for several processes.
        ValueError: an option out of range, or a name in ``exclude`` that no module has.
    """
    _check_model(model)
    options = _Options(block, sampling_stride, n_iter, first_n_iter, freeze_first, block_fc, backend)
    options.check()
    plan = _Plan(model, linear, _excluded(model, exclude))
    rows, new = [], {}
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        for module, name in plan.layers.items():
            action, became, why = "left", "-", plan.why_left(module)
            if not why and _is_norm(module):
                new[module] = _without_norm(module, plan.links[module])
                action, became, why = "removed", type(new[module]).__name__, plan.removed[module]
            elif not why:
                new[module] = _deconv(module, module in plan.first, module in plan.pooled, options)
                action, became, why = "converted", _describe(new[module]), plan.remark(module)
            rows.append(ConversionRow(name, _describe(module), action, became, why))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in new:
                parent.register_module(name, new[child])
    if report is not None:
        report.rows = rows
    return new.get(model, model)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a ScriptModule, whose layers cannot be replaced; convert the model before scripting it"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model is wrapped in {type(model).__name__}; convert the model before wrapping it")


def _excluded(model: nn.Module, exclude: Iterable[str | type[nn.Module]]) -> set[nn.Module]:
    """The modules that ``exclude`` names, and all inside them."""
    chosen = set()
    for item in (exclude,) if isinstance(exclude, (str, type)) else exclude:
        if isinstance(item, str):
            found = [m for name, m in model.named_modules(remove_duplicate=False) if fnmatchcase(name, item)]
            if not found:
                raise ValueError(f"exclude names {item!r}, but the model has no module of such a name")
        elif isinstance(item, type):
            found = [m for m in model.modules() if isinstance(m, item)]
        else:
            raise TypeError(f"exclude must hold names and classes of modules, got {item!r}")
        chosen.update(found)
    return {inner for m in chosen for inner in m.modules()}


# ------------------------------------------------------------------------------------------------------- what goes


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or _is_foreign_norm(module)


def _is_foreign_norm(module: nn.Module) -> bool:
    return (type(module).__module__.partition(".")[0], type(module).__name__) in _FOREIGN_NORMS


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear, torch.jit.ScriptModule)) or _is_norm(module)


class _Plan:
    """What goes and what stays of a model's layers, and why."""

    def __init__(self, model: nn.Module, linear: bool, excluded: set[nn.Module]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        inner = {m for layer in self.names if _is_layer(layer) for m in layer.modules() if m is not layer}
        self.layers = {m: name for m, name in self.names.items() if _is_layer(m) and m not in inner}
        self.linear, self.excluded = linear, excluded
        self.bypassed = {m for b in self.names if isinstance(b, _BYPASSING) for m in b.modules()}
        self.links = links(model, self.layers.__contains__)

    @cached_property
    def first(self) -> set[nn.Module]:
        """The convolutions that see the model's input, or the first one if it is computed with before."""
        convs = [m for m in self.links if isinstance(m, _ConvNd)]
        return {m for m in convs if self._ends(m, "sources") == [INPUT]} or set(convs[:1])

    @cached_property
    def whitening(self) -> set[nn.Module]:
        """The deconvolution layers, those there are and those to be."""
        return {m for m in self.layers if isinstance(m, _DECONVS) or not (_is_norm(m) or self.why_left(m))}

    @cached_property
    def removed(self) -> dict[nn.Module, str]:
        """The batch norms that go, and why. Each one gone brings what it fed closer to the layer that fed it."""
        self.removed: dict[nn.Module, str] = {}
        norms = [m for m in self.layers if _is_norm(m) and not self._why_norm_stays(m)]
        before = -1
        while before < len(self.removed):
            before = len(self.removed)
            for norm in norms:
                why = "" if norm in self.removed else self._why_needless(norm)
                if why:
                    self.removed[norm] = why
        return self.removed

    @cached_property
    def pooled(self) -> set[nn.Module]:
        """The 1x1 convolutions on images of one pixel: behind a pooling over all pixels, and behind one another."""
        pointwise = [m for m in self.links if isinstance(m, _ConvNd) and set(m.kernel_size) == {1}]
        pooled = {m for m in pointwise if self.links[m].pooled}
        for m in pointwise:  # in the order of calls
            if self.links[m].sources and pooled.issuperset(self._ends(m, "sources")):
                pooled.add(m)
        return pooled

    def why_left(self, module: nn.Module) -> str:
        """Empty if it goes."""
        if isinstance(module, _DECONVS):
            return "a deconvolution layer already"
        if module in self.excluded:
            return "excluded"
        if isinstance(module, torch.jit.ScriptModule):
            return "a ScriptModule, whose layers cannot be replaced"
        if isinstance(module, _ConvTransposeNd):
            return "a transposed convolution"
        if isinstance(module, nn.Linear) and not self.linear:
            return "linear=False"
        if not _is_norm(module):
            return _why_unsafe(module, self.links[module], module in self.bypassed)
        return "" if module in self.removed else self._why_norm_stays(module) or self._why_needed(module)

    def _why_norm_stays(self, norm: nn.Module) -> str:
        """Whatever feeds it."""
        if norm in self.excluded:
            return "excluded"
        if _plain_class(norm, _NORMS) is None and not _is_foreign_norm(norm):
            return f"a subclass of {_base(norm)}"
        return "has hooks, which would be lost" if _hooked(norm) else ""

    def _why_needless(self, norm: nn.Module) -> str:
        """Empty if it is not."""
        sources, sinks = self._ends(norm, "sources"), self._ends(norm, "sinks")
        if sources and all(self._whitens(end, norm, "out") for end in sources):
            return f"behind {self._list(sources)}{self._guess(norm, sources)}"
        if any(isinstance(end, (_ConvNd, nn.Linear)) and end not in self.whitening for end in sources):
            return ""
        if sinks and all(self._whitens(end, norm, "in") for end in sinks):
            return f"before {self._list(sinks)}{self._guess(norm, sinks)}"
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
        """Whether a deconvolution layer is at this end; a neighbour that is only guessed must fit in its channels."""
        if end not in self.whitening:
            return False
        return end not in self.links[norm].guessed or _size(end, side) == _features(norm)

    def _guess(self, norm: nn.Module, ends: list[End]) -> str:
        return "" if self.links[norm].guessed.isdisjoint(ends) else ", by the order of modules"

    def remark(self, module: nn.Module) -> str:
        calls = self.links[module].calls
        kind = "linear" if isinstance(module, nn.Linear) else _kind(module)
        kind = f"first {kind}" if module in self.first else f"{kind} of one pixel" if module in self.pooled else kind
        return f"{kind}, one set of statistics for its {calls} calls" if calls > 1 else kind

    def _list(self, ends: list[End]) -> str:
        names = [end if isinstance(end, str) else self.names[end] or type(end).__name__ for end in ends]
        return ", ".join([*names[:2], *([f"{len(names) - 2} more"] if len(names) > 2 else [])]) or "nothing"


def _why_unsafe(module: nn.Module, link: Links, bypassed: bool) -> str:
    """What would go wrong if this convolution or linear layer were replaced."""
    if nn.parameter.is_lazy(module.weight):
        return "not initialised: run the model once before"
    if _plain_class(module, (*_CONVS, nn.Linear)) is None:
        return f"a subclass of {_base(module)} with a forward of its own"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    if _hooked(module):
        return "has hooks, which would be lost"
    if bypassed or link.weight_read:
        return "its weight is used without calling it"
    return ""


def _plain_class(module: nn.Module, classes: Iterable[type]) -> type | None:
    """Which of these torch.nn classes computes what the module does: its own, or one it inherits the whole call from."""
    for base in classes:
        if isinstance(module, base):
            methods = ("__call__", "forward", "_conv_forward")
            if all(getattr(type(module), name, None) is getattr(base, name, None) for name in methods):
                return base
    return None


def _base(module: nn.Module) -> str:
    return next(c.__name__ for c in type(module).__mro__[1:] if c.__module__.startswith("torch.nn"))


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _size(layer: End, side: str) -> int:
    features = "features" if isinstance(layer, nn.Linear) else "channels"
    return getattr(layer, f"{side}_{features}")


def _features(norm: nn.Module) -> int:
    return norm.running_mean.numel() if norm.running_mean is not None else norm.num_features


def _kind(conv: Any) -> str:
    if conv.groups == 1:
        return "convolution"
    return "depthwise convolution" if conv.groups == conv.in_channels else "group convolution"


def _describe(module: Any) -> str:
    """``Conv2d(3, 64, 7x7)`` and the like, short enough for a table."""
    name = type(module).__name__
    if isinstance(module, _ConvNd):
        sizes = [str(module.in_channels), str(module.out_channels), "x".join(map(str, module.kernel_size))]
        sizes += [f"groups={module.groups}"] if module.groups > 1 else []
        if isinstance(module, _DECONVS):
            sizes = [f"block={module.block}", f"n_iter={module.n_iter}", *(["freeze"] if module.freeze else [])]
        return f"{name}({', '.join(sizes)})"
    if isinstance(module, Delinear):
        return f"{name}(block={module.block}, n_iter={module.n_iter})"
    if isinstance(module, nn.Linear):
        return f"{name}({module.in_features}, {module.out_features})"
    return f"{name}({_features(module)})" if _is_norm(module) else name


# ------------------------------------------------------------------------------------------------ what comes instead


class Clone(nn.Identity):
    """Stands for a removed batch norm whose output is changed in place while its input is needed unchanged."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


def _without_norm(norm: Any, link: Links) -> nn.Module:
    """What is left of a batch norm: nothing, or the dropout and activation of one of timm's.

    A batch norm's output was memory of its own, that the code after it may have changed in place.
    """
    parts = [m for m in norm.children() if type(m) is not nn.Identity]
    for part in parts:
        if link.input_read and getattr(part, "inplace", False):
            part.inplace = False
    if parts:
        rest = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    else:
        rest = Clone() if link.input_read and link.overwritten else nn.Identity()
    rest.training = norm.training
    return rest


def _deconv(layer: Any, first: bool, pooled: bool, options: _Options) -> nn.Module:
    """The deconvolution layer for a convolution or linear layer: its weight, a bias, fresh running statistics."""
    weight, n_iter, common = layer.weight, options.n_iter, {"backend": options.backend, "device": "meta"}
    common["dtype"] = weight.dtype
    if isinstance(layer, nn.Linear):
        sizes = (layer.in_features, layer.out_features)
        new: Any = Delinear(*sizes, n_iter=n_iter, block=options.block_fc, **common)
    else:
        most = {"depthwise convolution": 1, "group convolution": 3}.get(_kind(layer), n_iter)
        new = _CONVS[_plain_class(layer, _CONVS)](
            *(layer.in_channels, layer.out_channels, layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, layer.groups),
            n_iter=options.first_n_iter if first else min(n_iter, most),
            block=options.block,
            sampling_stride=1 if pooled else options.sampling_stride,
            freeze=first and options.freeze_first,
            padding_mode=layer.padding_mode,
            **common,
        )
    new.weight = weight
    zero = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    new.bias = nn.Parameter(zero, weight.requires_grad) if layer.bias is None else layer.bias
    for name, buffer in new.named_buffers():
        setattr(new, name, torch.empty_like(buffer, device=weight.device))
    new.reset_running_stats()
    return new.train(layer.training)
