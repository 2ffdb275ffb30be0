"""Where the time of a training step goes, stage by stage, and how far that is from what the hardware allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tdeconv.bench.markdown import Table
from tdeconv.bench.reports.ratios import (
    BASELINES,
    DIRECTIONS,
    OURS,
    STAGES,
    counted,
    extra,
    label,
    main_implementation,
    milliseconds,
    network,
    number,
    order,
    pivot,
    share,
)
from tdeconv.bench.results import Result, Row, counts, grouped, rows


class Sum(NamedTuple):
    """A stage in one direction, in milliseconds over all layers.

    ``above`` is the time beyond each layer's floor; all of it where a stage has none, such as taking the patches.
    """

    stage: str
    direction: str
    time: float
    floor: float | None
    above: float
    bound: str


def stage_sums(mine: Sequence[Row]) -> list[Sum]:
    """Sums over the layers, each as often as the network has it; ``mine`` are one implementation's rows."""
    count, found, floor_of = counts(mine), [], extra("floor_s", 1e3)
    stages = order((r["extra_info"]["stage"] for r in mine), STAGES)
    for stage, direction in ((s, d) for s in stages for d in DIRECTIONS):
        here = [r for r in mine if (r["extra_info"]["stage"], r["extra_info"]["direction"]) == (stage, direction)]
        if here:
            weighed = [(count[r["extra_info"]["case"]], milliseconds(r), floor_of(r)) for r in here]
            floors = [n * floor for n, _, floor in weighed if floor is not None]
            above = sum(n * max(0.0, time - (floor or 0.0)) for n, time, floor in weighed)
            bounds = order(r["extra_info"]["bound"] for r in here if r["extra_info"].get("bound"))
            time = sum(n * time for n, time, _ in weighed)
            found.append(Sum(stage, direction, time, sum(floors) if floors else None, above, ", ".join(bounds)))
    return found


def stage_table(mine: Sequence[Row], implementation: str) -> Table | None:
    """Where a network's training step goes, stage by stage, against what the hardware allows."""
    sums = stage_sums(mine)
    whole = sum(s.time for s in sums)
    if whole <= 0:
        return None
    floors = [s.floor for s in sums if s.floor is not None]
    head = ["stage", "direction", "ms", "of the step", "floor, ms", "share of floor", "above floor", "set by"]
    body = []
    for s in sums:
        of_floor = share(s.floor / s.time if s.floor and s.time > 0 else None)
        numbers = (number(s.time), share(s.time / whole), number(s.floor), of_floor, share(s.above / whole))
        body.append([s.stage, s.direction, *numbers, s.bound or "-"])
    last = [number(sum(floors)), share(sum(floors) / whole)] if floors else ["-", "-"]
    body.append(["all", "", number(whole), "100%", *last, share(sum(s.above for s in sums) / whole), ""])
    caption = (
        "The floor is the time this machine needs, at its own ceilings, to move the bytes and do the arithmetic of the "
        "formulas: a larger share of floor is better, and 100% is passed by what needs less arithmetic, as Winograd's "
        "convolutions do. Above floor, as a share of the step, is what could still be saved: smaller is better. "
        f"Sums over all {sum(counts(mine).values())} layers."
    )
    return Table(f"Where the time goes: {label(implementation)}", caption, [head, *body])


def stage_layer_table(mine: Sequence[Row], implementation: str, direction: str) -> Table | None:
    """Milliseconds of each stage, layer by layer, and in brackets the share of its floor."""
    here = [r for r in mine if r["extra_info"]["direction"] == direction]
    values, count = pivot(here, milliseconds, "stage"), counts(here)
    if not values:
        return None
    floors = pivot(here, extra("floor_s", 1e3), "stage")
    stages = order((s for of in values.values() for s in of), STAGES)
    body = []
    for case, of in values.items():
        cells = [_with_share(of.get(s), floors.get(case, {}).get(s)) for s in stages]
        body.append([counted(case, count), *cells, number(sum(of.values()))])
    caption = "Smaller is better. In brackets the share of the floor: larger is better."
    return Table(
        f"Stages of {label(implementation)}, {direction}, ms",
        caption,
        [["layer", *stages, "sum"], *body],
    )


def _with_share(time: float | None, floor: float | None) -> str:
    return number(time) + (f" ({share(floor / time)})" if time and floor and time > 0 else "")


def stage_tables(mine: Sequence[Row]) -> list[Table]:
    """All about one group's stages; ours first."""
    names = order((r["extra_info"]["implementation"] for r in mine), (*reversed(OURS), *BASELINES))
    by_name = {n: [r for r in mine if r["extra_info"]["implementation"] == n] for n in names}
    found = [stage_table(of, n) for n, of in by_name.items()]
    found += [stage_layer_table(of, n, d) for n, of in by_name.items() for d in DIRECTIONS]
    return [t for t in found if t]


def floor_sentence(data: Result) -> str:
    """How far the training step is from what the hardware allows, and the stage that has most to lose."""
    mine = rows(data, "stage")
    name = main_implementation(r["extra_info"]["implementation"] for r in mine)
    groups = grouped(r for r in mine if r["extra_info"]["implementation"] == name)
    if not groups:
        return ""
    group, of = next(iter(groups.items()))
    sums = stage_sums(of)
    whole, floors = sum(s.time for s in sums), [s.floor for s in sums if s.floor is not None]
    if not floors or whole <= 0:
        return ""
    above: dict[str, float] = {}
    for s in sums:
        above[s.stage] = above.get(s.stage, 0.0) + s.above
    worst = max(above, key=above.__getitem__)
    more = " (more, because some stages get by with less arithmetic)" if sum(floors) > whole else ""
    return (
        f"A training step of {network(group.network)}'s layers takes {number(whole)} ms; the formulas' bytes and "
        f"arithmetic take {number(sum(floors))} ms at this machine's ceilings{more}. "
        f"{share(sum(above.values()) / whole)} of "
        f"the step lies above the stages' floors, most of it in {worst}: {share(above[worst] / whole)}."
    )
