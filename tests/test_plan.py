"""What conversion takes out and leaves: which batch norms a deconvolution layer makes unnecessary, and which not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import Net, assert_close, randn
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.layers import Delinear, FastDeconv
from tdeconv.replacements import Clone


def conv(cin: int = 4, cout: int = 4, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)


def norm(features: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features)


def actions(model: nn.Module, **options: object) -> dict[str, str]:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return {row.name: row.action for row in report.rows}


def why(model: nn.Module, name: str, **options: object) -> str:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return next(row.why for row in report.rows if row.name == name)


GONE = {
    "behind a convolution": lambda m, x: m.n(m.c(x)),
    "an activation between": lambda m, x: m.n(F.relu(m.c(x))),
    "pooling between": lambda m, x: m.n(F.max_pool2d(m.c(x), 2)),
    "dropout and reshaping between": lambda m, x: m.n(F.dropout(m.c(x).flatten(2).unsqueeze(-1), 0.5)),
    "concatenation between": lambda m, x: m.n(torch.cat([m.c(x)[:, :2], m.d(x)[:, 2:]], 1)),
    "half of the channels": lambda m, x: m.n(m.big(x).chunk(2, 1)[0]),
    "before a convolution": lambda m, x: m.c(F.relu(m.n(x + x))),
    "before two convolutions": lambda m, x: m.c(y := F.relu(m.n(x * x))) + m.d(y),
    "on the input": lambda m, x: m.c(m.n(x)),
    "shapes are read": lambda m, x: m.d(m.n(x + x).view(x.size(0), 4, *x.shape[2:])),
    "called twice": lambda m, x: m.n(m.d(m.n(m.c(x)))),
}
STAYS = {
    "a sum of branches": lambda m, x: m.n(m.c(x) + m.d(x)),
    "a sum with the input": lambda m, x: F.relu(m.n(m.c(x) + x)),
    "the branch of a sum": lambda m, x: m.n(x) + m.c(x),
    "a product": lambda m, x: m.n(m.c(x) * m.d(x)),
    "before a convolution and a sum": lambda m, x: m.c(y := m.n(x + x)) + y,
    "the output": lambda m, x: m.n(x + m.c(x)),
    "behind a transposed convolution": lambda m, x: m.c(m.n(m.t(x))),
    "behind a functional convolution": lambda m, x: m.n(F.conv2d(x, x.new_ones(4, 4, 1, 1))),
    "between a functional convolution and another": lambda m, x: m.d(m.n(F.conv2d(x, x.new_ones(4, 4, 1, 1)))),
    "over another axis": lambda m, x: m.n(m.c(x)[:, :, :4].transpose(1, 2)),
    "called on a convolution and a sum": lambda m, x: m.n(m.c(x)) + m.n(x + x),
}


def several(how: Callable[[Net, Tensor], Tensor]) -> Net:
    return Net(how, c=conv(), d=conv(), n=norm(), big=conv(4, 8), t=nn.ConvTranspose2d(4, 4, 1)).double()


@pytest.mark.parametrize("how", GONE.values(), ids=GONE.keys())
def test_batch_norm_beside_deconvolution_layers_alone_goes(how: Callable[[Net, Tensor], Tensor]) -> None:
    model = several(how)
    assert actions(model)["n"] == "removed"
    assert isinstance(model.n, nn.Identity)
    model(randn(2, 4, 6, 6)).sum().backward()


@pytest.mark.parametrize("how", STAYS.values(), ids=STAYS.keys())
def test_batch_norm_of_anything_else_stays(how: Callable[[Net, Tensor], Tensor]) -> None:
    model = several(how)
    before = model.n
    assert actions(model)["n"] == "left"
    assert model.n is before
    model(randn(2, 4, 6, 6)).sum().backward()


def test_report_names_what_feeds_a_batch_norm_that_stays() -> None:
    assert why(several(STAYS["a sum of branches"]), "n") == "fed by add, and feeds the model's output"
    assert "t" in why(several(STAYS["behind a transposed convolution"]), "n")
    assert why(several(GONE["behind a convolution"]), "n") == "behind c"
    assert why(several(GONE["before two convolutions"]), "n") == "before c, d"


def test_batch_norms_that_go_bring_others_closer() -> None:
    """A dense block: every batch norm sees, through the ones before, nothing but convolutions."""

    def how(m: Net, x: Tensor) -> Tensor:
        a = m.n0(m.c0(x))
        b = m.c1(F.relu(m.n1(a)))
        return m.n3(m.c2(F.relu(m.n2(torch.cat([a, b], 1)))))

    model = Net(how, c0=conv(), n0=norm(), n1=norm(), c1=conv(), n2=norm(8), c2=conv(8), n3=norm())
    assert {name for name, action in actions(model).items() if action == "left"} == set()


def test_batch_norm_behind_a_linear_layer_goes_with_it() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    assert set(actions(net()).values()) == {"left"}
    model = net()
    assert actions(model, linear=True) == {"0": "converted", "1": "removed", "3": "converted"}
    assert isinstance(model[0], Delinear)


def test_batch_norm_of_a_sum_before_the_classifier_goes_with_delinear_only() -> None:
    def net() -> nn.Module:
        return Net(lambda m, x: m.fc(F.relu(m.n(m.c(x) + x)).mean((2, 3))), c=conv(), n=norm(), fc=nn.Linear(4, 2))

    assert actions(net(), unnormalised=True)["n"] == "left"
    assert actions(net(), unnormalised=True, linear=True)["n"] == "removed"


@pytest.mark.parametrize(
    "relu",
    [
        lambda m, y: m.relu(y),
        lambda m, y: F.relu(y, inplace=True),
        lambda m, y: F.relu(y, True),
        lambda m, y: y.relu_(),
        lambda m, y: F.relu(y.flatten(2), inplace=True).view(y.shape),
    ],
    ids=["module", "function", "position", "method", "view"],
)
def test_activation_in_place_behind_a_removed_batch_norm_leaves_the_shortcut_alone(
    relu: Callable[[Net, Tensor], Tensor],
) -> None:
    """Pre-activation: the batch norm's output was memory of its own, its input is the shortcut."""
    model = Net(lambda m, x: m.c(relu(m, m.n(x))) + x, n=norm(), c=conv(), relu=nn.ReLU(inplace=True)).double()
    weight, bias = model.c.weight.detach(), model.c.bias.detach()
    convert_deconv(model).eval()  # never trained: the deconvolution is the identity
    assert type(model.n) is Clone
    x = randn(2, 4, 6, 6)
    assert_close(model(x.clone()), F.conv2d(x.relu(), weight, bias, padding=1) + x, 1e-12)


