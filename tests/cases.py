"""The named awkward cases that every backend's stages and layers are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdeconv.geometry import Geometry, resolve_block


@dataclass(frozen=True)
class Case:
    """A layer and its input. ``kernel=()`` and a 2-D ``shape`` is a fully connected layer."""

    name: str
    shape: tuple[int, ...]
    out: int = 4
    kernel: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    block: int = 64
    sampling_stride: int = 2
    grouping: str = "interleaved"
    bias: bool = True
    layout: str = "contiguous"
    degenerate: bool = False  # fewer samples than features: float32 loses digits whoever computes

    @property
    def rank(self) -> int:
        return len(self.shape) - 2

    def axes(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.rank if isinstance(value, int) else value

    @property
    def geo(self) -> Geometry:
        return Geometry(
            channels=self.shape[1],
            kernel_size=self.axes(self.kernel),
            stride=self.axes(self.stride),
            padding=self.axes(self.padding),
            dilation=self.axes(self.dilation),
            groups=self.groups,
            block=resolve_block(self.block, self.shape[1], self.groups),
            grouping=self.grouping if self.rank else "contiguous",
            sampling_stride=self.sampling_stride if self.rank else 1,
        )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``fast_deconv`` or ``delinear``."""
        if not self.rank:
            return {"block": self.block}
        names = ("stride", "padding", "dilation", "groups", "block", "sampling_stride", "grouping")
        return {name: getattr(self, name) for name in names}

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Correlated input with a mean, in the case's memory layout; weight; bias."""
        g = torch.Generator().manual_seed(seed)
        weight_shape = (self.out, self.shape[1] // self.groups, *self.axes(self.kernel))
        x = LAYOUTS[self.layout](lambda shape: _correlated(shape, g).to(dtype), self.shape)
        weight = (torch.randn(weight_shape, generator=g, dtype=torch.float64) / weight_shape[1] ** 0.5).to(dtype)
        bias = torch.randn(self.out, generator=g, dtype=torch.float64).to(dtype) if self.bias else None
        assert tuple(x.shape) == self.shape
        return x, weight, bias


def _correlated(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    return noise + 0.8 * noise.roll(1, -1) + 0.5 * noise.mean(1, keepdim=True) + 0.5


Make = Callable[[tuple[int, ...]], Tensor]


def _sliced(make: Make, shape: tuple[int, ...]) -> Tensor:
    """Every other value of a larger tensor, off its start, along all axes."""
    return make(tuple(2 * n + 1 for n in shape))[tuple(slice(1, None, 2) for _ in shape)]


def _channels_last(make: Make, shape: tuple[int, ...]) -> Tensor:
    return make((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Make, tuple[int, ...]], Tensor]] = {
    "contiguous": lambda make, shape: make(shape),
    "channels_last": _channels_last,
    "sliced": _sliced,
    "channels_sliced": lambda make, shape: make((shape[0], shape[1] + 3, *shape[2:]))[:, 2:-1],
    "transposed": lambda make, shape: make(tuple(reversed(shape))).permute(*reversed(range(len(shape)))),
    "expanded": lambda make, shape: make((1, *shape[1:])).expand(shape),
}

CASES = [
    Case("plain", (2, 4, 8, 8), padding=1),
    Case("odd_sizes", (3, 5, 7, 9), padding=1),
    Case("odd_sizes_unpadded", (3, 3, 11, 7)),
    Case("sampling_one", (2, 3, 6, 6), padding=1, sampling_stride=1),
    Case("sampling_three", (4, 2, 11, 10), padding=1, sampling_stride=3),
    Case("sampling_past_the_end", (9, 2, 4, 5), kernel=2, sampling_stride=7),
    Case("stride_two", (3, 3, 11, 9), padding=1, stride=2),
    Case("stride_larger_than_kernel", (4, 2, 13, 12), kernel=2, stride=3, sampling_stride=1),
    Case("stride_rectangular", (3, 2, 9, 13), padding=1, stride=(1, 3)),
    Case("dilation_two", (3, 2, 9, 10), padding=2, dilation=2),
    Case("dilation_rectangular", (3, 2, 8, 11), padding=(0, 3), dilation=(1, 3)),
    Case("stride_dilation_padding", (4, 2, 13, 11), stride=2, dilation=2, padding=3, sampling_stride=1),
    Case("kernel_1x3", (3, 3, 6, 9), kernel=(1, 3), padding=(0, 1)),
    Case("kernel_3x2", (3, 2, 8, 7), kernel=(3, 2), padding=(1, 0)),
    Case("kernel_even", (3, 4, 7, 8), kernel=2, padding=1),
    Case("kernel_five", (4, 1, 11, 10), kernel=5, padding=2, sampling_stride=1),
    Case("groups_two", (4, 4, 8, 7), padding=1, groups=2),
    Case("groups_contiguous", (4, 6, 7, 7), padding=1, groups=3, out=6, kernel=2, grouping="contiguous"),
    Case("groups_one_output_each", (5, 6, 7, 6), out=3, groups=3, kernel=2),
    Case("depthwise", (4, 5, 9, 8), out=5, padding=1, groups=5),
    Case("depthwise_two_outputs_each", (4, 3, 9, 8), out=6, padding=1, groups=3, stride=2, sampling_stride=1),
    Case("block_divides", (2, 6, 8, 8), padding=1, block=2),
    Case("block_by_gcd", (2, 6, 8, 7), padding=1, block=4),
    Case("block_coprime", (2, 5, 7, 7), padding=1, block=3),
    Case("block_one", (2, 4, 6, 6), padding=1, block=1),
    Case("block_equals_channels", (4, 4, 7, 7), padding=1, block=4, kernel=2),
    Case("contiguous_grouping", (2, 6, 8, 7), padding=1, block=3, grouping="contiguous"),
    Case("contiguous_by_gcd_rectangular", (2, 6, 8, 7), kernel=(2, 3), padding=(0, 1), block=4, grouping="contiguous"),
    Case("pointwise", (3, 5, 7, 6), kernel=1),
    Case("pointwise_strided", (3, 4, 9, 7), kernel=1, stride=2, sampling_stride=1),
    Case("pointwise_padded", (3, 4, 5, 6), kernel=1, padding=1),
    Case("pointwise_block", (3, 6, 5, 7), kernel=1, block=2),
    Case("pointwise_groups_channels_last", (3, 6, 5, 7), kernel=1, groups=2, layout="channels_last"),
    Case("pointwise_sliced", (3, 4, 6, 5), kernel=1, layout="sliced"),
    Case("channels_last", (3, 4, 7, 8), padding=1, layout="channels_last"),
    Case("channels_last_block_stride", (3, 6, 9, 8), padding=1, block=3, stride=2, layout="channels_last"),
    Case("channels_last_depthwise", (4, 4, 9, 8), padding=1, groups=4, layout="channels_last"),
    Case("sliced", (3, 3, 7, 8), padding=1, layout="sliced"),
    Case("channels_sliced", (3, 4, 7, 8), padding=1, layout="channels_sliced"),
    Case("transposed", (3, 3, 8, 7), padding=1, layout="transposed"),
    Case("expanded_batch", (3, 2, 9, 8), padding=1, sampling_stride=1, layout="expanded"),
    Case("batch_one", (1, 2, 11, 10), padding=1, sampling_stride=1),
    Case("bias_off", (3, 3, 8, 8), padding=1, bias=False),
    Case("positions_in_padding_only", (4, 2, 3, 4), kernel=2, padding=4, sampling_stride=1),
    Case("sampled_in_padding_only", (2, 2, 4, 4), kernel=2, padding=3, sampling_stride=20, degenerate=True),
    Case("kernel_covers_input", (24, 2, 3, 3)),
    Case("single_sample", (1, 2, 3, 3), degenerate=True),
    Case("fewer_samples_than_features", (2, 5, 6, 6), padding=1, sampling_stride=3, degenerate=True),
    Case("past_the_half_gram", (3, 24, 9, 8), padding=1, sampling_stride=1, out=6),
    Case("wide_channels", (2, 130, 6, 5), out=129, padding=1, block=13, sampling_stride=1),
    Case("wide_unpadded_odd", (3, 128, 5, 7), out=128, block=4, sampling_stride=1),
    Case("wide_padding_uneven", (2, 128, 4, 6), out=129, padding=(2, 0), block=4, sampling_stride=1, layout="sliced"),
    Case("wide_channels_strided_dilated", (2, 128, 9, 8), out=128, padding=2, stride=2, dilation=2, block=4),
    Case("wide_few_pixels", (9, 128, 2, 2), out=130, padding=1, block=2, sampling_stride=1),
    Case(
        "wide_few_pixels_strided", (9, 129, 1, 3), out=128, kernel=(1, 2), padding=1, stride=2, block=3, layout="sliced"
    ),
    Case("wide_pointwise", (3, 128, 5, 4), out=128, kernel=1, block=16, sampling_stride=1),
    Case("wide_channels_last", (2, 128, 5, 6), out=128, padding=1, block=4, layout="channels_last"),
    Case("sixty_four_channels", (2, 64, 6, 5), out=65, padding=1, block=4, sampling_stride=1),
    Case("sixty_four_channels_unpadded_strided", (3, 65, 9, 8), out=64, stride=2, block=5, sampling_stride=1),
    Case("conv1d_wide", (3, 128, 9), out=128, padding=1, block=8, sampling_stride=1),
    Case("conv3d_wide", (2, 128, 3, 2, 3), out=128, kernel=2, padding=1, block=4, sampling_stride=1),
    Case("conv1d", (4, 4, 15), padding=1),
    Case("conv1d_groups_dilated", (4, 4, 17), padding=2, dilation=2, groups=2, stride=2, sampling_stride=1),
    Case("conv1d_block_sliced", (4, 6, 13), padding=1, block=2, layout="sliced"),
    Case("conv3d", (2, 2, 5, 6, 5), kernel=2, padding=1, sampling_stride=1),
    Case("conv3d_block_strided_rectangular", (3, 4, 5, 7, 6), kernel=(1, 2, 3), stride=(1, 2, 1), block=2),
    Case("conv3d_depthwise_channels_last", (3, 3, 5, 6, 5), out=3, kernel=2, groups=3, layout="channels_last"),
    Case("linear", (30, 6), kernel=(), out=3),
    Case("linear_by_gcd", (20, 12), kernel=(), out=5, block=8),
    Case("linear_sliced_bias_off", (25, 6), kernel=(), out=2, block=3, bias=False, layout="sliced"),
    Case("linear_transposed", (21, 4), kernel=(), layout="transposed"),
    Case("linear_wide", (40, 256), kernel=(), out=140, block=32),
]
CONV_CASES = [c for c in CASES if c.rank]


@dataclass(frozen=True)
class Spectrum:
    """Covariances ``(*batch, D, D)`` with designed eigenvalues."""

    name: str
    eigenvalues: tuple[float, ...]
    batch: tuple[int, ...] = (1,)

    def tensor(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        d = len(self.eigenvalues)
        vectors, _ = torch.linalg.qr(torch.randn(*self.batch, d, d, generator=g, dtype=torch.float64))
        cov = (vectors * torch.tensor(self.eigenvalues, dtype=torch.float64)) @ vectors.mT
        return ((cov + cov.mT) / 2).to(dtype)


def _power(d: int, condition: float, scale: float = 1.0) -> tuple[float, ...]:
    return tuple(scale * condition ** (-i / max(1, d - 1)) for i in range(d))


SPECTRA = [
    Spectrum("one", (2.5,)),
    Spectrum("one_of_many", (0.3,), (5,)),
    Spectrum("two", (3.0, 0.1)),
    Spectrum("identity", (1.0,) * 6),
    Spectrum("identity_large", (1.0,) * 40),
    Spectrum("eps_only", (1e-5,) * 27),
    Spectrum("two_values_repeated", (2.0,) * 13 + (0.05,) * 14),
    Spectrum("nearly_equal", tuple(1 + 1e-9 * i for i in range(30))),
    Spectrum("nearly_equal_tiny", (*(1e-5 * (1 + 1e-7 * i) for i in range(25)), 1.0, 2.0)),
    Spectrum("equal_but_for_one", (1.0,) * 26 + (1 + 1e-6,)),
    Spectrum("pairs", tuple(v for i in range(15) for v in (0.5**i + 1e-5, 0.5**i + 1e-5 + 1e-12))),
    Spectrum("condition_1e1", _power(27, 1e1)),
    Spectrum("condition_1e3", _power(27, 1e3)),
    Spectrum("condition_1e4_small", _power(9, 1e4)),
    Spectrum("condition_1e6", _power(27, 1e6)),
    Spectrum("condition_1e6_wide", _power(100, 1e6)),
    Spectrum("condition_1e6_depthwise", _power(9, 1e6), (7,)),
    Spectrum("rank_one", (5.0, *(1e-5,) * 26)),
    Spectrum("rank_half", _power(20, 1e2) + (1e-5,) * 20),
    Spectrum("rank_half_small", (2.0, 1.0, 0.5) + (1e-5,) * 4),
    Spectrum("large_values", _power(27, 1e3, 1e8)),
    Spectrum("small_values", _power(27, 1e3, 1e-6)),
    Spectrum("large_values_small_d", _power(4, 1e2, 1e8)),
    Spectrum("batch_of_three", _power(30, 1e3), (3,)),
    Spectrum("batch_of_depthwise", _power(9, 1e2), (16,)),
    Spectrum("two_batch_axes", _power(5, 1e2), (2, 3)),
    Spectrum("two_batch_axes_wide", _power(26, 1e2), (2, 2)),
    Spectrum("d23", _power(23, 1e3)),
    Spectrum("d24", _power(24, 1e3)),
    Spectrum("d25", _power(25, 1e3)),
    Spectrum("d64", _power(64, 1e4)),
    Spectrum("d193", _power(193, 1e5)),
]
