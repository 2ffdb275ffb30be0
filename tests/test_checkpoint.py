"""Gradient checkpointing: gradients, statistics and step counters as without it, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import tdeconv
from helpers import assert_close, randn
from tdeconv import ChannelDeconv, Delinear, FastDeconv
from tdeconv.checkpoint import checkpoint_contexts

BACKENDS = ("torch", "reference")
Forward = Callable[[nn.Module, Tensor], Tensor]


def _block(backend: str = "torch", freeze: bool = True) -> nn.Sequential:
    """Its first layer takes statistics in three of every twenty steps: a few steps cross the end of that phase."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"backend": backend, "dtype": torch.float64}
    return nn.Sequential(
        FastDeconv(3, 6, 3, padding=1, freeze=freeze, freeze_iter=2, **kind),
        nn.ReLU(),
        ChannelDeconv(4, **kind),
        FastDeconv(6, 8, 3, groups=2, **kind),
        nn.Flatten(),
        Delinear(128, 4, block=16, **kind),
        nn.Tanh(),  # something to recompute behind the last layer: or a recomputation ends before it
    )


def _plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def _counted_once(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts(block))


class _Early(nn.Module):
    """Checkpoints a block with contexts made when it was, as a model does in its ``__init__``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.contexts = checkpoint_contexts(block)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, context_fn=self.contexts)


def _train(block: nn.Module, forward: Forward, forwards_per_backward: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Four backward passes: the gradients summed over them, input's first; the buffers at the end."""
    xs = [randn(5, 3, 6, 6, seed=i).requires_grad_() for i in range(4 * forwards_per_backward)]
    for i in range(0, len(xs), forwards_per_backward):
        outputs = [forward(block, x) for x in xs[i : i + forwards_per_backward]]
        torch.stack([(y * randn(5, 4, seed=9)).sum() for y in outputs]).sum().backward()
    grads = [torch.stack([x.grad for x in xs]), *(p.grad for p in block.parameters())]
    return grads, [b.clone() for b in block.buffers()]


