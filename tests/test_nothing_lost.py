"""What models hang on their layers, and where else they keep them: after conversion it is all there, or named."""

from __future__ import annotations

import copy
import functools
import itertools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, randn
from models import timm, torchvision
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.layers import Delinear, FastDeconv

# whose only convolution is left, as most models here have it
pytestmark = pytest.mark.filterwarnings("ignore:convert_deconv converted nothing")


class Pair(NamedTuple):
    conv: nn.Module
    norm: nn.Module


class Slotted:
    __slots__ = ("conv",)

    def __init__(self, conv: nn.Module) -> None:
        self.conv = conv


class Net(nn.Module):
    """A registered convolution and batch norm, called by what ``hold`` puts into the attribute ``held``."""

    def __init__(self, hold: Callable[[nn.Module, nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.held, self.call = hold(self.conv, self.norm), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


def report_of(model: nn.Module, **options: Any) -> ConversionReport:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return report


def in_order(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def of_values(layers: Any, x: Tensor) -> Tensor:
    return in_order(layers.values(), x)


def of_keys(layers: Any, x: Tensor) -> Tensor:
    return in_order([layer for layer, used in layers.items() if used], x)


def outer(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """A module that is itself no part of the model."""
    return nn.Sequential(conv, norm)


REPLACED = {
    "list": (lambda c, n: [c, n], in_order),
    "tuple": (lambda c, n: (c, n), in_order),
    "named tuple": (Pair, in_order),
    "deque": (lambda c, n: deque([c, n]), in_order),
    "dict": (lambda c, n: {"c": c, "n": n}, of_values),
    "ordered dict": (lambda c, n: OrderedDict(c=c, n=n), of_values),
    "keys": (lambda c, n: {c: True, n: True}, of_keys),
    "set": (lambda c, n: [{c}, {n}], lambda held, x: in_order([next(iter(s)) for s in held], x)),
    "frozenset": (lambda c, n: (frozenset([c]), n), lambda held, x: in_order([*held[0], held[1]], x)),
    "nested": (lambda c, n: {"a": [(c, [n])]}, lambda held, x: in_order([held["a"][0][0], *held["a"][0][1]], x)),
    "forward": (lambda c, n: [c.forward, n.forward], in_order),
    "call": (lambda c, n: [c.__call__, n.__call__], in_order),
    "partial": (lambda c, n: [functools.partial(c), functools.partial(in_order, [n])], in_order),
    "keyword of a partial": (
        lambda c, n: functools.partial(lambda x, conv, norm: norm(conv(x)), conv=c, norm=n),
        lambda held, x: held(x),
    ),
    "object": (lambda c, n: types.SimpleNamespace(c=c, n=n), lambda held, x: held.n(held.c(x))),
    "module outside of the model": (lambda c, n: [outer(c, n)], in_order),
}


@pytest.mark.parametrize(("hold", "call"), REPLACED.values(), ids=REPLACED.keys())
def test_layer_that_is_held_elsewhere_too_is_replaced_there(hold: Any, call: Any) -> None:
    model = Net(hold, call).double()
    plain = copy.deepcopy(nn.Sequential(model.conv, model.norm))
    report = report_of(model)
    assert [row.action for row in report.rows] == ["converted", "removed"]
    x = randn(5, 4, 6, 6) + 2
    y = model(x)
    assert_close(y, convert_deconv(plain)(x), 1e-12)
    y.sum().backward()
    assert model.conv.running_mean.any()  # the layer in the forward is the registered one
    assert model.conv.weight.grad is not None


def test_containers_of_replaced_layers_stay_the_same_objects() -> None:
    model = Net(lambda c, n: {"a": [c, n, 3]}, lambda held, x: in_order(held["a"][:2], x))
    outermost, inner, size = model.held, model.held["a"], model.held["a"][2]
    convert_deconv(model)
    assert model.held is outermost
    assert model.held["a"] is inner
    assert inner[0] is model.conv
    assert inner[2] is size


def forward(self: nn.Module, x: Tensor) -> Tensor:
    return type(self).forward(self, -x)


def closure(conv: nn.Module, norm: nn.Module) -> Any:
    return lambda x: norm(conv(x))


def wrapped(layer: nn.Module) -> Any:
    """As ``torch.compile`` makes it: an attribute of the function says what it wraps."""

    def call(x: Tensor) -> Tensor:
        return layer(x)

    call.__wrapped__ = layer
    return call


def nested(conv: nn.Module, norm: nn.Module) -> Any:
    calls = [conv, closure(conv, norm)]
    return lambda x: calls[1](x)


HELD_FAST = {
    "closure": (closure, lambda held, x: held(x), "a function closure.<locals>.<lambda>"),
    "wrapper": (lambda c, n: [wrapped(c), wrapped(n)], in_order, "a function wrapped.<locals>.call"),
    "default": (lambda c, n: lambda x, c=c, n=n: n(c(x)), lambda held, x: held(x), "a function"),
    "iterator": (lambda c, n: itertools.cycle([c, n]), lambda held, x: next(held)(next(held)(x)), "a cycle"),
    "weak reference": (
        lambda c, n: [weakref.ref(c), weakref.ref(n)],
        lambda held, x: in_order([ref() for ref in held], x),
        "a weak reference",
    ),
    "slot": (lambda c, n: [Slotted(c), Slotted(n)], lambda held, x: in_order([s.conv for s in held], x), "a Slotted"),
    "other method": (
        lambda c, n: [c._conv_forward, n._check_input_dim],
        lambda held, x: held[0](x, x.new_ones(4, 4, 1, 1), None),
        "a method ",
    ),
    "forward of another function": (
        lambda c, n: [types.MethodType(forward, layer) for layer in (c, n)],
        in_order,
        "a method forward",
    ),
    "list in a closure, and a closure in it": (lambda c, n: nested(c, n), lambda held, x: held(x), "a function"),
}


@pytest.mark.parametrize(("hold", "call", "holder"), HELD_FAST.values(), ids=HELD_FAST.keys())
def test_layer_that_is_held_fast_elsewhere_is_left_and_the_report_names_the_holder(
    hold: Any, call: Any, holder: str
) -> None:
    model, x = Net(hold, call).double(), randn(5, 4, 6, 6)
    conv, norm, before = model.conv, model.norm, model(x)
    report = report_of(model)
    assert (model.conv, model.norm) == (conv, norm)
    assert [row.action for row in report.rows] == ["left", "left"]
    assert all(row.why.startswith(f"also held by {holder}") for row in report.rows)
    assert torch.equal(model(x), before)


def test_compiled_layer_is_left_and_a_compiled_part_is_converted_inside() -> None:
    def part() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    compiled = torch.compile(part(), backend="eager")
    model = nn.Sequential(compiled, torch.compile(nn.Conv2d(4, 4, 1), backend="eager"), nn.BatchNorm2d(4))
    model = model.double()
    report = report_of(model)
    assert [row.action for row in report.rows] == ["converted", "removed", "left", "left"]
    assert "also held by a function" in report.left[0].why
    layer = compiled._orig_mod[0]
    with torch.no_grad():
        model(randn(5, 4, 6, 6) + 1)
    assert layer.running_mean.any()


def test_list_that_other_modules_share_is_replaced_once() -> None:
    model = nn.Sequential(*(Net(lambda c, n: [c, n], in_order) for _ in range(2)))
    model[1].held = model[0].held
    convert_deconv(model)
    assert model[1].held is model[0].held
    assert model[0].held == [model[0].conv, model[0].norm]


def test_class_that_holds_a_list_of_layers() -> None:
    class Shared(nn.Module):
        layers: ClassVar[list[nn.Module]] = []

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.layers.extend([self.conv, self.norm])

        def forward(self, x: Tensor) -> Tensor:
            return in_order(self.layers, x)

    model = Shared()
    convert_deconv(model)
    assert Shared.layers == [model.conv, model.norm]
    assert type(model.conv) is FastDeconv


# --------------------------------------------------------------------------------------- what was changed on the layer


def own_forward(layer: nn.Module) -> None:
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)


def bound_forward(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), layer)


def own_call(layer: nn.Module) -> None:
    inner = layer._call_impl
    layer._call_impl = lambda x: 2 * inner(x)


def other_class(layer: nn.Module) -> None:
    kind = type(layer)
    layer.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def circular(conv: Any) -> None:
    """Padding around the image in one direction alone, as panoramas need it."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wrapped = nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
        return nn.functional.conv2d(nn.functional.pad(wrapped, (0, 0, 1, 1)), weight, bias)

    conv._conv_forward = forward


CHANGED = {
    "a forward of its own": (own_forward, "has a forward of its own"),
    "a bound forward of its own": (bound_forward, "has a forward of its own"),
    "a call of its own": (own_call, "has a _call_impl of its own"),
    "a class given later": (other_class, "a subclass of"),
    "state-dict hook": (lambda m: m._register_state_dict_hook(lambda *_: None), "has hooks"),
    "state-dict hook before": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), "has hooks"),
    "loading hook": (lambda m: m.register_load_state_dict_post_hook(lambda *_: None), "has hooks"),
    "loading hook before": (lambda m: m.register_load_state_dict_pre_hook(lambda *_: None), "has hooks"),
    "method for checkpoints": (
        lambda m: setattr(m, "_save_to_state_dict", lambda *_: None),
        "has a _save_to_state_dict of its own",
    ),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(4)), "of its own, mask"),
    "parameter": (lambda m: m.register_parameter("lora", nn.Parameter(torch.ones(4))), "of its own, lora"),
    "module": (lambda m: m.add_module("adapter", nn.Linear(4, 4)), "of its own, adapter"),
}
LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 4, 1), lambda layer: nn.Sequential(layer, nn.BatchNorm2d(4)), "0"),
    "batch norm": (lambda: nn.BatchNorm2d(4), lambda layer: nn.Sequential(nn.Conv2d(4, 4, 1), layer), "1"),
    "linear": (lambda: nn.Linear(4, 4), lambda layer: nn.Sequential(layer, nn.ReLU()), "0"),
}


@pytest.mark.parametrize(("change", "why"), CHANGED.values(), ids=CHANGED.keys())
@pytest.mark.parametrize(("make", "around", "name"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_that_was_changed_itself_is_left(make: Any, around: Any, name: str, change: Any, why: str) -> None:
    layer = make()
    change(layer)
    model = around(layer)
    report = report_of(model, linear=True)
    assert model[int(name)] is layer
    assert why in next(row.why for row in report.left if row.name == name)


def test_convolution_with_a_padding_of_its_own_computes_what_it_did() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    circular(model[0])
    plain = copy.deepcopy(model)
    report = report_of(model)
    assert "has a _conv_forward of its own, set on the layer itself" in report.left[0].why
    x = randn(3, 4, 6, 6)
    assert_close(model(x), plain(x), 1e-12)


# ----------------------------------------------------------------------------------------- what was hung on the layer


def test_attributes_that_a_model_hangs_on_its_layers_are_carried_over() -> None:
    """As YOLO's models do: ``m.f`` says from which layers a layer takes its input, ``m.i`` which one it is."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norms = nn.BatchNorm2d(4), timm().layers.BatchNormAct2d(4)
            self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), norms[0], nn.Conv2d(4, 4, 1), norms[1], nn.Linear(4, 4)])
            for i, layer in enumerate(self.layers):
                layer.i, layer.f = i, [i - 1]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                assert layer.f == [layer.i - 1]
                x = layer(x.mean((2, 3)) if layer.i == 4 else x)
            return x

    model = Routed()
    before = [layer.f for layer in model.layers]
    report = report_of(model, linear=True)
    assert not report.left
    assert [layer.i for layer in model.layers] == [0, 1, 2, 3, 4]
    assert all(layer.f is f for layer, f in zip(model.layers, before, strict=True))
    model(torch.randn(6, 4, 5, 5)).sum().backward()


