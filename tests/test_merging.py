"""Methods by which models merge their own layers: after conversion they raise an error, and the report names them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close
from models import timm
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.fuse import fuse_deconv_eval


class ConvNorm(nn.Module):
    """With what repositories call by many names: it would lose the whitening, or not find a batch norm."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.alone = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(self.norm(self.conv(x)))

    @torch.no_grad()
    def fuse(self, keep: bool = False) -> nn.Module:
        return self.conv

    def reparameterize(self) -> None:
        raise AssertionError("it would compute with what conversion replaced")


class Joined(ConvNorm):
    """Its forward fuses two maps, which has nothing to do with merging layers."""

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return a + b

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.fuse(y, y)


def converted(model: nn.Module, **options: Any) -> ConversionReport:
    report = ConversionReport()
    convert_deconv(model, report=report, **options)
    return report


def test_methods_are_disabled_and_named_in_the_report() -> None:
    model = nn.Sequential(ConvNorm(), Joined(), ConvNorm())
    report = converted(model)
    named = {(row.name, row.was): row.why for row in report.rows if row.action == "disabled"}
    assert named.keys() == {("0 and 1 more", "ConvNorm"), ("1", "Joined")}
    assert "reparameterize() is disabled" in named["1", "Joined"]
    assert "deploy with fuse_deconv_eval" in named["1", "Joined"]
    assert str(report).endswith("layers converted: 3; batch norms removed: 3; left: 0")
    x = torch.randn(2, 4, 12, 12)
    model(x)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fuse_deconv_eval(model.eval())):
        assert_close(twin.eval()(x), model(x), 1e-5)
        for method in ("fuse", "reparameterize"):
            with pytest.raises(
                RuntimeError, match=rf"ConvNorm.{method}\(\) .*fuse_deconv_eval\(model.eval\(\)\) as it"
            ):
                getattr(twin[2], method)()


def test_modules_whose_layers_stay_keep_their_methods() -> None:
    model = nn.Sequential(ConvNorm(), ConvNorm())
    report = converted(model, exclude="0")
    assert [row.name for row in report.rows if row.action == "disabled"] == ["1"] * 2  # two methods
    assert model[0].fuse() is model[0].conv
    again = copy.deepcopy(model)
    assert not [row for row in converted(model).rows if row.action == "disabled" and row.name == "1"]
    assert model[1].__dict__.keys() == again[1].__dict__.keys()


# of efficientvim, merging gave other outputs without a word; of the others, it stopped at a missing batch norm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("repvgg_a0", "repvit_m0_9", "efficientvim_m1")]
)
def test_reparameterize_model_of_timm_is_refused_after_conversion_and_works_before(name: str) -> None:
    reparameterize_model = timm().utils.model.reparameterize_model
    model = timm().create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        merged, expected = reparameterize_model(model), model(x)
        assert_close(merged(x), expected, 1e-4)
        assert any(row.action == "disabled" for row in converted(model, block=8).rows)
        with pytest.raises(RuntimeError, match="call it before conversion, or deploy"):
            reparameterize_model(model)
        with pytest.raises(RuntimeError, match="call it before conversion, or deploy"):
            reparameterize_model(fuse_deconv_eval(model))
        converted(merged, block=8)
        assert_close(fuse_deconv_eval(merged.eval())(x), merged(x), 1e-4)


def test_method_that_the_forward_calls_is_left_alone() -> None:
    class Fusing(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def fuse(self) -> Tensor:
            return 2 * self.features

        def forward(self, x: Tensor) -> Tensor:
            self.features = super().forward(x)
            return self.fuse()

    report = converted(model := Fusing())
    assert not [row for row in report.rows if row.action == "disabled"]
    x = torch.randn(2, 4, 12, 12)
    assert torch.equal(model(x), 2 * model.features)
