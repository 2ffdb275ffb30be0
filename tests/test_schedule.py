"""Statistics every few steps: which steps take them, what those between compute and keep, and how the count travels."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tdeconv
from helpers import BACKENDS, assert_close, difference, randn, train_step
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.schedule import WARMUP, every_step

# name: (layer, shape of a batch)
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "2d": (lambda **kw: FastDeconv(4, 3, 3, padding=1, block=2, sampling_stride=1, **kw), (3, 4, 5, 6)),
    "grouped": (lambda **kw: FastDeconv(4, 6, 2, groups=2, stride=2, sampling_stride=1, **kw), (5, 4, 6, 6)),
    "reflect": (lambda **kw: FastDeconv(2, 3, 3, padding=1, padding_mode="reflect", bias=False, **kw), (3, 2, 7, 6)),
    "1d": (lambda **kw: FastDeconv1d(2, 3, 3, padding=1, sampling_stride=1, **kw), (4, 2, 9)),
    "3d": (lambda **kw: FastDeconv3d(2, 3, 2, sampling_stride=1, **kw), (3, 2, 3, 4, 4)),
    "linear": (lambda **kw: Delinear(6, 4, block=3, **kw), (9, 6)),
    "channels": (lambda **kw: ChannelDeconv(3, **kw), (4, 8, 3, 4)),
}
LAYER = pytest.mark.parametrize("name", LAYERS)
BACKEND = pytest.mark.parametrize("backend", BACKENDS)
COUNTER = {"channels": "num_steps"}  # elsewhere num_batches_tracked


def make(name: str, backend: str = "torch", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name][0](backend=backend, dtype=dtype, **options)


def batch(name: str, step: int = 0) -> Tensor:
    return randn(*LAYERS[name][1], seed=step) * (1 + step % 3) + 0.5


def averages(layer: nn.Module) -> list[Tensor]:
    return [b.clone() for b in layer.buffers() if b.is_floating_point()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train(layer: nn.Module, name: str, steps: range, call: Callable[[Tensor], Any] | None = None) -> list[bool]:
    """Training steps on these batches; which of them moved the running statistics."""
    moved = []
    for step in steps:
        before = averages(layer)
        (call or layer)(batch(name, step))
        moved.append(not same(averages(layer), before))
    return moved


def kinds(steps: range, interval: int) -> list[bool]:
    return [t < 20 or t % interval == 0 for t in steps]


def count(layer: nn.Module) -> int | None:
    counter = layer._buffers.get(layer._counter)
    return None if counter is None else int(counter)


# ------------------------------------------------------------------------------------------------ which steps are fresh


@LAYER
@BACKEND
def test_by_default_there_is_nothing_to_count(name: str, backend: str) -> None:
    layer = make(name, backend)
    keys = {"running_mean", "running_deconv", *dict(layer.named_parameters())}
    if name == "channels":
        keys = {"running_mean1", "running_mean2", "running_var", "running_deconv", "num_batches_tracked"}
    assert set(layer.state_dict()) == keys
    assert layer._places == ()
    assert all(train(layer, name, range(25)))
    assert count(layer) is None


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("channels", "reflect")])
@BACKEND
def test_by_default_the_bits_are_those_of_the_function(name: str, backend: str) -> None:
    layer = make(name, backend)
    buffers = layer.running_mean.clone(), layer.running_deconv.clone()
    for step in range(23):
        y = layer(batch(name, step))
        assert torch.equal(y, function(layer, batch(name, step), buffers))
    assert same(list(buffers), averages(layer))


def function(layer: nn.Module, x: Tensor, buffers: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """The layer's training step by the function behind it."""
    shared = {"training": True, "block": layer.block, "backend": layer.backend} | options
    if isinstance(layer, Delinear):
        return tdeconv.delinear(x, layer.weight, layer.bias, *buffers, **shared)
    for option in ("stride", "padding", "groups", "sampling_stride"):
        shared[option] = getattr(layer, option)
    return tdeconv.fast_deconv(x, layer.weight, layer.bias, *buffers, **shared)


