"""The shape of a deconvolution layer: which patches it samples and which columns share a covariance.

A convolution has spatial rank 1, 2 or 3; a fully connected layer is the same thing at spatial rank 0, where a
patch is a row of features and nothing is sampled. Every stage of every backend reads its sizes from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GROUPINGS = ("interleaved", "contiguous")


def resolve_block(block: int, channels: int, groups: int = 1) -> int:
    """Channels whitened together (method.md, *Block size*): all of a group's, or ``block`` cut down to a divisor."""
    if groups > 1:
        return channels // groups
    if block >= channels:
        return channels
    return math.gcd(block, channels)


@dataclass(frozen=True)
class Geometry:
    """One layer's sizes.

    ``kernel_size, stride, padding, dilation`` have one int per spatial axis. ``stride`` is the convolution's own;
    patches are sampled at ``sample_stride = sampling_stride * stride``. ``block`` is resolved already
    (:func:`resolve_block`).
    """

    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    block: int
    grouping: str
    sampling_stride: int = 1

    @property
    def taps(self) -> int:
        """Kernel positions: ``kh * kw``."""
        return math.prod(self.kernel_size)

    @property
    def features(self) -> int:
        """``D``: the size of one covariance."""
        return self.block * self.taps

    @property
    def pooled(self) -> int:
        """``G``: vectors of one patch that share a covariance (1 with ``groups > 1``)."""
        return self.channels // (self.block * self.groups)

    @property
    def sample_stride(self) -> tuple[int, ...]:
        return tuple(self.sampling_stride * s for s in self.stride)

    @property
    def flat_stride(self) -> int:
        """A pointwise kernel's samples are every this-many-th pixel in N, H, W order."""
        return math.prod(self.sample_stride)

    @property
    def pointwise(self) -> bool:
        """A 1x1 kernel or a linear layer: its patches are pixels, sampled by one flat stride."""
        return self.taps == 1

    @property
    def interleaved(self) -> bool:
        """Whether column ``j`` of a patch belongs to vector ``j mod G``; else to vector ``j // D``."""
        return self.groups == 1 and self.grouping == "interleaved"

    @property
    def window(self) -> tuple[int, ...]:
        """Extent of the dilated kernel along each axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def positions(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Sampled positions along each axis of an input of this spatial size."""
        return tuple(
            (n + 2 * p - w) // s + 1
            for n, p, w, s in zip(spatial, self.padding, self.window, self.sample_stride, strict=True)
        )

    def patches(self, images: int, spatial: tuple[int, ...]) -> int:
        """``M``: the patches sampled from this many images of this spatial size."""
        if self.pointwise:
            return -(-images * math.prod(spatial) // self.flat_stride)
        return images * math.prod(self.positions(spatial))

    def every(self) -> Geometry:
        """The convolution itself: the same layer without sampling."""
        return replace(self, sampling_stride=1)

    def sampling_enough(self, images: int, spatial: tuple[int, ...], per_feature: int) -> Geometry:
        """The same layer with the largest sampling stride up to its own that leaves each covariance at least
        ``per_feature`` samples for each of its features; every patch where no stride does."""
        for stride in range(self.sampling_stride, 1, -1):
            sparser = replace(self, sampling_stride=stride)
            if sparser.patches(images, spatial) * self.pooled >= per_feature * self.features:
                return sparser
        return self.every()

    def steps_enough(self, images: int, spatial: tuple[int, ...], n_iter: int) -> int:
        """As many Newton-Schulz steps of ``n_iter`` as the samples are enough for: from 58 for each feature on all.

        A step raises the variance of the weakest directions by 1.5**2 = 9/4 at most, and what few samples say of these
        is noise. So n steps take ``samples / features >= (9/4)**n``, which was measured to be about right.
        """
        samples = self.patches(images, spatial) * self.pooled
        steps = 1
        while steps < min(n_iter, 5) and 4 ** (steps + 1) * samples >= 9 ** (steps + 1) * self.features:
            steps += 1
        return n_iter if steps == 5 else steps

    def pack(self) -> list[int]:
        """As a flat list of ints, the form in which PyTorch operators take it."""
        axes = (*self.kernel_size, *self.stride, *self.padding, *self.dilation)
        interleaved = int(self.grouping == "interleaved")
        return [self.channels, self.groups, self.block, interleaved, self.sampling_stride, *axes]

    @staticmethod
    def unpack(packed: list[int]) -> Geometry:
        """Inverse of :meth:`pack`."""
        channels, groups, block, interleaved, sampling_stride, *axes = packed
        rank = len(axes) // 4
        kernel_size, stride, padding, dilation = (tuple(axes[i * rank : (i + 1) * rank]) for i in range(4))
        grouping = "interleaved" if interleaved else "contiguous"
        return Geometry(channels, kernel_size, stride, padding, dilation, groups, block, grouping, sampling_stride)
