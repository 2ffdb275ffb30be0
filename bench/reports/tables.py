"""Tables of one result file, and the few lines that ``tdeconv bench`` ends with."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tdeconv.bench import markdown
from tdeconv.bench.markdown import Table
from tdeconv.bench.reports.ratios import (
    BASELINES,
    KINDS,
    LABELS,
    RATIO,
    WHO,
    all_of,
    cell,
    conditions,
    counted,
    extra,
    how,
    kinds_of_step,
    label,
    lowered,
    main_implementation,
    milliseconds,
    network,
    number,
    order,
    ours_of,
    pivot,
    ratio,
    ratios,
    subject,
    times,
    told_apart,
    total,
    where,
    with_means,
)
from tdeconv.bench.reports.stage_tables import floor_sentence, stage_tables
from tdeconv.bench.results import Result, Row, counts, grouped, rows

# --------------------------------------------------------------------------------------------------------- headlines


def headline(data: Result) -> Table | None:
    """Ratios of time for whole models and for sums over layers; None without those suites."""
    found = ratios(data)
    if not found:
        return None
    baselines = order(r.baseline for r in found)
    common, own = told_apart(r.group for r in found)
    lines: dict[str, dict[str, str]] = {}
    for one in found:
        line = f"{subject(one)}{own[one.group]}: {KINDS[one.kind]}, {label(one.ours)}"
        lines.setdefault(line, {})[one.baseline] = cell(one)
    head = ["time, over that of", *(LABELS[b] for b in baselines)]
    body = [[line, *(cells.get(b, "-") for b in baselines)] for line, cells in lines.items()]
    caption = RATIO + kinds_of_step(one.ours for one in found) + common
    return Table("Time with deconvolution over time without", caption, [head, *body])


def block_table(data: Result) -> Table | None:
    """Training steps by the channels that are whitened together, and by how often statistics are taken."""
    steps = [r for r in ratios(data) if r.kind == "step" and " block " in r.group.network]
    ours = main_implementation(r.ours for r in steps)
    mine = [r for r in steps if r.baseline == "conv_bn_relu" and r.ours.partition(" ")[0] == ours]
    names = order(r.ours for r in mine)
    if not names:
        return None
    common, own = told_apart(r.group for r in mine)
    lines: dict[str, dict[str, str]] = {}
    for r in mine:
        lines.setdefault(subject(r) + own[r.group], {})[r.ours] = cell(r)
    head = ["training step", *(name.partition(" ")[2] or "fresh" for name in names)]
    body = [[line, *(cells.get(name, "-") for name in names)] for line, cells in lines.items()]
    caption = f"Time of {label(names[0])} over that of {LABELS['conv_bn_relu']}. {RATIO}{kinds_of_step(names)}{common}"
    return Table("Cost by block and by how often statistics are taken", caption, [head, *body])


def ratio_table(mine: Sequence[Row], ours: str, kind: str = "step") -> Table | None:
    """Ratios of time layer by layer; ``mine`` are one group's rows of the suite ``layer`` or ``model``."""
    timed = [r for r in mine if r["extra_info"]["kind"] == kind]
    values, count = pivot(timed, milliseconds), counts(timed)
    sums = {b: one for b in BASELINES if (one := ratio(values, count, ours, b))}
    if not sums:
        return None
    body = []
    for case, of in values.items():
        cells = (times(of[ours] / of[b]) if ours in of and of.get(b, 0) > 0 else "-" for b in sums)
        body.append([counted(case, count), *cells])
    if _adds_up(mine):
        body.append([all_of(count), *(times(value) for value, _ in sums.values())])
    title = f"{KINDS[kind].capitalize()}, {label(ours)} over the others"
    return Table(title, RATIO, [[mine[0]["extra_info"]["suite"], *(LABELS[b] for b in sums)], *body])


def _adds_up(mine: Sequence[Row]) -> bool:
    """Layers make up a network; models are each for themselves."""
    return mine[0]["extra_info"]["suite"] == "layer" and len(counts(mine)) > 1


