"""What the demo can be asked for, and the check of it before anything is trained."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tdeconv.arguments import check_writable, nonempty_path
from tdeconv.backends import BackendUnavailable, choose
from tdeconv.demo.errors import DemoError
from tdeconv.demo.models import ARCHS, METHODS, Line


@dataclass(frozen=True)
class Settings:
    """What to train: batch norm, and deconvolution at each of the ``intervals``.

    ``lr`` has a learning rate per method of :data:`METHODS`: deconvolution's is the same at all intervals.
    """

    arch: str
    epochs: int
    batch_size: int
    lr: dict[str, float]
    seeds: tuple[int, ...]
    intervals: tuple[int, ...]
    device: str = "cpu"
    backend: str = "auto"

    @property
    def lines(self) -> tuple[Line, ...]:
        return Line("batch_norm"), *(Line("deconvolution", interval) for interval in self.intervals)


@dataclass(frozen=True)
class Defaults:
    """Epochs, and batch norm's and deconvolution's learning rate."""

    epochs: int
    lr: tuple[float, float] = (0.05, 0.05)


# Photographs and digits: the best of .01, .03, .1 and .3 (and .003 for batch norm on photographs) on training images
# held out, 2 and 3 seeds; near the best, rates cannot be told apart. The other data sets: not tuned.
DEFAULTS = {
    "photographs": Defaults(5, (0.01, 0.1)),
    "digits": Defaults(8, (0.03, 0.03)),
    "mnist": Defaults(2),
    "fashion-mnist": Defaults(3),
    "cifar10": Defaults(10),
    "cifar100": Defaults(10),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tdeconv demo``."""
    add = parser.add_argument
    add(
        "--data",
        choices=tuple(DEFAULTS),
        default="photographs",
        help="images to classify (default: %(default)s, no download)",
    )
    add("--root", type=nonempty_path, metavar="DIR", help="folder of mnist, fashion-mnist, cifar10 or cifar100")
    add("--download", action="store_true", help="download these into --root if they are not there")
    add("--arch", choices=tuple(ARCHS), default="slim", help="network (default: %(default)s)")
    add("--epochs", type=int, metavar="N", help="epochs (default: by data set, 5 for photographs)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per step (default: %(default)s)")
    add(
        "--lr",
        type=float,
        nargs="+",
        metavar="LR",
        help="learning rate: one for all networks, or batch norm's and deconvolution's (default: by data set)",
    )
    add(
        "--intervals",
        type=int,
        nargs="+",
        default=[1, 4, 10],
        metavar="K",
        help="deconvolution takes statistics in every K-th step: one network each (default: 1 4 10)",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="one run each (default: 0 1 2)")
    add("--device", default="cpu", help="a torch device (default: %(default)s)")
    add(
        "--out",
        type=nonempty_path,
        default=Path("demo-out"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The request as settings.

    Raises:
        DemoError: a value out of range, an unknown device or a backend that cannot run.
    """
    defaults = DEFAULTS[args.data]
    epochs = defaults.epochs if args.epochs is None else args.epochs
    _at_least("--epochs", epochs, 1)
    _at_least("--batch-size", args.batch_size, 2)
    rates = tuple(args.lr or defaults.lr)
    if len(rates) > 2 or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise DemoError(f"--lr must be one or two positive numbers, got {' '.join(map(str, rates))}")
    seeds = tuple(args.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise DemoError(f"--seeds must be different integers from 0 to 2**32 - 1, got {' '.join(map(str, seeds))}")
    intervals = tuple(args.intervals)
    if len(set(intervals)) < len(intervals) or not all(interval > 0 for interval in intervals):
        raise DemoError(f"--intervals must be different positive integers, got {' '.join(map(str, intervals))}")
    lr = {method: rates[k % len(rates)] for k, method in enumerate(METHODS)}
    return Settings(args.arch, epochs, args.batch_size, lr, seeds, intervals, *_device_and_backend(args.device))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DemoError(f"{name} must be at least {least}, got {value}")


def _device_and_backend(name: str) -> tuple[str, str]:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has tensors, but no values
        return name, choose(None, device).backend
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        what = "the chosen backend" if isinstance(error, (BackendUnavailable, ValueError)) else f"--device {name!r}"
        raise DemoError(f"{what} cannot be used: {reason}") from error


def check_folder(folder: Path) -> None:
    """Before anything is trained: the pictures can be written to the folder.

    Raises:
        DemoError: it cannot be made, or not be written to.
    """
    try:
        check_writable(folder)
    except ValueError as error:
        raise DemoError(str(error)) from None
