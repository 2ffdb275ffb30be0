"""How it is measured: rounds interleaved in one process, answers checked first.

On a small shared machine the speed drifts, and another process can halve it for half a minute. Times taken one after
the other are then not comparable, and all the rounds of one layer can fall into such a time. So a round runs everything
once, each layer in each implementation, in a new random order: all meet the same machine, a disturbance touches a few
rounds of everything, and medians over the rounds are compared. pytest-benchmark times one test's function at a time and
cannot do that: the rounds are therefore recorded first (:func:`interleaved`) and then handed to it, one test for each
row, through a clock that shows the recorded durations (:func:`replay`). Its statistics, groups, JSON and comparisons
are used as they are.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from tdeconv.bench.clock import Clock

Key = TypeVar("Key")
TOLERANCE = 2e-5  # relative, in float32


class Variant(NamedTuple):
    """An implementation as it is measured: in which memory layout, in which dtype."""

    implementation: str
    layout: str
    dtype: str


class Row(NamedTuple):
    """A row of the results: one part of one case, as one implementation does it. ``case`` is unique in its suite."""

    case: str
    implementation: str
    layout: str
    dtype: str
    part: str

    @property
    def variant(self) -> Variant:
        return Variant(self.implementation, self.layout, self.dtype)


class Work(Protocol):
    """Something to time."""

    def run(self, clock: Clock) -> Mapping[str, float]:
        """Do it once: seconds of each of its parts, by name."""


@dataclass
class Prepared:
    """A work whose answers were right, and what its rows say beside the times; ``parts``: about some of them."""

    work: Work
    info: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(
    works: Mapping[Key, Work],
    rounds: int,
    *,
    clock: Clock,
    progress: Callable[[Sequence[Key]], Iterable[Key]] = iter,
) -> dict[Key, dict[str, list[float]]]:
    """Run every work once a round: seconds by work, part and round.

    Nothing warms up here: the works have run before, when their answers were checked.
    """
    rng = random.Random(0)
    schedule = [key for _ in range(rounds) for key in rng.sample(list(works), len(works))]
    recorded: dict[Key, dict[str, list[float]]] = {key: {} for key in works}
    with _no_gc():
        for key in progress(schedule):
            clock.ready()
            for part, seconds in works[key].run(clock).items():
                recorded[key].setdefault(part, []).append(seconds)
    return recorded


class RecordedClock:
    """A timer for pytest-benchmark that only :func:`replay` moves."""

    __name__ = "recorded_perf_counter"  # the timer's name in the JSON

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


recorded_clock = RecordedClock()


def replay(benchmark: Any, durations: Sequence[float]) -> None:
    """Give recorded durations to a ``benchmark`` fixture whose timer is :data:`recorded_clock`."""
    remaining = iter(durations)

    def rewind() -> None:
        recorded_clock.now = 0.0

    def advance() -> None:
        recorded_clock.now = next(remaining)

    benchmark.pedantic(advance, setup=rewind, rounds=len(durations), iterations=1)


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each tensor, in the Euclidean norm."""
    pairs = [(g.detach().double(), e.detach().double()) for g, e in zip(got, expected, strict=True)]
    return [float((g - e).norm() / e.norm()) for g, e in pairs]


def check(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> float:
    """The largest relative error (in the Euclidean norm) of any tensor.

    Raises:
        AssertionError: it is above ``tolerance``, or not a number: no time is recorded for a wrong answer.
    """
    errors = relative_errors(got, expected)
    assert all(error <= tolerance for error in errors), f"{name}: relative errors {errors}, allowed {tolerance}"
    return max(errors)