def test_layers_that_are_hung_on_layers_are_replaced_there() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for layer, following in itertools.pairwise(model):
        layer.neighbours = [following]
    convert_deconv(model)
    assert all(layer.neighbours == [following] for layer, following in itertools.pairwise(model))


def test_attributes_of_the_new_layer_are_its_own() -> None:
    """``block`` is how many features a deconvolution layer whitens together: a model may mean something else."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].block = "stem"
    report = report_of(model)
    assert "an attribute block" in report.left[0].why
    assert model[0].block == "stem"
    linear = nn.Linear(4, 4)
    linear.n_iter = 0
    assert type(convert_deconv(linear, linear=True)) is nn.Linear
    linear = nn.Linear(4, 4)
    linear.sampling_stride = 0  # a Delinear has none
    linear = convert_deconv(linear, linear=True)
    assert type(linear) is Delinear
    assert linear.sampling_stride == 0


# ------------------------------------------------------------------------------------------------ norms of other kinds


class ScaleNorm(nn.Module):
    """A norm that no package knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()


OTHERS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "local response": lambda: nn.LocalResponseNorm(2),
    "torchvision's": lambda: torchvision().models.convnext.LayerNorm2d(4),
    "timm's layer": lambda: timm().layers.LayerNorm2d(4),
    "timm's group": lambda: timm().layers.GroupNormAct(4, 2),
    "unknown": ScaleNorm,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_norm_of_another_kind_behind_a_deconvolution_layer_is_in_the_report(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), make(), nn.AvgPool2d(2))
    before = model[3]
    report = report_of(model)
    assert model[3] is before
    row = report.rows[-1]
    assert (row.name, row.was.partition("(")[0], row.action) == ("3", type(before).__name__, "left")
    assert row.why == "no batch norm; it normalises what 0 has whitened already"
    assert report_of(model).rows[-1] == row


