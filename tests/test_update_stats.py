"""Plain averages of statistics: momentum=None, and one pass over the data."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import tdeconv
from helpers import BACKENDS, assert_close, randn
from tdeconv import ChannelDeconv, Delinear, FastDeconv, reference, update_stats

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def batches(*shape: int, count: int = 20, mean: float = 3.0) -> list[torch.Tensor]:
    return [randn(*shape, seed=i) + mean for i in range(count)]


def statistics(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's own mean and root, by the formulas."""
    if isinstance(layer, FastDeconv):
        geo = layer.in_training(x)[1]
    else:
        geo = tdeconv.functional.linear_geometry(layer.in_features, layer.block)
    _, mean, root, _ = reference.deconvolve(x, layer.weight, layer.bias, geo, layer.eps, layer.n_iter)
    return mean.detach(), root.detach()


def average(layer: nn.Module, data: list[torch.Tensor]) -> list[torch.Tensor]:
    means, roots = zip(*(statistics(layer, x) for x in data), strict=True)
    return [torch.stack(means).mean(0).reshape(layer.running_mean.shape), torch.stack(roots).mean(0)]


def assert_averages(layer: nn.Module, data: list[torch.Tensor]) -> None:
    mean, root = average(layer, data)
    assert_close(layer.running_mean, mean, 1e-13)
    assert_close(layer.running_deconv, root.reshape(layer.running_deconv.shape), 1e-13)


LAYERS = {
    "3x3": (lambda **kw: FastDeconv(4, 3, 3, block=2, dtype=torch.float64, **kw), (8, 4, 9, 9)),
    "groups": (lambda **kw: FastDeconv(4, 4, 3, groups=2, dtype=torch.float64, **kw), (8, 4, 9, 9)),
    "freezing": (lambda **kw: FastDeconv(4, 3, 3, freeze=True, freeze_iter=2, dtype=torch.float64, **kw), (8, 4, 9, 9)),
    "linear": (lambda **kw: Delinear(12, 3, block=4, dtype=torch.float64, **kw), (20, 12)),
}
LAYER = pytest.mark.parametrize("name", LAYERS)


# ------------------------------------------------------------------------------------------------------ momentum=None


@BACKEND
@pytest.mark.parametrize("name", ["3x3", "groups", "linear"])
def test_without_momentum_all_batches_weigh_the_same(name, backend):
    make, shape = LAYERS[name]
    layer, data = make(momentum=None, backend=backend), batches(*shape)
    for x in data:
        layer(x)
    assert_averages(layer, data)
    assert layer.num_updates.tolist() == [20] * getattr(layer, "groups", 1)


def test_channel_deconv_averages_too():
    layer, data = ChannelDeconv(4, momentum=None, dtype=torch.float64), batches(6, 10, 7, 7)
    for x in data:
        layer(x)
    once = []
    for x in data:
        other = ChannelDeconv(4, dtype=torch.float64)  # its first batch's statistics replace the initial ones
        other(x)
        once.append([b for b in other.buffers() if b.is_floating_point()])
    expected = [torch.stack(values).mean(0) for values in zip(*once, strict=True)]
    assert_close([b for b in layer.buffers() if b.is_floating_point()], expected, 1e-13)


def test_frozen_steps_are_not_counted():
    layer, data = (
        FastDeconv(4, 3, 3, freeze=True, freeze_iter=1, momentum=None, dtype=torch.float64),
        batches(8, 4, 9, 9),
    )
    for x in data:
        layer(x)
    assert layer.num_updates == 4  # steps 0, 1, 10 and 11
    assert layer.num_batches_tracked == 20
    assert_averages(layer, [data[i] for i in (0, 1, 10, 11)])


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
@pytest.mark.filterwarnings("ignore:network deconvolution met NaN")
def test_batches_that_are_refused_are_not_counted(bad):
    layer, data = LAYERS["3x3"][0](momentum=None), batches(8, 4, 9, 9, count=3)
    for x in (torch.full_like(data[0], bad), *data[:2], torch.full_like(data[0], bad), data[2]):
        layer(x)
    assert_averages(layer, data)


