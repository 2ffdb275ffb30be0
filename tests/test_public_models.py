"""Models that others wrote, converted, trained a step, evaluated and folded."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from helpers import all_finite, difference
from models import PUBLIC, TIMM, TORCHVISION, Public, build, tensors
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.fuse import fuse_deconv_eval
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d

DECONVS = (FastDeconv, FastDeconv1d, FastDeconv3d, Delinear)
FOLDED = 1e-3


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(public: Public) -> list[Tensor]:
    return [torch.randn(public.shape) for _ in range(public.inputs)]


def train_a_step(model: nn.Module, batch: list[Tensor]) -> None:
    """One step of SGD, of bounded length: a batch of eight small images has steep losses."""
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    loss = sum(t.square().mean() for t in tensors(model.train()(*batch)))
    loss.backward()
    assert torch.isfinite(loss), f"the loss is {loss}"
    assert all_finite(p.grad for p in parameters), "a gradient is not finite"
    assert any(p.grad is not None and p.grad.any() for p in parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def evaluate(model: nn.Module, batch: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(*batch))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if public.slow else []) for n, public in PUBLIC.items()]
)
def test_public_model_converts_trains_evaluates_and_folds(name: str) -> None:
    torch.manual_seed(0)
    public, report = PUBLIC[name], ConversionReport()
    model = convert_deconv(build(name), report=report, **public.convert)
    left = [row for row in report.left if row.why != "linear=False" and not row.why.startswith("no batch norm")]
    assert report.converted
    assert len(left) == public.left, report
    again = ConversionReport()
    convert_deconv(model, report=again, **public.convert)
    assert not again.converted, again
    assert not again.removed, again

    batch = inputs(public)
    train_a_step(model, batch)
    outputs = evaluate(model, batch)
    assert all_finite(outputs)

    plain = fuse_deconv_eval(model)
    assert not any(isinstance(m, DECONVS) for m in plain.modules())
    for folded, unfolded, once_more in zip(evaluate(plain, batch), outputs, evaluate(model, batch), strict=True):
        assert difference(folded, unfolded) <= FOLDED
        assert torch.equal(unfolded, once_more), "folding changed the model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", ["torchvision.mobilenet_v2", "timm.resnetv2_18"])
def test_folded_public_model_runs_in_onnxruntime(name: str) -> None:
    torch.manual_seed(0)
    model = convert_deconv(build(name), linear=True)
    batch = inputs(PUBLIC[name])
    train_a_step(model, batch)
    outputs = evaluate(model, batch)
    file = io.BytesIO()
    torch.onnx.export(fuse_deconv_eval(model), tuple(batch), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: batch[0].numpy()})
    assert difference(torch.from_numpy(np.asarray(y)), outputs[0]) <= FOLDED


def test_list_covers_the_papers_architectures_and_40_of_timm() -> None:
    assert len(TIMM) >= 40
    paper = {"vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "efficientnet_b0"}
    assert paper | {"deeplabv3_resnet50"} <= TORCHVISION.keys()
    assert {"resnetv2_18", "dpn48b", "legacy_seresnet18", "pnasnet5large"} <= TIMM.keys()
