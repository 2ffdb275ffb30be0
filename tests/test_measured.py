"""What the torch backend measures about the CPU. That no answer changes a layer is in test_torch_backend."""

from __future__ import annotations

import time

import pytest
import torch

from helpers import assert_close, randn
from tdeconv.torch_backend import gemm, measured


def test_the_clearly_faster_of_two_is_found() -> None:
    quick, slow = (lambda seconds=s: time.sleep(seconds) for s in (0.001, 0.01))
    assert measured._first_is_faster(quick, slow)
    assert not measured._first_is_faster(slow, quick)
    assert not measured._first_is_faster(quick, quick)


def test_answers_are_asked_for_once_and_may_be_fixed() -> None:
    assert (measured.onednn_multiplies(), measured.products_convolve()) == (False, True)  # as conftest fixes them
    with measured.fixed(onednn=True, products=False):
        assert measured.onednn_multiplies() == (measured.onednn_product() is not None)
        assert not measured.products_convolve()
    assert measured.products_convolve()
    for ask in (measured._onednn_multiplies, measured._products_convolve):
        assert ask() is ask()


def test_without_onednn_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert measured.onednn_product() is None
    with measured.fixed(onednn=True, products=True):
        assert not measured.onednn_multiplies()


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_products_of_any_layout(onednn: bool, batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors as they lie, transposed, and parts of larger ones."""
    monkeypatch.setattr(gemm, "_LARGE", 0)
    shape = () if batch is None else (batch,)
    a, b = randn(*shape, 7, 12).float()[..., ::2], randn(*shape, 6, 5, seed=1).float()
    with measured.fixed(onednn=onednn, products=True):
        for left in (a, a.mT.contiguous().mT):
            for right in (b, b.mT.contiguous().mT):
                total = torch.ones(*shape, 9, 8)[..., 1:8, 2:7]
                expected = left.double() @ right.double()
                assert_close(gemm.product(left, right), expected, 1e-6)
                assert_close(gemm.add_product_(total, left, right), expected + 1, 1e-6)
