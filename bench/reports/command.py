"""``python -m tdeconv report``: result files become one HTML page with plots, and the same tables as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from tdeconv.arguments import check_writable, nonempty_path
from tdeconv.bench import markdown
from tdeconv.bench.markdown import Table
from tdeconv.bench.reports import plots, tables
from tdeconv.bench.reports.answer import answer_table, lead, memory_line, steps_of
from tdeconv.bench.reports.ratios import (
    LABELS,
    RATIO,
    Ratio,
    cell,
    device_title,
    how,
    main_implementation,
    subject,
    told_apart,
    where,
)
from tdeconv.bench.reports.stage_tables import floor_sentence
from tdeconv.bench.results import Result, Row, by_device, found, publish, rows

TITLE = "What network deconvolution costs"
INTRODUCTION = (
    "Network deconvolution (FastDeconv) takes the place of a convolution and its batch norm. Here the same layers are "
    "timed as deconvolution and ReLU, and as convolution, batch norm and ReLU (conv+BN+ReLU), on the same input and "
    "with their answers checked first. A training step is forward and backward, without the optimiser."
)


class Figure(NamedTuple):
    """A plot and the sentence that says how to read it."""

    svg: Markup
    sentence: str


class Part(NamedTuple):
    """What belongs together: plots, tables that are shown, and tables that wait behind a click."""

    title: str
    figures: list[Figure]
    shown: list[Table]
    more: list[Table]


class File(NamedTuple):
    """One result file's part of the report."""

    name: str
    about: str
    parts: list[Part]


class Device(NamedTuple):
    """A device, its answer as a sentence, a table and notes, and its files."""

    title: str
    lead: str
    answer: Table | None
    notes: list[str]
    files: list[File]


def side_by_side(devices: Sequence[Mapping[Path, Result]]) -> Table | None:
    """Training steps on several devices, a column for each; None for a single one."""
    columns: dict[str, list[Ratio]] = {}
    for results in (list(files.values()) for files in devices):
        steps = steps_of(results)
        if name := main_implementation(r.ours for r in steps):
            columns[f"{device_title(results[0])}: {name}"] = [r for r in steps if r.ours == name]
    if len(columns) < 2:
        return None
    common, own = told_apart(r.group for of in columns.values() for r in of)
    lines: dict[str, dict[str, str]] = {}
    for head, of in columns.items():
        for r in of:
            lines.setdefault(f"{subject(r)}{own[r.group]}, over {LABELS[r.baseline]}", {})[head] = cell(r)
    body = [[line, *(cells.get(head, "-") for head in columns)] for line, cells in lines.items()]
    return Table("Devices side by side", RATIO + common, [["time of a training step", *columns], *body])


# ------------------------------------------------------------------------------------------------------------- parts


def _figures(*drawn: tuple[str | None, str]) -> list[Figure]:
    return [Figure(Markup(svg), sentence) for svg, sentence in drawn if svg]


def _timed_part(title: str, mine: Sequence[Row]) -> Part:
    of, suite = tables.part_tables(mine), mine[0]["extra_info"]["suite"]
    bars = f"Each bar is the time of one {suite}; within a block, the shorter the better."
    rounds = (
        f"Each dot is one round of one {suite}, as its distance from the median: the flatter, the surer. A round in "
        "which all go up together was disturbed, which hardly moves the ratios."
    )
    return Part(title, _figures((plots.layer_bars(mine), bars), (plots.spread(mine), rounds)), of[:1], of[1:])


def _stage_part(title: str, mine: Sequence[Row], ceilings: Mapping[str, Any]) -> Part:
    of = tables.part_tables(mine)
    name = main_implementation(r["extra_info"]["implementation"] for r in mine)
    ours = [r for r in mine if r["extra_info"]["implementation"] == name]
    bars = "Each bar is one layer's training step, cut into what its stages take."
    dots = (
        "Each dot is one stage of one layer; the two lines are what this machine's memory and arithmetic allow; the "
        "thin line from a dot to its tick is the gap to its floor. What needs less arithmetic than the formulas, as "
        "Winograd's convolutions do, can lie above."
    )
    roofline = plots.roofline(ours, ceilings) if ours else None
    return Part(title, _figures((plots.stage_bars(mine), bars), (roofline, dots)), of[:1], of[1:])


def _memory_part(data: Result) -> Part:
    table = tables.memory_table(data)
    sentence = "Each bar is what a training forward of the whole network keeps for backward, for one image of a batch."
    figures = _figures((plots.memory_bars(data["memory"]), sentence))
    return Part("Memory of whole networks", figures, [table] if table else [], [])