def _assert_equal(actual: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forwards", [1, 3])
def test_as_without_checkpointing(backend: str, forwards: int) -> None:
    plain = _train(_block(backend), _plain, forwards)
    _assert_equal(_train(_block(backend), _counted_once, forwards), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_one_forward_a_backward_needs_no_contexts(backend: str, reentrant: bool) -> None:
    """Across the ends of frozen phases and stale steps: a recomputation is no step, and of its forward's kind."""

    def bare(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    blocks = [_block(backend), _block(backend)]
    for block in blocks:
        _every_other_step(block)
    for _ in range(7):
        _assert_equal(_train(blocks[1], bare), _train(blocks[0], _plain))
    assert blocks[0][0].num_batches_tracked == blocks[1][0].num_batches_tracked == 28


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_forwards_a_backward_with_stale_steps(backend: str) -> None:
    """Why the contexts exist: the first forward's step may be stale where the last one's is not."""
    blocks = [_block(backend), _block(backend)]
    for block in blocks:
        _every_other_step(block)
    for _ in range(4):
        _assert_equal(_train(blocks[1], _counted_once, 3), _train(blocks[0], _plain, 3))


def _every_other_step(block: nn.Module) -> None:
    for layer in block:
        if isinstance(layer, (FastDeconv, ChannelDeconv, Delinear)):
            layer.stats_interval = 2


def test_evaluation_and_no_grad_change_nothing() -> None:
    block = _block()
    _train(block, _plain)
    block.eval()
    before = copy.deepcopy(block.state_dict())
    x = randn(2, 3, 6, 6).requires_grad_()
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert_close(torch.autograd.grad(_counted_once(block, x).sum(), x)[0], expected, 1e-12)
    with torch.no_grad():
        assert torch.equal(_counted_once(block, x), block(x))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_two_backwards_through_one_forward() -> None:
    """With retain_graph every backward recomputes, and each time the statistics are left alone."""
    plain, block = _block(), _block()
    x = randn(3, 3, 6, 6)
    for module, forward in ((plain, _plain), (block, _counted_once)):
        loss = forward(module, x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close([p.grad for p in block.parameters()], [p.grad for p in plain.parameters()], 1e-12)
    assert_close(list(block.buffers()), list(plain.buffers()), 1e-12)


def test_nested() -> None:
    def nested(block: nn.Sequential, x: Tensor) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            return block[3:](_counted_once(block[:3], x))

        return checkpoint(outer, x, use_reentrant=False, context_fn=checkpoint_contexts(block))

    _assert_equal(_train(_block(), nested), _train(_block(), _plain))


def _in_float32() -> nn.Module:
    return _Early(_block().float()).double()


def _replaced_when_loaded() -> nn.Module:
    model = _Early(_block().float())
    model.load_state_dict({f"block.{name}": value for name, value in _block().state_dict().items()}, assign=True)
    return model


def _on_meta() -> nn.Module:
    model = _Early(_block().to("meta")).to_empty(device="cpu")
    model.load_state_dict({f"block.{name}": value for name, value in _block().state_dict().items()})
    return model


def _before_a_copy() -> nn.Module:
    return copy.deepcopy(_Early(_block()))


@pytest.mark.parametrize(
    "make", [_in_float32, _replaced_when_loaded, _on_meta, _before_a_copy], ids=lambda f: f.__name__
)
def test_contexts_made_before_the_buffers_of_today(make: Callable[[], nn.Module]) -> None:
    """The gradients and buffers of the same layers without checkpointing, in float64."""
    model, plain = make(), _block()
    plain.load_state_dict(model.block.state_dict())
    assert all(p.dtype == torch.float64 for p in model.parameters())
    _assert_equal(_train(model, _plain), _train(plain, _plain))


def test_a_model_converted_after_its_contexts_were_made() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2), nn.Flatten()]
    model = tdeconv.convert_deconv(
        _Early(nn.Sequential(*layers, nn.Linear(8, 4), nn.Tanh())).double(), freeze_first=True
    )
    plain = copy.deepcopy(model.block)
    _assert_equal(_train(model, _plain), _train(plain, _plain))


def test_an_error_in_a_recomputation_leaves_the_buffers() -> None:
    """The hook fails only the second time, in the recomputation."""
    block, calls = _block(), []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("in the recomputation")

    block[4].register_forward_hook(fail)
    loss = _counted_once(block, randn(3, 3, 6, 6)).sum()
    before = [b.clone() for b in block.buffers()]
    with pytest.raises(RuntimeError, match="in the recomputation"):
        loss.backward()
    assert all(torch.equal(b, a) for b, a in zip(block.buffers(), before, strict=True))


@pytest.mark.parametrize("forwards", [1, 2])
def test_compiled_block_checkpointed(forwards: int) -> None:
    plain = _train(_block(), _plain, forwards)
    compiled = torch.compile(_block(), fullgraph=True, backend="aot_eager")
    _assert_equal(_train(compiled, _counted_once, forwards), plain)


@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpoint_within_compile(forwards: int) -> None:
    """The same call inside a compiled function, across the end of a frozen phase."""
    plain = _train(_block(), _plain, forwards)
    compiled = torch.compile(_counted_once, fullgraph=True, backend="aot_eager")
    _assert_equal(_train(_block(), compiled, forwards), plain)


@pytest.mark.parametrize("forwards", [1, 2])
def test_contexts_made_outside_of_the_compiled_function(forwards: int) -> None:
    plain = _train(_block(), _plain, forwards)
    compiled = torch.compile(_Early(_block()), fullgraph=True, backend="aot_eager")
    _assert_equal(_train(compiled, _plain, forwards), plain)


def test_models_of_one_kind_share_a_compiled_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = _block(freeze=False)

        def forward(self, x: Tensor) -> Tensor:
            return _counted_once(self.block, x)

    torch.compiler.reset()
    counter = CompileCounter()
    for _ in range(3):
        torch.compile(Model(), fullgraph=True, backend=counter)(randn(5, 3, 6, 6))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_inductor(inside: bool) -> None:
    plain = _train(_block(), _plain)
    block = _block()
    if inside:
        result = _train(block, torch.compile(_counted_once, fullgraph=True))
    else:
        result = _train(torch.compile(block, fullgraph=True), _counted_once)
    for ours, theirs in zip(result, plain, strict=True):
        assert_close(ours, theirs, 1e-9)
