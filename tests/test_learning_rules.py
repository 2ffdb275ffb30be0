"""What convert_deconv does so that converted networks learn: each rule, and the start that the rules give together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdeconv
from helpers import Net, assert_close, randn
from models import timm, torchvision
from tdeconv import ConversionReport, FastDeconv, convert_deconv

pytestmark = pytest.mark.usefixtures("one_thread")


def report_of(model: nn.Module, **options: Any) -> ConversionReport:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return report


def norm(channels: int, start: float | None = None) -> nn.BatchNorm2d:
    """With a weight and bias as training would leave them, or a weight of ``start``."""
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, 2, channels) if start is None else torch.full((channels,), start))
        made.bias.copy_(torch.linspace(3, -2, channels))
    return made


def sizes(layer: Any) -> Tensor:
    return layer.weight.detach().flatten(1).norm(dim=1)


# --------------------------------------------------------------------------------------------- scale and shift


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_starts_at_the_scale_and_shift_of_its_batch_norm(bias: bool, groups: int) -> None:
    conv, own = nn.Conv2d(4, 8, 3, groups=groups, bias=bias), norm(8)
    weight, parameter = conv.weight.detach().clone(), conv.weight
    model = convert_deconv(nn.Sequential(conv, own))
    assert_close(sizes(model[0]), own.weight.detach().abs(), 1e-6)
    direction = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert_close(model[0].weight, direction * own.weight.view(-1, 1, 1, 1), 1e-6)
    assert torch.equal(model[0].bias, own.bias)
    assert model[0].weight is parameter
    assert model[0].bias is not own.bias


def test_whitened_outputs_have_the_batch_norms_deviation() -> None:
    """Where whitening is complete, as by ten steps here, an output's mean and deviation are the batch norm's."""
    torch.manual_seed(0)
    x = randn(4096, 6) @ randn(6, 6) + 3
    conv, own = nn.Conv2d(6, 8, 1), norm(8)
    model = convert_deconv(nn.Sequential(conv, own), first_n_iter=40, freeze_first=False).double()
    y = model(x[:, :, None, None])[..., 0, 0].detach()
    assert_close(y.std(0), own.weight.detach().abs().double(), 0.05)
    assert_close(y.mean(0), own.bias.detach().double(), 0.05)


def test_branch_that_starts_at_zero_does() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.conv(x))

    model = convert_deconv(Residual())
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(model(x), x)
    model(x).square().sum().backward()
    assert model.conv.weight.grad.any()  # it does not stay there


def test_batch_norms_without_a_weight_mean_one_and_zero() -> None:
    conv = nn.Conv2d(3, 5, 3)
    convert_deconv(model := nn.Sequential(conv, nn.BatchNorm2d(5, affine=False)))
    assert_close(sizes(model[0]), torch.ones(5), 1e-6)
    assert not model[0].bias.any()


def test_a_weight_of_zero_stays_zero() -> None:
    conv = nn.Conv2d(3, 2, 3)
    nn.init.zeros_(conv.weight)
    convert_deconv(model := nn.Sequential(conv, nn.BatchNorm2d(2)))
    assert torch.equal(model[0].weight, torch.zeros(2, 3, 3, 3))


def test_half_precision_and_meta_weights() -> None:
    model = convert_deconv(nn.Sequential(nn.Conv2d(3, 5, 3), norm(5)).bfloat16())
    assert_close(sizes(model[0].float()), torch.linspace(-1, 2, 5).abs(), 0.01)
    with torch.device("meta"):
        model = convert_deconv(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    assert model[0].weight.is_meta


UNSCALED = {
    "two batch norms": lambda m, x: m.n(m.c(x)) + m.o(m.c(x)),
    "two convolutions": lambda m, x: m.n(torch.cat([m.c(x), m.d(x)], 1)[:, :4]) + m.o(x),
    "pixels from channels": lambda m, x: m.p(nn.functional.pixel_shuffle(m.c(x), 2)),
    "other order of channels": lambda m, x: m.n(nn.functional.channel_shuffle(m.c(x), 2)),
    "a sum of both": lambda m, x: (y := m.c(x)) + m.n(y),
    "an activation between": lambda m, x: m.n(m.c(x).relu()),
}


@pytest.mark.parametrize("call", UNSCALED.values(), ids=UNSCALED.keys())
def test_scale_that_is_not_one_batch_norms_alone_is_left(call: Any) -> None:
    conv = nn.Conv2d(4, 4, 1)
    weight = conv.weight.detach().clone()
    model = Net(call, c=conv, d=nn.Conv2d(4, 4, 1), n=norm(4), o=norm(4), p=norm(1))
    report = report_of(model)
    assert type(model.c) is FastDeconv
    assert torch.equal(model.c.weight, weight)
    assert "weight and bias of" not in next(row.why for row in report.rows if row.name == "c")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_weight_that_the_model_has_elsewhere_too_is_left(first: bool, same: bool) -> None:
    """As the same Parameter, or as another over the same memory; registered before the layer or behind it."""
    model = Net(lambda m, x: m.n(m.c(x)))
    conv = nn.Conv2d(4, 4, 1)
    weight = conv.weight.detach().clone()
    tied = conv.weight if same else nn.Parameter(conv.weight.detach())
    for name in ("tied", "c") if first else ("c", "tied"):
        setattr(model, name, tied if name == "tied" else conv)
    model.n = norm(4)
    convert_deconv(model)
    assert type(model.c) is FastDeconv
    assert torch.equal(model.tied, weight)


@pytest.mark.filterwarnings("ignore:convert_deconv converted nothing")
def test_convolution_whose_weight_is_read_by_another_name_is_left() -> None:
    model = Net(lambda m, x: m.n(m.c(x)) + nn.functional.conv2d(x, m.w))
    conv = nn.Conv2d(4, 4, 1)
    model.w, model.c, model.n = conv.weight, conv, norm(4)
    report = report_of(model)
    assert "used without calling it" in report.left[0].why
    assert [type(m) for m in (model.c, model.n)] == [nn.Conv2d, nn.BatchNorm2d]


def test_weight_that_two_convolutions_share_is_left() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    weight = first.weight.detach().clone()
    model = convert_deconv(nn.Sequential(first, norm(4), second, norm(4)))
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, weight)


def test_deconvolution_layer_that_is_there_keeps_its_weight() -> None:
    layer = FastDeconv(4, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    model = convert_deconv(nn.Sequential(layer, norm(4), nn.Conv2d(4, 4, 3), norm(4)))
    assert [type(m) for m in model] == [FastDeconv, nn.Identity, FastDeconv, nn.Identity]
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_keep_affine_false_keeps_the_weight() -> None:
    conv = nn.Conv2d(4, 4, 1)
    before = conv.weight.detach().clone(), conv.bias.detach().clone()
    model = convert_deconv(nn.Sequential(conv, norm(4)), keep_affine=False)
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[0].bias, before[1])


def test_report_names_the_batch_norm() -> None:
    report = report_of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert report.converted[0].why == "first convolution, with the weight and bias of 1"


# ------------------------------------------------------------------------------------------ where no batch norm was


def test_squeeze_and_excitation_stays_plain() -> None:
    model = timm().create_model("mobilenetv3_small_050", num_classes=10)
    report = report_of(model)
    left = {row.name: row.why for row in report.left if row.why != "linear=False"}
    gates = {name for name, _ in model.named_modules() if ".se.conv_" in name}
    assert gates
    assert left.keys() == gates | {"conv_head"}  # which sees one value per channel and image, too
    assert set(left.values()) == {"no batch norm before or behind it"}


NORMALISED = {
    "behind": lambda m, x: m.c(x),
    "before": lambda m, x: m.c(m.n(x + x).relu()),
    "behind pooling": lambda m, x: m.n(nn.functional.adaptive_avg_pool2d(m.c(x), 1)),
}


@pytest.mark.parametrize("case", NORMALISED)
def test_batch_norm_behind_or_before_counts(case: str) -> None:
    model = Net(NORMALISED[case], c=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4))
    if case == "behind":
        model = nn.Sequential(model.c, model.n)
    convert_deconv(model)
    assert any(isinstance(m, FastDeconv) for m in model.modules())


PLAIN = {
    "behind a mean": lambda m, x: m.c(m.n(x).mean((2, 3), keepdim=True)),
    "behind pooling": lambda m, x: m.c(nn.functional.adaptive_avg_pool2d(m.n(x), 1)),
    "behind a pooling module": lambda m, x: m.c(m.pool(m.n(x))),
    "without a norm near": lambda m, x: m.c(m.n(x) * 2),
    "of a large kernel": lambda m, x: m.big(m.n(x).relu()),
}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.filterwarnings("ignore:convert_deconv converted nothing")
def test_convolution_without_a_batch_norm_stays_unless_asked_for(call: Any) -> None:
    pool, big = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 5)
    model = Net(call, c=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4), pool=pool, big=big)
    other = copy.deepcopy(model)
    report = report_of(model)
    assert type(model.c) is type(model.big) is nn.Conv2d
    used = "big" if call is PLAIN["of a large kernel"] else "c"
    why = "no batch norm behind it, and a large kernel" if used == "big" else "no batch norm before or behind it"
    assert why in [row.why for row in report.left if row.name == used]
    convert_deconv(other, unnormalised=True)
    assert type(other.get_submodule(used)) is FastDeconv


def test_model_without_any_batch_norm_is_converted_whole_and_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    convert_deconv(model)
    assert [type(m) for m in model] == [FastDeconv, nn.ReLU, FastDeconv]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Unflatten(1, (4, 6, 6)))
    model.append(Net(lambda m, x: m.c(x * 2), c=nn.Conv2d(4, 4, 1)))
    for _ in range(2):  # now there is no batch norm either, but there was one
        convert_deconv(model)
        assert type(model[-1].c) is nn.Conv2d


# ------------------------------------------------------------------------------------------------------ the recipes


def test_recipe_of_the_paper() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 64, 7), nn.BatchNorm2d(64), nn.Conv2d(64, 8, 5), nn.BatchNorm2d(8)]
        return nn.Sequential(*layers, Net(lambda m, x: m.c(x * 2), c=nn.Conv2d(8, 8, 1)))

    ours, papers, weight = convert_deconv(net()), convert_deconv(net(), recipe="paper"), net()[2].weight
    assert [m.n_iter for m in (ours[0], ours[2])] == [5, 5]
    assert [m.n_iter for m in (papers[0], papers[2])] == [15, 5]
    assert [m.samples_per_feature for m in (ours[2], papers[2])] == [4, 0]
    assert [m.block for m in (ours[2], papers[2])] == [32, 64]  # 5x5 kernels: 800 features, 1600
    assert [type(m[4].c) for m in (ours, papers)] == [nn.Conv2d, FastDeconv]
    assert torch.equal(papers[2].weight, weight)
    mixed = convert_deconv(net(), recipe="paper", first_n_iter=7, samples_per_feature=2, block=16, keep_affine=True)
    assert (mixed[0].n_iter, mixed[2].samples_per_feature, mixed[2].block) == (7, 2, 16)
    assert_close(sizes(mixed[2]), torch.ones(8), 1e-6)


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="recipe must be one of 'tdeconv', 'paper', got 'papers'"):
        convert_deconv(nn.Conv2d(3, 3, 1), recipe="papers")


@pytest.mark.parametrize(("kernel", "block"), [(1, 64), (3, 64), (4, 64), (5, 32), (7, 16), (33, 1)])
def test_large_kernels_get_a_smaller_block(kernel: int, block: int) -> None:
    with torch.device("meta"):
        assert convert_deconv(nn.Conv2d(128, 8, kernel)).block == block
        assert convert_deconv(nn.Conv2d(128, 8, kernel), block=64).block == 64
        assert convert_deconv(nn.Conv2d(128, 8, kernel), block={"": 128}).block == 128


# -------------------------------------------------------------------------------------------- what they give together


def started(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, dict[str, float]]:
    """The gradient's norm at the start, and the deviation of what each convolution's batch norm gave."""
    outputs: dict[str, float] = {}

    def note(name: str) -> Any:
        return lambda m, i, y: outputs.__setitem__(name, float(y.detach().std()))

    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, FastDeconv)):
            module.register_forward_hook(note(name))
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm()), outputs


MODELS = {
    "resnet10t": lambda: timm().create_model("resnet10t", num_classes=10),
    "regnetx_002": lambda: timm().create_model("regnetx_002", num_classes=10),
    "mobilenetv3_small_050": lambda: timm().create_model("mobilenetv3_small_050", num_classes=10),
    "googlenet": lambda: torchvision().models.googlenet(num_classes=10, init_weights=False, aux_logits=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_outputs_at_the_start_are_of_batch_norms_size(name: str) -> None:
    """Smooth images, as enlarged ones are: their covariances have many weak directions."""
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(16, 3, 8, 8), scale_factor=8, mode="bilinear")
    labels = torch.arange(16) % 10
    model = MODELS[name]()
    other = convert_deconv(copy.deepcopy(model))
    calibrated = tdeconv.calibrate_deconv(copy.deepcopy(other), images)
    expected, _ = started(model, images, labels)
    gradient, outputs = started(other, images, labels)
    assert gradient <= 3 * expected
    assert all(d == 0 or 0.05 < d < 3 for d in outputs.values()), outputs
    gradient, outputs = started(calibrated, images, labels)
    assert gradient <= 3 * expected
    assert all(d == 0 or 0.3 < d <= 1.05 for d in outputs.values()), outputs


def test_report_says_why_a_block_is_smaller() -> None:
    convs = nn.Conv2d(64, 3, 7), nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 3)  # the second has no more channels
    report = report_of(nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels)))))
    assert [row.why.partition("; ")[2] for row in report.converted] == ["a block of 16 for its large kernel", "", ""]


def test_report_hints_at_calibration_where_steps_whiten_little() -> None:
    wide, narrow = nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 3, groups=8)
    report = report_of(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), wide, nn.BatchNorm2d(64), narrow))
    hints = {row.name for row in report.converted if "calibrate_deconv" in row.why}
    assert hints == {"2"}
