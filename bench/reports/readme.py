"""``python -m tdeconv.bench.reports.readme [--check]``: the README's results, written from ``bench/results/``.

Everything between the two marks is written anew; nothing of it is typed by hand. With ``--check`` nothing is written:
the difference is shown, and the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdeconv.arguments import nonempty_path, read
from tdeconv.bench import markdown
from tdeconv.bench.reports import tables
from tdeconv.bench.reports.answer import answer_table, steps_of
from tdeconv.bench.reports.ratios import RATIO, commit, main_implementation, measured, versions
from tdeconv.bench.reports.ratios import device_title as title
from tdeconv.bench.reports.stage_tables import floor_sentence
from tdeconv.bench.results import RESULTS, Result, by_device, found, on_gpu, publish

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
README = Path(__file__).parents[2] / "README.md"
SETS = ("layers", "models")  # whose ratios are the headline


def section(results: Mapping[Path, Result], base: Path) -> str:
    """What stands between the marks: a part for each device, CPUs first, then the memory of whole networks."""
    devices = sorted(by_device(results), key=lambda of: on_gpu(next(iter(of.values()))))
    parts = [_device(of, base) for of in devices]
    memory = next((part for path, data in results.items() if (part := _memory(path, data, base))), "")
    introduction = f"Written by `python -m tdeconv.bench.reports.readme` from the files named. {RATIO}"
    return "\n\n".join(filter(None, (_wrapped(introduction), *parts, memory)))


def _device(files: Mapping[Path, Result], base: Path) -> str:
    """A device's training steps, whole models and sums over layers, and how far they are from the hardware's floor."""
    mine = {path: data for path, data in files.items() if data["set"] in SETS}
    steps = steps_of(list(mine.values()))
    ours = main_implementation(r.ours for r in steps)
    if not ours:
        return ""
    table = answer_table(steps, ours)
    sources = "\n".join(_wrapped(f"- `{_relative(path, base)}`: {_source(data)}.") for path, data in mine.items())
    floors = (line for data in mine.values() if (line := floor_sentence(data)))
    about = f"**{title(next(iter(mine.values())))}.**{table.caption.removeprefix(RATIO)}"
    about = _wrapped(" ".join((about, *floors)))
    return "\n\n".join((about, markdown.table(table.rows), sources))


def _source(data: Result) -> str:
    return "; ".join(filter(None, (versions(data), commit(data), data["datetime"][:10], measured(data))))


def _memory(path: Path, data: Result, base: Path) -> str:
    table = tables.memory_table(data)
    if table is None:
        return ""
    said = f"{table.caption} `{_relative(path, base)}`: {versions(data)}; {data['datetime'][:10]}."
    return f"{_wrapped(f'**{table.title}.** {said}')}\n\n{markdown.table(table.rows)}"


def _relative(path: Path, base: Path) -> str:
    inside = path.resolve()
    return (inside.relative_to(base.resolve()) if inside.is_relative_to(base.resolve()) else path).as_posix()


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def rewritten(readme: str, results: str) -> str:
    """The README with ``results`` between its marks.

    Raises:
        ValueError: the marks are not there once each, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README: it needs one line {BEGIN} and below it one line {END}")
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    about = "Write the README's results from the files that are kept."
    parser = argparse.ArgumentParser(prog="python -m tdeconv.bench.reports.readme", description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is not up to date")
    parser.add_argument("--readme", type=nonempty_path, default=README, metavar="FILE", help="default %(default)s")
    parser.add_argument("--results", type=nonempty_path, default=RESULTS, metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        old = read(args.readme, "--readme")
        new = rewritten(old, section(found([args.results]), args.readme.parent))
        if not args.check:
            publish({args.readme: new})
    except (ValueError, OSError) as error:
        print(f"tdeconv.bench.reports.readme: {error}", file=sys.stderr)
        return 2
    if args.check and new != old:
        lines = (text.splitlines(keepends=True) for text in (old, new))
        sys.stdout.writelines(difflib.unified_diff(*lines, "README.md as it is", "README.md from the files"))
        print("README.md is out of date: run python -m tdeconv.bench.reports.readme", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
