"""Statistics over two processes (gloo, CPU): against one process with the whole batch, compiled, in DDP and FSDP2."""

from __future__ import annotations

import copy
import datetime
import inspect
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import rounding
from helpers import all_finite, assert_close, difference, randn, train_step
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d, reference
from tdeconv.checkpoint import checkpoint_contexts
from tdeconv.distributed import StatisticsGroup, convert_sync_deconv

SPLITS = [(5, 4), (7, 2), (9, 0), (0, 9)]  # images of each rank
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
# Seconds, after which a call has failed. Generous: a busy machine is no failure.
CALL_TIMEOUT = 180
SLOW_CALL_TIMEOUT = 600  # where a compiler works
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2 * SLOW_CALL_TIMEOUT)  # the call's comes first, and names the rank


# --------------------------------------------------------------------------------------- two processes that take calls


def _serve(rank: int, rendezvous: str, pipe: Any, seed: int | None) -> None:
    """A rank's process: run each function it is sent, send back what it returns or its traceback."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if seed is not None:
        rounding.imitate(seed)
    init = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=COLLECTIVE_TIMEOUT)
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        function, args = call
        try:
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Pair:
    """Two processes of one group, kept for many calls. If one is late or dies, that call fails, and the next call
    starts two new ones.
    """

    def __init__(self, folder: Path, seed: int | None) -> None:
        self.folder, self.seed, self.started = folder, seed, 0
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        self.started += 1
        rendezvous = str(self.folder / f"rendezvous{self.started}")  # an old one would lead to processes that are gone
        context = mp.get_context("spawn")
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, rendezvous, theirs, self.seed), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """``function(rank, *args)`` on both; fails on an exception of either, or if one dies or takes too long."""
        if not self.processes:
            self._start()
        deadline = time.monotonic() + timeout
        for pipe in self.pipes:
            with suppress(OSError):  # dead, as the answer will say
                pipe.send_bytes(pickle.dumps((function, args)))
        answers = [self._answer(pipe, deadline) for pipe in self.pipes]
        if any(fine is None for fine, _ in answers):
            self.close(patience=0)
        words = [f"rank {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        if words:
            pytest.fail("\n".join(words))
        return [answer for _, answer in answers]

    def _answer(self, pipe: Any, deadline: float) -> tuple[bool | None, Any]:
        """True and what was returned, False and the traceback, or None and why there is no answer."""
        try:
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return None, "its process died"
        return None, "no answer in time"

    def close(self, patience: float = 5) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(patience)
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), request.config.getoption("--rounding"))
    yield pair
    pair.close()


def _late(rank: int) -> None:
    if rank == 1:
        time.sleep(10 * CALL_TIMEOUT)
    dist.barrier()


def _dead(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    dist.barrier()


def _ranks(rank: int) -> int:
    dist.barrier()
    return rank


def test_a_lost_pair_is_replaced(pair: Pair) -> None:
    """The call that lost it fails; the next one meets two processes that know nothing of it."""
    for function, timeout, words in ((_late, 1, "no answer in time"), (_dead, CALL_TIMEOUT, "its process died")):
        with pytest.raises(pytest.fail.Exception, match=f"rank 1: {words}"):
            pair(function, timeout=timeout)
        assert pair(_ranks) == [0, 1]


# ------------------------------------------------------------------------------------------- one layer, whole batches


LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "3x3": (lambda **kw: FastDeconv(6, 8, 3, padding=1, block=3, **kw), (6, 7, 8)),
    "strided": (lambda **kw: FastDeconv(4, 6, 3, stride=2, padding=1, dilation=2, bias=False, **kw), (4, 11, 10)),
    "1x1": (lambda **kw: FastDeconv(6, 4, 1, block=3, **kw), (6, 6, 6)),
    "groups": (lambda **kw: FastDeconv(6, 9, 3, groups=3, **kw), (6, 9, 9)),
    "depthwise": (lambda **kw: FastDeconv(5, 5, 3, padding=1, groups=5, n_iter=1, sampling_stride=2, **kw), (5, 8, 8)),
    "1d": (lambda **kw: FastDeconv1d(3, 4, 5, padding=2, **kw), (3, 20)),
    "3d": (lambda **kw: FastDeconv3d(2, 3, 3, padding=1, sampling_stride=2, **kw), (2, 6, 6, 6)),
    "reflect": (lambda **kw: FastDeconv(3, 4, 3, padding=1, padding_mode="reflect", **kw), (3, 9, 9)),
    "frozen": (lambda **kw: FastDeconv(3, 4, 3, freeze=True, freeze_iter=1, **kw), (3, 9, 9)),
    "linear": (lambda **kw: Delinear(12, 5, block=4, **kw), (12,)),
    "channels": (lambda **kw: ChannelDeconv(4, **kw), (10, 6, 6)),
    "channels, all in blocks": (lambda **kw: ChannelDeconv(4, **kw), (8, 6, 6)),
    "channels, 2-D": (lambda **kw: ChannelDeconv(3, **kw), (7,)),
}


def _layer(name: str, dtype: torch.dtype, backend: str = "torch") -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name][0](backend=backend, dtype=dtype)


def _batch(name: str, dtype: torch.dtype, images: int = 9, mean: float = 0.5) -> Tensor:
    return (randn(images, *LAYERS[name][1], seed=3) + mean).to(dtype)


def _rows(rank: int, split: tuple[int, int]) -> slice:
    return slice(0, split[0]) if rank == 0 else slice(split[0], sum(split))


def _steps(layer: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, rows: slice) -> dict[str, Any]:
    """Three training steps on these rows of the whole batch ``x``, the second with its images in reverse order. In the
    third the freezing layer is frozen."""
    for whole in (x, x.flip(0), x):
        own = whole[rows].clone().requires_grad_()
        module.zero_grad()
        y = layer(own)
        y.backward(randn(len(x), *y.shape[1:], seed=4, dtype=y.dtype)[rows])
    return {
        "y": y.detach(),
        "grad_x": own.grad,
        "grads": [p.grad for p in module.parameters()],
        "buffers": list(module.buffers()),
    }


def _sync_steps(
    rank: int,
    name: str,
    split: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    backend: str = "torch",
    mean: float = 0.5,
    compiler: str | None = None,
) -> dict[str, Any]:
    layer = convert_sync_deconv(_layer(name, dtype, backend))
    torch._dynamo.reset()  # what other layers were compiled for must not matter
    run = torch.compile(layer, fullgraph=True, backend=compiler) if compiler else layer
    return _steps(run, layer, _batch(name, dtype, sum(split), mean), _rows(rank, split))


def _whole_steps(name: str, dtype: torch.dtype = torch.float64, backend: str = "torch", mean: float = 0.5) -> Any:
    """One process."""
    layer = _layer(name, dtype, backend)
    return _steps(layer, layer, _batch(name, dtype, mean=mean), slice(None))


def _check(ranks: list[dict[str, Any]], whole: dict[str, Any], tolerance: float) -> None:
    """Both ranks' parts against one process's whole; the ranks' buffers are the same to the last bit."""
    assert_close(torch.cat([r["y"] for r in ranks]), whole["y"], tolerance)
    assert_close(torch.cat([r["grad_x"] for r in ranks]), whole["grad_x"], tolerance)
    sums = [sum(grads) for grads in zip(*(r["grads"] for r in ranks), strict=True)]
    assert_close(sums, whole["grads"], tolerance)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["buffers"], ranks[1]["buffers"], strict=True))
    assert_close(ranks[0]["buffers"], whole["buffers"], tolerance)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_equal_one(pair: Pair, name: str, split: tuple[int, int]) -> None:
    _check(pair(_sync_steps, name, split), _whole_steps(name), TOLERANCE[torch.float64])