@LAYER
@BACKEND
@pytest.mark.parametrize("interval", [2, 4, 7, 30])
def test_the_running_statistics_are_those_of_a_plain_loop(name: str, backend: str, interval: int) -> None:
    """Stale steps leave every bit; a fresh one behind the 20th weighs as much as an interval's steps."""
    layer = make(name, backend, stats_interval=interval)
    of_batch = make(name, momentum=1)  # whose buffers are one batch's statistics
    expected, steps = averages(layer), range(WARMUP + 2 * interval + 1)
    for step in steps:
        assert train(layer, name, range(step, step + 1)) == kinds(range(step, step + 1), interval)
        if step < 20 or step % interval == 0:
            of_batch(batch(name, step))
            momentum = 0.1 if step < 20 else 1 - 0.9**interval
            if name == "channels" and step == 0:  # the first replaces them
                momentum = 1.0
            expected = [(1 - momentum) * e + momentum * b for e, b in zip(expected, averages(of_batch), strict=True)]
        assert_close(averages(layer), expected, 1e-12)
    assert count(layer) == len(steps)


@LAYER
@BACKEND
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_warm_up_may_be_of_any_length(name: str, backend: str, warmup: int) -> None:
    """Behind it a fresh step's momentum stands for the interval; set later, it counts from the first step, too."""
    layer = make(name, backend, stats_interval=4, stats_warmup=warmup)
    assert train(layer, name, range(9)) == [t < warmup or t % 4 == 0 for t in range(9)]
    if name != "channels":  # whose first batch replaces the buffers
        of_batch = make(name, momentum=1)
        of_batch(batch(name, 8))
        before = make(name, backend, stats_interval=4, stats_warmup=warmup)
        train(before, name, range(8))
        share = 1 - 0.9**4
        expected = [(1 - share) * e + share * b for e, b in zip(averages(before), averages(of_batch), strict=True)]
        assert_close(averages(layer), expected, 1e-12)
    layer.stats_warmup = 11
    assert train(layer, name, range(9, 16)) == [t < 11 or t % 4 == 0 for t in range(9, 16)]


@LAYER
@BACKEND
def test_a_plain_average_is_over_the_fresh_batches(name: str, backend: str) -> None:
    layer, of_batch = make(name, backend, stats_interval=4, momentum=None), make(name, momentum=1)
    seen = []
    for step in range(30):
        layer(batch(name, step))
        if step < 20 or step % 4 == 0:
            of_batch(batch(name, step))
            seen.append(averages(of_batch))
        assert_close(averages(layer), [torch.stack(all_).mean(0) for all_ in zip(*seen, strict=True)], 1e-12)
    assert torch.equal(layer.num_updates, torch.full_like(layer.num_updates, 23))


@BACKEND
@pytest.mark.parametrize(("freeze_iter", "interval"), [(3, 4), (3, 7), (30, 4), (1, 2), (2, 1)])
def test_freezing_decides_first(backend: str, freeze_iter: int, interval: int) -> None:
    """The first k + 1 of every 10 k steps; of these, the interval's."""
    layer = make("2d", backend, freeze=True, freeze_iter=freeze_iter, stats_interval=interval)
    steps = range(75)
    frozen = [t % (10 * freeze_iter) > freeze_iter for t in steps]
    assert train(layer, "2d", steps) == [a and not b for a, b in zip(kinds(steps, interval), frozen, strict=True)]


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_a_rule_set_between_steps_holds_from_the_next(name: str) -> None:
    layer, kinds_seen, expected = make(name), [], []
    for first, interval in ((0, 1), (18, 4), (26, 8), (35, 1), (40, 3)):
        steps = range(first, first + 9)
        if interval == 1 or count(layer) is None:
            start = first  # nothing counted the steps before: the count begins here
        layer.stats_interval = interval
        kinds_seen += train(layer, name, steps)
        expected += [True] * 9 if interval == 1 else kinds(range(first - start, first - start + 9), interval)
    assert kinds_seen == expected


