"""What the GPU report measures: the convolutions of ResNet-50 and VGG-11 at 224, and the units made of them.

A unit is what a child process does at one go and may fail at alone; its name is unique in its step. No torch here: the
process that hands the units out stays light, and away from the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

STAGES = ("patch_moments", "inverse_sqrt", "fold", "convolve")
TUNED = ("patch_moments", "inverse_sqrt", "convolve")  # the stages with candidates to choose from
BLOCK = 64
WHOLE = 64  # the inverse root of a matrix up to here is one program's


@dataclass(frozen=True)
class Case:
    """A square convolution on ``(batch, channels, size, size)``; its input is data if it is a network's ``first``."""

    network: str
    channels: int
    size: int
    out: int
    kernel: int
    stride: int = 1
    batch: int = 64
    dtype: str = "bfloat16"
    layout: str = "channels_last"
    first: bool = False

    @property
    def n_iter(self) -> int:
        return 15 if self.first else 5

    @property
    def features(self) -> int:
        """``D``."""
        return (math.gcd(BLOCK, self.channels) if self.channels > BLOCK else self.channels) * self.kernel**2

    @property
    def layer(self) -> str:
        return f"{self.channels}-{self.out} {self.kernel}x{self.kernel}/{self.stride} at {self.size}"

    @property
    def name(self) -> str:
        return f"{self.network} {self.layer} batch {self.batch} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Unit:
    """A stage of a case, done in one way."""

    case: Case
    stage: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.case.name}: {self.stage} {self.way}"


def resnet50() -> Iterator[Case]:
    yield Case("resnet50", 3, 224, 64, 7, 2, first=True)
    inputs, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        out, small = 4 * width, size // stride
        yield Case("resnet50", inputs, size, width, 1)
        yield Case("resnet50", width, size, width, 3, stride)
        yield Case("resnet50", width, small, out, 1)
        yield Case("resnet50", inputs, size, out, 1, stride)
        yield Case("resnet50", out, small, width, 1)
        yield Case("resnet50", width, small, width, 3)
        inputs, size = out, small


def vgg11() -> Iterator[Case]:
    yield Case("vgg11", 3, 224, 64, 3, first=True)
    for channels, size, out in (
        *((64, 112, 128), (128, 56, 256), (256, 56, 256)),
        *((256, 28, 512), (512, 28, 512), (512, 14, 512)),
    ):
        yield Case("vgg11", channels, size, out, 3)


def others() -> Iterator[Case]:
    """The other dtypes and the other layout, on a few layers."""
    for case in (
        *(Case("resnet50", 64, 56, 64, 3), Case("resnet50", 256, 56, 64, 1)),
        *(Case("resnet50", 512, 7, 512, 3), Case("vgg11", 128, 56, 256, 3)),
    ):
        yield replace(case, dtype="float32")
        yield replace(case, dtype="float16")
        yield replace(case, layout="contiguous")


def smoke() -> Iterator[Case]:
    """Small enough for the interpreter, in less than a second each."""
    yield Case("smoke", 3, 6, 4, 2, 2, batch=2, dtype="float32", first=True)
    yield Case("smoke", 4, 5, 3, 1, batch=4, dtype="float32")


def cases(small: bool) -> list[Case]:
    return list(dict.fromkeys(smoke() if small else (*resnet50(), *vgg11(), *others())))


def tuned_cases(small: bool) -> list[Case]:
    """What the networks' steps meet: bfloat16, channels last, at both batch sizes."""
    if small:
        return cases(small)
    found = dict.fromkeys([*resnet50(), *vgg11()])
    return [replace(case, batch=batch) for batch in (64, 256) for case in found]


def _ways(stage: str, features: int, barrier: bool) -> Iterable[str]:
    if stage == "convolve":
        return "library", "triton"
    if stage == "inverse_sqrt" and features > WHOLE:
        return ("phases", "barrier") if barrier else ("phases",)
    return ("default",)


def units(found: Iterable[Case], barrier: bool) -> list[Unit]:
    """Every stage in every way. An inverse root, which depends on its covariance's size alone, is there once."""
    seen = set()
    made = []
    for case in found:
        for stage in STAGES:
            root = (case.features, case.n_iter)
            if stage == "inverse_sqrt" and root in seen:
                continue
            seen |= {root} if stage == "inverse_sqrt" else set()
            made += [Unit(case, stage, way) for way in _ways(stage, case.features, barrier)]
    return made


def tuned_units(small: bool) -> list[Unit]:
    """The stages with candidates, as they run once tuned."""
    made = units([case for case in tuned_cases(small) if small or case.batch == 64], barrier=False)
    return [replace(u, way="tuned") for u in made if u.stage in TUNED and u.way in ("default", "phases", "triton")]


VARIANTS = (
    *("conv_bn compiled", "triton compiled", "triton compiled stale"),
    *("triton eager", "triton eager stale", "triton eager barrier"),
    *("conv_bn eager", "torch eager", "reference eager"),
)


@dataclass(frozen=True)
class Model:
    """A network's training step as one variant does it; a stale one uses the running statistics."""

    network: str
    batch: int
    variant: str

    @property
    def name(self) -> str:
        return f"{self.network} batch {self.batch}: {self.variant}"


def models(small: bool, barrier: bool) -> list[Model]:
    """What has to be compared comes first, and side by side."""
    nets = [("tiny", 4)] if small else [(net, batch) for batch in (64, 256) for net in ("resnet50", "vgg11")]
    variants = [v for v in VARIANTS if barrier or "barrier" not in v]
    return [Model(net, batch, variant) for net, batch in nets for variant in variants]
