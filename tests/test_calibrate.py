"""calibrate_deconv: the scale of every layer, set by a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers import assert_close, randn
from tdeconv import Delinear, FastDeconv, calibrate_deconv

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [FastDeconv(3, 8, 3, freeze=True), nn.ReLU(), nn.Dropout(0.5), FastDeconv(8, 6, 3, bias=False)]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(6), FastDeconv(6, 6, 3, groups=6), nn.Flatten(), Delinear(96, 4)
    ).double()


def images() -> Tensor:
    return randn(9, 3, 10, 10) * 4 + 2


def variations(model: nn.Module, x: Tensor) -> list[float]:
    """The root mean square of what each convolution's output differs from its bias."""
    found: list[float] = []

    def note(layer: Any, _: Any, y: Tensor) -> None:
        bias = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
        found.append(float((y - bias).detach().square().mean().sqrt()))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, FastDeconv)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def without_dropout(model: nn.Sequential) -> nn.Sequential:
    model[2].p = 0.0
    return model


def test_every_convolution_varies_by_one() -> None:
    model, x = without_dropout(net()), images()
    before = variations(copy.deepcopy(model), x)
    assert calibrate_deconv(model, x) is model
    assert max(abs(v - 1) for v in before) > 0.1
    assert_close(torch.tensor(variations(copy.deepcopy(model), x)), torch.ones(3), 1e-6)


def test_one_number_for_a_layer_and_nothing_for_linear_layers() -> None:
    model, x = net(), images()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibrate_deconv(model, x)
    for name, p in model.named_parameters():
        if name in ("0.weight", "3.weight", "5.weight"):
            ratio = p.detach() / before[name]
            assert_close(ratio, torch.full_like(ratio, float(ratio.flatten()[0])), 1e-12)
            assert (ratio != 1).all()
        else:
            assert torch.equal(p, before[name]), name


def test_a_second_time_changes_nothing() -> None:
    model, x = without_dropout(net()), images()
    calibrate_deconv(model, x)
    weights = [p.detach().clone() for p in model.parameters()]
    calibrate_deconv(model, x)
    for a, e in zip(model.parameters(), weights, strict=True):
        assert_close(a, e, 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_everything_but_weights_stays(training: bool) -> None:
    model = net().train(training)
    model[4].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    calibrate_deconv(model, images())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the statistics
def test_weights_of_zero_and_batches_that_say_nothing_change_nothing() -> None:
    model = net()
    nn.init.zeros_(model[3].weight)
    calibrate_deconv(model, images())
    assert not model[3].weight.any()
    model = without_dropout(net())
    weights = [p.detach().clone() for p in model.parameters()]
    for value in (torch.nan, 1.0):
        calibrate_deconv(model, torch.full((4, 3, 10, 10), value).double())
    for a, e in zip(model.parameters(), weights, strict=True):
        assert torch.equal(a, e)


def test_layer_called_twice_is_scaled_by_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = FastDeconv(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(5 * self.conv(x).relu() + 1)

    torch.manual_seed(0)
    model, x = Twice().double(), randn(6, 4, 7, 7)
    calibrate_deconv(model, x)
    assert abs(variations(model, x)[0] - 1) < 1e-6


def test_batches_as_loaders_give_them() -> None:
    x = images()
    expected = calibrate_deconv(net(), x)[0].weight

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, *, image: Tensor) -> Tensor:
            return self.net(image)

    assert torch.equal(calibrate_deconv(net(), [x, torch.zeros(9)])[0].weight, expected)
    assert torch.equal(calibrate_deconv(Named(), {"image": x}).net[0].weight, expected)
    with pytest.raises(TypeError, match=r"a batch must be a tensor, .* got str"):
        calibrate_deconv(net(), "images")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        calibrate_deconv(None, x)


def test_what_fails_leaves_the_model_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        calibrate_deconv(model, randn(9, 3, 6, 6))  # too small for the linear layer: the convolutions have been called
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks for m in model.modules())


def test_shared_weight_is_scaled_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FastDeconv(4, 4, 3, padding=1), nn.ReLU(), FastDeconv(4, 4, 3, padding=1)).double()
    model[2].weight = model[0].weight
    x = randn(6, 4, 7, 7)
    calibrate_deconv(model, x)
    weight = model[0].weight.detach().clone()
    assert abs(variations(copy.deepcopy(model), x)[0] - 1) < 1e-6
    calibrate_deconv(model, x)
    assert_close(model[0].weight, weight, 1e-6)


def test_weight_that_is_computed_is_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    prune.l1_unstructured(model[3], "weight", 0.5)
    with pytest.raises(ValueError, match=r"that of its layer '3' is computed from others"):
        calibrate_deconv(model, images())
    assert torch.equal(model[0].weight, before["0.weight"])


def test_buffers_that_are_set_anew_or_share_memory_stay() -> None:
    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(FastDeconv(3, 4, 3))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mask", torch.ones(1, 1).expand(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x) + self.mask.sum()

        def train(self, mode: bool = True) -> None:  # and returns nothing
            super().train(mode)

    model = Counting().double()
    calls = model.calls
    calibrate_deconv(model, images())
    assert model.calls is calls
    assert calls == 0
