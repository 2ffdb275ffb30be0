"""A profile as text for a terminal, and as Markdown: both from what ``profile.json`` holds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tdeconv.bench.markdown import table
from tdeconv.bench.roofline import STAGES

Content = Mapping[str, Any]
Layer = Mapping[str, Any]
WIDTH = 120
SHORT = {"patch_moments": "mom.", "inverse_sqrt": "root", "fold": "fold", "convolve": "conv", "rest": "rest"}
DIRECTIONS = ("forward", "backward")
NONE = "-"


# ---------------------------------------------------------------------------------------------------------- numbers


def _unit(content: Content) -> tuple[float, str]:
    """In which a step's parts are numbers of few digits."""
    step = content["step_s"]
    return (1e6, "microseconds") if step < 0.01 else (1e3, "milliseconds") if step < 10 else (1.0, "seconds")


def _number(seconds: float | None, scale: float) -> str:
    """At most four characters, wherever the unit suits."""
    if seconds is None:
        return NONE
    value = seconds * scale
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


# ------------------------------------------------------------------------------------------------------------- rows


def _columns(content: Content) -> list[tuple[str, str]]:
    """The stages and directions that some layer has; on the reference backend a layer is one whole."""
    stages = [s for s in STAGES if any(s in layer["seconds"][d] for layer in content["layers"] for d in DIRECTIONS)]
    return [(direction, stage) for direction in DIRECTIONS for stage in (*stages, "rest")]


def _in_stages(columns: Sequence[tuple[str, str]]) -> bool:
    return len(columns) > len(DIRECTIONS)


def _body(content: Content, columns: Sequence[tuple[str, str]], scale: float) -> list[list[str]]:
    """A row for each layer, their sum, all else and the step: times, total, share of the step, floor, share of it."""
    layers, step = content["layers"], content["step_s"]
    rows = [_row(layer, columns, scale) for layer in layers]
    sums = {d: {s: sum(layer["seconds"][d].get(s, 0.0) for layer in layers) for s in SHORT} for d in DIRECTIONS}
    total = sum(layer["total_s"] for layer in layers)
    with_floor = [layer for layer in layers if layer["floor_s"] is not None]
    floor = sum(layer["floor_s"] for layer in with_floor)
    everyone = {
        "seconds": sums,
        "total_s": total,
        "share_of_step": total / step,
        "floor_s": floor if with_floor else None,
        "share_of_floor": floor / sum(layer["total_s"] for layer in with_floor) if with_floor else None,
    }
    empty = [""] * len(columns)
    rows.append(_row(everyone, columns, scale))
    rows.append([*empty, _number(content["else_s"], scale), _percent(content["else_s"] / step), "", ""])
    rows.append([*empty, _number(step, scale), "100%", "", ""])
    return rows


def _row(layer: Layer, columns: Sequence[tuple[str, str]], scale: float) -> list[str]:
    times = [_number(layer["seconds"][direction].get(stage), scale) for direction, stage in columns]
    floor = _number(layer["floor_s"], scale)
    return [*times, _number(layer["total_s"], scale), _percent(layer["share_of_step"]), floor,
            _percent(layer["share_of_floor"])]  # fmt: skip


def _ends(content: Content) -> list[str]:
    """What the last rows are called."""
    return [f"all {len(content['layers'])} deconvolution layers", "everything else", "the step"]


def _shape(layer: Layer) -> str:
    return layer["shape"] + (f", {layer['calls']} times" if layer["calls"] > 1 else "")


# ------------------------------------------------------------------------------------------------------------ words


STEPS = {
    "fresh": "a fresh training step (with its batch's statistics; forward and backward)",
    "stale": "a stale training step (with the running statistics; forward and backward)",
}


def _heading(content: Content) -> str:
    shape, threads = " x ".join(map(str, content["input"])), content["threads"]
    where = f"{content['device']}" + (f", {threads} thread(s)" if content["device_type"] == "cpu" else "")
    return (
        f"{content['model']}{', converted' if content['converted'] else ''}: {STEPS[content['step']]} "
        f"of {shape}, {content['dtype']}, {content['layout']}; {where}; torch {content['torch']}, "
        f"{content['datetime'][:10]}."
    )


def _explanation(content: Content) -> list[str]:
    ceilings, (scale, unit) = content["ceilings"], _unit(content)
    products = ", ".join(f"{dtype} {value / 1e9:.4g}" for dtype, value in ceilings["matmul"].items())
    products += " (half precision: at least float32's)" if len(ceilings["matmul"]) > 1 else ""
    times = (
        f"Times in {unit}: medians of {content['rounds']} rounds, part by part; the step is their sum. The median of "
        f"the whole steps: {_number(content['step_median_s'], scale)}; of steps without this clockwork: "
        f"{_number(content['unwatched_s'], scale)}. The column step: the share of the step."
    )
    columns = _columns(content)
    shortened = [f"{SHORT[s]} = {s}, " for s in STAGES if SHORT[s] != s and ("forward", s) in columns]
    rest = "rest = what a layer does around its stages; a layer without stages has all its time there."
    words = "".join(shortened) + rest
    floors = (
        "floor = the least that bytes, products and chains of launches need on this machine, stage by stage; share = "
        f"floor / total. Measured here: copying {ceilings['memory'] / 1e9:.4g} GB/s; products, in GFLOP/s: {products}; "
        f"a launch {ceilings['launch'] * 1e6:.2g} microseconds."
    )
    lines = [times, *([words] if _in_stages(columns) else []), floors]
    if any((layer["share_of_floor"] or 0) > 1 for layer in content["layers"]):
        lines.append(
            "A share above 100%: tensors stayed in a cache, or a stage was done with fewer operations than are counted "
            "(Winograd's convolution, an eigendecomposition)."
        )
    if content["not_called"]:
        lines.append(f"Not called in a step: {', '.join(content['not_called'])}.")
    return lines


