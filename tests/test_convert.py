"""convert_deconv: the layers it makes, its options, its report, and what it refuses."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from helpers import assert_close, randn
from models import timm, torchvision
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.replacements import Clone


def plain_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def report_of(model: nn.Module, **options: Any) -> ConversionReport:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return report


# ------------------------------------------------------------------------------------------------ the layers it makes

CONVOLUTIONS = {
    "1d": (nn.Conv1d(6, 4, 5, stride=2, padding=2), FastDeconv1d, (2, 6, 11)),
    "2d": (nn.Conv2d(6, 4, (3, 5), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), FastDeconv, (2, 6, 9, 10)),
    "3d": (nn.Conv3d(3, 4, 3, padding=1), FastDeconv3d, (2, 3, 5, 6, 7)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), FastDeconv, (2, 3, 6, 6)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), FastDeconv, (2, 3, 6, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), FastDeconv, (2, 3, 6, 6)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2), FastDeconv, (2, 6, 6, 6)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), FastDeconv, (2, 6, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("conv", "kind", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_converted_convolution_is_the_convolution_until_it_is_trained(
    conv: nn.Module, kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    conv = copy.deepcopy(conv).double().eval()
    layer = convert_deconv(conv)
    assert type(layer) is kind
    assert layer.weight is conv.weight
    assert conv.bias is None or layer.bias is conv.bias
    x = randn(*shape)
    assert_close(layer(x), conv(x), 1e-12)


def test_weight_bias_device_dtype_mode_and_layout_are_kept() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.bfloat16).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    layer = convert_deconv(conv)
    assert layer.weight is conv.weight
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert {t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()} == {torch.bfloat16}
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.bias.count_nonzero() == 0
    meta = convert_deconv(nn.Conv2d(4, 6, 3, device="meta"))
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


def test_parameters_keep_their_names_and_random_numbers_are_not_drawn() -> None:
    model = plain_net()
    weights, state = {n: p for n, p in model.named_parameters() if p.ndim > 1}, torch.get_rng_state()
    convert_deconv(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights.items() <= dict(model.named_parameters()).items()


def test_options_reach_the_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3)
    )
    convert_deconv(model, block=4, sampling_stride=2, n_iter=6, first_n_iter=9, backend="reference")
    assert [m.n_iter for m in model] == [9, 1, 3, 6]
    assert [m.freeze for m in model] == [True, False, False, False]
    assert [m.block for m in model] == [4, 1, 4, 4]
    assert {(m.sampling_stride, m.backend) for m in model} == {(2, "reference")}
    few = convert_deconv(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)), n_iter=2, freeze_first=False)
    assert [(m.n_iter, m.freeze) for m in few] == [(5, False), (2, False)]


def test_statistics_every_few_steps_are_for_convolutions_and_begin_late() -> None:
    """Or no layer would hold the activations' size in a step between."""
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
    model = convert_deconv(nn.Sequential(*copy.deepcopy(layers)), linear=True, stats_interval=10)
    assert [(m.stats_interval, m.stats_warmup) for m in model] == [(10, 100), (10, 100), (1, 20)]
    early = convert_deconv(nn.Sequential(*layers), stats_interval=4, stats_warmup=7)
    assert [(m.stats_interval, m.stats_warmup) for m in early[:2]] == [(4, 7), (4, 7)]


def test_other_options_are_the_papers() -> None:
    first, second = convert_deconv(nn.Sequential(nn.Conv2d(128, 128, 3), nn.Conv2d(128, 8, 3)), recipe="paper")
    assert (first.n_iter, first.freeze, first.freeze_iter) == (15, True, 100)
    assert (second.n_iter, second.freeze, second.block, second.sampling_stride, second.grouping) == (
        *(5, False, 64, 3),
        "interleaved",
    )
    assert (second.eps, second.momentum) == (1e-5, 0.1)


