"""How the cost of a step and of its stages grows with each size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdeconv.bench.measure import Row, recorded_clock


@pytest.mark.benchmark(timer=recorded_clock)
def test_scaling(replay: Callable[[Row], None], row: Row) -> None:
    replay(row)
