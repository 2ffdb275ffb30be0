"""What takes the place of a convolution, a linear layer and a batch norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv import checks
from tdeconv.dataflow import Links
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.plan import BLOCK, CONVS, MOST_FEATURES, kind_of, plain_class
from tdeconv.schedule import LONGEST

_MOST_OF_A_GROUP = 128  # features; with more, a network with SiLU stayed behind batch norm until it was calibrated
_DECONV_OF: dict[type | None, Any] = {nn.Conv1d: FastDeconv1d, nn.Conv2d: FastDeconv, nn.Conv3d: FastDeconv3d}


@dataclass(frozen=True)
class Options:
    """How the new layers are made."""

    sampling_stride: int
    samples_per_feature: int
    n_iter: int
    first_n_iter: int
    freeze_first: bool
    stats_interval: int
    stats_warmup: int
    block_fc: int
    backend: str | None

    def check(self) -> None:
        checks.options(1e-5, self.n_iter, 0.1, BLOCK, self.sampling_stride)
        checks.positive_int("samples_per_feature", self.samples_per_feature, least=0)
        checks.positive_int("first_n_iter", self.first_n_iter)
        checks.positive_int("stats_interval", self.stats_interval, most=LONGEST)
        checks.positive_int("stats_warmup", self.stats_warmup, least=0, most=LONGEST)
        checks.positive_int("block_fc", self.block_fc)
        checks.backend(self.backend)


class Clone(nn.Identity):
    """Stands for a removed batch norm whose output is changed in place while its input is needed unchanged."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


def without_norm(norm: Any, link: Links) -> nn.Module:
    """What is left of a batch norm: nothing, or the dropout and activation of one of timm's.

    A batch norm's output was memory of its own, that the code after it may have changed in place.
    """
    parts = [m for m in norm.children() if type(m) is not nn.Identity]
    for part in parts:
        if link.input_read and getattr(part, "inplace", False):
            part.inplace = False
    if parts:
        rest = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    else:
        rest = Clone() if link.input_read and link.overwritten else nn.Identity()
    rest.training = norm.training
    return rest


def _default_block(taps: int) -> int:
    """64 channels, fewer where that many would have more features than ``MOST_FEATURES`` in a kernel of ``taps``."""
    block = BLOCK
    while block > 1 and block * taps > MOST_FEATURES:
        block //= 2
    return block


def hints(layer: Any, default_block: bool) -> str:
    """What a reader of the report should know of a new layer: why its block is small, or that it whitens little."""
    if isinstance(layer, Delinear):
        return ""
    found = ""
    if default_block and layer.groups == 1 and layer.block < min(BLOCK, layer.in_channels):
        found = f"; a block of {layer.block} for its large kernel"
    features = layer.running_mean.numel() // layer.groups
    if layer.groups > 1 and features > _MOST_OF_A_GROUP:
        found += f"; {layer.n_iter} step(s) whiten {features} features a little: see calibrate_deconv"
    return found


def deconv(layer: Any, first: bool, block: int | None, options: Options) -> nn.Module:
    """The deconvolution layer for a convolution or linear layer: its weight, a bias, fresh running statistics."""
    weight, n_iter = layer.weight, options.n_iter
    common: dict[str, Any] = {"backend": options.backend, "device": "meta", "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        sizes = (layer.in_features, layer.out_features)
        new: Any = Delinear(*sizes, n_iter=n_iter, block=options.block_fc, **common)
    else:
        most = {"depthwise convolution": 1, "group convolution": 3}.get(kind_of(layer), n_iter)
        new = _DECONV_OF[plain_class(layer, CONVS)](
            *(layer.in_channels, layer.out_channels, layer.kernel_size),
            *(layer.stride, layer.padding, layer.dilation, layer.groups),
            n_iter=options.first_n_iter if first else min(n_iter, most),
            block=block or _default_block(math.prod(layer.kernel_size)),
            sampling_stride=options.sampling_stride,
            samples_per_feature=options.samples_per_feature,
            freeze=first and options.freeze_first,
            stats_interval=options.stats_interval,
            stats_warmup=options.stats_warmup,
            padding_mode=layer.padding_mode,
            **common,
        )
        # which is what torch pads by, even where the layer's padding has been set since
        new._reversed_padding_repeated_twice = list(layer._reversed_padding_repeated_twice)
    new.weight = weight
    zero = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    new.bias = nn.Parameter(zero, weight.requires_grad) if layer.bias is None else layer.bias
    for name, buffer in new.named_buffers():
        setattr(new, name, torch.empty_like(buffer, device=weight.device))
    new.reset_running_stats()
    return new.train(layer.training)