def segmentation_net() -> nn.Module:
    """A backbone and a head, whose layers see 8 channels each."""
    parts = {
        name: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        for name in ("backbone", "head")
    }
    return nn.ModuleDict(parts)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (4, [4, 4, 4, 4]),
        ({}, [8, 8, 8, 8]),  # 64, of which there are 8 channels
        ({"*": 2}, [2, 2, 2, 2]),
        ({"head.2": 2}, [8, 8, 8, 2]),
        ({"head": 2}, [8, 8, 2, 2]),  # and all that is inside it
        ({"head.2": 1, "head": 2, "*": 4}, [4, 4, 2, 1]),
        ({"*": 4, "head": 2}, [4, 4, 4, 4]),  # the first name that fits counts
        ({"*.0": 2}, [2, 8, 2, 8]),
    ],
)
def test_block_by_name(block: Any, expected: list[int]) -> None:
    model = segmentation_net()
    convert_deconv(model, block=block)
    assert [m.block for m in model.modules() if isinstance(m, FastDeconv)] == expected


def test_block_of_a_layer_with_two_names() -> None:
    model = segmentation_net()
    model.again = model["head"][2]
    convert_deconv(model, block={"again": 2})
    assert model["head"][2].block == 2


def test_linear_on_request() -> None:
    model = plain_net()
    assert type(convert_deconv(model)[-1]) is nn.Linear
    weight = model[-1].weight
    convert_deconv(model, linear=True, block_fc=4)
    assert type(model[-1]) is Delinear
    assert (model[-1].block, model[-1].weight) == (4, weight)
    without = convert_deconv(nn.Linear(4, 2, bias=False), linear=True)
    assert without.bias.count_nonzero() == 0


# -------------------------------------------------------------------------------------------------- what there can be


def test_shared_modules_stay_shared() -> None:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": nn.Sequential(conv, norm), "b": nn.Sequential(conv, norm, conv)})
    model.again = conv
    report = report_of(model["b"])
    assert "for its 2 calls" in report.converted[0].why
    assert type(model["b"][0]) is FastDeconv
    assert model["b"][0] is model["b"][2]
    model = nn.ModuleDict({"a": nn.Sequential(conv, norm), "b": nn.Sequential(conv, norm, conv)})
    convert_deconv(model)
    assert model["a"][0] is model["b"][0] is model["b"][2]
    assert model["a"][1] is model["b"][1]


def test_timm_batch_norm_keeps_its_dropout_and_activation() -> None:
    layers = timm().layers
    norms = {
        "act": layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        "both": layers.BatchNormAct2d(4, drop_layer=nn.Dropout),
        "neither": layers.BatchNormAct2d(4, apply_act=False),
        "frozen": layers.freeze_batch_norm_2d(layers.BatchNormAct2d(4)),
    }
    for name, norm in norms.items():
        model = convert_deconv(nn.Sequential(nn.Conv2d(4, 4, 1), norm))
        kept = model[1] if isinstance(model[1], nn.Sequential) else [model[1]]
        expected = {"act": [nn.SiLU], "both": [nn.Dropout, nn.ReLU], "neither": [nn.Identity], "frozen": [nn.ReLU]}
        assert [type(m) for m in kept] == expected[name]


def test_timm_activation_in_place_leaves_the_shortcut_alone() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = timm().layers.BatchNormAct2d(4, inplace=True), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x)) + x

    model = PreActivation().double()
    conv = copy.deepcopy(model.conv)
    convert_deconv(model).eval()
    x = randn(2, 4, 5, 5)
    assert_close(model(x.clone()), conv(x.relu()) + x, 1e-12)


def test_frozen_batch_norms_go_too() -> None:
    frozen = torchvision().ops.FrozenBatchNorm2d(4)
    evaluated = nn.BatchNorm2d(4).eval().requires_grad_(False)
    for norm in (frozen, evaluated, nn.BatchNorm2d(4, track_running_stats=False), nn.SyncBatchNorm(4)):
        model = convert_deconv(nn.Sequential(nn.Conv2d(4, 4, 1), norm))
        assert type(model[1]) is nn.Identity