def test_momentum_may_be_set_later():
    layer, data = LAYERS["groups"][0](), batches(8, 4, 9, 9, count=4)
    layer(data[0])
    assert layer.momentum == 0.1
    layer.momentum = None
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_deconv", "num_updates"}
    for x in data[1:]:
        layer(x)
    assert_averages(layer, data[1:])  # from then on: what there was is replaced
    layer.momentum = 0.5
    assert "num_updates" not in layer.state_dict()
    assert "momentum=0.5" in repr(layer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_an_average_goes_on_in_a_copy(how):
    layer, data = LAYERS["3x3"][0](momentum=None), batches(8, 4, 9, 9, count=5)
    for x in data[:3]:
        layer(x)
    if how == "state_dict":
        other = LAYERS["3x3"][0](momentum=None)
        other.load_state_dict(layer.state_dict())
    else:
        other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    for x in data[3:]:
        other(x)
    assert_averages(other, data)


def test_a_checkpoint_without_a_count_starts_an_average():
    layer, data = LAYERS["3x3"][0](momentum=None), batches(8, 4, 9, 9, count=3)
    layer(data[0])
    layer.load_state_dict(LAYERS["3x3"][0]().state_dict())
    for x in data[1:]:
        layer(x)
    assert_averages(layer, data[1:])
    layer.reset_running_stats()
    layer(data[0])
    assert_averages(layer, data[:1])


def test_compiled():
    layer, data = LAYERS["groups"][0](momentum=None), batches(8, 4, 9, 9, count=4)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for x in data:
        compiled(x)
    assert_averages(layer, data)
    assert len(graphs) == 1


@pytest.mark.parametrize("layer", [lambda: FastDeconv(2, 2, 3), lambda: Delinear(18, 2)])
def test_the_functions_need_a_count(layer):
    module = layer()
    x = torch.randn(4, 2, 5, 5) if isinstance(module, FastDeconv) else torch.randn(9, 18)
    function = tdeconv.fast_deconv if isinstance(module, FastDeconv) else tdeconv.delinear
    running = torch.zeros(18), torch.eye(18)
    with pytest.raises(ValueError, match="momentum=None needs num_updates"):
        function(x, module.weight, module.bias, *running, training=True, momentum=None)
    with pytest.raises(ValueError, match=r"num_updates must have shape \(1,\), got \(2,\)"):
        function(x, module.weight, None, *running, training=True, momentum=None, num_updates=torch.zeros(2).long())
    counts = torch.zeros(1, device="meta").long()
    with pytest.raises(ValueError, match="num_updates is on meta but the input is on cpu"):
        function(x, module.weight, None, *running, training=True, momentum=None, num_updates=counts)
    count = torch.zeros(1).long()
    function(x, module.weight, module.bias, *running, training=True, momentum=None, num_updates=count)
    assert count == 1
    function(x, module.weight, module.bias, training=True, momentum=None)  # keeps no statistics: needs no count


# -------------------------------------------------------------------------------------------------------- update_stats


@LAYER
@BACKEND
def test_one_pass_gives_the_average(name, backend):
    """Whatever training left behind: a running mean of 2.64 after 20 batches of mean 3.0, from 0 with momentum 0.1."""
    make, shape = LAYERS[name]
    layer, data = make(backend=backend), batches(*shape)
    for x in data:
        layer(x)
    kept = {k: v.clone() for k, v in layer.state_dict().items()}
    counted = 3 if name == "freezing" else 20
    assert_close(layer.running_mean, torch.full_like(layer.running_mean, 3 - 3 * 0.9**counted), 0.05)
    assert update_stats(layer, data) is layer
    assert_averages(layer, data)
    assert_close(layer.running_mean, torch.full_like(layer.running_mean, 3.0), 0.02)
    assert layer.training
    assert layer.momentum == 0.1
    assert layer.state_dict().keys() == kept.keys()
    assert all(torch.equal(layer.state_dict()[k], kept[k]) for k in ("weight", "bias"))
    if name == "freezing":
        assert layer.freeze
        assert layer.num_batches_tracked == 20  # goes on where it was


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(FastDeconv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), ChannelDeconv(4), nn.Dropout(0.5)),
        *(nn.Flatten(), Delinear(6 * 36, 5, block=54)),
    ).double()


def test_batch_norms_are_estimated_in_the_same_pass():
    """As torch's own update_bn does, in a model that keeps some; with dropout off, as in evaluation."""
    net, data = network(), batches(8, 3, 8, 8)
    other = copy.deepcopy(net)
    update_stats(net, data)
    update_bn(data, other)
    for ours, theirs in ((net[1].running_mean, other[1].running_mean), (net[1].running_var, other[1].running_var)):
        assert_close(ours, theirs, 1e-13)
    hidden = [net[:1](x) for x in data]
    assert_close(net[1].running_mean, torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0), 1e-12)
    assert net[1].momentum == 0.1
    assert net[3].num_batches_tracked == 20
    assert all(m.training for m in net.modules())


