"""What feeds what: traced, traced in part, guessed from the order of modules, and never at the model's expense."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tdeconv.dataflow import INPUT, OUTPUT, links

LAYERS = (nn.Conv2d, nn.BatchNorm2d)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS)


class Block(nn.Module):
    """Registered in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, scale: float | None = None, *, twice: bool = False) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = y if scale is None else y * scale
        return 2 * y if twice else y


class Untraceable(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.conv = nn.Conv2d(4, 6, 1)
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.act(self.conv(self.block(x))))
        return y if y.sum() > 0 else -y


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = Untraceable()
        self.last = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.norm(self.stem(x))) + 1)


def test_trace_reads_calls_not_registration() -> None:
    block = Block()
    found = links(block, is_layer)
    assert list(found) == [block.conv1, block.bn1, block.conv2, block.bn2]
    assert found[block.conv1].sources == [INPUT]
    assert found[block.bn1].sources == [block.conv1]
    assert found[block.bn1].sinks == [block.conv2]
    assert found[block.bn2].sinks == [OUTPUT]
    assert not any(link.guessed for link in found.values())


def test_parts_that_can_be_traced_are() -> None:
    model = Around()
    found = links(model, is_layer)
    block, inner = model.inner.block, model.inner
    assert found[model.norm].sources == [model.stem]
    assert found[block.bn1].sources == [block.conv1]
    assert found[block.bn1].sinks == [block.conv2]
    assert not found[block.bn1].guessed
    assert found[inner.norm].sources == [inner.conv]
    assert found[inner.norm].guessed == {inner.conv, model.last}
    assert found[model.last].sources == ["add"]  # the trace of the whole goes around the part


def test_neighbours_stand_in_where_nothing_can_be_traced() -> None:
    model = Untraceable()
    found = links(model, is_layer)
    assert found[model.norm].sources == [model.conv]
    assert found[model.norm].sinks == [OUTPUT]
    assert found[model.conv].sources == [model.block.conv2]
    assert found[model.norm].guessed


class Careless(nn.Module):
    """A forward that changes the module, draws random numbers and warns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("steps", torch.zeros(1))
        self.calls = 0
        self.seen: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps.add_(1)
        self.seen = self.conv(x) * torch.rand(1)
        torch.tensor(x) if self.calls > 100 else None
        return self.seen


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_as_it_was(training: bool) -> None:
    model = Careless().train(training)
    model.conv.train(not training)
    before, state = dict(vars(model)), torch.get_rng_state()
    found = links(model, is_layer)
    assert found[model.conv].sources == [INPUT]
    assert vars(model) == before
    assert model.conv.training is not training
    assert model.steps.item() == 0
    assert torch.equal(torch.get_rng_state(), state)


class Cache:
    """An object of the model's that is no module."""

    def __init__(self) -> None:
        self.last: object = "none"
        self.deep = {"list": [1, {2}], "queue": deque([1, 2], maxlen=2)}


class Slotted:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[object] = []


