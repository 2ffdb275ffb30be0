"""Batches that say little: of one sample, without variation, with fewer samples than features."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import tdeconv
from helpers import BACKENDS, FAST, all_finite, assert_close, randn, train_step
from tdeconv import ChannelDeconv, Delinear, FastDeconv, FastDeconv1d, FastDeconv3d, reference, running

# name: (layer, shape of an image, or of a row)
LAYERS = {
    "3x3": (lambda **kw: FastDeconv(6, 4, 3, **kw), (6, 9, 9)),
    "blocks": (lambda **kw: FastDeconv(6, 4, 3, block=2, **kw), (6, 9, 9)),
    "1x1": (lambda **kw: FastDeconv(6, 4, 1, **kw), (6, 5, 5)),
    "groups": (lambda **kw: FastDeconv(6, 4, 3, groups=2, **kw), (6, 9, 9)),
    "depthwise": (lambda **kw: FastDeconv(6, 6, 3, groups=6, **kw), (6, 9, 9)),
    "fifteen steps": (lambda **kw: FastDeconv(3, 4, 3, n_iter=15, **kw), (3, 9, 9)),
    "1d": (lambda **kw: FastDeconv1d(3, 4, 5, **kw), (3, 30)),
    "3d": (lambda **kw: FastDeconv3d(2, 4, 3, **kw), (2, 6, 6, 6)),
    "linear": (lambda **kw: Delinear(12, 4, **kw), (12,)),
    "channels": (lambda **kw: ChannelDeconv(4, **kw), (10, 6, 6)),
    "channels, all in blocks": (lambda **kw: ChannelDeconv(5, **kw), (10, 6, 6)),
}
LAYER = pytest.mark.parametrize("name", LAYERS)
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def trained(name: str, backend: str, steps: int = 5, **options) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name][0](backend=backend, **options)
    for step in range(steps):
        layer(batch(name, seed=step))
    return layer


def batch(name: str, images: int = 8, seed: int = 0) -> torch.Tensor:
    return randn(images, *LAYERS[name][1], dtype=torch.float32, seed=seed) + 0.5


def running_values(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in layer.named_buffers() if b.is_floating_point()}


def assert_unmoved(layer: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in running_values(layer).items():
        assert torch.equal(value, before[name]), name


# -------------------------------------------------------------------------------------------------- without variation


# to ChannelDeconv, whose second moment is about zero, a constant is data
BLANK = [(name, value) for name in LAYERS for value in (0.0, 0.3, -1e6) if value == 0 or "channels" not in name]
KERNELS = [(name, 0.3, "triton") for name in ("1x1", "depthwise", "linear")]  # interpreted, each takes seconds


@pytest.mark.parametrize(("name", "value", "backend"), [*((*blank, b) for blank in BLANK for b in BACKENDS), *KERNELS])
def test_blank_batches_are_not_counted(name, value, backend):
    """What is computed is the method's; the running statistics keep what they learnt of data."""
    layer = trained(name, backend)
    before = running_values(layer)
    x = torch.full_like(batch(name), value)
    shown = train_step(layer, x)
    assert_unmoved(layer, before)
    assert all_finite(shown)
    layer(batch(name, seed=9))  # and the next batch counts again
    for key, now in running_values(layer).items():
        assert not torch.equal(now, before[key]) or key in ("running_mean2", "running_var")


@BACKEND
def test_one_row_does_not_ruin_a_linear_layer(backend):
    """As reported: its covariance of zero has the root of eps I, and running_deconv's diagonal went from 1.5 to 33."""
    torch.manual_seed(0)
    layer = Delinear(64, 8, backend=backend)
    for seed in range(100):
        layer(randn(32, 64, dtype=torch.float32, seed=seed))
    before = running_values(layer)
    x = randn(1, 64, dtype=torch.float32, seed=1000)
    y = layer(x)
    assert_unmoved(layer, before)
    # as the method has it: the row is its own mean, and cancels
    whitened = x.abs() @ reference.inverse_sqrt(layer.eps * torch.eye(64), layer.n_iter)
    assert_close(y, layer.bias.expand(1, 8), 1e-6, [whitened @ layer.weight.abs().T])


