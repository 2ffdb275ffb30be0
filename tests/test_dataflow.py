"""What feeds what: traced, traced in part, guessed from the order of modules, and never at the model's expense."""

from __future__ import annotations

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