def test_freezing_set_between_steps_holds_from_the_next() -> None:
    layer = make("2d", stats_interval=4)
    train(layer, "2d", range(23))
    layer.freeze = True
    layer.freeze_iter = 2
    assert train(layer, "2d", range(23, 26)) == [False, False, False]  # 24 is fresh, and frozen
    layer.freeze_iter = 5
    assert train(layer, "2d", range(26, 58)) == [t in (52,) for t in range(26, 58)]
    layer.freeze = False
    assert train(layer, "2d", range(58, 62)) == [False, False, True, False]
    layer.freeze, layer.stats_interval = True, 1
    assert count(layer) == 62
    assert train(layer, "2d", range(62, 64)) == [False, False]
    layer.freeze = False
    assert count(layer) is None
    assert all(train(layer, "2d", range(3)))


# -------------------------------------------------------------------------------------------------- what a stale one is


def midway(name: str, backend: str = "torch", steps: int = 21, **options: Any) -> nn.Module:
    """A layer behind the warm-up, whose next step is stale."""
    layer = make(name, backend, **{"stats_interval": 4} | options)
    train(layer, name, range(steps))
    return layer


@LAYER
@BACKEND
def test_a_stale_step_is_evaluation_with_gradients(name: str, backend: str) -> None:
    layer = midway(name, backend)
    assert "next step is stale" in layer.describe_schedule()
    plain = copy.deepcopy(layer).eval()
    before = averages(layer)
    assert_close(train_step(layer, batch(name, 50)), train_step(plain, batch(name, 50)), 1e-13)
    assert same(averages(layer), before)
    assert count(layer) == 22


@LAYER
@BACKEND
def test_the_gradients_of_a_stale_step_are_numerical_ones(name: str, backend: str) -> None:
    layer = midway(name, backend)
    names = [n for n, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    with every_step([layer], fresh=False):
        leaves = [p.detach().requires_grad_() for p in layer.parameters()]
        assert torch.autograd.gradcheck(run, (batch(name, 50)[:2].requires_grad_(), *leaves))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("channels", "reflect")])
def test_a_stale_step_keeps_no_square_matrix_but_the_root(name: str) -> None:
    layer, kept = midway(name), {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    x = batch(name, 50).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    once = [layer.running_mean, layer.running_deconv, layer.weight, layer.weight, x]  # a weight again: the folded one
    assert sorted(kept.values()) == sorted(t.numel() for t in once)


@LAYER
@BACKEND
def test_what_comes_later_does_not_change_a_stale_steps_backward(name: str, backend: str) -> None:
    """As two networks that train each other do: a fresh step in between writes the statistics."""
    layer = midway(name, backend, stats_interval=2)
    x, twin = batch(name, 50).requires_grad_(), copy.deepcopy(layer)
    leaves = [x, *layer.parameters()]
    y = layer(x)
    assert train(layer, name, range(22, 25)) == [True, False, True]
    own = torch.autograd.grad(y.square().sum(), leaves)
    alone = torch.autograd.grad(twin(x).square().sum(), [x, *twin.parameters()])
    assert same(list(own), list(alone))


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
@BACKEND
def test_a_layer_used_twice_in_a_step_counts_two(name: str, backend: str) -> None:
    """And gradients accumulated over a fresh and a stale call are the sum of theirs."""
    layer = midway(name, backend, stats_interval=2, steps=22)
    x = batch(name, 50)
    twin = copy.deepcopy(layer)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(first).square().sum() + layer(second).square().sum()).backward()
    for one in (first, second):
        mine = x.clone().requires_grad_()
        twin(mine).square().sum().backward()
        assert torch.equal(mine.grad, one.grad)
    assert count(layer) == count(twin) == 24
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()], 1e-13)


def test_without_gradients_training_steps_are_steps() -> None:
    layer, plain = make("2d", stats_interval=4), make("2d", stats_interval=4)
    with torch.no_grad():
        train(layer, "2d", range(30))
    train(plain, "2d", range(30))
    assert same(list(layer.buffers()), list(plain.buffers()))


