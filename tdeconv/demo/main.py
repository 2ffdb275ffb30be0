"""The demo from the request to the files."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from tdeconv.backends import use_backend
from tdeconv.demo import data, figures, report, train, whitening
from tdeconv.demo.errors import DemoError
from tdeconv.demo.models import Line
from tdeconv.demo.options import Settings, check_folder, settings_of

SHOWN = ("cat", "coffee", "motorcycle")


def run(args: argparse.Namespace) -> int:
    """See :func:`tdeconv.demo.run`."""
    try:
        with _terminate_as_interrupt():
            return _run(args)
    except DemoError as error:
        print(f"tdeconv demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\ntdeconv demo: interrupted before it was complete; nothing was written", file=sys.stderr)
        return 143 if isinstance(interrupt, _Terminated) else 130


def _run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    check_folder(args.out)
    images = data.load(args.data, args.root, args.download)
    print(
        f"{images.name}: {len(images.classes)} classes, images {tuple(images.test[0].shape[1:])}; "
        f"network {settings.arch}, batches of {settings.batch_size}, backend {settings.backend!r}"
    )
    with use_backend(settings.backend):
        runs = _train(images, settings)
        print("\ndrawing ...", flush=True)
        files = _draw(runs, images, settings)
    summary = report.summarise(runs)
    files["results.json"] = report.as_json(runs, summary, images, settings, [*files, "results.json"])
    _write(args.out, files)
    print(f"\n{report.conclusion(summary, settings)}\n\nWritten to {args.out.resolve()}:\n  {'  '.join(files)}")
    return 0


def _train(images: data.DataSet, settings: Settings) -> list[train.Run]:
    """Train every seed's networks, with a progress bar and a row of the table per epoch."""
    steps = settings.epochs * train.steps_per_epoch(images, settings.batch_size)
    total = len(settings.seeds) * len(settings.lines) * steps
    runs: list[train.Run] = []
    with tqdm(total=total, unit="step", leave=False, disable=None, dynamic_ncols=True) as bar:

        def on_step(line: Line, seed: int, epoch: int, loss: float) -> None:
            bar.set_description(f"seed {seed} epoch {epoch} {line.title}", refresh=False)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        bar.write(report.header(settings.lines), file=sys.stdout)
        for of_seed in train.train(images, settings, on_step):
            bar.write(report.row(of_seed, settings.epochs), file=sys.stdout)
            sys.stdout.flush()
            if len(of_seed[0].epochs) == settings.epochs:
                runs += of_seed
    return runs


def _draw(runs: list[train.Run], images: data.DataSet, settings: Settings) -> dict[str, bytes]:
    """All pictures by file name."""
    sample = images.normalise(images.train(torch.Generator().manual_seed(0))[0][:1000])
    pictures = {name: data.read_photograph(name).float() / 255 for name in data.SCENES}
    deconvolution = whitening.pixel_deconvolution(list(pictures.values()))
    before = torch.cat([(picture - picture.mean((1, 2), keepdim=True)).flatten() for picture in pictures.values()])
    after = torch.cat([deconvolution(picture).flatten() for picture in pictures.values()])
    return {
        "training.png": figures.training(runs, images.name, settings.arch),
        "covariance.png": figures.covariance(whitening.patch_whitening(sample), images.name),
        "kernels.png": figures.kernels(deconvolution),
        "photographs.png": figures.photographs([pictures[name] for name in SHOWN], deconvolution),
        "densities.png": figures.densities(whitening.density(before), whitening.density(after)),
    }


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        report.publish(folder, files)
    except OSError as error:
        raise DemoError(f"the results cannot be written to {folder}: {error.strerror or error}") from error


class _Terminated(KeyboardInterrupt):
    """A SIGTERM, handled as Ctrl-C is."""


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: signals are not this code's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
