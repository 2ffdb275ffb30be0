"""In which training steps a layer takes the statistics of its batch: freezing, and statistics every few steps.

A training step is *fresh* or *stale*. A fresh one takes the statistics of its batch, and the running ones follow; a
stale one takes the running statistics, as constants. With ``stats_interval=k`` the first ``stats_warmup`` steps and
every k-th one are fresh; with ``freeze_iter=k`` the first ``k + 1`` of every ``10 * k``. A step is fresh where both say
so.

The count is a buffer, so that a ``state_dict`` has it. To read it in every step would make a GPU wait, and forbid
capturing the step in a CUDA graph. So a layer walks along rings of places on the host, one place a step, and each says
whether its step is fresh. They are places, and not a number, for ``torch.compile``: it compiles anew whenever a number
that it has read changes, and of a place it reads one bool. So it makes one graph for each kind of step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv import checks, transforms
from tdeconv.precision import statistics_dtype
from tdeconv.running import Averaging
from tdeconv.tracing import has_value

LONGEST = 100_000  # what a rule may ask for: a ring has a place for each of its steps, ten times as many for freezing
WARMUP = 20  # steps at the start that are all fresh: the running statistics begin far from any batch's


def is_fresh(step: int, stats_interval: int, stats_warmup: int) -> bool:
    """Whether training step ``step``, counted from 0, takes the batch's statistics."""
    return step < stats_warmup or step % stats_interval == 0


def of_interval(momentum: float | Tensor, stats_interval: int) -> Any:
    """The momentum of a fresh step behind the warm-up, which stands for ``stats_interval`` steps."""
    return 1 - (1 - momentum) ** stats_interval