@LAYER
@BACKEND
@pytest.mark.parametrize("which", ["empty", "blank"])
@pytest.mark.filterwarnings("ignore:.*batch without variation")
def test_a_batch_that_says_nothing_counts_and_moves_nothing(name: str, backend: str, which: str) -> None:
    layer = midway(name, backend, steps=24)  # the next is fresh
    before = averages(layer)
    x = batch(name)[:0] if which == "empty" else torch.zeros_like(batch(name))
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape[0] == x.shape[0]
    assert same(averages(layer), before)
    assert count(layer) == 25
    assert train(layer, name, range(25, 29)) == [False, False, False, True]


@pytest.mark.parametrize("name", ["2d", "grouped", "linear", "channels"])
@BACKEND
def test_a_stale_step_under_autocast(name: str, backend: str) -> None:
    """In bfloat16 the output is as far from float64's as evaluation's; the buffers stay float32."""
    layer = midway(name, backend).float()
    exact, plain, x = copy.deepcopy(layer).double(), copy.deepcopy(layer).eval(), batch(name, 50).float()
    before = averages(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, in_evaluation = layer(x), plain(x)
    assert y.dtype == in_evaluation.dtype
    expected = exact(x.double())
    assert difference(y, expected) <= 2 * difference(in_evaluation, expected) + torch.finfo(torch.bfloat16).eps
    assert same(averages(layer), before)
    assert count(layer) == 22


@BACKEND
def test_a_stale_step_keeps_the_layout(backend: str) -> None:
    layer = midway("2d", backend).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer).eval()
    x = batch("2d", 50).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_close(dx, torch.autograd.grad(plain(x).square().sum(), x)[0], 1e-13)


