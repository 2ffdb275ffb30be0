"""Memory is counted exactly: every storage once, every allocation, the same again in every run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tdeconv
from tdeconv.bench import memory
from tdeconv.vision import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")


def _network(backend: str | None = None) -> nn.Module:
    """Every kind of layer: first, wide, depthwise, strided, dense."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(32, 10)),
    )
    return model if backend is None else tdeconv.convert_deconv(model, backend=backend)


# ---------------------------------------------------------------------------------------------- kept for backward


def test_each_storage_counts_once_without_parameters_and_output() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    conv = nn.Conv2d(3, 5, 3, bias=False)
    assert memory.forward_counted(conv, x)[1] == x.nbytes
    # the first tanh keeps its output, which is also the second convolution's input; the second keeps the module's own
    middle, pair = 2 * 5 * 6 * 6 * 4, nn.Sequential(conv, nn.Tanh(), nn.Conv2d(5, 7, 3), nn.Tanh())
    assert memory.forward_counted(pair, x)[1] == x.nbytes + middle
    assert memory.forward_counted(nn.ReLU(), x)[1] == 0


def test_a_networks_layers_add_up() -> None:
    # a dropout keeps no input
    model = nn.Sequential(*(m for m in _network("torch") if not isinstance(m, nn.Dropout))).train()
    x = torch.randn(4, 3, 12, 12, requires_grad=True)
    whole = memory.forward_counted(model, x)[1]
    total = 0
    for layer in model:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # what it keeps is its output, the next layer's input
        x, kept = memory.forward_counted(layer, x)
        total += kept
    # a pool keeps its input, the ReLU's output, and a convolution the pool's: each once in all
    assert total == whole


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.Softmax(1)], ids=lambda m: type(m).__name__
)
def test_the_meta_device_keeps_as_much(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    real = memory.forward_counted(layer, x)[1]
    assert memory.forward_counted(copy.deepcopy(layer).to("meta"), x.to("meta"))[1] == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference", None])
def test_shapes_alone_tell_what_a_network_keeps(backend: str | None, dtype: torch.dtype) -> None:
    model, shape = _network(backend), (4, 3, 12, 12)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # of a batch norm under autocast the shapes-only run believes the mean and the deviation to be bfloat16 too
    unseen = sum(2 * 2 * m.num_features for m in norms) if dtype == torch.bfloat16 else 0
    real = memory.model_saved_bytes(model, shape, dtype, device="cpu")
    assert memory.model_saved_bytes(model, shape, dtype) == real - unseen
    assert memory.model_saved_bytes(copy.deepcopy(model).to("meta"), shape, dtype) == real - unseen


def test_the_input_and_the_loss_count_too() -> None:
    linear, x, y = nn.Linear(5, 3), 7 * 5 * 4, 7 * 3 * 4
    assert memory.model_saved_bytes(linear, (7, 5), torch.float32) == x + y


def test_a_model_is_left_as_it_is() -> None:
    model = _network("torch").eval()
    model[0].train()
    before = copy.deepcopy(model.state_dict())
    for device in ("meta", "cpu"):
        memory.model_saved_bytes(model, (2, 3, 12, 12), torch.float32, device)
        assert [m.training for m in model] == [True] + [False] * (len(model) - 1)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())


def test_what_a_model_must_give() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(ValueError, match="model must return one tensor, Pair gave tuple"):
        memory.model_saved_bytes(Pair(), (2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be a floating one, got torch\.int64"):
        memory.model_saved_bytes(nn.Identity(), (2, 3), torch.int64)


def test_networks_keep_at_most_three_quarters() -> None:
    torchvision()
    rows = memory.network_memory(batches=(8, 64), dtypes=("float32",))
    assert len(rows) == 2 * 2 * 2
    saved = {(row["model"], row["batch"], row["implementation"]): row["saved_bytes"] for row in rows}
    assert rows[0].keys() == {"model", "batch", "size", "dtype", "implementation", "saved_bytes"}
    for model in ("vgg11", "resnet50"):
        for batch in (8, 64):
            assert saved[model, batch, "torch"] <= 0.75 * saved[model, batch, "conv_bn_relu"]


def test_networks_that_are_not_there() -> None:
    torchvision()
    with pytest.raises(ValueError, match="names of torchvision's models, got 'vgg111'"):
        memory.network_memory(models=["vgg111"])
    with pytest.raises(ValueError, match="dtypes must be among float32, bfloat16, got int8"):
        memory.network_memory(dtypes=["int8"])


# ------------------------------------------------------------------------------------------------- the allocator


def test_allocations_of_known_sizes() -> None:
    kept = []

    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(250)
        del a
        kept.extend([b, torch.empty(500)])

    assert memory.allocations(run) == memory.Allocations(3, 7000, 5000)


def test_what_was_there_before_does_not_count() -> None:
    held: list[torch.Tensor] = []

    def run() -> None:
        held.clear()
        held.append(torch.empty(250))
        held.append(torch.empty(250))

    for before in ([torch.empty(1000)], held):  # allocated outside, and inside an earlier call
        held = list(before)
        assert memory.allocations(run) == memory.Allocations(2, 2000, 2000)


def test_a_training_step_asks_for_the_same_every_time(capfd: pytest.CaptureFixture[str]) -> None:
    layer = tdeconv.FastDeconv(16, 24, 3, padding=1, backend="torch")
    x = torch.randn(4, 16, 9, 9, requires_grad=True)

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).sum().backward()

    step()
    repeats = {memory.allocations(step) for _ in range(10)}
    assert len(repeats) == 1
    assert repeats.pop().count > 20
    assert capfd.readouterr().err == ""


def test_an_error_inside_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        memory.allocations(fail)
    assert memory.allocations(lambda: torch.empty(10)).count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_allocations_on_a_gpu() -> None:
    x = torch.ones(1 << 20, device="cuda")
    memory.allocations(lambda: x + 1, "cuda")
    assert memory.allocations(lambda: x + 1, "cuda") == memory.Allocations(1, 4 << 20, 4 << 20)
