"""torch.func and torch.autograd.forward_ad: what works, and what says clearly that it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from helpers import assert_close
from tdeconv import (
    ChannelDeconv,
    Delinear,
    FastDeconv,
    FastDeconv1d,
    FastDeconv3d,
    inverse_sqrt,
    patch_moments,
    use_backend,
)
from tdeconv.distributed import StatisticsGroup

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


# ------------------------------------------------------------------------------------- every transform in evaluation

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: FastDeconv1d(3, 4, 3), (2, 3, 7)),
    "2d": (lambda: FastDeconv(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "3d": (lambda: FastDeconv3d(3, 4, 2), (2, 3, 3, 3, 3)),
    "1x1": (lambda: FastDeconv(3, 4, 1, freeze=True), (2, 3, 4, 4)),
    "groups": (lambda: FastDeconv(4, 4, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: FastDeconv(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "blocks": (lambda: FastDeconv(4, 4, 3, block=2, stride=2), (2, 4, 5, 5)),
    "circular": (lambda: FastDeconv(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "linear": (lambda: Delinear(6, 4, block=3), (5, 6)),
    "channels": (lambda: ChannelDeconv(4), (3, 6, 2, 2)),
    "channels of rows": (lambda: ChannelDeconv(3), (3, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
last = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = [
    (name, layout) for name, (_, s) in LAYERS.items() for layout in ("contiguous", "last")[: 1 + (len(s) in last)]
]
every_layout = pytest.mark.parametrize(("name", "layout"), LAYOUTS)


def evaluated(name: str, layout: str = "contiguous", seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The layer in evaluation mode, with statistics of a batch, and three batches, each in the layout."""
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer = make().double()
    layer(torch.randn(shape, dtype=torch.float64) + 1)
    xs = torch.randn(3, *shape, dtype=torch.float64)
    if layout == "last":
        xs = xs.movedim(2, -1).contiguous().movedim(-1, 2)
        assert xs[0].is_contiguous(memory_format=last[len(shape)])
    return layer.eval(), xs


def squares(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).square().sum()


