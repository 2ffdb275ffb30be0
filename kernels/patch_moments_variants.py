"""Every shipped variant of the first stage's kernels, for the ahead-of-time compiler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.kernels.configs import Variant
from tdeconv.kernels.patch_moments import (
    _patch_moments_gram_kernel,
    _patches_write_kernel,
    gram_candidates,
    gram_legal,
    patch_moments,
)
from tdeconv.kernels.patch_moments_backward import (
    _patch_moments_bwd_kernel,
    candidates,
    fits,
    patch_moments_backward_,
)
from tdeconv.kernels.patches import columns_of, dense, source
from tdeconv.kernels.recording import recorded, variants_of


class Layer(NamedTuple):
    """A layer whose launches differ in kind from the others'; ``full`` ones with every precision and candidate."""

    label: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    last: bool = True  # channels-last
    kernel: int = 3
    groups: int = 1
    block: int = 64
    full: bool = False

    @property
    def geometry(self) -> Geometry:
        channels, rank = self.shape[1], len(self.shape) - 2
        one, axes, padding = (1,) * rank, (self.kernel,) * rank, (self.kernel // 2,) * rank
        block = channels // self.groups if self.groups > 1 else min(self.block, channels)
        grouping = "interleaved" if rank else "contiguous"
        return Geometry(channels, axes, one, padding, one, self.groups, block, grouping, 3 if rank else 1)


_FLOAT = (torch.float32,)
LAYERS = (
    Layer("first 3x3", (64, 3, 224, 224), last=False, full=True),
    Layer("3x3 runs", (256, 64, 56, 56), _FLOAT, full=True),
    Layer("3x3 runs", (256, 64, 56, 56), (torch.bfloat16, torch.float16)),
    Layer("3x3 runs nchw", (256, 64, 56, 56), last=False),
    Layer("3x3 interleaved", (256, 128, 28, 28)),
    Layer("3x3 interleaved small", (64, 64, 28, 28), _FLOAT, block=4),
    Layer("1x1", (64, 256, 56, 56), kernel=1),
    Layer("1x1 nchw", (64, 64, 57, 56), last=False, kernel=1),
    Layer("depthwise", (64, 96, 56, 56), groups=96),
    Layer("3x3 one row", (1, 48, 3, 3), _FLOAT, last=False),
    Layer("linear", (256, 4096), _FLOAT, last=False, kernel=0, block=512, full=True),
)


def layers() -> Iterator[tuple[Layer, str, Tensor]]:
    """Layers that are compiled ahead of time, each with its name and an input without memory."""
    for layer in LAYERS:
        for dtype in layer.dtypes:
            x = torch.empty(layer.shape, dtype=dtype, device="meta")
            if layer.last:
                x = x.to(memory_format=torch.channels_last)
            yield layer, f"{layer.label} {str(dtype).removeprefix('torch.')}", x


def _forward() -> Iterator[Variant]:
    kinds = set[Any]()
    for layer, label, x in layers():
        geo = layer.geometry
        src = source(geo, x)
        if not src.cols.direct:
            src = dense(src)
        launches = recorded(functools.partial(patch_moments, x, geo))
        seen = {launched.kernel: launched for launched in reversed(launches)}
        gram = seen.pop(_patch_moments_gram_kernel)
        yield from variants_of(label, [launch for kernel, launch in seen.items() if layer.full or kernel not in kinds])
        kinds |= seen.keys()
        yield from variants_of(label, [gram], functools.partial(gram_candidates, src), gram_legal, layer.full)


def _backward() -> Iterator[Variant]:
    kinds = set[Any]()
    for layer, label, x in layers():
        geo, cols = layer.geometry, columns_of(layer.geometry)
        mean = x.new_empty((cols.groups, cols.features), dtype=torch.float32)
        cov = mean.new_empty(cols.groups, cols.features, cols.features)
        launches = recorded(functools.partial(patch_moments_backward_, torch.empty_like(x), x, mean, mean, cov, geo))
        seen = {launched.kernel: launched for launched in reversed(launches)}
        product = seen.pop(_patch_moments_bwd_kernel)
        seen.pop(_patches_write_kernel, None)  # forward's own
        yield from variants_of(label, [launch for kernel, launch in seen.items() if kernel not in kinds])
        kinds |= seen.keys()
        yield from variants_of(label, [product], lambda _, cols=cols: candidates(cols), fits, layer.full)  # type: ignore[misc]


def variants() -> Iterator[Variant]:
    yield from _forward()
    yield from _backward()