# -------------------------------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("name", ["2d", "grouped", "1d", "3d", "linear"])
@pytest.mark.parametrize("momentum", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@BACKEND
def test_the_function_does_as_the_layer_does(name: str, backend: str, momentum: Any) -> None:
    layer = make(name, backend, stats_interval=4)
    buffers = layer.running_mean.clone(), layer.running_deconv.clone()
    for step in range(30):
        x = batch(name, step)
        y = function(layer, x, buffers, stats_interval=4, step=step, momentum=momentum)
        assert_close(y.detach(), layer(x).detach(), 1e-13)
    assert_close(list(buffers), averages(layer), 1e-13)


@pytest.mark.parametrize("name", ["2d", "linear"])
@BACKEND
def test_the_function_is_stale_when_told(name: str, backend: str) -> None:
    layer = midway(name, backend)
    buffers = layer.running_mean.clone(), layer.running_deconv.clone()
    expected = copy.deepcopy(layer).eval()(batch(name, 50))
    for options in ({}, {"stats_interval": 4, "step": 24}):  # a fresh one, but for what is told
        assert_close(function(layer, batch(name, 50), buffers, stale=True, **options), expected, 1e-13)
    assert same(list(buffers), averages(layer))


# ------------------------------------------------------------------------------------------------ how the count travels


def by_state_dict(layer: nn.Module, name: str) -> nn.Module:
    other = make(name, layer.backend, stats_interval=4)
    train(other, name, range(3))
    other.load_state_dict(layer.state_dict())
    return other


def by_assignment(layer: nn.Module, name: str) -> nn.Module:
    other = make(name, layer.backend, stats_interval=4, device="meta")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return other


def by_meta_device(layer: nn.Module, name: str) -> nn.Module:
    other = make(name, layer.backend, stats_interval=4, device="meta")
    other(batch(name).to("meta"))  # shapes alone, which is no step of what follows
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    return other


def by_filling(layer: nn.Module, name: str) -> nn.Module:
    """As DistributedDataParallel does when it is made, and averages of weights."""
    other = make(name, layer.backend, stats_interval=4)
    with torch.no_grad():
        for theirs, value in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            theirs.copy_(value)
    return other


def by_file(layer: nn.Module, _: str) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_averaging(layer: nn.Module, name: str) -> nn.Module:
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    train(layer, name, range(21, 27))  # another place by now
    averaged.update_parameters(layer)
    averaged.update_parameters(layer)
    return averaged.module


COPIES = {
    "state_dict": by_state_dict,
    "assignment": by_assignment,
    "meta device": by_meta_device,
    "filling": by_filling,
    "file": by_file,
    "pickle": lambda layer, _: pickle.loads(pickle.dumps(layer)),
    "deepcopy": lambda layer, _: copy.deepcopy(layer),
    "averaging": by_averaging,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_copies_go_on_where_the_layer_was(name: str, how: str) -> None:
    """In the middle of an interval, to the same bits."""
    layer = midway(name)
    other = COPIES[how](layer, name).train()
    assert count(other) == count(layer)
    for step in range(27, 37):
        ours, theirs = (train_step(one, batch(name, step)) for one in (layer, other))
        assert same([t for t in ours if t is not None], [t for t in theirs if t is not None])
    assert count(other) == count(layer)


def test_copies_walk_by_themselves() -> None:
    layer = midway("2d", freeze=True, freeze_iter=9)
    other = copy.deepcopy(layer)
    train(layer, "2d", range(21, 23))
    assert count(other) == 21
    steps = range(21, 130)
    assert train(other, "2d", steps) == [t % 4 == 0 and 90 <= t < 100 for t in steps]


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_checkpoints_of_other_schedules(name: str) -> None:
    """One without the count starts at 0; one with it loads into a layer that has none."""
    counting, plain = midway(name), make(name)
    train(plain, name, range(3))
    counting.load_state_dict(plain.state_dict())
    assert count(counting) == 0
    assert train(counting, name, range(25)) == kinds(range(25), 4)
    plain.load_state_dict(counting.state_dict())
    assert count(plain) is None
    assert same(averages(plain), averages(counting))
    assert all(train(plain, name, range(25, 28)))
    net = nn.Sequential(make(name))  # as a part of a model too
    net.load_state_dict({f"0.{key}": value for key, value in counting.state_dict().items()})


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=["momentum", "plain average"])
def test_a_part_of_a_checkpoint_without_statistics_leaves_the_counts(options: dict[str, Any]) -> None:
    layer = midway("2d", **options)
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"bias": torch.ones(3)}, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items() if key != "bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*running_deconv"):
        layer.load_state_dict({"bias": torch.ones(3), "weight": layer.weight})


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_what_is_no_training_step_does_not_count(name: str) -> None:
    layer = midway(name)
    expected = [b.clone() for b in layer.buffers()]
    for _ in range(2):
        layer.eval()(batch(name))
    layer.train()
    if name != "channels":
        weight = layer.weight.clone()
        tdeconv.calibrate_deconv(nn.Sequential(layer) if name == "2d" else layer, batch(name))
        layer.weight.data.copy_(weight)
    with every_step([layer], fresh=False):
        layer(batch(name))
    assert same(list(layer.buffers()), expected)
    tdeconv.update_stats(layer, [batch(name, step) for step in range(3)])
    assert count(layer) == 21
    assert train(layer, name, range(21, 29)) == kinds(range(21, 29), 4)


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_a_reset_layer_begins_anew(name: str) -> None:
    layer = midway(name)
    layer.reset_running_stats()
    assert count(layer) == 0
    assert train(layer, name, range(25)) == kinds(range(25), 4)
    if name != "channels":
        layer.reset_parameters()
        assert count(layer) == 0


def test_statistics_that_are_not_tracked_stay_at_their_step() -> None:
    layer = midway("2d")
    layer.track_running_stats = False
    assert not any(train(layer, "2d", range(21, 27)))
    assert count(layer) == 21


def test_an_error_in_the_input_is_no_step() -> None:
    layer = midway("2d", steps=23)
    with pytest.raises(ValueError, match="expected an input with 4 channels"):
        layer(randn(2, 3, 8, 8))
    assert train(layer, "2d", range(23, 26)) == [False, True, False]