def test_arithmetic_in_place_behind_a_removed_batch_norm_leaves_its_input_alone() -> None:
    def how(m: Net, x: Tensor) -> Tensor:
        before = m.c(x)
        after = m.n(before)
        after *= 2
        return after + before

    model = Net(how, c=conv(), n=norm()).double()
    weight, bias = model.c.weight.detach(), model.c.bias.detach()
    convert_deconv(model).eval()
    x = randn(2, 4, 6, 6)
    assert_close(model(x), 3 * F.conv2d(x, weight, bias, padding=1), 1e-12)


def test_nothing_is_copied_where_nothing_can_be_overwritten() -> None:
    behind = Net(lambda m, x: F.relu(m.n(m.c(x)), inplace=True), c=conv(), n=norm())
    out_of_place = Net(lambda m, x: m.c(F.relu(m.n(x))) + x, n=norm(), c=conv())
    for model in (behind, out_of_place):
        convert_deconv(model)
        assert type(model.n) is nn.Identity


def test_first_convolutions_are_those_that_see_the_input() -> None:
    model = Net(lambda m, x: m.c(m.a(x)) + m.b(F.avg_pool2d(x, 1)), c=conv(), b=conv(), a=conv())
    convert_deconv(model)
    assert [m.freeze for m in (model.a, model.b, model.c)] == [True, True, False]


def test_first_convolution_behind_arithmetic_is_the_first_called() -> None:
    model = Net(lambda m, x: m.c(m.a((x - 0.5) / 0.25)), c=conv(), a=conv())
    convert_deconv(model)
    assert model.a.freeze
    assert not model.c.freeze


def test_first_convolution_left_makes_no_other_one_first() -> None:
    model = nn.Sequential(conv(), norm(), conv())
    convert_deconv(model, exclude="0")
    assert isinstance(model[2], FastDeconv)
    assert not model[2].freeze


def test_weight_that_other_code_uses_stays() -> None:
    def how(m: Net, x: Tensor) -> Tensor:
        scaled = F.conv2d(x, m.c.weight * 2, padding=1)
        return m.d(x).to(m.d.weight.dtype) + scaled * m.n.weight.view(1, -1, 1, 1)

    found = actions(Net(how, c=conv(), d=conv(), n=norm()))
    assert found == {"c": "left", "d": "converted", "n": "left"}  # a dtype is no use of the weight


def test_layers_that_torch_bypasses_stay() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    assert set(actions(model, linear=True).values()) == {"left"}
    assert "without calling it" in why(model, "layers.0.linear1", linear=True)
