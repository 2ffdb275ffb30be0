"""The steps of the GPU report about whole networks: compiled ahead, then forward, training step and memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu import kernels as gpu_kernels
from bench.gpu import nets as gpu_nets
from bench.gpu import timing as gpu_time
from bench.gpu.cases import Model, models
from bench.gpu.kernels import Options, Row
from tdeconv import convert_deconv
from tdeconv.schedule import every_step

BACKEND = {"triton": "triton", "torch": "torch", "reference": "reference"}
# A variant's outputs may be so many times as far from float32's as plain torch's in the same dtype, and a little more.
TIMES, LITTLE = 4.0, 0.02


def _model(name: str, smoke: bool) -> Model:
    return next(model for model in models(smoke, barrier=True) if model.name == name)


class Network:
    """One variant of a network, its input ``(N, 3, size, size)`` and targets ``(N,)``, in bfloat16 by autocast."""

    def __init__(self, what: Model, smoke: bool, variant: str = "", half: bool = True) -> None:
        self.method, self.how, *rest = (variant or what.variant).split()
        self.stale = "stale" in rest
        self.device, self.half = gpu_time.device(), half and not smoke  # the interpreter truncates to bfloat16
        torch.manual_seed(0)
        model, self.code = gpu_nets.build(what.network)
        if self.method != "conv_bn":
            model = convert_deconv(model, backend=BACKEND[self.method])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the variants are compared
        self.model = model.to(self.device, memory_format=torch.channels_last).train()
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        size = gpu_nets.SIZE.get(what.network, 224)
        generator = torch.Generator().manual_seed(1)
        x = F.interpolate(torch.randn(what.batch, 3, size // 2, size // 2, generator=generator), scale_factor=2)
        self.x = x.to(self.device).contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(10, (what.batch,), generator=generator).to(self.device)
        if self.stale:  # or its statistics would be where they start
            with torch.no_grad(), self._autocast():
                self.model(self.x)
        backend = "aot_eager" if smoke else "inductor"
        self.run = torch.compile(self.model, backend=backend) if self.how == "compiled" else self.model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def forward(self) -> Tensor:
        """In training, ready for backward."""
        with self._autocast(), every_step(self.model.modules(), fresh=not self.stale):
            return self.run(self.x)

    def step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(self.forward().float(), self.target).backward()
        self.optimiser.step()

    def kept(self) -> int | None:
        """Bytes that a forward keeps for backward; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.optimiser.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        loss = F.cross_entropy(self.forward().float(), self.target)
        bytes_ = torch.cuda.memory_allocated() - before
        del loss
        return bytes_


_oracles: dict[tuple[str, int, str], tuple[Tensor, float]] = {}


def _oracle(what: Model, smoke: bool) -> tuple[Tensor, float]:
    """Outputs in float32 on plain torch, and how far plain torch in bfloat16 is from them."""
    method = "conv_bn" if what.variant.startswith("conv_bn") else "torch"
    variant = f"{method} eager{' stale' if what.variant.endswith('stale') else ''}"
    key = (what.network, what.batch, variant)
    if key not in _oracles:
        exact, plain = (Network(what, smoke, variant, half).forward().detach().float() for half in (False, True))
        _oracles[key] = (exact, float((plain - exact).norm() / exact.norm()))
    return _oracles[key]


def _checked(network: Network, what: Model, smoke: bool) -> Row:
    """The outputs' relative error, and plain torch's: a deep network at its start makes much of little.

    Raises:
        ValueError: it is beyond what the dtype explains, or not a number.
    """
    exact, plain = _oracle(what, smoke)
    got = network.forward().detach().float()
    error = float((got - exact).norm() / exact.norm())
    if not error <= TIMES * plain + LITTLE:
        raise ValueError(f"wrong outputs: relative error {error:.2e}, plain torch in the same dtype has {plain:.2e}")
    return {"error_measured": error, "error_plain": plain}


@contextlib.contextmanager
def _ways(what: Model) -> Iterator[None]:
    with gpu_kernels._cooperative(what.variant.endswith("barrier")):
        yield


def step(unit: str, options: Options) -> Iterator[Row]:
    """Two rows: forward and training step."""
    what = _model(unit, options.smoke)
    torch._dynamo.reset()
    gc.collect()
    if gpu_time.device().type == "cuda":
        torch.cuda.empty_cache()
    with _ways(what):
        start = time.perf_counter()
        network = Network(what, options.smoke)
        about: dict[str, Any] = {"network": what.network, "batch": what.batch, "variant": what.variant}
        about |= {"code": network.code, "dtype": "bfloat16 autocast" if network.half else "float32"}
        about |= {"shape": list(network.x.shape), "layout": "channels_last"}
        about |= _checked(network, what, options.smoke)
        network.step()
        about["first_step_s"] = round(time.perf_counter() - start, 1)
        memory = {"kept_bytes": network.kept(), "peak_bytes": gpu_time.peak(network.step)}
        for kind, run in (("forward", network.forward), ("step", network.step)):
            yield {**about, "kind": kind, **memory, **gpu_time.steps(run)}


def compile_ahead(unit: str, options: Options) -> Iterator[Row]:
    """Fill the compilers' caches: of a network's graphs, or of the tuner's candidates. Nothing here is timed."""
    start = time.perf_counter()
    if unit.startswith("model "):
        what = _model(unit.removeprefix("model "), options.smoke)
        with _ways(what):
            Network(what, options.smoke).step()
    else:
        gpu_kernels.candidates(unit, options)
    yield {"seconds": round(time.perf_counter() - start, 1)}
