"""``python -m tdeconv.bench.intervals``: train at several intervals, measure steps, keep all of it, compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product

import torch
from tqdm import tqdm

from tdeconv.arguments import check_writable, nonempty_path, positive_int
from tdeconv.bench.intervals import report, runs
from tdeconv.bench.learning.store import commit
from tdeconv.bench.results import publish
from tdeconv.demo.errors import DemoError

PROGRAM = "tdeconv.bench.intervals"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _report(args) if args.report else _measure(args)
    except (ValueError, OSError, DemoError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{PROGRAM}: {error.name} is not installed; pip install 'tdeconv[demo,bench,vision]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on from the runs that are done", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    intervals = ", ".join(map(str, runs.INTERVALS))
    about = f"Train the demo's networks with batch norm, and with statistics every {intervals} steps."
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=about)
    add = parser.add_argument
    networks, by_block = tuple(runs.NETWORKS), tuple(runs.NETWORKS_BY_BLOCK)
    about = f"of {', '.join(networks)} (default: all), or with other blocks {', '.join(by_block)}"
    add("networks", nargs="*", metavar="NETWORK", help=about)
    add("--data", nargs="+", choices=tuple(runs.DATA), default=["photographs", "digits"], help="what they learn")
    add("--root", type=nonempty_path, metavar="DIR", help="MNIST or Fashion-MNIST in torchvision's layout")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="one run each (default 0 1 2)")
    add("--threads", type=positive_int, metavar="N", help="torch's (default: as torch chooses)")
    add("--time", type=positive_int, metavar="ROUNDS", help="train nothing: measure so many steps of each kind")
    about = "runs, or with --report: the tables; runs that the file holds already are not made again"
    add("--out", type=nonempty_path, required=True, metavar="FILE", help=about)
    add("--report", type=nonempty_path, nargs="+", metavar="FILE", help="train nothing: compare the runs of these")
    return parser


def _measure(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.networks if name not in runs.NETWORKS | runs.NETWORKS_BY_BLOCK]:
        raise ValueError(f"there is no network {unknown[0]!r} here; choose from {', '.join(runs.NETWORKS)}")
    if bad := [seed for seed in args.seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"--seeds must be whole numbers from 0 to 2**32 - 1, got {bad[0]}")
    check_writable(args.out.parent)
    commit()  # now, while the files are those of the code that runs
    if args.threads:
        torch.set_num_threads(args.threads)
    sets = {name: runs.DATA[name](args.root) for name in args.data}
    found, times = runs.load([args.out], "--out") if args.out.exists() else ({}, {})
    networks = args.networks or runs.NETWORKS
    if args.time:
        for network, data in tqdm(list(product(networks, args.data)), unit="network"):
            times[f"{data} {network}"] = runs.time_steps(sets[data], network, args.time)
            runs.save(args.out, found, times)
    else:
        tuning = {name: runs.held_out(data) for name, data in sets.items()}
        turns = list(product(networks, args.seeds, args.data))  # if time runs out, it is some seed's runs that lack
        with tqdm(total=sum(1 for turn in turns for _ in runs.plans(*turn, None)), unit="run") as bar:
            for turn in turns:
                for plan in runs.plans(*turn, found):
                    bar.set_description(f"{plan.network} {plan.data} {plan.line.title} seed {plan.seed}")
                    if runs.key(plan) not in found:
                        data = (tuning if plan.held_out else sets)[plan.data]
                        found[runs.key(plan)] = runs.train(plan, data)
                        runs.save(args.out, found, times)
                    bar.update()
    print(f"saved in {args.out}; compare: python -m {PROGRAM} --report {args.out} --out TABLE.md")
    return 0


def _report(args: argparse.Namespace) -> int:
    text = report.text(*runs.load(args.report, "--report"))
    check_writable(args.out.parent)
    publish({args.out: text})
    print(text)
    print(f"saved in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
