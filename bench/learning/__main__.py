"""``python -m tdeconv.bench.learning``: train networks with batch norm and converted, keep the runs, compare them."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from tqdm import tqdm

import tdeconv
from tdeconv.arguments import check_writable, nonempty_path, positive_int
from tdeconv.bench.learning import report, store, tasks
from tdeconv.bench.learning.networks import NETWORKS
from tdeconv.bench.learning.train import SIDES, Plan, run
from tdeconv.bench.results import publish

PROGRAM = "tdeconv.bench.learning"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _report(args) if args.report else _train(args)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{PROGRAM}: {error.name} is not installed; pip install 'tdeconv[demo,bench,vision]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on from the runs that are done", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Train public networks with batch norm and converted, from the same start, on the same batches."
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=about)
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    add("--data", nargs="+", choices=tasks.DATA, default=["digits"], help="what they learn (default: digits)")
    add("--root", type=nonempty_path, metavar="DIR", help="Fashion-MNIST in torchvision's layout (default: Debian's)")
    add("--download", action="store_true", help="download it into --root if it is not there")
    add("--size", type=positive_int, default=64, metavar="N", help="images' height and width (default %(default)s)")
    add("--batch", type=positive_int, default=32, metavar="N", help="images a step (default %(default)s)")
    add("--steps", type=positive_int, default=40, metavar="N", help="of training (default %(default)s)")
    rates = [0.005, 0.02, 0.08]
    add("--rates", type=_rate, nargs="+", default=rates, metavar="R", help="learning rates (default .005 .02 .08)")
    add("--seeds", type=_seed, nargs="+", default=[0, 1, 2], metavar="S", help="default 0 1 2")
    about = "seeds that every rate is tried with; 'first': the others run at the rate that was best there"
    add("--rate-seeds", choices=("all", "first"), default="all", help=f"{about} (default %(default)s)")
    sides = parser.add_mutually_exclusive_group()
    for side in SIDES:
        sides.add_argument(f"--{side}", dest="sides", action="store_const", const=(side,), help="only this side")
    parser.set_defaults(sides=SIDES)
    about = "an option of convert_deconv, a Python value or else text: n_iter=3"
    add("--convert", type=_option, nargs="+", default=[], metavar="KEY=VALUE", help=about)
    add("--calibrate", action="store_true", help="converted networks: calibrate_deconv with the first batch")
    about = "steps after which the test accuracy is taken, besides the last"
    add("--checkpoints", type=positive_int, nargs="+", default=[], metavar="N", help=about)
    add("--held-out", type=positive_int, default=1000, metavar="N", help="test images (default %(default)s)")
    add("--threads", type=positive_int, metavar="N", help="torch's (default: as torch chooses)")
    add("--device", default="cpu", help="default %(default)s")
    about = "runs, or with --report: the tables; runs that the file holds already are not made again"
    add("--out", type=nonempty_path, required=True, metavar="FILE", help=about)
    add(
        "--report", type=nonempty_path, nargs="+", metavar="FILE", help="train nothing: compare the runs of these files"
    )
    add("--plot", type=nonempty_path, metavar="DIR", help="with --report: the losses as pictures, too")
    return parser


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    options = inspect.signature(tdeconv.convert_deconv).parameters
    if name not in options or name in ("model", "report"):
        names = ", ".join(option for option in options if option not in ("model", "report"))
        raise argparse.ArgumentTypeError(f"convert_deconv has no option {name!r}, only {names}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _train(args: argparse.Namespace) -> int:
    device = _check(args)
    store.commit()  # now, while the files are those of the code that runs
    if args.threads:
        torch.set_num_threads(args.threads)
    sets = {name: tasks.load(name, args.size, args.root, args.download) for name in args.data}
    runs = store.load([args.out], "--out") if args.out.exists() else {}
    total = sum(1 for _ in _plans(args, None))
    with tqdm(total=total, unit="run") as bar:
        for plan in _plans(args, runs):
            bar.set_description(f"{plan.network} {plan.side} {plan.data} rate {plan.rate:g} seed {plan.seed}")
            if store.key(plan) not in runs:
                task = tasks.Task(sets[plan.data], plan.size, NETWORKS[plan.network].dense)
                result = run(plan, task, device=device, checkpoints=args.checkpoints, held_out=args.held_out)
                runs[store.key(plan)] = store.made(plan, result, device)
                store.save(args.out, runs)
            bar.update()
    print(f"saved in {args.out}; compare: python -m {PROGRAM} --report {args.out} --out TABLE.md")
    return 0


def _report(args: argparse.Namespace) -> int:
    runs = list(store.load(args.report, "--report").values())
    check_writable(args.out.parent)
    publish({args.out: report.text(runs)})
    pictures = import_module("tdeconv.bench.learning.plots").draw(runs, args.plot) if args.plot else []
    print(report.text(runs))
    print(f"saved in {', '.join(map(str, (args.out, *pictures)))}")
    return 0


def _check(args: argparse.Namespace) -> torch.device:
    """Whatever can be refused before hours of training."""
    if unknown := [name for name in args.networks if name not in NETWORKS]:
        raise ValueError(f"there is no network {unknown[0]!r} here; choose from {', '.join(NETWORKS)}")
    if args.plot is not None:
        raise ValueError("--plot needs --report FILE, the runs to draw")
    if args.calibrate and not hasattr(tdeconv, "calibrate_deconv"):
        raise ValueError("--calibrate needs calibrate_deconv, which this version of tdeconv does not have")
    if late := [step for step in args.checkpoints if step > args.steps]:
        raise ValueError(f"--checkpoints must be at most --steps {args.steps}, got {late[0]}")
    try:
        tdeconv.convert_deconv(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), **dict(args.convert))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--convert: {error}") from None
    check_writable(args.out.parent)
    try:
        return torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device!r} cannot be used: {str(error).partition(chr(10))[0]}") from None


def _plans(args: argparse.Namespace, runs: dict[str, store.Run] | None) -> Iterator[Plan]:
    """All runs in turn. Which rate was best is looked up in ``runs``, which have grown by then; None: any."""

    def plans(network: str, data: str, side: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Plan]:
        options = (dict(args.convert), args.calibrate) if side == "converted" else ({}, False)
        sizes = (args.size, args.batch, args.steps)
        return [Plan(network, side, data, *sizes, rate, seed, *options) for rate in rates for seed in seeds]

    for data in args.data:
        for network in args.networks or NETWORKS:
            for side in args.sides:
                first = args.seeds if args.rate_seeds == "all" else args.seeds[:1]
                tried = plans(network, data, side, args.rates, first)
                yield from tried
                if runs is None:
                    best = args.rates[0]
                else:
                    best = min(tried, key=lambda plan: report.last_loss(runs[store.key(plan)])).rate
                yield from plans(network, data, side, [best], args.seeds[len(first) :])


if __name__ == "__main__":
    sys.exit(main())
