"""Layers of VGG-11 and ResNet-50 with normalisation and ReLU: forward in training, and a training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdeconv.bench.measure import Row, recorded_clock


@pytest.mark.benchmark(timer=recorded_clock)
def test_layer(replay: Callable[[Row], None], row: Row) -> None:
    replay(row)
