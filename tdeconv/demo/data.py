"""The demo's images: photographs inside installed packages, scikit-learn's digits, torchvision's data sets.

Every set is 8-bit images ``(N, C, H, W)`` with labels ``(N)``; nothing is downloaded unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tdeconv.demo.errors import DemoError
from tdeconv.vision import torchvision

Labelled = tuple[Tensor, Tensor]

# the colour photographs that scikit-image and scikit-learn carry inside their packages
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
# of these, scenes as an eye sees them (no telescope, no microscope)
SCENES = ("astronaut", "cat", "coffee", "motorcycle", "rocket")

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@dataclass(frozen=True)
class DataSet:
    """Images to train and test on.

    Attributes:
        name: as :func:`load` takes it.
        classes: the labels' names.
        train: one epoch's images and labels, in random order, from a generator: ``(N, C, H, W)`` uint8, ``(N)`` int64.
        test: the same for testing, fixed.
        mean, std: the training images' per channel, ``(C)``, in [0, 1].
    """

    name: str
    classes: tuple[str, ...]
    train: Callable[[torch.Generator], Labelled]
    test: Labelled
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        images = self.train(torch.Generator().manual_seed(0))[0][:5000].float() / 255
        object.__setattr__(self, "mean", images.mean((0, 2, 3)))
        object.__setattr__(self, "std", images.std((0, 2, 3)))

    @property
    def channels(self) -> int:
        return self.test[0].shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """8-bit images as float32 of mean 0 and variance 1 per channel."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


def load(name: str, root: Path | None = None, download: bool = False) -> DataSet:
    """The data set of that name: ``"photographs"``, ``"digits"`` or a key of :data:`TORCHVISION`.

    Raises:
        DemoError: a package or the data set's files are missing.
    """
    if name == "photographs":
        return photographs()
    if name == "digits":
        return digits()
    return from_torchvision(name, root, download)


def read_photograph(name: str) -> Tensor:
    """A photograph of :data:`PHOTOGRAPHS`: ``(3, H, W)`` uint8."""
    package, file = PHOTOGRAPHS[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    # the file itself, not skimage.data's function, which would download what the package does not carry
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise DemoError(f"the photograph {file} is not inside the installed {package}; install another version of it")
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def photographs(
    train: tuple[float, float] = (0.0, 0.5),
    test: tuple[float, float] = (0.5, 1.0),
    train_size: int = 3200,
    test_size: int = 1500,
    crop: int = 24,
) -> DataSet:
    """Which photograph is a random crop from? Train and test crops come from disjoint strips of each.

    Args:
        train, test: the strips, as fractions of the picture's width: the left half and the right.
        train_size, test_size: crops per epoch, and to test on; about the same number of each picture.
        crop: their height and width.
    """
    pictures = [read_photograph(name) for name in PHOTOGRAPHS]
    train_strips, test_strips = ([_strip(p, *part) for p in pictures] for part in (train, test))
    return DataSet(
        "photographs",
        tuple(PHOTOGRAPHS),
        lambda generator: random_crops(train_strips, train_size, crop, generator),
        random_crops(test_strips, test_size, crop, torch.Generator().manual_seed(2020)),
    )


def _strip(picture: Tensor, start: float, stop: float) -> Tensor:
    width = picture.shape[-1]
    return picture[..., int(width * start) : int(width * stop)]


def random_crops(pictures: list[Tensor], n: int, size: int, generator: torch.Generator) -> Labelled:
    """``n`` crops with random flips, brightness, contrast and noise; the label is the picture's place in the list."""
    labels = torch.arange(n) % len(pictures)
    images = torch.empty(n, 3, size, size)
    span = torch.arange(size)
    for label, picture in enumerate(pictures):
        chosen = (labels == label).nonzero().squeeze(1)
        top, left = (
            torch.randint(length - size + 1, (len(chosen), 1), generator=generator) for length in picture.shape[1:]
        )
        rows, columns = (top + span)[:, :, None], (left + span)[:, None, :]
        images[chosen] = picture[:, rows, columns].transpose(0, 1).float()
    flip = torch.rand(n, generator=generator) < 0.5
    images[flip] = images[flip].flip(-1)
    contrast = 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)
    brightness = 50 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    noise = 8 * torch.randn(images.shape, generator=generator)
    images = ((images - 128) * contrast + 128 + brightness + noise).round_().clamp_(0, 255).to(torch.uint8)
    order = torch.randperm(n, generator=generator)
    return images[order], labels[order]


def digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of them, always the same, to test on."""
    bunch = import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images * 15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2020))
    held = len(labels) // 5
    test, train = order[:held], order[held:]
    return fixed("digits", tuple("0123456789"), (images[train], labels[train]), (images[test], labels[test]))


def fixed(name: str, classes: tuple[str, ...], train: Labelled, test: Labelled, shifts: bool = False) -> DataSet:
    """A data set whose epochs show the same images in another order, perhaps shifted and flipped."""

    def epoch(generator: torch.Generator) -> Labelled:
        order = torch.randperm(len(train[1]), generator=generator)
        images = train[0][order]
        return (shift_and_flip(images, generator) if shifts else images), train[1][order]

    return DataSet(name, classes, epoch, test)


def shift_and_flip(images: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Each image moved by up to ``reach`` pixels along both axes (zeros move in) and flipped half of the time."""
    n, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4)
    top, left = (torch.randint(2 * reach + 1, (n, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flip = torch.rand(n, generator=generator) < 0.5
    columns[flip] = columns[flip].flip(1)
    sample = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def from_torchvision(name: str, root: Path | None, download: bool) -> DataSet:
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 under ``root``, in torchvision's layout."""
    if root is None:
        raise DemoError(f"--data {name} needs --root DIR, the folder that holds the data (or shall, with --download)")
    if not download and not root.is_dir():
        raise DemoError(
            f"--root {root} is not a folder; give the data's folder, or add --download to create and fill it"
        )
    source = getattr(_torchvision_datasets(), TORCHVISION[name])
    parts = []
    for train in (True, False):
        try:
            part = source(str(root), train=train, download=download)
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, AssertionError) as error:  # of damaged files
            what = f"the {'training' if train else 'test'} images of {name} cannot be read under --root {root}"
            advice = "" if download else " (add --download to fetch what is missing)"
            raise DemoError(f"{what}: {str(error) or 'the files are damaged'}{advice}") from error
        images = torch.as_tensor(part.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.as_tensor(part.targets).long()))
    return fixed(name, tuple(map(str, part.classes)), parts[0], parts[1], shifts=name.startswith("cifar"))


def _torchvision_datasets() -> Any:
    """``torchvision.datasets``, also where torchvision's compiled operators cannot be loaded."""
    try:
        torchvision()
    except RuntimeError as error:
        raise DemoError(f"torchvision cannot be imported: {error}") from error
    return import_module("torchvision.datasets")