def test_modes_come_back():
    net, data = network().eval(), batches(8, 3, 8, 8, count=2)
    net[4].train()
    update_stats(net, data)
    assert [m.training for m in net] == [False] * 4 + [True] + [False] * 2
    assert not net.training


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x, "label"], lambda x: {"input": x}], ids=["x", "()", "[]", "{}"]
)
def test_batches_of_every_kind(wrap):
    net, data = network(), batches(8, 3, 8, 8, count=3)
    expected = copy.deepcopy(net)
    update_stats(expected, data)
    update_stats(net, (wrap(x) for x in data), device="cpu")
    for a, b in zip(net.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_changed_by_a_pass_that_fails():
    net, data = network(), batches(8, 3, 8, 8, count=3)
    net(data[0])
    net[0].momentum = None
    net(data[1])
    before = copy.deepcopy(net.state_dict())
    for bad, error in (
        ([], ValueError),
        ([data[0], "text"], TypeError),
        ([data[0], ["text"]], TypeError),
        ([data[0], data[0][:, :2]], ValueError),
    ):
        with pytest.raises(error, match=r"a batch must be|loader must give|expected an input with 3 channels"):
            update_stats(net, bad)
        assert before.keys() == net.state_dict().keys()
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert all(m.training for m in net.modules())
        assert (net[0].momentum, net[1].momentum, net[6].momentum) == (None, 0.1, 0.1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        update_stats("model", data)


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = LAYERS["linear"][0](), LAYERS["linear"][0]()

        def forward(self, x):
            return self.used(x)

    net, data = Two(), batches(20, 12, count=3)
    net.unused(data[0])
    before = copy.deepcopy(net.unused.state_dict())
    update_stats(net, data)
    assert all(torch.equal(v, before[k]) for k, v in net.unused.state_dict().items())
    assert_averages(net.used, data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LAYERS["linear"][0](momentum=None),
        lambda: ChannelDeconv(4, dtype=torch.float64),
        lambda: ChannelDeconv(4, momentum=None, dtype=torch.float64),
        lambda: nn.BatchNorm1d(12, momentum=None, dtype=torch.float64),
    ],
)
@pytest.mark.parametrize("blank", [False, True])
def test_an_average_goes_on_after_a_pass_that_has_not_reached_it(make, blank):
    """Nor have blank batches."""
    layer, data = make(), batches(20, 12, count=4)
    for x in data[:3]:
        layer(x)
    other = copy.deepcopy(layer)
    if blank and not isinstance(layer, nn.BatchNorm1d):
        update_stats(layer, [torch.zeros_like(data[0])])
    elif not blank:
        net = LAYERS["linear"][0]()
        net.unused = layer
        update_stats(net, data)
    layer(data[3])
    other(data[3])
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", [slice(0, 8), slice(8, 10)], ids=["blocks", "rest"])
def test_channel_deconv_counts_its_two_parts_apart(part):
    data = batches(6, 10, 7, 7, count=4)
    layer, other = (ChannelDeconv(4, momentum=None, dtype=torch.float64) for _ in range(2))
    dead = data[0].clone()
    dead[:, part] = 0
    for x in (dead, *data[1:]):
        layer(x)
    for x in data[1:]:
        other(x)
    names = ("running_mean1", "running_deconv") if part.start == 0 else ("running_mean2", "running_var")
    for name in names:
        assert torch.equal(getattr(layer, name), getattr(other, name))
    assert layer.num_updates.tolist() == ([3, 4] if part.start == 0 else [4, 3])


def test_averaged_weights_get_statistics_of_their_own():
    """The recipe of the README."""
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(3, 8, 3), nn.ReLU(), nn.Flatten(), Delinear(8 * 36, 4, block=72)).double()
    averaged, data = AveragedModel(net), batches(64, 3, 8, 8, count=6)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for x in data:
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(64) % 4).backward()
        optimiser.step()
        averaged.update_parameters(net)
    update_stats(averaged, data)
    first, relu, flatten, last = averaged.module
    assert_averages(first, data)
    hidden = []
    for x in data:
        first.train()
        hidden.append(flatten(relu(first(x))))
    assert_averages(last, hidden)
