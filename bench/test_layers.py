"""VGG-11's 3x3 layers: forward in training, and a whole training step without the optimiser."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdeconv.bench.cases import BY_NAME
from tdeconv.bench.measure import recorded_clock
from tdeconv.bench.steps import KINDS


@pytest.mark.benchmark(timer=recorded_clock)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", BY_NAME)
def test_layer(replay: Callable[..., None], layer: str, kind: str, implementation: str) -> None:
    replay(layer, implementation, kind, kind=kind)
