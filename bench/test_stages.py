"""The same layers, stage by stage: the paper's Table 3."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdeconv.bench.cases import VGG11
from tdeconv.bench.measure import recorded_clock
from tdeconv.bench.stages import BACKENDS, parts

CASES = [(layer.name, backend, *part) for layer in VGG11 for backend in BACKENDS for part in parts(backend, layer)]


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize(("layer", "backend", "stage", "direction"), CASES)
def test_stage(replay: Callable[..., None], layer: str, backend: str, stage: str, direction: str) -> None:
    replay(layer, backend, f"{stage} {direction}", stage=stage, direction=direction)