def backward(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(squares(layer)(x), x)[0]


@every_layout
def test_vmap_is_a_loop(name: str, layout: str) -> None:
    layer, xs = evaluated(name, layout)
    each = torch.stack([layer(x) for x in xs])
    assert_close(vmap(layer)(xs), each, 1e-12)
    assert_close(vmap(layer, in_dims=1, out_dims=1)(xs.transpose(0, 1)), each.transpose(0, 1), 1e-12)
    assert_close(vmap(vmap(layer))(torch.stack([xs, xs.flip(0)])), torch.stack([each, each.flip(0)]), 1e-12)


@every_layout
def test_gradients_one_by_one_are_a_loop(name: str, layout: str) -> None:
    layer, xs = evaluated(name, layout)
    each = torch.stack([backward(layer, x) for x in xs])
    assert_close(grad(squares(layer))(xs[0]), each[0], 1e-12)
    assert_close(vmap(grad(squares(layer)))(xs), each, 1e-12)


@every_layout
def test_jacobians_and_the_hessian_are_backwards(name: str, layout: str) -> None:
    layer, xs = evaluated(name, layout)
    x, along = xs[0], xs[1]
    jacobian = torch.autograd.functional.jacobian(layer, x)
    assert_close(jacrev(layer)(x), jacobian, 1e-12)
    assert_close(jacfwd(layer)(x), jacobian, 1e-12)
    assert_close(hessian(squares(layer))(x), torch.autograd.functional.hessian(squares(layer), x), 1e-12)
    tangent = torch.tensordot(jacobian, along, x.ndim)
    assert_close(jvp(layer, (x,), (along,))[1], tangent, 1e-12)
    assert_close(vmap(lambda t: jvp(layer, (x,), (t,))[1])(xs)[1], tangent, 1e-12)


@every_layer
def test_an_ensemble_of_layers_and_statistics_is_a_loop(name: str) -> None:
    layers, xs = [evaluated(name, seed=seed)[0] for seed in range(3)], evaluated(name)[1]
    parameters, buffers = stack_module_state(layers)

    def call(parameters: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    each = torch.stack([layer(x) for layer, x in zip(layers, xs, strict=True)])
    assert_close(vmap(call)(parameters, buffers, xs), each, 1e-12)
    shared = torch.stack([layer(xs[0]) for layer in layers])
    assert_close(vmap(call, in_dims=(0, 0, None))(parameters, buffers, xs[0]), shared, 1e-12)
    gradients = vmap(grad(lambda x, p, b: call(p, b, x).square().sum()))(xs, parameters, buffers)
    assert_close(gradients, torch.stack([backward(layer, x) for layer, x in zip(layers, xs, strict=True)]), 1e-12)


# -------------------------------------------------------------------------------------------------------- forward mode


def difference_quotient(f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    """A derivative along a direction, wrong in the tenth digit or so: by ``h**4`` and by rounding over ``h``."""
    h = 1e-3
    with torch.no_grad():
        near, far = f(x + h * along) - f(x - h * along), f(x + 2 * h * along) - f(x - 2 * h * along)
    return (8 * near - far) / (12 * h)


def tangent_of(f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, along))).tangent


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_tangents_of_dual_tensors_are_difference_quotients(name: str, training: bool, wanted: bool) -> None:
    """Without a gradient that is ``wanted``, torch drops the tangents of an operator that has no rule for them."""
    layer, xs = evaluated(name)
    layer.train(training).requires_grad_(wanted)
    assert_close(tangent_of(layer, xs[0], xs[1]), difference_quotient(layer, xs[0], xs[1]), 1e-7)


def test_tangents_of_weights() -> None:
    layer, xs = evaluated("2d")
    layer.train()
    weight, along = layer.weight.detach(), torch.randn_like(layer.weight)

    def of_weight(weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (xs[0],))

    assert_close(tangent_of(of_weight, weight, along), difference_quotient(of_weight, weight, along), 1e-7)


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_tangents_and_maps_of_the_stages(method: str) -> None:
    torch.manual_seed(0)
    x, along = torch.randn(2, 8, 2, 6, 6, dtype=torch.float64)

    def moments(x: Tensor) -> Tensor:
        return torch.cat([m.flatten() for m in patch_moments(x, 2)])

    def root(cov: Tensor) -> Tensor:
        return inverse_sqrt(cov, 7, method=method)

    # one with eigenvalues that repeat, where the derivatives of eigenvectors do not exist
    covs = torch.stack([patch_moments(x, 2)[1], torch.eye(8, dtype=torch.float64)])
    towards = torch.stack([patch_moments(along, 2)[1]] * 2)
    for function, at, direction in ((moments, x, along), (root, covs, towards)):
        expected = difference_quotient(function, at, direction)
        assert_close(tangent_of(function, at, direction), expected, 1e-7)
        assert_close(jvp(function, (at,), (direction,))[1], expected, 1e-7)
        assert_close(vmap(function)(torch.stack([at, 2 * at]))[0], function(at), 1e-12)
    assert_close(jacfwd(root)(covs), jacrev(root)(covs), 1e-12)


def test_a_fast_backend_asked_for_by_name_says_what_to_do_in_forward_mode() -> None:
    layer, xs = evaluated("2d")
    layer.backend = "torch"
    assert_close(tangent_of(layer, xs[0], xs[1]), difference_quotient(layer, xs[0], xs[1]), 1e-7)
    with pytest.raises(RuntimeError, match=r"forward_ad cannot go through backend 'torch'.*backend='reference'"):
        tangent_of(layer.train(), xs[0], xs[1])


def test_a_compiled_function_keeps_its_tangents() -> None:
    """Also where its graph was compiled outside: with the fast operator, which has no tangents."""
    torch.manual_seed(0)
    x, along = torch.randn(2, 4, 3, 7, 7, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return inverse_sqrt(patch_moments(x, 2)[1]).square().sum()

    expected = difference_quotient(loss, x, along)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), loss(x), 1e-12)
    assert_close(tangent_of(compiled, x, along), expected, 1e-7)
    inside = torch.compile(lambda x, along: jvp(loss, (x,), (along,))[1], backend="aot_eager", fullgraph=True)
    assert_close(inside(x, along), expected, 1e-7)


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_statistics_of_many_processes_say_that_no_transform_goes_through_them(name: str) -> None:
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=fake_pg.FakeStore())
    message = r"cannot go through statistics of several processes.*model.eval\(\)"
    try:
        layer, xs = evaluated(name)
        layer.process_group = StatisticsGroup.of(None)
        assert tangent_of(layer, xs[0], xs[1]) is not None
        layer.train()
        with pytest.raises(RuntimeError, match=message):
            grad(squares(layer))(xs[0])
        with pytest.raises(RuntimeError, match=message):
            tangent_of(layer, xs[0], xs[1])
    finally:
        torch.distributed.destroy_process_group()