@pytest.mark.parametrize("split", SPLITS[:2], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_equal_one_in_float32(pair: Pair, name: str, split: tuple[int, int]) -> None:
    ranks = pair(_sync_steps, name, split, torch.float32)
    _check(ranks, _whole_steps(name, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("split", [(5, 4), (9, 0)], ids=str)
@pytest.mark.parametrize("name", ["3x3", "groups", "linear", "frozen"])
def test_reference_backend(pair: Pair, name: str, split: tuple[int, int]) -> None:
    ranks = pair(_sync_steps, name, split, torch.float64, "reference")
    _check(ranks, _whole_steps(name, backend="reference"), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["groups", "linear"])
def test_a_mean_far_from_zero_loses_nothing(pair: Pair, name: str) -> None:
    """Mean 1000, spread 1, float32, in the first steps, when no running mean is near: sums of squares about zero would
    cancel, and be wrong by a tenth. Two processes and one, both against float64."""
    exact = _whole_steps(name, torch.float64, mean=1000.0)
    one = _whole_steps(name, torch.float32, mean=1000.0)
    ranks = pair(_sync_steps, name, (5, 4), torch.float32, "torch", 1000.0)
    for i, buffer in enumerate(exact["buffers"]):
        error = difference(ranks[0]["buffers"][i], buffer)
        # the ranks' means are rounded at 1000, and enter as their difference
        assert error <= 2 * difference(one["buffers"][i], buffer) + 1000 * torch.finfo(torch.float32).eps / 2


# ------------------------------------------------------------------------------------------- batches that say little


def _blank(rank: int, name: str, blank: tuple[int, ...]) -> list[bool]:
    """Which buffers a step moves in which these ranks' images are blank."""
    layer = convert_sync_deconv(_layer(name, torch.float64))
    x = _batch(name, torch.float64)
    layer(x)
    before = [b.clone() for b in layer.buffers()]
    layer(torch.zeros_like(x) if rank in blank else x.flip(0) * 3)
    return [not torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True)]


@pytest.mark.parametrize("name", ["3x3", "1x1", "linear", "channels, all in blocks"])
def test_a_blank_batch_counts_where_another_rank_has_data(pair: Pair, name: str) -> None:
    assert not any(any(moved) for moved in pair(_blank, name, (0, 1)))
    one_blank = pair(_blank, name, (1,))
    assert one_blank[0] == one_blank[1]
    assert all(one_blank[0][:2])


def _plain_average(rank: int) -> tuple[Tensor, Tensor]:
    layer = convert_sync_deconv(FastDeconv(4, 3, 3, momentum=None, dtype=torch.float64))
    for seed in range(4):
        layer(randn(6, 4, 9, 9, seed=seed)[_rows(rank, (4, 2))])
    return layer.running_deconv, layer.num_updates


def test_plain_averages_are_of_all_ranks(pair: Pair) -> None:
    layer = FastDeconv(4, 3, 3, momentum=None, dtype=torch.float64)
    for seed in range(4):
        layer(randn(6, 4, 9, 9, seed=seed))
    for root, count in pair(_plain_average):
        assert_close(root, layer.running_deconv, TOLERANCE[torch.float64])
        assert count == 4


# ------------------------------------------------------------------------------------------------------- in compile


@pytest.mark.parametrize("name", ["3x3", "frozen", "channels"])
def test_compiled_is_one_graph(pair: Pair, name: str) -> None:
    ranks = pair(_sync_steps, name, (5, 4), torch.float64, "torch", 0.5, "aot_eager")
    _check(ranks, _whole_steps(name), TOLERANCE[torch.float64])


def test_compiled_with_an_empty_rank(pair: Pair) -> None:
    ranks = pair(_sync_steps, "3x3", (9, 0), torch.float64, "torch", 0.5, "aot_eager")
    _check(ranks, _whole_steps("3x3"), TOLERANCE[torch.float64])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3x3", "frozen", "groups", "linear", "channels"])
def test_inductor(pair: Pair, name: str) -> None:
    ranks = pair(_sync_steps, name, (5, 4), torch.float32, "torch", 0.5, "inductor", timeout=SLOW_CALL_TIMEOUT)
    _check(ranks, _whole_steps(name, torch.float32), TOLERANCE[torch.float32])


def _count_graphs(rank: int) -> int:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = convert_sync_deconv(_layer("3x3", torch.float64))
    run = torch.compile(layer, fullgraph=True, backend=count)
    for images in (4, 5, 6, 7):
        x = _batch("3x3", torch.float64, images + rank)
        torch._dynamo.mark_dynamic(x, 0)
        run(x)
    return len(graphs)


def test_a_changing_batch_compiles_once(pair: Pair) -> None:
    assert pair(_count_graphs) == [1, 1]


# ------------------------------------------------------------------------------- who communicates, and when


def _collectives(function: Callable[[], Any]) -> int:
    """How many collectives a call makes, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name.startswith("_c10d_functional::all_reduce") for event in profile.events())


def _count_collectives(rank: int) -> dict[str, int]:
    counts = {}
    for name in ("3x3", "linear", "channels"):
        layer = convert_sync_deconv(_layer(name, torch.float64))
        x = _batch(name, torch.float64, 2).requires_grad_()
        counts[f"{name}, forward"] = _collectives(lambda layer=layer, x=x: layer(x))
        counts[f"{name}, forward and backward"] = _collectives(lambda layer=layer, x=x: layer(x).sum().backward())
        counts[f"{name}, of data"] = _collectives(lambda layer=layer, x=x: layer(x.detach()).sum())
        layer.eval()
        counts[f"{name}, evaluation"] = _collectives(lambda layer=layer, x=x: layer(x).sum().backward())
    frozen = convert_sync_deconv(_layer("frozen", torch.float64))
    x = _batch("frozen", torch.float64, 2)
    for step in ("first", "second", "third"):
        counts[f"{step} step of a freezing layer"] = _collectives(lambda: frozen(x))
    return counts


def test_one_collective_each_way(pair: Pair) -> None:
    expected: dict[str, int] = {}
    for name in ("3x3", "linear", "channels"):
        expected |= {f"{name}, forward": 1, f"{name}, forward and backward": 2}
        expected |= {f"{name}, of data": 1, f"{name}, evaluation": 0}
    expected |= {f"{step} step of a freezing layer": n for step, n in (("first", 1), ("second", 1), ("third", 0))}
    assert pair(_count_collectives) == [expected, expected]


def _alone(rank: int) -> bool:
    """A group of one process: as if not converted, to the last bit."""
    groups = [dist.new_group([r]) for r in range(2)]
    layer, plain = _layer("3x3", torch.float64), _layer("3x3", torch.float64)
    convert_sync_deconv(layer, groups[rank])
    x = _batch("3x3", torch.float64, 3 + rank)
    if rank == 1:  # no step of rank 0 would meet it
        assert _collectives(lambda: train_step(layer, x)) == 0
        return True
    results = zip(train_step(layer, x), train_step(plain, x), strict=True)
    return all(torch.equal(a, b) for a, b in results)


def test_a_group_of_one(pair: Pair) -> None:
    assert pair(_alone) == [True, True]


def _all_empty(rank: int, name: str) -> list[Tensor]:
    layer = convert_sync_deconv(_layer(name, torch.float64))
    before = [b.clone() for b in layer.buffers()]
    x = _batch(name, torch.float64, 0).requires_grad_()
    y = layer(x)
    assert y.shape[0] == 0
    y.sum().backward()
    assert all(torch.equal(b, a) for b, a in zip(layer.buffers(), before, strict=True))
    return [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("name", ["3x3", "groups", "linear", "channels"])
def test_all_ranks_empty(pair: Pair, name: str) -> None:
    """Nothing is learned and nothing is lost."""
    for grads in pair(_all_empty, name):
        assert all(not g.any() for g in grads)


def _untracked(rank: int) -> Tensor:
    layer = convert_sync_deconv(_layer("3x3", torch.float64))
    layer.track_running_stats = False
    y = layer(_batch("3x3", torch.float64)[_rows(rank, (5, 4))])
    assert not layer.running_mean.any()
    return y.detach()


def test_without_running_statistics(pair: Pair) -> None:
    y = _layer("3x3", torch.float64)(_batch("3x3", torch.float64))
    assert_close(torch.cat(pair(_untracked)), y.detach(), 1e-11)


def _other_sizes(rank: int) -> tuple[Tensor, list[Tensor]]:
    layer = convert_sync_deconv(_layer("3x3", torch.float64))
    y = layer(randn(3 + rank, 6, 9 - rank, 5 + 4 * rank, seed=rank))
    return y.detach(), list(layer.buffers())


def test_images_of_other_sizes(pair: Pair) -> None:
    """Only D has to agree: the moments are those of both ranks' patches."""
    xs = [randn(3 + rank, 6, 9 - rank, 5 + 4 * rank, seed=rank) for rank in range(2)]
    layer = _layer("3x3", torch.float64)
    geo = layer.in_training(xs[0])[1]
    vectors = torch.cat([reference.to_vectors(reference.im2col(x, geo), geo) for x in xs], dim=1)[0]
    cov = torch.cov(vectors.t(), correction=0) + layer.eps * torch.eye(geo.features)
    mean, deconv = vectors.mean(0, keepdim=True), reference.inverse_sqrt(cov.unsqueeze(0), layer.n_iter)
    folded = reference.fold(layer.weight, layer.bias, mean, deconv, geo)
    for x, (y, buffers) in zip(xs, pair(_other_sizes), strict=True):
        assert_close(y, reference.convolve(x, *folded, geo), 1e-11)
        assert_close(buffers[0], 0.1 * mean[0], 1e-11)


def _nan_on_rank_1(rank: int, name: str) -> tuple[list[Tensor], list[Tensor]]:
    layer = convert_sync_deconv(_layer(name, torch.float64))
    x = _batch(name, torch.float64)[_rows(rank, (5, 4))]
    layer(x)
    before = [b.clone() for b in layer.buffers()]
    bad = x.clone()
    bad.view(-1)[0] = float("nan") if rank == 1 else 0.0
    y = layer(bad)
    assert y.isnan().any()
    assert all(torch.equal(b, a) for b, a in zip(layer.buffers(), before, strict=True))
    layer(2 * x)
    return before, list(layer.buffers())


@pytest.mark.parametrize("name", ["3x3", "linear", "channels"])
def test_nan_on_one_rank_spoils_the_statistics_of_none(pair: Pair, name: str) -> None:
    (before, first), (_, second) = pair(_nan_on_rank_1, name)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all_finite(first)
    assert not torch.equal(first[0], before[0])  # and the step after it counts again


def _autocast(rank: int) -> tuple[Tensor, list[Tensor]]:
    layer = convert_sync_deconv(_layer("3x3", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(_batch("3x3", torch.float32)[_rows(rank, (5, 4))])
    y.float().sum().backward()
    return y.detach(), list(layer.buffers())


def test_autocast(pair: Pair) -> None:
    layer = _layer("3x3", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(_batch("3x3", torch.float32))
    (first, buffers), (second, _) = pair(_autocast)
    assert first.dtype == torch.bfloat16
    assert_close(torch.cat([first, second]), y.detach(), 1e-2)
    assert_close(buffers, list(layer.buffers()), 1e-5)


def _checkpointed(rank: int, split: tuple[int, int]) -> dict[str, Any]:
    layer = convert_sync_deconv(_layer("3x3", torch.float64))

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts(layer))

    return _steps(run, layer, _batch("3x3", torch.float64), _rows(rank, split))


@pytest.mark.parametrize("split", [(5, 4), (0, 9)], ids=str)
def test_gradient_checkpointing(pair: Pair, split: tuple[int, int]) -> None:
    _check(pair(_checkpointed, split), _whole_steps("3x3"), TOLERANCE[torch.float64])


# --------------------------------------------------------------------------------------------------- DDP, FSDP2


# what DDP's option is called, by version of torch
_FLAG = "forward_sync_buffers"
NO_BROADCAST = {_FLAG if _FLAG in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers": False}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        FastDeconv(3, 8, 3, padding=1, freeze=True, freeze_iter=2, dtype=torch.float64),
        nn.ReLU(),
        FastDeconv(8, 8, 3, stride=2, dtype=torch.float64),
        nn.ReLU(),
        nn.Flatten(),
        Delinear(128, 5, block=32, dtype=torch.float64),
    )


def _images() -> tuple[Tensor, Tensor]:
    return randn(8, 3, 10, 10, seed=7), torch.arange(8) % 5


def _train(
    model: nn.Module, rows: slice, share: float = 1.0, micro_batches: int = 1, hold: Callable[[], Any] = nullcontext
) -> None:
    """Three steps of SGD on the mean loss over these images times ``share``, accumulated over micro-batches."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    xs, labels = _images()
    for _ in range(3):
        optimiser.zero_grad()
        parts = list(zip(xs.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        for i, (x, label) in enumerate(parts):
            with hold() if i < len(parts) - 1 else nullcontext():
                y = model(x[rows])
                (nn.functional.cross_entropy(y, label[rows], reduction="sum") * share / len(label)).backward()
        optimiser.step()


def _whole_state(micro_batches: int = 1) -> dict[str, Tensor]:
    model = _model()
    _train(model, slice(None), micro_batches=micro_batches)
    return model.state_dict()


def _ddp(rank: int, split: tuple[int, int], micro_batches: int, compiler: str | None) -> dict[str, Tensor]:
    """DDP averages over the two ranks what one process would sum: hence the share of 2."""
    model = convert_sync_deconv(_model())
    inner = torch.compile(model, fullgraph=True, backend=compiler) if compiler else model
    ddp = DistributedDataParallel(inner, **NO_BROADCAST)
    _train(ddp, _rows(rank, split), 2.0, micro_batches, ddp.no_sync)
    return model.state_dict()


def _assert_states(ranks: list[dict[str, Tensor]], whole: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for state in ranks:
        assert state.keys() == whole.keys()
        assert_close(list(state.values()), list(whole.values()), tolerance)


@pytest.mark.parametrize("split", [(4, 4), (6, 2), (8, 0)], ids=str)
def test_ddp(pair: Pair, split: tuple[int, int]) -> None:
    _assert_states(pair(_ddp, split, 1, None), _whole_state())


def test_ddp_accumulates_with_no_sync(pair: Pair) -> None:
    """The statistics are of both ranks in each micro-batch."""
    _assert_states(pair(_ddp, (3, 1), 2, None), _whole_state(micro_batches=2))


def test_ddp_compiled(pair: Pair) -> None:
    _assert_states(pair(_ddp, (4, 4), 1, "aot_eager"), _whole_state())


def _compiled_ddp(rank: int) -> dict[str, Tensor]:
    model = convert_sync_deconv(_model())
    ddp = DistributedDataParallel(model, **NO_BROADCAST)
    _train(torch.compile(ddp), _rows(rank, (4, 4)), 2.0)
    return model.state_dict()


@pytest.mark.slow
def test_compile_of_ddp(pair: Pair) -> None:
    _assert_states(pair(_compiled_ddp, timeout=SLOW_CALL_TIMEOUT), _whole_state())


def _broadcasting_ddp(rank: int) -> dict[str, Tensor]:
    model = convert_sync_deconv(_model())
    ddp = DistributedDataParallel(model)
    _train(ddp, _rows(rank, (4, 4)), 2.0)
    state = copy.deepcopy(model.state_dict())
    x = _images()[0][_rows(rank, (4, 4))]
    (ddp(x).sum() + ddp(x).sum()).backward()  # the second broadcast must not spoil the first one's backward
    return state


def test_ddp_broadcasting_buffers_is_only_slower(pair: Pair) -> None:
    _assert_states(pair(_broadcasting_ddp), _whole_state())


def _fsdp(rank: int, split: tuple[int, int]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    model = convert_sync_deconv(_model(), mesh.get_group())
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, _rows(rank, split), 2.0)
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


@pytest.mark.parametrize("split", [(4, 4), (6, 2)], ids=str)
def test_fsdp2(pair: Pair, split: tuple[int, int]) -> None:
    _assert_states(pair(_fsdp, split), _whole_state())


# ------------------------------------------------------------------------------------------ statistics every few steps


def _interval_steps(rank: int, name: str, split: tuple[int, int] | None, backend: str = "torch") -> dict[str, Any]:
    """34 steps at an interval of 4 on these images of each batch, in one process on all of them; gradients summed."""
    layer = _layer(name, torch.float64, backend)
    layer.stats_interval = 4
    if split is not None:
        convert_sync_deconv(layer)
    rows = slice(None) if split is None else _rows(rank, split)
    ys, grads = [], []
    for step in range(34):
        x = randn(9, *LAYERS[name][1], seed=step) * (1 + step % 3) + 0.5
        own = x[rows].requires_grad_()
        y = layer(own)
        y.backward(randn(*(9, *y.shape[1:]), seed=4)[rows])
        ys.append(y.detach())
        grads.append(own.grad)
    return {
        "y": torch.stack(ys, 1),
        "grad_x": torch.stack(grads, 1),
        "grads": [p.grad for p in layer.parameters()],
        "buffers": list(layer.buffers()),
    }


@pytest.mark.parametrize("split", [(7, 2), (0, 9)], ids=str)
@pytest.mark.parametrize("name", ["3x3", "groups", "1d", "frozen", "linear", "channels"])
def test_two_processes_equal_one_at_an_interval(pair: Pair, name: str, split: tuple[int, int]) -> None:
    _check(pair(_interval_steps, name, split), _interval_steps(0, name, None), TOLERANCE[torch.float64])


def test_two_processes_equal_one_at_an_interval_on_the_reference(pair: Pair) -> None:
    whole = _interval_steps(0, "3x3", None, "reference")
    _check(pair(_interval_steps, "3x3", (5, 4), "reference"), whole, TOLERANCE[torch.float64])


def _count_by_step(rank: int, name: str) -> list[int]:
    layer = _layer(name, torch.float64)
    layer.stats_interval = 4
    convert_sync_deconv(layer)
    x = _batch(name, torch.float64, 2 * rank).requires_grad_()  # an empty one on rank 0
    return [_collectives(lambda: layer(x).sum().backward()) for _ in range(30)]


@pytest.mark.parametrize("name", ["3x3", "linear", "channels"])
def test_stale_steps_communicate_nothing(pair: Pair, name: str) -> None:
    expected = [2 if step < 20 or step % 4 == 0 else 0 for step in range(30)]
    assert pair(_count_by_step, name) == [expected, expected]


def _scheduled_model(steps: int) -> nn.Sequential:
    """Trained for so many steps, of three each time."""
    model = _model()
    for layer in model:
        if isinstance(layer, (FastDeconv, Delinear)):
            layer.stats_interval = 4
    for _ in range(steps // 3):
        _train(model, slice(None))
    return model


def _resumed_on_rank_0(rank: int, split: tuple[int, int]) -> dict[str, Tensor]:
    model = convert_sync_deconv(_scheduled_model(21 if rank == 0 else 0))
    ddp = DistributedDataParallel(model, **NO_BROADCAST)
    for _ in range(5):
        _train(ddp, _rows(rank, split), 2.0)
    return model.state_dict()


@pytest.mark.parametrize("split", [(5, 3), (8, 0)], ids=str)
def test_rank_0_alone_resumes(pair: Pair, split: tuple[int, int]) -> None:
    """And both go on in step with it: the statistics are taken in the same steps, over both ranks' images."""
    whole = _scheduled_model(36).state_dict()
    assert whole["0.num_batches_tracked"] == 36
    _assert_states(pair(_resumed_on_rank_0, split), whole)


@pytest.mark.parametrize("options", [{}, NO_BROADCAST], ids=["broadcast", "no broadcast"])
def test_rank_0_alone_resumes_without_common_statistics(pair: Pair, options: dict[str, bool]) -> None:
    """Both ranks train on all images, so that each one's statistics are one process's."""
    _assert_states(pair(_everything_on_both, options), _scheduled_model(36).state_dict())


def _everything_on_both(rank: int, options: dict[str, bool]) -> dict[str, Tensor]:
    model = _scheduled_model(21 if rank == 0 else 0)
    ddp = DistributedDataParallel(model, **options)
    for _ in range(5):
        _train(ddp, slice(None))
    return model.state_dict()


def _fsdp_at_an_interval(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    model = convert_sync_deconv(_scheduled_model(21), mesh.get_group())
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(5):
        _train(model, _rows(rank, (6, 2)), 2.0)
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def test_fsdp2_at_an_interval(pair: Pair) -> None:
    _assert_states(pair(_fsdp_at_an_interval), _scheduled_model(36).state_dict())


def _compiled_at_an_interval(rank: int) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = convert_sync_deconv(_scheduled_model(21 if rank == 0 else 0))
    ddp = DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager"), **NO_BROADCAST)
    for _ in range(5):
        _train(ddp, _rows(rank, (5, 3)), 2.0)
    return model.state_dict()


def test_rank_0_alone_resumes_compiled(pair: Pair) -> None:
    ranks = pair(_compiled_at_an_interval, timeout=SLOW_CALL_TIMEOUT)
    _assert_states(ranks, _scheduled_model(36).state_dict())


# ------------------------------------------------------------------------------------------ the attribute, bad input


def _carried(rank: int) -> bytes:
    model = convert_sync_deconv(_model())
    group = model[0].process_group
    assert group == StatisticsGroup(dist.group.WORLD.group_name, rank, 2)
    assert model[5].process_group == group
    assert model.state_dict().keys() == _model().state_dict().keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        assert twin[0].process_group == group
    unconverted = copy.deepcopy(model)
    for module in unconverted:
        if isinstance(module, (FastDeconv, Delinear)):
            module.process_group = None
    assert _collectives(lambda: unconverted(_images()[0])) == 0
    return pickle.dumps(model)


def test_copies_stay_in_the_group(pair: Pair) -> None:
    """And what is unpickled elsewhere, where there is none, evaluates; it does not train on half a batch unsaid."""
    model = pickle.loads(pair(_carried)[0])
    x = _images()[0]
    with pytest.raises(ValueError, match="process group '0', which is not initialised in this process"):
        model(x)
    assert_close(model.eval()(x).detach(), _model().eval()(x).detach(), 1e-12)
    model.train()
    for layer in model:
        if isinstance(layer, (FastDeconv, Delinear)):
            layer.process_group = None
    assert_close(model(x).detach(), _model()(x).detach(), 1e-12)


DISAGREEMENTS: dict[str, Callable[[int], nn.Module]] = {
    "D": lambda rank: nn.Sequential(FastDeconv(4, 4, 1), FastDeconv(4 + 2 * rank, 4, 3)),
    "a layer more": lambda rank: nn.Sequential(*(FastDeconv(4, 4, 3) for _ in range(1 + rank))),
    "dtype": lambda rank: nn.Sequential(FastDeconv(4, 4, 3, dtype=(torch.float32, torch.float64)[rank])),
    "freezing": lambda rank: nn.Sequential(FastDeconv(4, 4, 3, freeze=True, freeze_iter=10 + rank)),
    "interval": lambda rank: nn.Sequential(FastDeconv(4, 4, 3, stats_interval=1 + 3 * rank)),
    "kind": lambda rank: nn.Sequential((Delinear(8, 8, block=4), ChannelDeconv(4))[rank]),
}


def _disagree(rank: int, what: str) -> str:
    with pytest.raises(ValueError, match="module must have the same deconvolution layers on all ranks") as error:
        convert_sync_deconv(DISAGREEMENTS[what](rank))
    dist.barrier()  # both are here, and their collectives still meet
    return str(error.value)


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_fail_on_every_rank(pair: Pair, what: str) -> None:
    first, second = pair(_disagree, what)
    assert first == second
    assert "rank 1" in first


def test_the_message_names_the_layer(pair: Pair) -> None:
    message = pair(_disagree, "D")[0]
    assert "('1', 'FastDeconv', (36, 36)" in message
    assert "('1', 'FastDeconv', (54, 54)" in message


def _bad_groups(rank: int) -> None:
    layer = _layer("3x3", torch.float64)
    theirs = dist.new_group([0])
    if rank == 1:
        with pytest.raises(TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"):
            convert_sync_deconv(layer, theirs)
    with pytest.raises(TypeError, match=r"got DeviceMesh .*pass mesh.get_group\(\)"):
        convert_sync_deconv(layer, init_device_mesh("cpu", (2,)))
    assert layer.process_group is None
    layer.process_group = dist.group.WORLD
    with pytest.raises(TypeError, match="process_group must come from convert_sync_deconv, got ProcessGroup"):
        layer(_batch("3x3", torch.float64))


def test_bad_groups(pair: Pair) -> None:
    pair(_bad_groups)


def test_not_initialised() -> None:
    layer = _layer("3x3", torch.float64)
    with pytest.raises(ValueError, match=r"not initialised .*call torch.distributed.init_process_group first"):
        convert_sync_deconv(layer)
    assert layer.process_group is None
    layer.process_group = StatisticsGroup("gone", 0, 2)  # of a process group that was destroyed
    with pytest.raises(ValueError, match=r"process group 'gone', which is not initialised"):
        layer(_batch("3x3", torch.float64))


def test_a_model_without_deconvolutions_is_returned(pair: Pair) -> None:
    assert pair(_no_layers) == [True, True]


def _no_layers(rank: int) -> bool:
    model = nn.Linear(2, 2)
    return convert_sync_deconv(model) is model


# ------------------------------------------------------------------------------------------------------ the example


def _example(processes: int) -> str:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(root / "examples" / "train_ddp.py"), "--epochs", "1"]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_example_trains_as_one_process_does() -> None:
    loss, accuracy = ([], [])
    for processes in (1, 2):
        words = _example(processes).replace(",", "").replace("%", "").split()
        loss.append(float(words[words.index("loss") + 1]))
        accuracy.append(float(words[words.index("accuracy") + 1]))
    assert abs(loss[0] - loss[1]) < 1e-3 * loss[0]
    assert min(accuracy) > 90
