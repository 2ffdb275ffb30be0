"""torch.func: what works, and what says clearly that it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from helpers import assert_close
from tdeconv import ChannelDeconv, Delinear, FastDeconv, inverse_sqrt, patch_moments, use_backend

Parameters = dict[str, Tensor]


def net(training: bool, backend: str | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    conv, linear = FastDeconv(3, 4, 3, backend=backend), Delinear(16, 5, block=16, backend=backend)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear)
    return model.train(training).double()


def loss_of(model: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    """A pure function: the buffers it updates are copies."""

    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, (parameters, buffers), (x,)).square().mean()

    return loss


def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_grad_equals_backward(training: bool) -> None:
    model, x = net(training), images()
    parameters = dict(model.named_parameters())
    gradients = grad(loss_of(model))(parameters, x)
    loss_of(model)(parameters, x).backward()
    assert_close(tuple(gradients.values()), tuple(p.grad for p in parameters.values()), 1e-10)


def test_per_sample_gradients_and_directions_in_evaluation() -> None:
    model, x = net(training=False), images()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    one = grad(loss_of(model))(parameters, x[3:4])
    assert_close(tuple(g[3] for g in each.values()), tuple(one.values()), 1e-10)
    y, along = jvp(lambda x: model(x), (x,), (x,))
    assert y.shape == along.shape == (12, 5)


def test_ensemble_of_parameters_in_evaluation() -> None:
    model, x = net(training=False), images()
    parameters = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in model.named_parameters()}
    losses = vmap(loss_of(model), in_dims=(0, None))(parameters, x)
    assert_close(losses[0], loss_of(model)({name: p[0] for name, p in parameters.items()}, x), 1e-10)


def test_stages_go_through_grad() -> None:
    def loss(x: Tensor) -> Tensor:
        mean, cov = patch_moments(x, 3, stride=2)
        return inverse_sqrt(cov + torch.eye(27, dtype=x.dtype)).square().sum() + mean.square().sum()

    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert_close(grad(loss)(x.detach()), expected, 1e-10)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_fast_backend_asked_for_by_name_says_what_to_do(how: str) -> None:
    model, x = net(training=True, backend="torch" if how == "argument" else None), images()
    message = "cannot go through backend 'torch'.*backend='reference' or 'auto'"
    with use_backend("torch" if how == "context" else "auto"), pytest.raises(RuntimeError, match=message):
        grad(loss_of(model))(dict(model.named_parameters()), x)


@pytest.mark.parametrize("make", [lambda: FastDeconv(3, 4, 3), lambda: ChannelDeconv(2)])
def test_vmap_in_training_says_what_to_do(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"torch.vmap cannot go through .* in training mode.*model.eval\(\)"):
        vmap(make())(torch.randn(2, 4, 3, 8, 8))