def _scaling_part(data: Result) -> Part:
    fits = tables.fits(data)
    name = main_implementation(f.implementation for f in fits)
    stages = [f for f in fits if f.stage != "step" and f.implementation == name]
    sentence = (
        "Dots are measured, solid lines fitted, dashed lines have the slope that bytes and arithmetic predict; a "
        "flatter line is better."
    )
    figures = _figures(
        (plots.scaling([f for f in fits if f.stage == "step"], "implementation"), f"Whole training steps. {sentence}"),
        (plots.scaling(stages, "stage"), f"The stages of {LABELS.get(name or '', '')}. {sentence}"),
    )
    whole, full = tables.scaling_table(data, stages=False), tables.scaling_table(data)
    more = [full._replace(title="How the cost of every stage grows")] if full and full != whole else []
    return Part("Scaling", figures, [whole] if whole else [], more)


def _parts(data: Result, with_memory: bool) -> list[Part]:
    """Suite by suite; what was not measured is left out."""
    found = []
    if whole := [table for table in (tables.headline(data), tables.block_table(data)) if table]:
        found.append(Part("Ratios", [], whole, []))
    for title, mine in tables.parts(data).items():
        if mine[0]["extra_info"]["suite"] == "stage":
            found.append(_stage_part(title, mine, data["machine_info"].get("ceilings") or {}))
        else:
            found.append(_timed_part(title, mine))
    if with_memory:
        found.append(_memory_part(data))
    if rows(data, "scaling"):
        found.append(_scaling_part(data))
    return found


# ------------------------------------------------------------------------------------------------------------ report


def _memory_files(results: Iterable[tuple[Path, Result]]) -> set[Path]:
    """Files whose memory is shown: exact bytes are the same on every machine, so the same rows are shown once."""
    first: dict[str, Path] = {}
    for path, data in results:
        if data.get("memory"):
            first.setdefault(repr(data["memory"]), path)
    return set(first.values())


def _device(files: Mapping[Path, Result], with_memory: Collection[Path]) -> Device:
    results = list(files.values())
    steps, title = steps_of(results), device_title(results[0])
    ours = main_implementation(r.ours for r in steps)
    said, table = (lead(title, steps, ours), answer_table(steps, ours)) if ours else (f"{title}.", None)
    notes = [next(filter(None, map(say, reversed(results))), "") for say in (memory_line, floor_sentence)]
    mine = [
        File(f"{data['set']} ({path.name})", f"{where(data)}. {how(data)}", _parts(data, path in with_memory))
        for path, data in files.items()
    ]
    return Device(title, said, table, list(filter(None, notes)), mine)


def page(devices: Sequence[Device], side: Table | None) -> str:
    """One self-contained HTML page."""
    options: Any = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    source = resources.files("tdeconv.bench.reports").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, **options).from_string(source)
    return template.render(title=TITLE, introduction=INTRODUCTION, ratio=RATIO, devices=devices, side=side)


def text(devices: Sequence[Device], side: Table | None) -> str:
    """The same without plots, as Markdown."""
    lines = [f"# {TITLE}\n", f"{INTRODUCTION}\n", f"{RATIO}\n"]
    for device in (d for d in devices if d.answer or d.notes):
        answer = f"{markdown.table(device.answer.rows)}\n" if device.answer else ""
        lines += filter(None, (f"**{device.lead}**\n", answer, *(f"{note}\n" for note in device.notes)))
    lines += [side.markdown()] if side else []
    for device in devices:
        lines.append(f"## {device.title}\n")
        for file in device.files:
            lines += [f"### {file.name}\n", f"{file.about}\n"]
            for part in file.parts:
                of = [*part.shown, *part.more]
                lines += [f"#### {part.title}\n", *(t.markdown(5) for t in of)] if of else []
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = "result files, or folders of them"
    parser.add_argument("results", nargs="+", type=nonempty_path, metavar="RESULTS", help=of)
    out = "folder for report.html and report.md (default %(default)s)"
    parser.add_argument("--out", type=nonempty_path, default=Path("bench-out/report"), metavar="DIR", help=out)


def run(args: argparse.Namespace) -> int:
    """Write the report. Returns the process's exit status."""
    try:
        files = by_device(found(args.results))
        check_writable(args.out)
        with_memory = _memory_files(item for of in files for item in of.items())
        devices, side = [_device(of, with_memory) for of in files], side_by_side(files)
        html, plain = args.out / "report.html", args.out / "report.md"
        publish({html: page(devices, side), plain: text(devices, side)})
    except (ValueError, OSError) as error:
        print(f"tdeconv report: {error}", file=sys.stderr)
        return 2
    print(f"saved: {html}, {plain}")
    return 0