def value_table(mine: Sequence[Row], title: str, caption: str, value: Callable[[Row], float | None]) -> Table | None:
    """A number of each layer and implementation, and the sums; None where it was not measured."""
    values, count = pivot(mine, value), counts(mine)
    if not values:
        return None
    names = order(n for of in values.values() for n in of)
    body = [[counted(case, count), *(number(of.get(n)) for n in names)] for case, of in values.items()]
    if _adds_up(mine):
        sums = total(values, count)
        body.append([all_of(count), *(number(sums.get(n)) for n in names)])
    return Table(title, caption, [[mine[0]["extra_info"]["suite"], *map(label, names)], *body])


def layer_tables(mine: Sequence[Row]) -> list[Table]:
    """Everything about one group's layers (or models): ratios first, then times, bytes and allocations."""
    mine = with_means(mine)
    by_kind = {kind: [r for r in mine if r["extra_info"]["kind"] == kind] for kind in KINDS}
    names = ours_of(r["extra_info"]["implementation"] for r in mine)
    less = "Smaller is better."
    pairs = ((kind, ours) for kind in KINDS for ours in names if mine[0]["extra_info"]["suite"] == "layer")
    found = [ratio_table(mine, ours, kind) for kind, ours in pairs]  # whole models': the headline has them
    found += [value_table(by_kind[k], f"{KINDS[k].capitalize()}, ms", f"{less} Medians.", milliseconds) for k in KINDS]
    step = by_kind["step"] or by_kind["forward"]
    subjects = (
        ("Kept for backward, MB", f"{less} Exact: what the forward keeps.", extra("saved_bytes", 1e-6)),
        ("Peak of a training step, MB", f"{less} The most that is allocated at once.", extra("peak_bytes", 1e-6)),
        ("Allocations of a training step", f"{less} How often memory is asked for.", extra("allocations")),
    )
    return [t for t in (*found, *(value_table(step, *subject) for subject in subjects)) if t]


# ------------------------------------------------------------------------------------------------- memory and scaling


def memory_ratios(data: Result) -> dict[tuple[str, int, str], dict[int, dict[str, int]]]:
    """Bytes kept for backward by (model, size, dtype), batch and implementation."""
    found: dict[tuple[str, int, str], dict[int, dict[str, int]]] = {}
    for row in data.get("memory") or ():
        key = (row["model"], row["size"], row["dtype"])
        found.setdefault(key, {}).setdefault(row["batch"], {})[row["implementation"]] = row["saved_bytes"]
    return found


def memory_table(data: Result, ours: str = "torch", baseline: str = "conv_bn_relu") -> Table | None:
    """Bytes that whole networks keep for backward, as ratios, batch by batch."""
    found = memory_ratios(data)
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    if not any(ours in of and baseline in of for by_batch in found.values() for of in by_batch.values()):
        return None
    body = []
    for (model, size, dtype), by_batch in found.items():
        both = {b: of for b, of in by_batch.items() if ours in of and of.get(baseline)}
        cells = [times(both[b][ours] / both[b][baseline]) if b in both else "-" for b in batches]
        body.append([f"{network(model)} at {size}, {dtype}", *cells])
    caption = (
        f"What a training forward keeps for backward with deconvolution, over the same with {LABELS[baseline]}. "
        f"{RATIO} Exact bytes, the same on every machine."
    )
    return Table("Memory of whole networks", caption, [["model", *(f"batch {b}" for b in batches)], *body])