def test_an_mlp_survives_a_last_batch_of_one():
    """Trained on batches of 32 and a last one of a single row, each epoch."""
    torch.manual_seed(0)
    net = nn.Sequential(Delinear(16, 32), nn.ReLU(), Delinear(32, 1))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02)
    x = torch.randn(32 * 6 + 1, 16)
    target = x[:, :1] * x[:, 1:2]
    for _ in range(30):
        for rows, wanted in zip(x.split(32), target.split(32), strict=True):
            loss = (net(rows) - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        trained = (net(x) - target).square().mean()
        evaluated = (net.eval()(x) - target).square().mean()
    assert evaluated < 2 * trained + 0.1


@BACKEND
def test_each_covariance_is_judged_by_itself(backend):
    """A channel that is off for a batch, in a depthwise convolution: it keeps its statistics, the others move on."""
    layer = trained("depthwise", backend)
    before = running_values(layer)
    x = batch("depthwise", seed=7)
    x[:, 2] = 0
    layer(x)
    moved = [not torch.equal(a, b) for a, b in zip(layer.running_deconv, before["running_deconv"], strict=True)]
    assert moved == [True, True, False, True, True, True]
    means = zip(layer.running_mean.view(6, 9), before["running_mean"].view(6, 9), strict=True)
    assert [not torch.equal(a, b) for a, b in means] == moved


def test_remaining_channels_are_judged_by_themselves():
    layer = trained("channels", "torch")
    before = running_values(layer)
    x = batch("channels", seed=7)
    x[:, 8:] = 0.25
    layer(x)
    moved = {name: not torch.equal(value, before[name]) for name, value in running_values(layer).items()}
    expected = {"running_mean1": True, "running_deconv": True, "running_mean2": False, "running_var": False}
    assert moved == expected


@LAYER
@BACKEND
def test_a_first_blank_batch_is_no_first_batch(name, backend):
    layers = [trained(name, backend, steps=0, momentum=None) for _ in range(2)]
    layers[0](torch.zeros_like(batch(name)))
    for layer in layers:
        layer(batch(name))
    for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["3x3", "depthwise", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blank_batches_in_half_precision(name, dtype):
    layer = trained(name, "torch").to(dtype)
    before = running_values(layer)
    layer(torch.zeros_like(batch(name, images=40)).to(dtype))
    assert_unmoved(layer, before)


def test_nothing_is_read_on_the_host():
    """On a device whose values cannot be read, in eager mode; and a compiled graph decides as eager mode does."""
    layer = FastDeconv(3, 4, 3, device="meta")
    layer(torch.empty(2, 3, 8, 8, device="meta"))
    layer = trained("groups", "torch")
    before = running_values(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.zeros_like(batch("groups")))
    assert_unmoved(layer, before)
    compiled(batch("groups", seed=3))
    assert not torch.equal(layer.running_deconv, before["running_deconv"])
    torch._dynamo.reset()


@BACKEND
@pytest.mark.parametrize("constant", [1e3, -1e9])
def test_a_constant_feature_hides_no_other(constant, backend):
    """Each is judged by its own size."""
    layer = Delinear(2, 1, backend=backend)
    for seed in range(60):
        layer(torch.stack([torch.full((256,), constant), randn(256, dtype=torch.float32, seed=seed)], 1))
    assert_close(layer.running_mean[0], torch.tensor(constant) * (1 - 0.9**60), 1e-5)


@BACKEND
def test_a_small_variation_is_one(backend):
    """Air pressure in Pascal: its spread is some 40 steps of float32 there."""
    layer = FastDeconv(1, 4, 3, backend=backend)
    for seed in range(60):
        layer(101325 + 0.3 * randn(16, 1, 20, 20, dtype=torch.float32, seed=seed))
    assert_close(layer.running_mean, torch.full((9,), 101325 * (1 - 0.9**60)), 1e-5)


@BACKEND
def test_values_whose_squares_overflow_are_not_counted(backend):
    layer = trained("3x3", backend)
    before = running_values(layer)
    layer(batch("3x3") * 1e11)
    assert_unmoved(layer, before)


# --------------------------------------------------------------------------------------------------------- one sample


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Delinear(6, 2), (1, 6)),
        (lambda: FastDeconv(3, 2, 3), (1, 3, 4, 4)),
        (lambda: FastDeconv(4, 4, 1, groups=2), (9, 4, 1, 1)),
        (lambda: FastDeconv(3, 2, 3, freeze=True), (1, 3, 4, 4)),
    ],
)
def test_one_sample_warns_once(make, shape):
    running._warn_of_nothing.cache_clear()
    layer = make()
    with pytest.warns(RuntimeWarning, match=r"batch without variation \(a single sample, or equal ones\)"):
        layer(torch.randn(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Delinear(6, 2, block=3), (1, 6)),
        (lambda: FastDeconv(3, 2, 3), (2, 3, 4, 4)),
        (lambda: FastDeconv(3, 2, 3).eval(), (1, 3, 4, 4)),
        (lambda: FastDeconv(3, 2, 3), (0, 3, 4, 4)),
        (lambda: frozen(FastDeconv(3, 2, 3, freeze=True)), (1, 3, 4, 4)),
    ],
)
def test_more_samples_or_none_warn_of_nothing(make, shape):
    running._warn_of_nothing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(torch.randn(shape))