def recomputing() -> bool:
    """Whether this forward runs within a backward, as that of a checkpointed module does the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Place:
    """One step in a ring: whether it is fresh, and the place of the step behind it."""

    __slots__ = ("fresh", "next", "ring")
    fresh: bool
    next: Place
    ring: Ring

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy's or a pickle's has its own; by default, they would follow `next` until Python's stack ends
        ring = self.ring
        return _place, (ring.flags, ring.again, ring.places.index(self))


class Ring:
    """The steps of one rule: as many places as ``flags``, of which the last leads back to place ``again``."""

    def __init__(self, flags: list[bool], again: int = 0) -> None:
        self.flags, self.again = flags, again
        self.places = [Place() for _ in flags]
        for i, (place, fresh) in enumerate(zip(self.places, flags, strict=True)):
            place.fresh, place.ring = fresh, self
            place.next = self.places[i + 1 if i + 1 < len(flags) else again]

    def at(self, step: int) -> Place:
        round_ = len(self.places) - self.again
        return self.places[step if step < self.again else self.again + (step - self.again) % round_]


def _place(flags: list[bool], again: int, index: int) -> Place:
    return Ring(flags, again).places[index]


def _refreshing(stats_interval: int, stats_warmup: int) -> Ring:
    steps = range(stats_warmup + stats_interval)
    return Ring([is_fresh(t, stats_interval, stats_warmup) for t in steps], stats_warmup)


def _freezing(freeze_iter: int) -> Ring:
    # <= and not <: the paper's code takes statistics in freeze_iter + 1 steps of each round
    return Ring([t <= freeze_iter for t in range(10 * freeze_iter)])


class Scheduled(Averaging):
    """A layer with running statistics that takes its batch's in some training steps only."""

    _counter = "num_batches_tracked"  # the buffer that counts training steps, if any of the rules needs it
    _stats_interval, _stats_warmup = 1, WARMUP
    _freeze, _freeze_iter = False, 100
    _places: tuple[Place, ...] = ()  # of the next training step, one in the ring of each rule
    _replayed: tuple[Place, ...] = ()  # of the next recomputation: the last training step's, without further notice
    _followed: Tensor | None = None  # the buffer that a step has looked at
    _given: bool | None = None  # within `every_step`: what kind every step is

    @property
    def stats_interval(self) -> int:
        """Behind the warm-up, every how many training steps the layer takes its batch's statistics. To set this or
        ``stats_warmup`` takes effect at the next step."""
        return self._stats_interval

    @stats_interval.setter
    def stats_interval(self, value: int) -> None:
        self._stats_interval = checks.positive_int("stats_interval", value, most=LONGEST)
        self._reschedule()

    @property
    def stats_warmup(self) -> int:
        """How many training steps at the start all take their batches' statistics."""
        return self._stats_warmup

    @stats_warmup.setter
    def stats_warmup(self, value: int) -> None:
        self._stats_warmup = checks.positive_int("stats_warmup", value, least=0, most=LONGEST)
        self._reschedule()

    def _reschedule(self) -> None:
        """After a rule has changed: the counter that the rules need, and this step's place in their rings."""
        rings = [_refreshing(self._stats_interval, self._stats_warmup)] if self._stats_interval > 1 else []
        rings += [_freezing(self._freeze_iter)] if self._freeze else []
        counted = self._counter in self._buffers
        if rings and not counted:
            steps = torch.zeros((), dtype=torch.long, device=self.running_deconv.device)
            self.register_buffer(self._counter, steps)
        elif counted and not rings:
            delattr(self, self._counter)
        self._places = tuple(ring.at(0) for ring in rings)
        self._follow()

    @property
    def _steps(self) -> Tensor | None:
        return self._buffers.get(self._counter)

    def _follow(self) -> None:
        """Go to the places of the step that the buffer counts, which is read."""
        steps = self._steps
        if steps is not None and has_value(steps):
            step = int(steps)
            self._places = tuple(place.ring.at(step) for place in self._places)

    def _set_steps(self, step: int) -> None:
        """Count this many training steps as done."""
        steps = self._steps
        if steps is not None:
            with torch.no_grad():
                steps.fill_(step)
            self._follow()

    def _takes_statistics(self, x: Tensor) -> bool:
        """Whether the training step on ``x`` is fresh."""
        steps = self._steps
        if self._given is not None or steps is None:
            return self._given is not False
        checks.same_home(x, **{self._counter: steps})
        # the first step looks, since buffers are also filled from outside (by DistributedDataParallel, by averaging),
        # and so does the first with another buffer: one moved elsewhere, torch.func.functional_call's
        if not torch.compiler.is_compiling() and self._followed is not steps:
            transforms.no_vmap_in_training()  # which could not be looked into
            self._follow()
            self._followed = steps if has_value(steps) else None
        return all(place.fresh for place in (self._replayed if recomputing() else self._places))

    def _share(self) -> float | Tensor | None:
        """The momentum of this training step: a tensor, where it depends on the count, which is not read."""
        momentum, steps = self._momentum, self._steps
        if momentum is None or self._stats_interval == 1 or steps is None:
            return momentum
        early = steps.new_full((), momentum, dtype=statistics_dtype(self.running_deconv.dtype))
        return torch.where(steps < self._stats_warmup, early, of_interval(momentum, self._stats_interval))

    def describe_schedule(self) -> str:
        """In which steps statistics are taken, and which kind the next one is."""
        rules = []
        if self._stats_interval > 1:
            rules.append(f"the first {self._stats_warmup} steps and one in {self._stats_interval} behind them")
        if self._freeze:
            rules.append(f"the first {self._freeze_iter + 1} of every {10 * self._freeze_iter} steps")
        kind = "fresh" if all(place.fresh for place in self._places) else "stale: fold and convolve alone"
        return f"statistics: in {', but only in '.join(rules)}; the next step is {kind}"

    def _count_step(self) -> None:
        """This training step is done; the recomputation of one does not count."""
        steps = self._steps
        if self._given is not None or steps is None:
            return
        if recomputing():
            self._replayed = tuple(place.next for place in self._replayed)
            return
        steps.add_(1)
        if torch.compiler.is_compiling():  # which refuses to set attributes inside of torch.utils.checkpoint otherwise
            from torch._dynamo.utils import (  # noqa: PLC0415  # slow to import
                _disable_side_effect_safety_checks_for_current_subtracer as allowed,
            )

            allowed(self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        self._replayed = self._places
        self._places = tuple(place.next for place in self._places)

    # ------------------------------------------------------------------- where the count may come from somewhere else

    def train(self, mode: bool = True) -> Any:
        if mode and not self.training:
            self._follow()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._counter not in self._buffers:  # of a layer with another schedule: this one has none
            state_dict.pop(prefix + self._counter, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._followed = None

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # made for one step, which counts in the buffer of the module it is of and moves the replica's places alone
        replica._followed = self._followed = None
        return replica


@contextmanager
def every_step(layers: Iterable[nn.Module], fresh: bool) -> Iterator[None]:
    """Within the block all training steps of these layers are fresh, or all are stale, and none is counted."""
    scheduled = [layer for layer in layers if isinstance(layer, Scheduled)]
    before = [layer._given for layer in scheduled]
    for layer in scheduled:
        layer._given = fresh
    try:
        yield
    finally:
        for layer, given in zip(scheduled, before, strict=True):
            layer._given = given
