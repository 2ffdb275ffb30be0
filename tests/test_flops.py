"""torch.utils.flop_counter over deconvolution layers: the fast backends count as the reference does, of whose products
the counter knows by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tdeconv
from cases import CASES, Case
from tdeconv import ChannelDeconv, Delinear, FastDeconv


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """FLOPs by module, of all operators together."""
    with FlopCounterMode(display=False) as counter:
        work()
    return {module: sum(of.values()) for module, of in counter.get_flop_counts().items()}


def forward_and_backward(work: Callable[[], Tensor]) -> list[int]:
    output: list[Tensor] = []
    forward = counted(lambda: output.append(work()))["Global"]
    return [forward, counted(lambda: output[0].sum().backward()).get("Global", 0)]


def running_statistics(case: Case) -> tuple[Tensor, Tensor]:
    groups, d = case.geo.groups, case.geo.features
    return torch.zeros(groups * d), torch.eye(d).repeat(groups, 1, 1) if groups > 1 else torch.eye(d)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("need_x", [True, False], ids=["input_gradient", "weights_only"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_counts_as_the_reference(case: Case, need_x: bool, stale: bool) -> None:
    def step(backend: str) -> Tensor:
        x, weight, bias = case.tensors(torch.float32)
        layer = tdeconv.fast_deconv if case.rank else tdeconv.delinear
        options = {**case.options(), "training": True, "backend": backend, "stale": stale}
        return layer(x.requires_grad_(need_x), weight.requires_grad_(), bias, *running_statistics(case), **options)

    assert forward_and_backward(lambda: step("torch")) == forward_and_backward(lambda: step("reference"))


LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "one step": (lambda **how: FastDeconv(3, 4, 3, n_iter=1, **how), (4, 3, 8, 8)),
    "many steps": (lambda **how: FastDeconv(3, 4, 3, n_iter=15, **how), (4, 3, 8, 8)),
    "without a batch axis": (lambda **how: FastDeconv(3, 4, 3, **how), (3, 8, 8)),
    "padded before": (lambda **how: FastDeconv(3, 4, 4, padding="same", padding_mode="reflect", **how), (3, 3, 8, 8)),
    "freezing": (lambda **how: FastDeconv(3, 4, 3, freeze=True, freeze_iter=1, **how), (4, 3, 8, 8)),
    "rows of a sequence": (lambda **how: Delinear(6, 5, **how), (3, 7, 6)),
    "channels alone": (lambda **how: ChannelDeconv(4, **how), (5, 6, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_counts_as_the_reference(name: str) -> None:
    """Three steps, of which a freezing layer's third is frozen, and an evaluation."""
    make, shape = LAYERS[name]
    found = {}
    for backend in ("torch", "reference"):
        layer, x = make(backend=backend), torch.randn(shape, requires_grad=True)
        steps = [forward_and_backward(lambda layer=layer, x=x: layer(x)) for _ in range(3)]
        layer.eval()
        found[backend] = [*steps, forward_and_backward(lambda layer=layer, x=x: layer(x))]
    assert found["torch"] == found["reference"]
    assert min(map(min, found["torch"])) > 0


@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_single_stages_count_as_the_reference(n_iter: int) -> None:
    def work(backend: str) -> Callable[[], None]:
        def run() -> None:
            x = torch.randn(3, 6, 9, 9, requires_grad=True)
            _, cov = tdeconv.patch_moments(x, 3, stride=2, groups=2, backend=backend)
            root = tdeconv.inverse_sqrt(cov + torch.eye(27), n_iter, backend=backend)
            root.sum().backward()

        return run

    assert counted(work("torch")) == counted(work("reference"))


def test_modules_have_their_share() -> None:
    model = nn.Sequential(FastDeconv(3, 8, 3), nn.ReLU(), nn.Flatten(), Delinear(8 * 36, 5))
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    found = counted(lambda: model(x).sum().backward())
    assert min(found["Sequential.0"], found["Sequential.3"]) > 0
    assert found["Sequential.0"] + found["Sequential.3"] == found["Global"]


@pytest.mark.parametrize("first", ["tdeconv", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = f"""
import {first}
import sys, torch, tdeconv
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    tdeconv.FastDeconv(3, 8, 3, backend="torch")(torch.randn(2, 3, 8, 8))
print(counter.get_total_flops() > 0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