def test_norm_of_another_kind_elsewhere_is_not_in_the_report() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Softmax2d())
    report = report_of(model, exclude="1")
    assert [row.name for row in report.rows] == ["1", "2"]
    assert [row.name for row in report_of(model).rows] == ["1", "2"]


class DetrFrozenBatchNorm2d(nn.Module):
    """As detectors' packages have it, each its own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((n,), float(value)))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale


def test_frozen_batch_norm_of_any_package_is_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), DetrFrozenBatchNorm2d(4))
    report = report_of(model)
    assert [(row.action, row.was) for row in report.rows] == [
        ("converted", "Conv2d(4, 4, 1x1)"),
        ("removed", "DetrFrozenBatchNorm2d(4)"),
    ]
    assert type(model[1]) is nn.Identity


def test_frozen_batch_norm_that_holds_more_than_one_does_is_left() -> None:
    norm = DetrFrozenBatchNorm2d(4)
    norm.register_buffer("shift", torch.ones(4))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    report = report_of(model)
    assert model[1] is norm
    assert [row.why for row in report.left if row.name == "1"] == [
        "no batch norm; it normalises what 0 has whitened already"
    ]


# ------------------------------------------------------------------------------------------ what a trace would not see


def test_layers_in_a_cache_that_tracing_fills_are_left() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        @functools.cache  # noqa: B019
        def layers(self) -> list[nn.Module]:
            return [self.conv, self.norm]

        def forward(self, x: Tensor) -> Tensor:
            return in_order(self.layers(), x)

    model = Cached()
    report = report_of(model)
    assert [row.action for row in report.rows] == ["left", "left"]
    assert model.layers() == [model.conv, model.norm]


ALIASES = {
    "data": lambda y: y.data,
    "detach": lambda y: y.detach(),
    "unbind": lambda y: y.unbind(0)[0],
    "swapaxes": lambda y: y.swapaxes(2, 3),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "mT": lambda y: y.mT,
    "expand_as": lambda y: y.expand_as(y),
    "ravel": lambda y: y.ravel(),
    "unfold": lambda y: y.unfold(2, 1, 1),
    "diagonal": lambda y: y.diagonal(),
    "unary plus": lambda y: +y,
    "chunk": lambda y: y.chunk(2, 1)[0],
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES.keys())
def test_output_that_is_overwritten_by_another_name_is_a_copy(alias: Callable[[Tensor], Tensor]) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            y = self.norm(h)
            alias(y).mul_(0)
            return h + y

    model = convert_deconv(Overwriting().double()).eval()
    x = randn(5, 3, 6, 6)
    with torch.no_grad():
        h = model.conv(x)
        y = h.clone()
        alias(y).mul_(0)
        assert_close(model(x), h + y, 1e-12)


def test_subclass_with_more_than_a_constructor_is_left() -> None:
    class Scaled(nn.Conv2d):
        gain = 2.0

    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.BatchNorm2d:
            return super().train(False)

    class Sized(nn.Conv2d):
        @staticmethod
        def stride_for(size: int) -> int:
            return 1 + size // 100

    model = nn.Sequential(Scaled(3, 4, 1), Frozen(4), Sized(4, 4, 1), nn.BatchNorm2d(4))
    report = report_of(model)
    whys = {row.name: row.why for row in report.left}
    assert whys == {
        "0": "a subclass of Conv2d with a gain of its own",
        "1": "a subclass of BatchNorm2d with a train of its own",
    }
    assert type(model[2]) is FastDeconv


def test_convolution_that_was_cut_to_other_channels_is_left() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach()[:, :1])
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    assert "is of shape (4, 1, 3, 3)" in report_of(model).left[0].why
    assert model(torch.randn(5, 1, 6, 6)).shape == (5, 4, 4, 4)


def test_padding_that_was_set_on_the_layer_is_what_torch_pads_by() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    conv._reversed_padding_repeated_twice = [2, 0, 0, 0]
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).double()
    expected = conv(randn(5, 3, 6, 6)).shape
    assert convert_deconv(model)(randn(5, 3, 6, 6)).shape == expected
