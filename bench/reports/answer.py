"""The answer of a report and of the README: what a training step costs on one device, over all its result files."""

from __future__ import annotations

from collections.abc import Sequence

from tdeconv.bench.markdown import Table
from tdeconv.bench.reports import tables
from tdeconv.bench.reports.ratios import (
    BASELINES,
    LABELS,
    RATIO,
    STALE,
    Ratio,
    cell,
    kinds_of_step,
    label,
    network,
    ours_of,
    ratios,
    subject,
    times,
    told_apart,
)
from tdeconv.bench.results import Result


def steps_of(results: Sequence[Result]) -> list[Ratio]:
    """Ratios of one device's training steps; of what was measured twice the one with more rounds, then the newer."""
    of = sorted(results, key=lambda d: (max(r["stats"].get("rounds", 0) for r in d["benchmarks"]), d["datetime"]))
    steps = {(r.suite, r.group, r.size, r.ours, r.baseline): r for data in of for r in ratios(data) if r.kind == "step"}
    return sorted(steps.values(), key=lambda r: (r.suite != "model", r.suite))


def lead(device: str, steps: Sequence[Ratio], ours: str) -> str:
    """The answer in a sentence: against conv+BN+ReLU, or against what else there is."""
    first = min((r.baseline for r in steps if r.ours == ours), key=BASELINES.index)

    def said(name: str) -> str:
        values = [r.value for r in steps if (r.ours, r.baseline) == (name, first)]
        low, high = times(min(values)), times(max(values))
        return low if low == high else f"{low} to {high}"

    means = [name for name in _kinds(steps, ours, first) if not name.endswith(STALE)]
    return (
        f"On {device}, a training step with deconvolution ({ours}) takes {said(ours)} times as long as with "
        f"{label(first)}{''.join(f', in a{name.removeprefix(ours)} {said(name)}' for name in means)}."
    )


def _kinds(steps: Sequence[Ratio], ours: str, baseline: str) -> list[str]:
    """The names of an implementation in other kinds of step that were compared with a baseline."""
    return ours_of(r.ours for r in steps if r.baseline == baseline and r.ours.startswith(f"{ours} "))


def answer_table(steps: Sequence[Ratio], ours: str) -> Table:
    """A line for each model and network, a column for each thing that deconvolution is compared with."""
    pairs = {
        (ours, "conv_bn_relu"): LABELS["conv_bn_relu"],
        **{
            (name, "conv_bn_relu"): f"{LABELS['conv_bn_relu']}:{name.removeprefix(ours)}"
            for name in _kinds(steps, ours, "conv_bn_relu")
        },
        (ours, "conv_bn_relu_compiled"): LABELS["conv_bn_relu_compiled"],
        (f"{ours}_compiled", "conv_bn_relu_compiled"): "conv+BN+ReLU, both compiled",
        (ours, "reference"): LABELS["reference"],
        (ours, "paper"): LABELS["paper"],
    }
    lines: dict[str, dict[str, str]] = {}
    shown = [r for r in steps if (r.ours, r.baseline) in pairs]
    common, own = told_apart(r.group for r in shown)
    for r in shown:
        lines.setdefault(subject(r) + own[r.group], {})[pairs[r.ours, r.baseline]] = cell(r)
    heads = [head for head in pairs.values() if any(head in cells for cells in lines.values())]
    body = [[line, *(cells.get(head, "-") for head in heads)] for line, cells in lines.items()]
    head = [f"training step of {ours}, over that of", *heads]
    caption = RATIO + kinds_of_step(r.ours for r in shown) + common
    return Table("Time with deconvolution over time without", caption, [head, *body])


def memory_line(data: Result, batch: int = 64) -> str:
    """Whole networks' bytes, at one batch that all have, as near to ``batch`` as can be."""
    said = []
    for (model, size, dtype), by_batch in tables.memory_ratios(data).items():
        both = {b: of for b, of in by_batch.items() if "torch" in of and of.get("conv_bn_relu")}
        if both:
            nearest = min(both, key=lambda b: abs(b - batch))
            ratio = both[nearest]["torch"] / both[nearest]["conv_bn_relu"]
            said.append(f"{times(ratio)}x for {network(model)} at {size}, {dtype}, batch {nearest}")
    return f"Bytes kept for backward, against {LABELS['conv_bn_relu']}: {'; '.join(said)}." if said else ""
