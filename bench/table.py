"""Results as Markdown, and the results that are kept: ``python -m tdeconv.bench.table FILE.json [--keep]``.

Only the JSON that pytest-benchmark saved is read: every number of a report can be made again from its file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tdeconv.bench.markdown import table

RESULTS = Path(__file__).parent / "results"
NAMES = ("conv_bn", "conv_bn_channels_last", "reference", "paper", "torch", "torch_channels_last")
RATIOS = {  # whose over whose
    "torch / conv_bn": ("torch", "conv_bn"),
    "the same, channels_last": ("torch_channels_last", "conv_bn_channels_last"),
    "torch / reference": ("torch", "reference"),
    "torch / paper": ("torch", "paper"),
}
STAGES = ("patches", "moments", "inverse_sqrt", "fold", "convolve", "rest")
Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """A file of pytest-benchmark.

    Raises:
        ValueError: it is not one, or holds no benchmarks.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data["benchmarks"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of pytest-benchmark: {error!r}") from None
    if not rows:
        raise ValueError(f"{path} holds no benchmarks")
    return data


def device(data: dict[str, Any]) -> str:
    """The device as a folder's name."""
    cores = data["machine_info"]["cores"]
    return re.sub(r"[^a-z0-9]+", "-", f"{data['machine_info']['device']} {cores} cores".lower()).strip("-")


def _by_layer(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, dict[str, float]]:
    """Values by layer and implementation, and their sum with each layer counted as often as the network has it."""
    values: dict[str, dict[str, float]] = {}
    total: dict[str, float] = {}
    layers = sum({row["extra_info"]["layer"]: row["extra_info"]["count"] for row in rows}.values())
    for row in rows:
        info = row["extra_info"]
        name, layer, count = info["implementation"], info["layer"], info["count"]
        values.setdefault(layer if count == 1 else f"{layer} (x{count})", {})[name] = value(row)
        total[name] = total.get(name, 0.0) + count * value(row)
    return {**values, f"all {layers} layers": total}


def _median_ms(row: Row) -> float:
    return 1e3 * row["stats"]["median"]


def _saved_mb(row: Row) -> float:
    return row["extra_info"]["saved_bytes"] / 1e6


def _value_table(values: dict[str, dict[str, float]], digits: int) -> str:
    names = [n for n in NAMES if n in next(iter(values.values()))]
    return table(
        [["layer", *names], *([layer, *(f"{of[n]:.{digits}f}" for n in names)] for layer, of in values.items())]
    )


def _ratio_table(values: dict[str, dict[str, float]]) -> str:
    names = next(iter(values.values()))
    ratios = {title: (a, b) for title, (a, b) in RATIOS.items() if a in names and b in names}
    rows = ([layer, *(f"{of[a] / of[b]:.2f}" for a, b in ratios.values())] for layer, of in values.items())
    return table([["layer", *ratios], *rows])


def _stage_values(rows: Sequence[Row], name: str, direction: str) -> dict[str, dict[str, float]]:
    """Milliseconds by layer and stage; patches are what ``patch_moments`` takes beyond its moments."""
    mine = [r for r in rows if r["extra_info"]["implementation"] == name and r["extra_info"]["direction"] == direction]
    by_stage = [{**r, "extra_info": {**r["extra_info"], "implementation": r["extra_info"]["stage"]}} for r in mine]
    values = _by_layer(by_stage, _median_ms)
    for of in values.values():
        if "patch_moments" in of:
            of["patches"] = of.pop("patch_moments") - of["moments"]
    return values


def _stage_table(rows: Sequence[Row], name: str, direction: str) -> str:
    values = _stage_values(rows, name, direction)
    stages = [s for s in STAGES if any(s in of for of in values.values())]
    lines = [["layer", *stages, "sum"]]
    for layer, of in values.items():
        cells = [f"{of[s]:.1f}" if s in of else "-" for s in stages]
        lines.append([layer, *cells, f"{sum(of[s] for s in stages if s in of):.1f}"])
    return table(lines)


def _about(data: dict[str, Any]) -> str:
    machine, rows = data["machine_info"], data["benchmarks"]
    info, rounds = rows[0]["extra_info"], rows[0]["stats"]["rounds"]
    spread = statistics.median(r["stats"]["iqr"] / r["stats"]["median"] for r in rows if r["stats"]["median"] > 0)
    commit, _, dirty = info["commit"].partition("-")
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}, "
        f"Python {machine['python_version']};\ncommit {commit[:12]}{' with changes' if dirty else ''}; "
        f"{data['datetime'][:10]}. Batch {info['batch']}, {info['dtype']}.\nMedians over {rounds} interleaved rounds; "
        f"in a typical row the middle half of the rounds spans {spread:.0%} of the median.\n"
    )


def _layer_parts(rows: Sequence[Row]) -> list[str]:
    """Tables of the layers: time of each kind, and the bytes saved."""
    subjects = (
        ("Forward in training", "ms", "forward", _median_ms, 1),
        ("Training step, forward and backward", "ms", "step", _median_ms, 1),
        ("Saved for backward, input included", "MB", "step", _saved_mb, 2),
    )
    parts = []
    for title, unit, kind, value, digits in subjects:
        if mine := [r for r in rows if r["extra_info"]["kind"] == kind]:
            values = _by_layer(mine, value)
            parts += [
                f"## {title}\n",
                f"Ratios:\n\n{_ratio_table(values)}\n",
                f"{unit}:\n\n{_value_table(values, digits)}\n",
            ]
    return parts


def _stage_parts(rows: Sequence[Row]) -> list[str]:
    """Tables of the stages, forward and backward, one for each implementation."""
    parts = []
    for name in dict.fromkeys(r["extra_info"]["implementation"] for r in rows):
        for direction in ("forward", "backward"):
            parts += [f"## Stages of {name}, {direction} (ms)\n", _stage_table(rows, name, direction) + "\n"]
    return parts


def markdown(data: dict[str, Any]) -> str:
    """The report of one run."""
    rows = data["benchmarks"]
    layers = _layer_parts([r for r in rows if "kind" in r["extra_info"]])
    stages = _stage_parts([r for r in rows if "stage" in r["extra_info"]])
    return "\n".join(["# VGG-11's 3x3 layers\n", _about(data), *layers, *stages])


def keep(path: Path, results: Path = RESULTS) -> Path:
    """Put a run and its report into ``results/<device>/``, to be committed. Returns the folder."""
    data = load(path)
    folder = results / device(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    (folder / path.with_suffix(".md").name).write_text(markdown(data), encoding="utf-8")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tdeconv.bench.table", description="Print a saved run's tables.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--keep", action="store_true", help="also put run and tables into bench/results/<device>/")
    args = parser.parse_args(argv)
    try:
        print(markdown(load(args.file)))
        if args.keep:
            print(f"kept in {keep(args.file)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