class Marking(nn.Module):
    """A forward that stores what it sees wherever a model can."""

    latest: object = None
    everything: ClassVar[list[object]] = []

    def __init__(self, how: Callable[[Marking, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("statistics", torch.zeros(4))
        self.how = how
        self.cache: dict[str, object] = {"h": None}
        self.ordered: OrderedDict[str, object] = OrderedDict(a=1, b=2)
        self.features: list[object] = [1.5]
        self.names: set[object] = {"a"}
        self.helper, self.slotted = Cache(), Slotted()
        self.counts = torch.arange(4.0)
        self.outside = [nn.Conv2d(3, 4, 1)]
        self.remember = remembering([])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.how(self, y)
        return y


def remembering(seen: list[object]) -> Callable[[object], None]:
    return lambda value: seen.append(value)


MARKS: dict[str, Callable[[Any, Tensor], object]] = {
    "item of a dict": lambda m, y: m.cache.update(h=y, new=y),
    "no item of a dict": lambda m, y: m.cache.clear(),
    "attribute that is a new dict": lambda m, y: setattr(m, "cache", {"h": y}),
    "order of a dict": lambda m, y: m.ordered.move_to_end("a"),
    "item of a list": lambda m, y: m.features.append(y),
    "member of a set": lambda m, y: m.names.add(y),
    "attribute of an object": lambda m, y: setattr(m.helper, "last", y),
    "new attribute of an object": lambda m, y: setattr(m.helper, "first", y),
    "deep in an object": lambda m, y: (m.helper.deep["list"][1].add(y), m.helper.deep["queue"].append(y)),
    "list in a slot": lambda m, y: m.slotted.seen.append(y),
    "attribute of the class": lambda m, y: setattr(Marking, "latest", y),
    "new attribute of the class": lambda m, y: setattr(Marking, "first", y),
    "list of the class": lambda m, y: m.everything.append(y),
    "list in a closure": lambda m, y: m.remember(y),
    "attribute of a layer": lambda m, y: setattr(m.conv, "output", y),
    "hook": lambda m, y: m.conv.register_forward_hook(lambda *_: None),
    "attribute of a module that is not registered": lambda m, y: setattr(m.outside[0], "output", y),
    "tensor that is no buffer": lambda m, y: m.counts.add_(1),
    "part of a tensor, twice": lambda m, y: (m.counts[1:].mul_(2), m.counts[:2].zero_()),
    "tensors as a list": lambda m, y: torch._foreach_add_([m.counts, m.counts[:2]], 1),
    "output of an operation": lambda m, y: torch.add(torch.ones(4), 1, out=m.counts),
    "tensor of another size": lambda m, y: m.counts.resize_(0),
    "tensor in inference mode": lambda m, y: count_in_inference_mode(m),
    "parameter": lambda m, y: m.outside[0].weight.data.zero_(),
}


def count_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        torch.zeros(2).add_(1)
        model.counts.add_(1)


def everything_in(item: Any) -> Any:
    """All that a model holds, deeply, with the identities of objects and copies of tensors, to be compared."""
    if isinstance(item, Tensor):
        return id(item), item.detach().tolist()
    if isinstance(item, dict):
        return id(item), [(key, everything_in(value)) for key, value in item.items()]
    if isinstance(item, (list, tuple, deque)):
        return id(item), [everything_in(value) for value in item]
    if isinstance(item, (nn.Module, Cache)):
        return id(item), everything_in(vars(item))
    if isinstance(item, Slotted):
        return id(item), everything_in(item.seen)
    if inspect.isfunction(item):
        return id(item), [everything_in(cell.cell_contents) for cell in item.__closure__ or ()]
    return id(item), sorted(map(repr, item)) if isinstance(item, set) else repr(item)


@pytest.mark.parametrize("how", MARKS.values(), ids=MARKS.keys())
@pytest.mark.parametrize("traceable", [True, False])
def test_tracing_leaves_no_marks_in_what_the_model_holds(how: Callable[[Any, Tensor], object], traceable: bool) -> None:
    def mark(model: Any, y: Tensor) -> None:
        how(model, y)
        if not traceable:
            bool(y.sum() > 0)

    model = Marking(mark)
    mark_of_class = dict(vars(Marking)), list(Marking.everything)
    held = everything_in(model)
    found = links(model, is_layer)
    assert everything_in(model) == held
    assert (dict(vars(Marking)), Marking.everything) == mark_of_class
    if traceable:
        assert found[model.conv].sources == [INPUT]
        assert not found[model.conv].guessed


def test_tracing_leaves_alone_what_it_does_not_change() -> None:
    """A dict of a class of its own is not written to, and a bounded cache, which relies on its inside, works on."""

    class Strict(dict):  # type: ignore[type-arg]
        def _refuse(self, *_: object, **__: object) -> None:
            raise AssertionError("written to")

        __setitem__ = clear = update = _refuse

    model = Marking(lambda m, y: [m.power(i) for i in range(3, 6)])
    model.strict = Strict(a=1)
    model.power = functools.lru_cache(maxsize=2)(lambda n: 2**n)
    assert [model.power(n) for n in (1, 2)] == [2, 4]
    links(model, is_layer)
    assert model.strict == {"a": 1}
    assert [model.power(n) for n in (1, 5, 2, 4, 1)] == [2, 32, 4, 16, 2]


def test_model_is_traced_as_in_training() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if self.training else x

    model = Auxiliary().eval()
    assert links(model, is_layer)[model.norm].sources == [model.conv]
    assert not links(model, is_layer)[model.norm].guessed
