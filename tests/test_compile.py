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


class Network(nn.Module):
    """Four layers, of which the first freezes, as ``convert_deconv`` makes it; the others checkpointed if asked."""

    def __init__(self, interval: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = tdeconv.FastDeconv(3, 4, 3, padding=1, freeze=True, freeze_iter=2, stats_interval=interval)
        self.rest = nn.Sequential(
            nn.ReLU(),
            tdeconv.FastDeconv(4, 4, 3, stride=2, groups=2, stats_interval=interval),
            tdeconv.ChannelDeconv(2, stats_interval=interval),
            nn.Flatten(),
            tdeconv.Delinear(36, 5, block=6, stats_interval=interval),
            nn.Tanh(),
        )
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if not self.checkpointed:
            return self.rest(x)
        contexts = tdeconv.checkpoint_contexts(self.rest)
        return torch.utils.checkpoint.checkpoint(self.rest, x, use_reentrant=False, context_fn=contexts)


def _train_network(model: nn.Module, compiled: nn.Module, steps: int, rate: float = 0.01) -> list[int]:
    """Steps of SGD on both, compared; how many graphs there were behind each."""
    optimisers = [torch.optim.SGD(m.parameters(), rate) for m in (model, compiled)]
    graphs = []
    for step in range(steps):
        _compare(model, compiled, torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
        for optimiser in optimisers:
            optimiser.step()
        graphs.append(_graphs())
    return graphs


@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_a_network_has_a_graph_for_each_kind_of_step(backend, checkpointed):
    """Fresh, all but the first layer fresh, stale: none that comes late, in steps that cross each other's rounds."""
    model = Network(checkpointed=checkpointed)
    graphs = _train_network(model, _compiled(model, backend), 50)
    assert graphs[-1] == graphs[29] <= 3
    assert model.first.num_batches_tracked == 50


@pytest.mark.slow
def test_a_network_in_the_mode_that_captures_cuda_graphs():
    """On a CPU, which has none, it compiles as usual."""
    model = Network()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode="reduce-overhead")
    assert _train_network(model, compiled, 30)[-1] <= 3


def test_an_interval_changed_between_steps_of_a_compiled_layer():
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(3, 4, 3, stats_interval=2)
    compiled = _compiled(layer, "aot_eager")
    for step in range(56):
        if step in (25, 40):
            layer.stats_interval = compiled.stats_interval = {25: 8, 40: 3}[step]
        _compare(layer, compiled, torch.randn(3, 3, 7, 7))
    assert compiled.num_batches_tracked == 56
    assert _graphs() <= 4  # a kind of step, and the fresh ones' momentum, which is of the interval


def test_a_copy_that_is_compiled_anew_needs_no_more_graphs_than_its_own():
    model = Network()
    compiled = _compiled(model, "aot_eager")
    first = _train_network(model, compiled, 30)[-1]
    assert _train_network(model, _compiled(model, "aot_eager"), 12)[-1] <= 2 * first


def test_compiled_and_eager_steps_in_turn_count_as_one():
    model = Network()
    mixed, run = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    run_mixed = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    for step in range(30):
        x = torch.randn(6, 3, 8, 8)
        _close((run_mixed if step % 3 else mixed)(x), run(x), OUTPUT)
    assert mixed.first.num_batches_tracked == model.first.num_batches_tracked == 30
    assert [p.fresh for p in mixed.first._places] == [p.fresh for p in model.first._places]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "backend"), [("conv", "torch"), ("conv", "reference"), ("channels", "torch")])
@pytest.mark.parametrize("together", [True, False], ids=["in one graph", "in a later call"])
def test_statistics_that_are_written_before_a_stale_steps_backward(name, backend, compiler, together):
    """The gradients are of the values that forward saw, not of what the buffers hold by then."""
    make, shape = LAYERS[name]
    layer = make()
    layer.backend, layer.stats_interval = backend, 2
    for _ in range(21):
        layer(torch.randn(shape) + 0.3)
    twin, gradients = copy.deepcopy(layer), []

    def stale_and_fresh(module, x):
        return module(x), module(later)

    x, later = torch.randn(shape).requires_grad_(), 3 * torch.randn(shape) + 1
    for module, compiles in ((layer, False), (twin, True)):
        run, both = module, stale_and_fresh
        if compiles:
            run, both = (torch.compile(f, fullgraph=True, backend=compiler) for f in (module, stale_and_fresh))
        y = both(module, x)[0] if together else stale_and_fresh(run, x)[0]
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    for expected, found in zip(*gradients, strict=True):
        _close(found, expected, GRADIENT)


def test_a_checkpoint_loaded_into_a_compiled_network():
    model = Network()
    with torch.no_grad():
        for _ in range(22):
            model(torch.randn(6, 3, 8, 8))
    plain = Network()
    other = torch.compile(plain, fullgraph=True, backend="aot_eager")
    _step(other, torch.randn(6, 3, 8, 8))
    plain.load_state_dict(model.state_dict())
    assert _train_network(model, other, 20)[-1] <= 3


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
