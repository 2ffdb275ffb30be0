"""What training scripts do with a model: mixed precision, averaging of weights, checkpoints, CUDA graphs."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from helpers import all_finite, assert_close, difference
from tdeconv import ChannelDeconv, Delinear, FastDeconv

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = [torch.bfloat16, torch.float16]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        FastDeconv(3, 8, 3, padding=1, n_iter=10, freeze=True, freeze_iter=2),
        nn.ReLU(),
        FastDeconv(8, 8, 3, padding=1, block=4),
        ChannelDeconv(3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        Delinear(32, 5, block=16),
    )


def images(n: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_autocast_of_inputs_far_from_zero(device: str, dtype: torch.dtype, compiler: str | None) -> None:
    """Mean 100, spread 1: float16 holds three digits of it, which whitening turns into nearly one."""
    torch.manual_seed(0)
    layer = FastDeconv(4, 8, 3, padding=1, sampling_stride=1).to(device)
    exact, x = copy.deepcopy(layer), images().repeat(1, 2, 1, 1)[:, :4].to(device) + 100
    x = x.to(dtype).float()  # what arrives, not what was lost before
    g = torch.randn(16, 8, 12, 12, device=device)
    run = torch.compile(layer, fullgraph=True, backend=compiler) if compiler else layer
    with torch.autocast(device, dtype):
        y = run(x)
    assert y.dtype == dtype
    y.float().backward(g)
    expected = exact(x)
    expected.backward(g)
    assert all_finite([y, layer.weight.grad, layer.bias.grad, layer.running_deconv])
    close = 0.05 if dtype == torch.float16 else 0.3  # bfloat16's spacing at 100 is half of the spread
    assert difference(y, expected) <= close
    assert_close(layer.running_deconv, exact.running_deconv, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler_skips_a_step_that_overflowed_and_goes_on(device: str) -> None:
    model = net().to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**4, growth_interval=100)
    for step in range(4):
        x = images(seed=step).to(device)
        if step == 1:
            x[0, 0, 0, 0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast(device, torch.float16), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the statistics met Inf
            loss = model(x).float().square().mean()
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step != 1)
        assert all_finite([*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())])


# ------------------------------------------------------------------------------------------------ averages of weights


def test_moving_average_of_weights_and_statistics() -> None:
    """``use_buffers``: the statistics are averaged along with the weights they belong to."""
    model = net()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(4):
        optimiser.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimiser.step()
        ema.update_parameters(model)
    ema.eval()
    assert all_finite([ema(images())])
    twin = net().eval()
    twin.load_state_dict(ema.module.state_dict())
    assert torch.equal(twin(images()), ema(images()))


def test_averaged_weights_take_new_statistics_by_a_pass_over_the_data() -> None:
    """torch's ``update_bn`` knows batch norms only: the deconvolution layers are reset by hand, and a pass does it."""
    model = net()
    swa = AveragedModel(model)
    swa.update_parameters(model)
    for module in swa.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    before = [b.clone() for b in swa.buffers()]
    swa.train()
    with torch.no_grad():
        for step in range(3):
            swa(images(seed=step))
    assert any(not torch.equal(a, b) for a, b in zip(before, swa.buffers(), strict=True))
    update_bn([images()], swa)  # does nothing, and no harm
    assert all_finite([swa.eval()(images())])


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_resumes_bitwise() -> None:
    """Model and optimiser through a file read with ``weights_only=True``, the freezing counter included."""

    def step(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
        optimiser.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimiser.step()

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    model, optimiser = start()
    for seed in range(3):
        step(model, optimiser, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, file)
    step(model, optimiser, 3)

    other, its_optimiser = start()
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other.load_state_dict(checkpoint["model"])
    its_optimiser.load_state_dict(checkpoint["optimiser"])
    step(other, its_optimiser, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_network_train_alike(how: Any) -> None:
    model = net()
    model(images()).square().mean().backward()
    twin = how(model)
    assert torch.equal(model(images(seed=2)), twin(images(seed=2)))
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_reduce_overhead_equals_eager(device: str) -> None:
    """CUDA graphs on a GPU; on a CPU the mode compiles as usual."""
    torch._dynamo.reset()
    model = net().to(device)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        results = []
        for m in (model, compiled):
            x = images(seed=seed).to(device).requires_grad_()
            m.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            y = m(x)
            y.square().mean().backward()
            results.append([t.detach().clone() for t in (y, x.grad, *(p.grad for p in m.parameters()))])
        assert_close(tuple(results[1][:1]), tuple(results[0][:1]), 1e-4)
        assert_close(tuple(results[1][1:]), tuple(results[0][1:]), 2e-3)
    assert_close(tuple(b.double() for b in compiled.buffers()), tuple(b.double() for b in model.buffers()), 1e-3)
