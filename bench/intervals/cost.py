"""``python -m tdeconv.bench.intervals.cost``: steps of whole networks by block and by kind, in turn, as a JSON file.

Training steps (forward, cross entropy and backward) of a network with batch norm and of the same network converted with
each block, fresh and stale, every one once a round; medians. Answers are not checked here: ``python -m tdeconv bench``
does that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdeconv
from tdeconv.arguments import check_writable, nonempty_path, positive_int
from tdeconv.bench.learning.store import commit
from tdeconv.bench.machine import describe
from tdeconv.bench.markdown import table
from tdeconv.bench.results import publish
from tdeconv.named_models import load_model
from tdeconv.schedule import every_step

BLOCKS = (8, 16, 32, 64)
INTERVALS = (1, 4, 10)
BATCH_NORM = "batch norm"


def step_seconds(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.zero_grad()
    start = time.perf_counter()
    F.cross_entropy(model(images), labels).backward()
    return time.perf_counter() - start


def measure(name: str, size: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds: of batch norm, and of every block's ``"<block> fresh"`` and ``"<block> stale"``."""

    def network(block: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = load_model(name)
        return (model if block is None else tdeconv.convert_deconv(model, block=block)).train()

    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    plain, networks = network(None), {block: network(block) for block in BLOCKS}
    seconds = defaultdict(list)
    for _ in range(rounds + 1):  # the first is thrown away
        seconds[BATCH_NORM].append(step_seconds(plain, images, labels))
        for block, model in networks.items():
            for kind in ("fresh", "stale"):
                with every_step(model.modules(), fresh=kind == "fresh"):
                    seconds[f"{block} {kind}"].append(step_seconds(model, images, labels))
    return {what: round(statistics.median(times[1:]), 5) for what, times in seconds.items()}


def ratios(seconds: dict[str, float]) -> list[list[str]]:
    """A row for each block: a step's time at each interval, and a stale step's, over that of batch norm."""
    rows = [["block", *(f"interval {k}" for k in INTERVALS), "stale step"]]
    for block in BLOCKS:
        fresh, stale = (seconds[f"{block} {kind}"] / seconds[BATCH_NORM] for kind in ("fresh", "stale"))
        rows.append([str(block), *(f"{fresh / k + (1 - 1 / k) * stale:.2f}" for k in INTERVALS), f"{stale:.2f}"])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tdeconv.bench.intervals.cost", description=__doc__.split("\n")[0])
    add: Any = parser.add_argument
    add("networks", nargs="*", default=["torchvision:resnet18", "torchvision:resnet50"], metavar="NETWORK")
    add("--size", type=positive_int, default=128, metavar="N", help="images' height and width (default %(default)s)")
    add("--batch", type=positive_int, default=16, metavar="N", help="images a step (default %(default)s)")
    add("--rounds", type=positive_int, default=7, metavar="N", help="steps of each kind (default %(default)s)")
    add("--out", type=nonempty_path, required=True, metavar="FILE", help="results, JSON")
    args = parser.parse_args(argv)
    check_writable(args.out.parent)
    found = {name: measure(name, args.size, args.batch, args.rounds) for name in args.networks}
    for name, seconds in found.items():
        print(f"{name} at {args.size} px, batch {args.batch}, over conv + batch norm + ReLU")
        print(table(ratios(seconds)) + "\n")
    made = {"commit": commit(), "machine": describe(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
    about = {"size": args.size, "batch": args.batch, "rounds": args.rounds, "seconds": found}
    publish({args.out: json.dumps(made | about, indent=1) + "\n"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
