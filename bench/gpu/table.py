"""The GPU report's results as Markdown, as a short table, and as plots: all from ``results.json`` alone."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table

Row = dict[str, Any]
Content = dict[str, Any]
NONE = "-"


def _number(value: Any, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return table([list(head), *body]) if body else "Nothing."


def _of(content: Content, *steps: str) -> list[Row]:
    return [row for row in content["rows"] if row["step"] in steps]


def _measured(content: Content, *steps: str) -> list[Row]:
    return [row for row in _of(content, *steps) if "p50_ms" in row]


def _about(content: Content) -> str:
    about, options = content["about"], content["options"]
    smoke = "\n\nA smoke run: its times mean nothing." if options.get("smoke") else ""
    return ", ".join(f"{key} {value}" for key, value in about.items()) + "." + smoke


def _steps(content: Content) -> str:
    rows = (
        [
            *(s["step"], s["state"], _number(s["seconds"]), _number(s["allowed_s"])),
            *(str(s["begun"]), str(s["units"] or NONE), s.get("error", "")[-80:]),
        ]
        for s in content["steps"]
    )
    return _table(["step", "state", "seconds", "allowed", "begun", "units", "error"], rows)


def _outcomes(content: Content) -> str:
    counts = Counter(row.get("outcome", "stopped") for row in _of(content, "tests"))
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none ran"


def _times(row: Row) -> list[str]:
    return [_number(row[f"p{tenth}_ms"]) for tenth in (20, 50, 80)]


def _megabytes(value: int | None) -> str:
    return NONE if value is None else f"{value / 1e6:.0f}"


def _stages(rows: Iterable[Row]) -> str:
    head = ["layer", "stage", "way", "p20 ms", "p50 ms", "p80 ms", "floor ms", "share", "bound", "peak MB", "error"]
    return _table(head, (
        [
            f"{r['network']} {r['shape']}, {r['batch']}, {r['dtype']}, {r['layout']}",
            *(f"{r['stage']} {r['direction']}", r["way"], *_times(r)),
            *(_number(r.get("floor_ms")), _number(r.get("share"), 2), r.get("bound", NONE)),
            *(_megabytes(r.get("peak_bytes")), _number(r.get("error_measured"), 2)),
        ]
        for r in rows
    ))  # fmt: skip


def _models(content: Content) -> str:
    head = ["network", "batch", "variant", "kind", "p20 ms", "p50 ms", "p80 ms", "of conv_bn compiled", "kept MB"]
    rows = _measured(content, "models")
    base = {(r["network"], r["batch"], r["kind"]): r["p50_ms"] for r in rows if r["variant"] == "conv_bn compiled"}
    return _table([*head, "peak MB", "error", "plain torch's"], (
        [
            *(r["network"], str(r["batch"]), r["variant"], r["kind"], *_times(r)),
            _ratio(r["p50_ms"], base.get((r["network"], r["batch"], r["kind"]))),
            *(_megabytes(r["kept_bytes"]), _megabytes(r["peak_bytes"])),
            *(_number(r["error_measured"], 2), _number(r["error_plain"], 2)),
        ]
        for r in rows
    ))  # fmt: skip


def _ratio(value: float, base: float | None) -> str:
    return NONE if not base else f"{value / base:.2f}"


def _errors(content: Content) -> str:
    rows = [row for row in content["rows"] if "error" in row]
    return _table(["step", "unit", "what"], ([r["step"], r["unit"], r["error"][:300]] for r in rows))


def _choices(content: Content) -> str:
    def words(choice: Row) -> str:
        blocks = " ".join(f"{k}={v}" for k, v in choice["blocks"].items())
        return f"{blocks} warps={choice['num_warps']} stages={choice['num_stages']}".strip()

    rows = ([*name.split(": ", 1), words(choice)] for name, choice in sorted(content["choices"].items()))
    return _table(["kernel", "sizes", "chosen"], rows)


def _ceilings(ceilings: dict[str, float]) -> str:
    units = {"memory": "bytes/s", "launch": "s"}
    rows = ([what, _number(value), units.get(what, "operations/s")] for what, value in ceilings.items())
    return _table(["what", "measured", "in"], rows)


def markdown(content: Content) -> str:
    """The whole report."""
    ceilings = next((row["ceilings"] for row in content["rows"] if "ceilings" in row), {})
    tools = _table(["tool", "outcome"], ([r["unit"], r["outcome"]] for r in _of(content, "tools") if "outcome" in r))
    parts = {
        "Steps": _steps(content),
        "Ceilings, measured": _ceilings(ceilings),
        "Tests": f"{_outcomes(content)}.",
        "Grid barrier": _table(["what", "outcome"], ([r.get("what", r["unit"]), r.get("outcome", r.get("error", NONE))]
                                                    for r in _of(content, "barrier"))),
        "Networks": _models(content),
        "Stages": _stages(_measured(content, "kernels")),
        "Stages, tuned": _stages(_measured(content, "tuned")),
        "The tuner's choices": _choices(content),
        "Tools": tools,
        "What failed or was stopped": _errors(content),
    }  # fmt: skip
    return f"# GPU report\n\n{_about(content)}\n\n" + "\n".join(f"## {k}\n\n{v}\n" for k, v in parts.items())


def short(content: Content) -> str:
    """What to look at first."""
    shares = [row for row in _measured(content, "kernels", "tuned") if "share" in row]
    furthest = sorted(shares, key=lambda row: row["floor_ms"] - row["p50_ms"])[:8]
    errors = sum("error" in row for row in content["rows"])
    lines = [_about(content), "", _steps(content), "", f"tests: {_outcomes(content)}; errors in all: {errors}", ""]
    lines += [_models(content), "", "Furthest from their floors:", _stages(furthest)]
    return "\n".join(lines)


def plots(content: Content, out: Path) -> list[str]:
    """Pictures of the networks' steps and of the stages' shares; none without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        plt = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return []
    shares = [row for row in _measured(content, "kernels") if "share" in row]
    pictures = {
        "models.png": [(f"{r['network']} {r['batch']} {r['variant']} {r['kind']}", r["p50_ms"])
                       for r in _measured(content, "models")],
        "shares.png": [(f"{r['network']} {r['shape']} {r['dtype']} {r['stage']} {r['direction']} {r['way']}",
                        r["share"]) for r in shares],
    }  # fmt: skip
    labels = {"models.png": "milliseconds, median", "shares.png": "share of the floor"}
    for name, bars in pictures.items():
        if bars:
            figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * len(bars)), layout="constrained")
            axes.barh([label for label, _ in bars], [value for _, value in bars])
            axes.invert_yaxis()
            axes.tick_params(axis="y", labelsize=5)
            axes.set_xlabel(labels[name])
            figure.savefig(out / name, dpi=120)
            plt.close(figure)
    return [name for name, bars in pictures.items() if bars]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m bench.gpu.table results.json``: the report once more."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.table")
    parser.add_argument("file", type=Path)
    print(markdown(json.loads(parser.parse_args(argv).file.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
