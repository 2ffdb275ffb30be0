"""For tests of kernels: without a GPU they run under Triton's interpreter; what they leave unwritten shows as NaN.

Import it before anything of ``tdeconv.kernels``: Triton decides when a kernel is defined.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocation full of NaN."""

    def inner(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return inner


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


def named(quick: str, slow: str = "") -> list[Any]:
    """The cases of these names as test parameters, the second half of them marked slow."""
    by_name = {case.name: case for case in CASES}

    def parameter(name: str, *marks: pytest.MarkDecorator) -> Any:
        return pytest.param(by_name[name], id=name, marks=marks)

    return [*map(parameter, quick.split()), *(parameter(name, pytest.mark.slow) for name in slow.split())]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
