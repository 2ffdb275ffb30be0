"""torch.compile is a test axis: whole graphs, one of them for steady training, results as in eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

import tdeconv

OUTPUT, GRADIENT, BUFFER = 1e-4, 2e-3, 1e-3

LAYERS = {
    "conv": (lambda: tdeconv.FastDeconv(8, 6, 3, padding=1, block=4), (4, 8, 9, 7)),
    "strided": (lambda: tdeconv.FastDeconv(6, 4, (3, 2), stride=2, padding="valid", bias=False), (3, 6, 9, 8)),
    "same_reflect": (lambda: tdeconv.FastDeconv(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 8, 8)),
    "pointwise": (lambda: tdeconv.FastDeconv(12, 5, 1, block=4), (4, 12, 6, 6)),
    "depthwise": (lambda: tdeconv.FastDeconv(6, 6, 3, groups=6, n_iter=1), (3, 6, 8, 8)),
    "conv1d": (lambda: tdeconv.FastDeconv1d(4, 6, 3), (3, 4, 15)),
    "conv3d": (lambda: tdeconv.FastDeconv3d(2, 3, 2), (2, 2, 5, 4, 6)),
    "linear": (lambda: tdeconv.Delinear(12, 5, block=6), (20, 12)),
    "channels": (lambda: tdeconv.ChannelDeconv(4), (4, 10, 7, 7)),
    "reference": (lambda: tdeconv.FastDeconv(8, 6, 3, padding=1, block=4, backend="reference"), (4, 8, 9, 7)),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _compiled(layer: nn.Module, backend: str, **options: object) -> nn.Module:
    return torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend, **options)


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    difference = (actual - expected).norm() / expected.norm().clamp_min(1e-6)
    assert difference <= tolerance, f"differs by {difference:.1e}"


def _step(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), x.grad


def _compare(eager: nn.Module, compiled: nn.Module, x: torch.Tensor) -> None:
    (y, dx), (expected_y, expected_dx) = _step(compiled, x), _step(eager, x)
    assert y.stride() == expected_y.stride()
    _close(y, expected_y, OUTPUT)
    _close(dx, expected_dx, GRADIENT)
    for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        _close(mine.grad, theirs.grad, GRADIENT)
    for mine, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        _close(mine.double(), theirs.double(), BUFFER)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", LAYERS)
def test_training_is_one_whole_graph_equal_to_eager(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    compiled = _compiled(layer, "aot_eager")
    for _ in range(3):
        _compare(layer, compiled, torch.randn(shape) + 0.3)
    assert _graphs() == 1


def test_inductor_equals_eager():
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(8, 6, 3, padding=1, block=4)
    compiled = _compiled(layer, "inductor")
    for _ in range(2):
        _compare(layer, compiled, torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last))
    layer.eval(), compiled.eval()
    x = torch.randn(4, 8, 9, 9)
    _close(compiled(x), layer(x), OUTPUT)


def test_a_freezing_layer_has_a_graph_for_each_kind_of_step():
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(3, 4, 3, freeze=True, freeze_iter=2)
    compiled = _compiled(layer, "aot_eager")
    for _ in range(22):  # computes, freezes, computes again
        _compare(layer, compiled, torch.randn(3, 3, 7, 7))
    assert _graphs() == 2
    assert compiled.num_batches_tracked == 22


def test_the_batch_may_change_its_size():
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(4, 4, 3, padding=1)
    compiled = _compiled(layer, "aot_eager", dynamic=True)
    for n in (5, 6, 3, 9):  # not the channels: equal sizes share a symbol
        _compare(layer, compiled, torch.randn(n, 4, 8, 8))
    assert _graphs() == 1


def test_autocast_inside_a_graph():
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(4, 4, 3, padding=1)
    compiled = _compiled(layer, "aot_eager")
    x = torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    _close(y.float(), expected.float(), 1e-2)
    assert compiled.running_deconv.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_functions_are_whole_graphs(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, 7, 7), torch.randn(5, 6, 3, 3)

    def stages(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean, cov = tdeconv.patch_moments(x, 3, stride=3, block=3, backend=backend)
        deconv = tdeconv.inverse_sqrt(cov + 1e-5 * torch.eye(len(cov)), 5, backend=backend)
        return nn.functional.conv2d(x, *tdeconv.fold_deconv(weight, None, mean, deconv))

    _close(torch.compile(stages, fullgraph=True, backend="aot_eager")(x, weight), stages(x, weight), OUTPUT)
    assert _graphs() == 1
