"""What the networks learn: the demo's images in a network's size, and labels of images or of pixels."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tdeconv.demo.data import (
    PHOTOGRAPHS,
    DataSet,
    Labelled,
    digits,
    fixed,
    from_torchvision,
    photographs,
    read_photograph,
)
from tdeconv.demo.errors import DemoError
from tdeconv.demo.train import batches_of

DATA = ("digits", "photographs", "fashion-mnist")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist
EPOCH, HELD_OUT = 1600, 2000  # random crops of photographs: how many make an epoch, and a test


class Batch(NamedTuple):
    """Images ``(N, 3, size, size)`` and the labels of the images ``(N)`` or of their pixels ``(N, size, size)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A data set in one size, its labels those of the images, or ``dense``: those of every pixel.

    There is no data set of segmentation that needs no download, so one is made: a pixel has its image's class where it
    is brighter than the image's mean, and else the class of the background, one more.
    """

    data: DataSet
    size: int
    dense: bool

    @property
    def classes(self) -> int:
        return len(self.data.classes) + self.dense

    def batches(self, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch after the other, the same for every network; 8-bit as yet, see :meth:`prepare`."""
        for epoch in count(1):
            yield from batches_of(self.data, seed, epoch, batch)

    def prepare(self, images: Tensor, labels: Tensor) -> Batch:
        """8-bit images and their classes as a network takes them."""
        x = self.data.normalise(images).expand(-1, 3, -1, -1)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        if self.dense:
            grey = x.mean(1)
            foreground = grey > grey.mean((1, 2), keepdim=True)
            labels = torch.where(foreground, labels[:, None, None], len(self.data.classes))
        return Batch(x.contiguous(), labels)


def load(name: str, size: int, root: Path | None = None, download: bool = False) -> DataSet:
    """A data set of :data:`DATA`; Fashion-MNIST from ``root`` in torchvision's layout, or from Debian's package.

    Raises:
        ValueError: the data is not there, or its pictures are too small.
    """
    if name == "digits":
        return digits()
    if name == "photographs":
        shapes = [read_photograph(photograph).shape for photograph in PHOTOGRAPHS]
        most = min(min(height, width // 2) for _, height, width in shapes)  # a half is for training, a half for testing
        if size > most:
            raise ValueError(f"--size must be at most {most} with --data photographs, got {size}")
        return photographs(crop=size, train_size=EPOCH, test_size=HELD_OUT)
    if root is None and DEBIAN.is_dir():
        return _debians(name)
    if root is None:
        raise ValueError(
            f"--data {name} needs --root DIR with the data in torchvision's layout (or to fill, with --download), or "
            f"Debian's package dataset-fashion-mnist, which puts it into {DEBIAN}"
        )
    try:
        return from_torchvision(name, root, download)
    except DemoError as error:
        raise ValueError(str(error)) from error


def _debians(name: str) -> DataSet:
    try:
        train, test = (read_labelled(DEBIAN, part, "ubyte.gz") for part in ("train", "t10k"))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"the data of {name} in {DEBIAN} cannot be read: {error}") from error
    return fixed(name, tuple("0123456789"), train, test)


def read_labelled(folder: Path, part: str, ending: str = "ubyte") -> Labelled:
    """The part ``"train"`` or ``"t10k"`` of a data set in MNIST's format: images ``(N, 1, H, W)`` and labels.

    Raises:
        OSError, EOFError, ValueError: a file is missing or damaged.
    """
    images, labels = (_read(folder / f"{part}-{what}-{ending}") for what in ("images-idx3", "labels-idx1"))
    return images.unsqueeze(1), labels.long()


def _read(path: Path) -> Tensor:
    """A file of MNIST's format: two zero bytes, 8 for bytes, the number of dimensions, these, and the bytes."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    rank = np.frombuffer(content, np.uint8, 4)[3]  # refuses, as the next line does, where there are too few bytes
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
