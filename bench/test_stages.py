"""The same layers, stage by stage, the paper's Table 3."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdeconv.bench.measure import Row, recorded_clock


@pytest.mark.benchmark(timer=recorded_clock)
def test_stage(replay: Callable[[Row], None], row: Row) -> None:
    replay(row)