def _choices(content: Content, stages: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """Of the backend and these stages: every choice and the numbers of the layers it was made for."""
    choices: dict[str, dict[str, list[int]]] = {}
    for layer in content["layers"]:
        said = {"backend": f"{layer['backend']}: {layer['why']}"} | {s: layer["how"].get(s) for s in stages}
        for what, how in said.items():
            if how is not None:
                choices.setdefault(what, {}).setdefault(how, []).append(layer["number"])
    return choices


def _numbers(numbers: Sequence[int]) -> str:
    """``1-4, 7``"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


# ------------------------------------------------------------------------------------------------------------- text


def text(content: Content) -> str:
    """For a terminal of 120 columns; names that do not fit lose their middles."""
    columns, (scale, _) = _columns(content), _unit(content)
    body = _body(content, columns, scale)
    times = [SHORT[stage] for _, stage in columns] if _in_stages(columns) else list(DIRECTIONS)
    titles = [*times, "total", "step", "floor", "share"]
    widths = [max(4, *(len(row[i]) for row in (titles, *body))) for i in range(len(titles))]
    half = len(columns) // 2
    numbers = [str(layer["number"]) for layer in content["layers"]]
    shapes = [_shape(layer) for layer in content["layers"]]
    fixed = len(numbers[-1]) + 2 + max(map(len, shapes)) + 2 + sum(w + 1 for w in widths) + 3
    names = [layer["name"] for layer in content["layers"]]
    room = min(max(map(len, names)), max(12, WIDTH - fixed))
    heads = [
        f"{number:>{len(numbers[-1])}}  {short(name, room):<{room}} {shape:<{max(map(len, shapes))}} "
        for number, name, shape in zip(numbers, names, shapes, strict=True)
    ]
    left = max(len(head) for head in (heads[0], *(f"{end} " for end in _ends(content))))

    def line(head: str, cells: Sequence[str]) -> str:
        cells = [cell.rjust(w) for cell, w in zip(cells, widths, strict=True)]
        groups = (cells[:half], cells[half : 2 * half], cells[2 * half :])
        return (f"{head:<{left}}" + "  ".join(" ".join(group) for group in groups)).rstrip()

    spans = [sum(w + 1 for w in widths[part]) - 1 for part in (slice(half), slice(half, 2 * half))]
    over = f"{'':<{left}}" + "  ".join(f" {d} ".center(n, "-") for d, n in zip(DIRECTIONS, spans, strict=True))
    lines = [line(head, row) for head, row in zip([*heads, *_ends(content)], body, strict=True)]
    top = line(f"{'#':>{len(numbers[-1])}}  {'layer':<{room}} shape", titles)
    rule = "-" * len(top)
    last = len(content["layers"])
    parts = [*([over] if _in_stages(columns) else []), top, rule, *lines[:last], rule, *lines[last:]]
    words = [_wrapped(_heading(content)), "", *parts, "", *map(_wrapped, _explanation(content)), "", *_said(content)]
    return "\n".join(words) + "\n"


def short(name: str, room: int) -> str:
    """A name without its middle where it is too long: its beginning says where a layer is, its end what."""
    if len(name) <= room:
        return name
    tail = (room - 1) // 2
    return f"{name[: room - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH - 1)


def _said(content: Content) -> list[str]:
    lines = ["How, and why; in brackets the numbers of the layers.", ""]
    for what, choices in _choices(content, ("inverse_sqrt", "convolve")).items():
        lines.append(f"{what}:")
        for how, numbers in choices.items():
            line = f"{how} [{_numbers(numbers)}]"
            lines.append(textwrap.fill(line, WIDTH - 1, initial_indent="  ", subsequent_indent="    "))
    return lines


# --------------------------------------------------------------------------------------------------------- Markdown


def markdown(content: Content) -> str:
    """The same with full names and every stage's choices."""
    columns, (scale, _) = _columns(content), _unit(content)
    in_stages = _in_stages(columns)
    times = [f"{stage} {direction}" for direction, stage in columns] if in_stages else list(DIRECTIONS)
    head = ["layer", "shape", "backend", *times, "total", "step", "floor", "share"]
    labels = [[f"{x['number']} {x['name']}", _shape(x), x["backend"]] for x in content["layers"]]
    labels += [[end, "", ""] for end in _ends(content)]
    rows = [[*label, *row] for label, row in zip(labels, _body(content, columns, scale), strict=True)]
    parts = ["# Where a training step's time goes", _heading(content), table([head, *rows])]
    parts += ["\n".join(f"- {line}" for line in _explanation(content)), "## How each stage is done, and why"]
    for what, choices in _choices(content, STAGES).items():
        cells = [[_numbers(numbers), how.replace("|", "/")] for how, numbers in choices.items()]
        parts += [f"{what}:", _plain_table([["layers", "how"], *cells])]
    return "\n\n".join(parts) + "\n"


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Words, to the left."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
