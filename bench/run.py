"""``python -m tdeconv.bench.run``: measure, save, print the tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tdeconv.bench import table

ROUNDS, QUICK_ROUNDS = 12, 3


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdeconv.bench.run", description="Time this machine on VGG-11's layers.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="results (default %(default)s)")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, answers checked in float32")
    add("--rounds", type=_positive, metavar="N", help=f"rounds of every measurement (default {ROUNDS})")
    add("--batch", type=_positive, metavar="N", help="batch size (default 128)")
    add("--paper-code", type=Path, metavar="DIR", help="checkout of the paper's repository, to measure too")
    add("--select", metavar="EXPR", help="only tests that match (pytest's -k): test_layer, 512-512-2x2, ...")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _measure(args: argparse.Namespace, json_path: Path) -> int:
    """Run the suites in a process of their own, which writes the JSON at its end."""
    suites = Path(__file__).parent
    # -o: nothing that the project's own tests are run with may reach a measurement
    command = [sys.executable, "-m", "pytest", str(suites), "-o", "addopts=", "-o", "filterwarnings=ignore"]
    command += ["-o", "console_output_style=classic", "-p", "no:cacheprovider"]
    command += ["-x", "-s", "-q", "--no-header", "--benchmark-quiet", f"--benchmark-json={json_path.resolve()}"]
    command.append(f"--rounds={args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)}")
    if args.quick:
        command.append("--oracle=float32")
    if args.batch is not None:
        command.append(f"--batch={args.batch}")
    if args.paper_code is not None:
        command.append(f"--paper-code={args.paper_code.resolve()}")
    if args.select:
        command += ["-k", args.select]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=suites.parent, env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Measure into ``--out``: ``vgg11.json`` and ``vgg11.md``. Earlier results stay until the new ones are complete."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    partial, final = args.out / "vgg11.partial.json", args.out / "vgg11.json"
    partial.unlink(missing_ok=True)
    try:
        if code := _measure(args, partial):
            return code
        report = table.markdown(table.load(partial))
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    final.with_suffix(".md").write_text(report, encoding="utf-8")
    print(f"\n{report}\nsaved: {final}, {final.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