def frozen(layer: FastDeconv) -> FastDeconv:
    layer.num_batches_tracked.fill_(500)
    return layer


# -------------------------------------------------------------------------------------------------------- few samples


def sampled_at(stride: int, layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    other = copy.deepcopy(layer)
    if layer.samples_per_feature:
        other.n_iter = layer.in_training(x)[2]
    other.sampling_stride, other.samples_per_feature = stride, 0
    return train_step(other, x)


@BACKEND
@pytest.mark.parametrize(
    ("layer", "shape", "stride"),
    [
        # patches times vectors against features: 3x3 of 4x4 positions and so on, for the largest stride that leaves 2 D
        ((4, 4, 3), (2, 4, 26, 26), 3),  # 2 * 64 against 2 * 36
        ((4, 4, 3), (2, 4, 20, 20), 3),  # 2 * 36
        ((4, 4, 3), (2, 4, 17, 17), 2),  # 2 * 25 at 3, 2 * 64 at 2
        ((4, 4, 3), (2, 4, 13, 13), 2),  # 2 * 36
        ((4, 4, 3), (2, 4, 12, 12), 1),  # 2 * 25 at 2
        ((4, 4, 3), (1, 4, 4, 4), 1),  # never enough: all there are
        ((8, 4, 1), (16, 8, 3, 3), 3),  # 144 pixels: 16 at a flat stride of 9
        ((8, 4, 1), (8, 8, 3, 3), 2),  # 8 at 9, 18 at 4
        ((8, 4, 1), (9, 8, 1, 1), 1),  # 9: all
    ],
)
def test_more_is_sampled_where_little_would_be(layer, shape, stride, backend):
    torch.manual_seed(0)
    made = FastDeconv(*layer, samples_per_feature=2, backend=backend)
    x = randn(*shape, dtype=torch.float32)
    expected = sampled_at(stride, made, x)
    for a, e in zip(train_step(made, x), expected, strict=True):
        assert a is e is None or torch.equal(a, e)
    assert made.in_training(x)[1].sampling_stride == stride


@pytest.mark.parametrize(
    ("samples", "steps"),
    # of 10 features: samples / 10 against 5.06, 11.4, 25.6 and 57.7
    [(1, 1), (50, 1), (51, 2), (113, 2), (114, 3), (256, 3), (257, 4), (576, 4), (577, 5), (10**6, 5)],
)
def test_fewer_steps_are_taken_where_samples_stay_few(samples, steps):
    x = torch.empty(samples, 10, 1, 1, device="meta")
    for n_iter in (1, 2, 3, 5, 8, 15):
        layer = FastDeconv(10, 2, 1, n_iter=n_iter, samples_per_feature=10**9, device="meta")
        expected = n_iter if steps == 5 else min(n_iter, steps)
        assert layer.in_training(x)[2] == expected
        assert FastDeconv(10, 2, 1, n_iter=n_iter, device="meta").in_training(x)[2] == n_iter


@BACKEND
def test_fewer_steps_are_that_many_steps(backend):
    torch.manual_seed(0)
    x = randn(3, 4, 5, 5)
    made = FastDeconv(4, 3, 3, samples_per_feature=1, sampling_stride=1, backend=backend).double()
    assert made.in_training(x)[2] == 1  # 27 patches for 36 features
    other = copy.deepcopy(made)
    other.samples_per_feature, other.n_iter = 0, 1
    for a, e in zip(train_step(made, x), train_step(other, x), strict=True):
        assert torch.equal(a, e)


def test_vectors_count_as_samples():
    geo = FastDeconv(8, 2, 3, block=2, samples_per_feature=2).in_training(torch.zeros(1, 8, 11, 11))[1]
    assert geo.sampling_stride == 3  # 9 patches of 4 vectors, for 18 features
    geo = FastDeconv(8, 4, 3, groups=4, samples_per_feature=2).in_training(torch.zeros(1, 8, 11, 11))[1]
    assert geo.sampling_stride == 1  # 9 at 3, 25 at 2


def test_a_given_stride_is_kept_unless_asked_otherwise():
    x = randn(2, 4, 6, 6, dtype=torch.float32)
    torch.manual_seed(0)
    layer = FastDeconv(4, 4, 3)
    expected = sampled_at(3, layer, x)
    for a, e in zip(train_step(layer, x), expected, strict=True):
        assert torch.equal(a, e)
    assert "samples_per_feature" not in repr(layer)
    assert "samples_per_feature=2" in repr(FastDeconv(4, 4, 3, samples_per_feature=2))


def test_functions_take_it_too():
    x, weight = randn(2, 4, 6, 6), randn(3, 4, 3, 3)
    dense = tdeconv.fast_deconv(x, weight, training=True, sampling_stride=1, n_iter=1)
    assert torch.equal(tdeconv.fast_deconv(x, weight, training=True, samples_per_feature=4), dense)
    assert not torch.equal(tdeconv.fast_deconv(x, weight, training=True), dense)


def head(images: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 8), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    return model, randn(images, 3, 8, 8, dtype=torch.float32)


@pytest.mark.parametrize("images", [8, 32, 200])
def test_converted_layers_of_one_pixel_see_every_image(images):
    """As reported: with every ninth image's only pixel, outputs of 7061 at batch 8."""
    model, x = head(images)
    tdeconv.convert_deconv(model)
    y = model(x)
    assert y.abs().max() < 50
    hidden = model[:3](x)
    last = model[3]
    _, geo, n_iter = last.in_training(hidden)
    assert geo.sampling_stride == (1 if images < 4 * 32 * 4 else 2)
    assert n_iter == (2 if images == 200 else 1)  # 6.25, 1 and 0.25 samples for each feature
    expected = reference.deconvolve(hidden, last.weight, last.bias, geo.every(), last.eps, n_iter)[0]
    assert_close(y, expected, 1e-4)


def test_conversion_says_how_many_samples_are_enough():
    model, _ = head(1)
    tdeconv.convert_deconv(model, samples_per_feature=7)
    assert [m.samples_per_feature for m in model if isinstance(m, FastDeconv)] == [7, 7]
    model, x = head(8)
    tdeconv.convert_deconv(model, samples_per_feature=0)  # the paper's sampling
    assert model[3].in_training(model[:3](x))[1].sampling_stride == 3


@pytest.mark.parametrize("fast", FAST)
def test_a_compiled_layer_follows_the_batch(fast):
    """Another batch size may mean another stride: the graph is made anew where it does, and not for every size."""
    torch.manual_seed(0)
    layer = FastDeconv(4, 4, 3, samples_per_feature=2, backend=fast)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    ways = set()
    for images in (2, 3, 7, 8, 9, 20, 21, 22):
        x = randn(images, 4, 12, 12, dtype=torch.float32, seed=images)
        expected = copy.deepcopy(layer)(x)
        assert_close(compiled(x), expected, 1e-6)
        _, geo, n_iter = layer.in_training(x)
        ways.add((geo.sampling_stride, n_iter))
    assert len(graphs) <= len(ways)
    torch._dynamo.reset()


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "4"])
def test_bad_samples_per_feature(value):
    with pytest.raises((TypeError, ValueError), match="samples_per_feature must be"):
        FastDeconv(3, 4, 3, samples_per_feature=value)