def scaling_table(data: Result, stages: bool = True) -> Table | None:
    """Fitted exponents beside the predicted ones; without ``stages`` those of whole steps only."""
    found = [fit for fit in fits(data) if stages or fit.stage == "step"]
    if not found:
        return None
    ranges: dict[str, set[float]] = {}
    for row in rows(data, "scaling"):
        ranges.setdefault(row["extra_info"]["axis"], set()).add(row["extra_info"]["value"])
    head = ["what grows", "from", "to", "of", "stage", "exponent", "predicted", "R2"]
    body = []
    for fit in found:
        ends = (number(min(ranges[fit.axis])), number(max(ranges[fit.axis])))
        name = label(fit.implementation)
        exponents = (times(fit.exponent), "-" if fit.predicted is None else times(fit.predicted), times(fit.r2))
        body.append([fit.axis, *ends, name, fit.stage, *exponents])
    caption = (
        "Time grows as the size to this exponent: 1 is in proportion, 2 with its square, 0 not at all; smaller is "
        "better. Predicted from the bytes and the arithmetic; R2 near 1 says that such a law fits."
    )
    return Table("How the cost grows", caption, [head, *body])


def parts(data: Result) -> dict[str, list[Row]]:
    """Rows of the suites model, layer and stage that belong into one table or plot, by what they are about."""
    found: dict[str, list[Row]] = {}
    for suite in ("model", "layer", "stage"):
        for group, mine in grouped(rows(data, suite)).items():
            about = {"model": "Whole models", "layer": f"Layers of {network(group.network)}"}
            name = about.get(suite, f"Stages of {network(group.network)}'s layers")
            found.setdefault(f"{name}, {conditions(group)}", []).extend(mine)
    return found


def part_tables(mine: Sequence[Row]) -> list[Table]:
    """The tables of one of :func:`parts`."""
    return stage_tables(mine) if mine[0]["extra_info"]["suite"] == "stage" else layer_tables(mine)


def tables(data: Result) -> list[Table]:
    """All tables of a run, suite by suite; what was not measured is left out."""
    found = [headline(data), block_table(data), memory_table(data)]
    for name, mine in parts(data).items():
        found += [t._replace(title=f"{name}: {lowered(t.title)}") for t in part_tables(mine)]
    found.append(scaling_table(data))
    return [t for t in found if t]


def fits(data: Result) -> list[Any]:
    """Power laws through the suite ``scaling``, empty without it."""
    mine = rows(data, "scaling")
    if not mine:
        return []
    scaling = import_module("tdeconv.bench.scaling")  # with torch, which no other table needs
    return list(scaling.fits(mine))


# ----------------------------------------------------------------------------------------------------------- summary


def summary(data: Result) -> str:
    """What ``tdeconv bench`` prints at its end: short, for somebody who has never seen this project."""
    measured = order(r["extra_info"]["implementation"] for r in data["benchmarks"])
    lines = [
        "What network deconvolution costs here: the same layers with deconvolution and ReLU, and as convolution,",
        "batch norm and ReLU (conv+BN+ReLU), on the same input; answers were checked before anything was timed.",
        "A training step is forward and backward, without the optimiser.",
        *(f"{LABELS[name]}: {WHO[name]}." for name in measured if name in WHO),
        "",
        where(data) + ".",
        *how(data).replace(". ", ".\n", 1).splitlines(),
        "",
    ]
    found = [
        headline(data),
        block_table(data),
        *_step_tables(data),
        memory_table(data),
        scaling_table(data, stages=False),
    ]
    lines += [_plain(t) for t in found if t]
    lines += textwrap.wrap(floor_sentence(data), 110)
    return "\n".join(lines).rstrip() + "\n"


def _step_tables(data: Result) -> list[Table | None]:
    """Training steps layer by layer, of what a user of this machine runs."""
    groups = grouped(rows(data, "layer"))
    several = len({g.network for g in groups}) < len(groups)
    found = []
    for group, mine in groups.items():
        ours = main_implementation(r["extra_info"]["implementation"] for r in mine)
        if ours and (table := ratio_table(mine, ours)):
            name = network(group.network) + (f", {conditions(group)}" if several else "")
            found.append(table._replace(title=f"{name}: {lowered(table.title)}", caption=""))
    return found


def _plain(table: Table) -> str:
    said = [f"{table.title}.", *textwrap.wrap(table.caption, 110)]
    return "\n".join(said) + f"\n\n{markdown.table(table.rows)}\n"
