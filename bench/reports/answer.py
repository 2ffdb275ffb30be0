"""The answer of a report and of the README: what a training step costs on one device, over all its result files."""

from __future__ import annotations

from collections.abc import Sequence

from tdeconv.bench.markdown import Table
from tdeconv.bench.reports import tables
from tdeconv.bench.reports.ratios import (
    BASELINES,
    LABELS,
    RATIO,
    Ratio,
    cell,
    network,
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
    values = [r.value for r in steps if (r.ours, r.baseline) == (ours, first)]
    low, high = times(min(values)), times(max(values))
    said = low if low == high else f"{low} to {high}"
    return (
        f"On {device}, a training step with deconvolution ({ours}) takes {said} times as long as with {LABELS[first]}."
    )


def answer_table(steps: Sequence[Ratio], ours: str) -> Table:
    """A line for each model and network, a column for each thing that deconvolution is compared with."""
    pairs = {
        (ours, "conv_bn_relu"): LABELS["conv_bn_relu"],
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
    return Table("Time with deconvolution over time without", RATIO + common, [head, *body])


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