def test_detector_with_frozen_batch_norm_converts() -> None:
    with torch.device("meta"):
        detection = torchvision().models.detection
        model = detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, norm_layer=torchvision().ops.FrozenBatchNorm2d
        )
    report = report_of(model)
    assert len(report.removed) == 53
    heads = {row.name.split(".")[0] for row in report.left if row.why == "no batch norm before or behind it"}
    assert heads == {"backbone", "rpn"}  # the pyramid's convolutions, in the backbone, have none
    assert len(report.left) == len([row for row in report.left if "linear=False" in row.why]) + 11


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Renamed(nn.Conv2d):
    """A constructor of its own alone, as torchvision's video models have it."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(lambda *_: None)
    return conv


LEFT = {
    "own forward": (lambda: Own(4, 4, 1), "a subclass of Conv2d"),
    "standardised weight": (lambda: timm().layers.StdConv2d(4, 4, 1), "a subclass of Conv2d"),
    "dynamic padding": (lambda: timm().layers.Conv2dSame(4, 4, 1), "a subclass of Conv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 1), "a transposed convolution"),
    "hooks": (hooked, "hooks"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "computed from others"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), "computed from others"),
    "lazy": (lambda: nn.LazyConv2d(4, 1), "run the model once"),
    "complex": (lambda: nn.Conv2d(4, 4, 1, dtype=torch.complex64), "complex64"),
}


@pytest.mark.filterwarnings("ignore:.*(Lazy modules|spectral_norm|Complex modules).*")
@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT.keys())
def test_convolution_that_cannot_be_replaced_is_left_with_its_batch_norm(make: Any, why: str) -> None:
    model = nn.Sequential(make(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    before = list(model)
    report = report_of(model)
    assert why in report.left[0].why
    assert [a is b for a, b in zip(model, before, strict=True)] == [True, True, False]


def test_subclass_that_computes_the_same_is_converted() -> None:
    assert type(convert_deconv(nn.Sequential(Renamed()))[0]) is FastDeconv


def test_batch_norm_subclasses_and_hooked_ones_are_left() -> None:
    class OwnNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    hooked_norm = nn.BatchNorm2d(4)
    hooked_norm.register_forward_hook(lambda *_: None)
    for norm, why in ((OwnNorm(4), "a subclass"), (hooked_norm, "hooks"), (nn.LazyBatchNorm2d(), "run the model once")):
        report = report_of(nn.Sequential(nn.Conv2d(4, 4, 1), norm))
        assert why in report.left[0].why


# --------------------------------------------------------------------------------------------- options and the report


@pytest.mark.parametrize("exclude", ["4", ["4"], ("[4]",), nn.Linear, [nn.Linear, nn.ReLU]])
def test_exclude_by_name_wildcard_and_class(exclude: Any) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), inner)
    report = report_of(model, linear=True, exclude=exclude)
    excluded = {row.name for row in report.left if row.why == "excluded"}
    assert excluded == ({"4.0"} if exclude not in (nn.Linear, [nn.Linear, nn.ReLU]) else {"0", "2", "4.0"})


def test_report_is_a_table() -> None:
    report = report_of(plain_net())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "was", "became", "why"]
    assert lines[2].split("  ")[0] == "0"
    assert "Conv2d(3, 8, 3x3)" in lines[2]
    assert "FastDeconv(block=3, n_iter=5, freeze)" in lines[2]
    assert "first convolution" in lines[2]
    assert "Identity" in lines[3]
    assert "behind 0" in lines[3]
    assert lines[-1] == "layers converted: 2; batch norms removed: 2; left: 1"
    assert [len(rows) for rows in (report.converted, report.removed, report.left)] == [2, 2, 1]
    assert max(map(len, lines)) < 120


def test_report_of_a_guess_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return y if y.sum() > 0 else -y

    model = Branching()
    report = report_of(model)
    assert report.removed[0].why == "behind conv, by the order of modules"
    assert report.left[0].name == "other"  # five features: not that convolution's
    assert type(model.norm) is Clone  # who else reads the convolution's output is not known


def test_one_line_goes_to_the_log_and_nothing_to_the_screen(caplog: Any, capfd: Any) -> None:
    report = ConversionReport()
    with caplog.at_level(logging.INFO, "tdeconv"):
        convert_deconv(plain_net())
        convert_deconv(plain_net(), report=report)
    assert report.summary == "layers converted: 2; batch norms removed: 2; left: 1"
    assert caplog.messages == [f"{report.summary} (report=tdeconv.ConversionReport() lists them)"] * 2
    assert capfd.readouterr() == ("", "")


def test_report_is_filled_anew() -> None:
    report = report_of(plain_net())
    convert_deconv(nn.ReLU(), report=report)
    assert not report.rows


# ----------------------------------------------------------------------------------------------------------- warnings


def trained(net: nn.Module) -> nn.Module:
    net(torch.randn(4, 3, 8, 8))
    return net


def has(norm: nn.Module, **buffers: float) -> nn.Module:
    for name, value in buffers.items():
        getattr(norm, name).fill_(value)
    return norm


@pytest.mark.parametrize(
    "norm",
    [
        lambda: has(nn.BatchNorm2d(4), running_mean=0.1),
        lambda: has(nn.BatchNorm2d(4), running_var=2),
        lambda: has(nn.BatchNorm2d(4, affine=False), num_batches_tracked=1),
        lambda: has(torchvision().ops.FrozenBatchNorm2d(4), running_var=2),
        lambda: has(timm().layers.BatchNormAct2d(4), running_mean=1),
        lambda: has(timm().layers.freeze_batch_norm_2d(timm().layers.BatchNormAct2d(4)), running_mean=1),
    ],
    ids=["mean", "variance", "counter", "frozen", "timm", "timm frozen"],
)
def test_warns_that_a_trained_model_changes(norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), norm())
    with pytest.warns(UserWarning, match=r"its batch norm '3' has the statistics .* Train it on") as caught:
        convert_deconv(model)
    assert caught[0].filename == __file__  # the caller's line


def test_warns_of_training_that_a_batch_norm_that_stays_tells_of() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.conv, self.gone = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(x + self.gone(self.conv(x)))

    model = Residual()
    has(model.kept, running_mean=1)
    with pytest.warns(UserWarning, match="batch norm 'kept'"):
        convert_deconv(copy.deepcopy(model))
    has(model.gone, running_mean=1)
    with pytest.warns(UserWarning, match="batch norm 'gone'"):  # the better example
        convert_deconv(model)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = trained(plain_net())
    before = list(model.modules())
    with pytest.raises(UserWarning, match="batch norm '1'"):  # the tests make errors of warnings
        convert_deconv(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_no_warning_where_nothing_that_was_trained_changes() -> None:
    head = nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5)
    linear = nn.Sequential(nn.Linear(3, 3), has(nn.BatchNorm1d(3), running_mean=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_deconv(nn.Sequential(trained(plain_net()), *head), exclude="0")
        convert_deconv(linear)  # nothing is converted
        with torch.device("meta"):
            convert_deconv(plain_net())  # without values
        with FakeTensorMode():
            convert_deconv(plain_net())
    assert not caught


def test_converting_a_trained_converted_model_again_is_silent() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gone, self.kept = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.up = nn.ConvTranspose2d(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.kept(x + self.gone(self.conv(x))))

    model = trained(convert_deconv(Residual()))
    assert model.kept.num_batches_tracked == 1
    convert_deconv(model)


def test_warns_if_nothing_was_converted_and_says_why() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), Own(4, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2))
    with pytest.warns(UserWarning, match="nothing: 2 of the model's 3 .* reason: a transposed convolution") as caught:
        convert_deconv(model)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="2 of the model's 2 convolutions were left for this reason: excluded"):
        convert_deconv(plain_net(), exclude="*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_deconv(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))  # no convolution


# ---------------------------------------------------------------------------------------------------- awkward callers


def test_converting_twice_changes_nothing() -> None:
    model = convert_deconv(plain_net())
    modules = list(model.modules())
    report = report_of(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not report.converted
    assert not report.removed
    assert [row.why for row in report.left] == ["a deconvolution layer already"] * 2 + ["linear=False"]


def test_model_without_convolutions_is_left_alone_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    report = report_of(model)
    assert convert_deconv(model) is model
    assert "no convolution" in str(report)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_converted_without_gradients_it_still_trains(mode: Any) -> None:
    model = plain_net()
    with mode():
        convert_deconv(model)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_converted_model_can_be_copied_and_pickled() -> None:
    model = convert_deconv(plain_net()).eval()
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_single_layer_is_replaced_by_the_return_value() -> None:
    report = ConversionReport()
    assert type(convert_deconv(nn.Conv2d(3, 4, 1), report=report)) is FastDeconv
    assert report.rows[0].name == "(the model)"
    assert type(convert_deconv(nn.BatchNorm2d(4))) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (None, {}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        (nn.DataParallel(nn.Conv2d(3, 4, 1)), {}, TypeError, "wrapped in DataParallel; convert the model before"),
        (plain_net(), {"block": 0}, ValueError, "block must be at least 1"),
        (plain_net(), {"block": "64"}, TypeError, "block must be a positive int, got '64'"),
        (plain_net(), {"block": {"0": 0}}, ValueError, r"block\['0'\] must be at least 1, got 0"),
        (plain_net(), {"block": {"0": 1.5}}, TypeError, r"block\['0'\] must be a positive int, got 1.5"),
        (plain_net(), {"block": {0: 8}}, TypeError, "block must map names of modules to ints, got a name 0"),
        (plain_net(), {"block": {"head": 8}}, ValueError, "block names 'head', but the model has no module"),
        (plain_net(), {"n_iter": 1.5}, TypeError, "n_iter must be a positive int"),
        (plain_net(), {"first_n_iter": 0}, ValueError, "first_n_iter must be at least 1"),
        (plain_net(), {"block_fc": 0}, ValueError, "block_fc must be at least 1"),
        (plain_net(), {"sampling_stride": 0}, ValueError, "sampling_stride must be at least 1"),
        (plain_net(), {"backend": "cudnn"}, ValueError, "backend must be one of"),
        (plain_net(), {"exclude": ["layer7"]}, ValueError, "exclude names 'layer7', but the model has no module"),
        (plain_net(), {"exclude": [3]}, TypeError, "exclude must hold names and classes of modules, got 3"),
    ],
)
def test_bad_input(model: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    before = list(model.modules()) if model is not None else []
    with pytest.raises(error, match=match):
        convert_deconv(model, **options)
    assert all(a is b for a, b in zip(before, model.modules() if model is not None else [], strict=True))


def test_wrapped_part_of_a_model_is_refused() -> None:
    """By its class's name: what wraps needs processes."""

    class FullyShardedDataParallel(nn.Sequential): ...

    class DistributedDataParallel(nn.Sequential): ...

    class Own(DistributedDataParallel): ...  # of a training library

    for kind in (FullyShardedDataParallel, DistributedDataParallel, Own):
        with pytest.raises(
            TypeError, match=f"model's part '1' is wrapped in {kind.__name__}; convert the model before"
        ):
            convert_deconv(nn.Sequential(nn.ReLU(), kind(plain_net())))
        with pytest.raises(TypeError, match=f"model is wrapped in {kind.__name__}; convert"):
            convert_deconv(kind(plain_net()))


def test_sharded_model_is_refused() -> None:
    model = plain_net()
    model[0].weight.placements = ()  # what tells a DTensor
    with pytest.raises(TypeError, match=r"DTensor parameters .* convert the model before sharding"):
        convert_deconv(model)


@pytest.mark.filterwarnings("ignore:.*jit.script.*")
def test_script_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ScriptModule.*convert the model before scripting"):
        convert_deconv(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))))


@pytest.mark.filterwarnings("ignore:.*jit.script.*")
def test_script_module_inside_is_left() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    model = nn.Sequential(scripted, nn.Conv2d(4, 4, 1))
    report = report_of(model)
    assert [(row.name, row.action) for row in report.rows] == [("0", "left"), ("1", "converted")]
    assert "ScriptModule" in report.left[0].why
    assert not scripted.training