# --------------------------------------------------------------------------------------- modules that others take apart


def replicas_of(layer: nn.Module) -> nn.Module:
    """As torch.nn.DataParallel makes one for each device: new in every step, with the buffers of the module."""
    replica = layer._replicate_for_data_parallel()
    for key, parameter in layer._parameters.items():
        setattr(replica, key, parameter)
    return replica


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_replicas_of_data_parallel(name: str) -> None:
    """And the module itself, trained alone behind them."""
    layer, plain = make(name, stats_interval=4), make(name, stats_interval=4)
    moved = train(layer, name, range(22), lambda x: replicas_of(layer)(x))
    moved += train(layer, name, range(22, 26))
    moved += train(layer, name, range(26, 31), lambda x: replicas_of(layer)(x))
    assert moved == train(plain, name, range(31)) == kinds(range(31), 4)
    assert same(list(layer.buffers()), list(plain.buffers()))


@pytest.mark.parametrize("name", ["2d", "linear", "channels"])
def test_buffers_of_the_caller(name: str) -> None:
    """torch.func.functional_call with two sets of them in turn: each has a count of its own, and the layer's stays."""
    layer = make(name, stats_interval=4)
    ahead, plain = midway(name), make(name, stats_interval=4)
    sets = [{n: b.clone() for n, b in one.named_buffers()} for one in (layer, ahead)]
    for step in range(26):
        for buffers, module, first in zip(sets, (plain, ahead), (0, 21), strict=True):
            x = batch(name, first + step)
            assert torch.equal(functional_call(layer, buffers, (x,)), module(x))
    for buffers, module in zip(sets, (plain, ahead), strict=True):
        assert same(list(buffers.values()), list(module.buffers()))
    assert count(layer) == 0
    assert train(layer, name, range(22)) == kinds(range(22), 4)


@pytest.mark.parametrize("name", ["2d", "linear"])
@pytest.mark.parametrize("steps", [21, 24])
def test_torch_func_differentiates_both_kinds_of_step(name: str, steps: int) -> None:
    """With the buffers as arguments, as torch.func wants what is written in place."""
    layer = midway(name, "reference", steps=steps)
    parameters, buffers = (
        {n: t.detach().clone() for n, t in ts} for ts in (layer.named_parameters(), layer.named_buffers())
    )
    x = batch(name, 50)
    loss = lambda p, b: functional_call(layer, (p, b), (x,)).square().sum()  # noqa: E731
    grads = torch.func.grad(loss)(parameters, buffers)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert_close(list(grads.values()), list(expected), 1e-13)
    assert same(list(buffers.values()), list(layer.buffers()))


def test_vmap_over_counts_says_what_to_do() -> None:
    buffers = {n: torch.stack([b, b]) for n, b in midway("2d").named_buffers()}
    layer, x = midway("2d"), batch("2d", 50)
    with pytest.raises(RuntimeError, match=r"torch.vmap cannot go through .* in training mode.*model.eval\(\)"):
        torch.vmap(lambda b: functional_call(layer, b, (x,)))(buffers)


def test_a_parametrised_weight_trains_through_stale_steps() -> None:
    layer = nn.utils.parametrizations.weight_norm(midway("2d"))
    y = layer(batch("2d", 50))
    y.square().sum().backward()
    plain = copy.deepcopy(layer).eval()
    plain.zero_grad()
    plain(batch("2d", 50)).square().sum().backward()
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in plain.parameters()], 1e-13)
    assert count(layer) == 22


def test_threads_that_train_models_of_their_own() -> None:
    layers = [make("2d", stats_interval=4) for _ in range(4)]
    moved: list[list[bool]] = [[] for _ in layers]

    def work(i: int) -> None:
        for step in range(30):
            moved[i] += train(layers[i], "2d", range(step, step + 1), lambda x: layers[i](x).square().sum().backward())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moved == [kinds(range(30), 4)] * 4
    assert all(same(list(layer.buffers()), list(layers[0].buffers())) for layer in layers)
