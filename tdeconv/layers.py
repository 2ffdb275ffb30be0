"""The layers as modules: parameters, running statistics, freezing. Names and state_dict keys are the paper's code's.

Source: Ye et al., *Network Deconvolution*, ICLR 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tdeconv import checks
from tdeconv import functional as TF
from tdeconv.distributed import StatisticsGroup
from tdeconv.geometry import Geometry, resolve_block
from tdeconv.schedule import LONGEST, WARMUP, Scheduled


class _WeightLayer(Scheduled):
    """What the layers with a weight share: a running mean and a running root."""

    track_running_stats = True  # as in the paper's code: an attribute; False stops the updates
    process_group: StatisticsGroup | None = None  # whose ranks' statistics these are: see convert_sync_deconv
    running_mean: Tensor
    num_batches_tracked: Tensor  # with freeze, or a stats_interval
    _version = 2  # of the state_dict: the paper's code, which counts nothing in a buffer, writes 1

    def reset_running_stats(self) -> None:
        """Mean 0, deconvolution the identity, all counts 0: freezing begins anew, and so does a plain average."""
        with torch.no_grad():
            self.running_mean.zero_()
            self.running_deconv.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
            for counts in self._counts().values():
                counts.zero_()
        self._follow()

    def _statistics_options(self, x: Tensor) -> dict[str, Any]:
        """What the function behind a layer is told of its statistics in this step."""
        fresh = self.training and self._takes_statistics(x)
        keep = self.track_running_stats or not fresh
        return {
            "running_mean": self.running_mean if keep else None,
            "running_deconv": self.running_deconv if keep else None,
            "training": self.training,
            "stale": self.training and not fresh,
            "eps": self.eps,
            "n_iter": self.n_iter,
            "momentum": self._share() if fresh else None,
            "num_updates": self._buffers.get("num_updates"),
            "backend": self.backend,
            "process_group": self.process_group,
        }

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch's layer does, and reset the running statistics."""
        super().reset_parameters()  # type: ignore[misc]
        if "running_deconv" in self._buffers:  # not yet, when torch's constructor calls this
            self.reset_running_stats()


class _FastDeconvNd(_WeightLayer, _ConvNd):
    """What the convolution layers of every rank share; ``_rank`` is the number of spatial axes."""

    _rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float | None = 0.1,
        block: int = 64,
        sampling_stride: int = 3,
        freeze: bool = False,
        freeze_iter: int = 100,
        *,
        padding_mode: str = "zeros",
        grouping: str = "interleaved",
        samples_per_feature: int = 0,
        stats_interval: int = 1,
        stats_warmup: int = WARMUP,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        eps, n_iter, momentum, block, sampling_stride = checks.options(eps, n_iter, momentum, block, sampling_stride)
        samples_per_feature = checks.positive_int("samples_per_feature", samples_per_feature, least=0)
        freeze_iter = checks.positive_int("freeze_iter", freeze_iter, most=LONGEST)
        in_channels = checks.positive_int("in_channels", in_channels)
        out_channels = checks.positive_int("out_channels", out_channels)
        groups = checks.positive_int("groups", groups)
        checks.divides("groups", groups, "in_channels", in_channels)
        checks.divides("groups", groups, "out_channels", out_channels)
        rank = self._rank
        super().__init__(
            in_channels,
            out_channels,
            checks.int_tuple("kernel_size", kernel_size, rank, 1),
            checks.int_tuple("stride", stride, rank, 1),
            padding if isinstance(padding, str) else checks.int_tuple("padding", padding, rank, 0),
            checks.int_tuple("dilation", dilation, rank, 1),
            False,
            (0,) * rank,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]  # torch refuses other names
            device=device,
            dtype=checks.float_dtype(dtype),
        )
        self.eps, self.n_iter = eps, n_iter
        self.block = resolve_block(block, in_channels, groups)
        self.sampling_stride, self.samples_per_feature = sampling_stride, samples_per_feature
        self.grouping = checks.grouping(grouping)
        self.backend = checks.backend(backend)
        taps = self.weight[0, 0].numel()
        self.num_features = self.block * taps
        square = (self.num_features, self.num_features)
        batch = () if groups == 1 else (groups,)
        self.register_buffer("running_mean", self.weight.new_empty(groups * self.num_features))
        self.register_buffer("running_deconv", self.weight.new_empty(batch + square))
        self._freeze, self._freeze_iter = bool(freeze), freeze_iter
        self.stats_interval, self.stats_warmup = stats_interval, stats_warmup
        self._averages, self.momentum = groups, momentum
        self.reset_running_stats()

    @property
    def freeze(self) -> bool:
        """Whether the layer takes its batch's statistics in the first part of every round of steps only. To set this or
        ``freeze_iter`` takes effect at the next step."""
        return self._freeze

    @freeze.setter
    def freeze(self, value: bool) -> None:
        self._freeze = bool(value)
        self._reschedule()

    @property
    def freeze_iter(self) -> int:
        """A tenth of that round's steps."""
        return self._freeze_iter

    @freeze_iter.setter
    def freeze_iter(self, value: int) -> None:
        self._freeze_iter = checks.positive_int("freeze_iter", value, most=LONGEST)
        self._reschedule()

    def _forward(self, x: Tensor) -> Tensor:
        checks.float_tensor("input", x)
        if x.ndim not in (self._rank + 1, self._rank + 2):
            raise ValueError(
                f"{type(self).__name__} expects an input of {self._rank + 2} dimensions (N, C, *spatial), or "
                f"{self._rank + 1} without a batch; got shape {tuple(x.shape)}"
            )
        checks.channels(x, self.in_channels, axis=-1 - self._rank)
        x, padding = self._pad(x)
        y = TF.fast_deconv(
            x,
            self.weight,
            self.bias,
            **self._statistics_options(x),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            block=self.block,
            sampling_stride=self.sampling_stride,
            samples_per_feature=self.samples_per_feature,
            grouping=self.grouping,
        )
        if self.training and self.track_running_stats:  # here, since a refused input is no step
            self._count_step()
        return y

    def in_training(self, x: Tensor) -> tuple[Tensor, Geometry, int]:
        """The input as it is convolved (padded, unless zeros do it), and of a training step on it the layer's sizes and
        the Newton-Schulz steps."""
        x, padding = self._pad(x)
        geo = TF.convolution_geometry(
            x,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.block,
            self.grouping,
            self.sampling_stride,
        )
        return x, *TF.sampled(geo, self.n_iter, x, self.samples_per_feature, self.process_group)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Padding that a convolution's own zeros cannot express goes into the input, before it is sampled."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding  # which may have been set since
        sides = self._reversed_padding_repeated_twice
        low = tuple(sides[-2::-2])
        high = tuple(sides[-1::-2])
        if self.padding_mode == "zeros" and low == high:
            return x, low
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, sides, mode=mode), (0,) * self._rank

    def extra_repr(self) -> str:
        extra = [f"block={self.block}", f"n_iter={self.n_iter}", f"sampling_stride={self.sampling_stride}"]
        if self.eps != 1e-5:
            extra.append(f"eps={self.eps}")
        if self.momentum != 0.1:
            extra.append(f"momentum={self.momentum}")
        if self.samples_per_feature:
            extra.append(f"samples_per_feature={self.samples_per_feature}")
        if self.grouping != "interleaved":
            extra.append(f"grouping={self.grouping}")
        if self.stats_interval != 1:
            extra.append(f"stats_interval={self.stats_interval}, stats_warmup={self.stats_warmup}")
        if self.freeze:
            extra.append(f"freeze=True, freeze_iter={self.freeze_iter}")
        if self.backend is not None:
            extra.append(f"backend={self.backend}")
        return ", ".join([super().extra_repr(), *extra])  # type: ignore[no-untyped-call]


class FastDeconv1d(_FastDeconvNd):
    """:class:`FastDeconv` for ``(N, C, L)``."""

    _rank = 1


class FastDeconv(_FastDeconvNd):
    """2-D convolution over whitened patches; replaces a convolution and the batch normalisation behind it.

    In training the patches' mean and covariance are those of the batch; in evaluation the running ones, folded into
    the weight: a plain convolution.

    It is no ``torch.nn.Conv2d``: quantisers and adapters (LoRA) that look for these leave it as it is, or refuse it.
    After :func:`tdeconv.fuse_deconv_eval` it is one.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``torch.nn.Conv2d``.
        eps: added to the covariance's diagonal.
        n_iter: Newton-Schulz steps.
        momentum: share of the batch's statistics in the running ones, in [0, 1]. None makes these the plain average of
            all batches, as in torch's batch norm.
        block: channels whitened together, cut down to a divisor of ``in_channels``; all of a group's if groups > 1.
        sampling_stride: the statistics take every ``sampling_stride * stride``-th patch.
        freeze: take statistics only in the first ``freeze_iter + 1`` of every ``10 * freeze_iter`` training steps,
            as the paper's code does, and use the running ones in the rest.
        grouping: ``"interleaved"`` (the paper's) or ``"contiguous"`` channels per covariance.
        samples_per_feature: where ``sampling_stride`` leaves a covariance fewer than this many samples for each of its
            features, a training step samples more, up to all patches. Where it samples fewer than 58 then, it takes
            fewer than five Newton-Schulz steps: with M samples of D features at most ``log(M/D) / log(9/4)``, and at
            least one (but all of them over several processes, whose batches may differ). 0, as in the paper, does
            neither; 58 samples as many as five steps want, where there are as many.
        stats_interval: behind the first ``stats_warmup`` training steps, take statistics in every
            ``stats_interval``-th step only, in which ``momentum`` stands for as many steps, and use the running ones,
            as constants, in those between: a fold and a convolution. 1 is the paper's method. At most 100,000. All
            layers of a model should have the same, but for one before the loss, which should take statistics in every
            step: without that, and without a long warm-up, deep networks were seen to diverge.
        stats_warmup: training steps at the start that all take their batches' statistics.
        backend: see :func:`tdeconv.use_backend`.

    Shape:
        Input ``(N, C, H, W)`` or ``(C, H, W)``, output ``(N, O, H_out, W_out)`` or without N, as ``torch.nn.Conv2d``.

    Buffers:
        running_mean: ``(D)`` with ``D = block * kh * kw``, or ``(groups * D)``; starts at 0.
        running_deconv: ``(D, D)``, or ``(groups, D, D)``; starts at the identity.
        num_batches_tracked: training steps seen, only with ``freeze`` or a ``stats_interval``. It is read when it is
            loaded and where training begins; to write it from elsewhere takes effect at the next ``train()`` behind an
            ``eval()``.
        num_updates: ``(groups)``, batches in the running statistics, only with ``momentum=None``.

    Raises:
        TypeError, ValueError: an argument or input of the wrong type, shape, dtype, device or range.

    Source: Ye et al., *Network Deconvolution*, ICLR 2020.
    """

    _rank = 2


class FastDeconv3d(_FastDeconvNd):
    """:class:`FastDeconv` for ``(N, C, D, H, W)``."""

    _rank = 3


class Delinear(_WeightLayer, nn.Linear):
    """Fully connected layer over whitened features.

    The features are split into contiguous runs of ``block`` that share one mean and covariance.

    It is a ``torch.nn.Linear`` whose weight is not what multiplies the input, which code that looks for linear layers
    does not know:

    - An adapter beside the layer (LoRA) trains and runs as it does beside any other. Merged into the layer's weight it
      would be whitened too: fold the model with :func:`tdeconv.fuse_deconv_eval` first, adapters and all, and merge
      then.
    - A quantiser that replaces the weight (torchao's ``quantize_``) makes a layer that raises an error, and one that
      replaces exactly ``torch.nn.Linear`` (``torch.ao.quantization.quantize_dynamic``) leaves the layer as it is. One
      that puts a layer of its own in the place of every kind of linear layer loses the whitening without a word. After
      folding there are plain linear layers for all of them.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        eps, n_iter, momentum, stats_interval, stats_warmup, backend: as in :class:`FastDeconv`.
        block: features whitened together, cut down to a divisor of ``in_features``.

    Shape:
        Input ``(..., in_features)``, output ``(..., out_features)``.

    Buffers:
        running_mean: ``(block)``; starts at 0.
        running_deconv: ``(block, block)``; starts at the identity.
        num_batches_tracked: training steps seen, only with a ``stats_interval``.
        num_updates: ``(1)``, batches in the running statistics, only with ``momentum=None``.

    Raises:
        TypeError, ValueError: an argument or input of the wrong type, shape, dtype, device or range.

    Source: Ye et al., *Network Deconvolution*, ICLR 2020.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        n_iter: int = 5,
        momentum: float | None = 0.1,
        block: int = 512,
        *,
        stats_interval: int = 1,
        stats_warmup: int = WARMUP,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        eps, n_iter, momentum, block, _ = checks.options(eps, n_iter, momentum, block)
        in_features = checks.positive_int("in_features", in_features)
        out_features = checks.positive_int("out_features", out_features)
        super().__init__(in_features, out_features, bias, device, checks.float_dtype(dtype))
        self.eps, self.n_iter = eps, n_iter
        self.block = resolve_block(block, in_features)
        self.backend = checks.backend(backend)
        self.register_buffer("running_mean", self.weight.new_empty(self.block))
        self.register_buffer("running_deconv", self.weight.new_empty(self.block, self.block))
        self.momentum, self.stats_interval, self.stats_warmup = momentum, stats_interval, stats_warmup
        self.reset_running_stats()

    def in_training(self, x: Tensor) -> tuple[Tensor, Geometry, int]:
        """The input as rows of features, and of a training step on it the layer's sizes and the Newton-Schulz steps."""
        return x.reshape(-1, self.in_features), TF.linear_geometry(self.in_features, self.block), self.n_iter

    def _forward(self, x: Tensor) -> Tensor:
        y = TF.delinear(x, self.weight, self.bias, **self._statistics_options(x), block=self.block)
        if self.training and self.track_running_stats:
            self._count_step()
        return y

    def extra_repr(self) -> str:
        extra = [super().extra_repr(), f"block={self.block}", f"n_iter={self.n_iter}"]
        if self.eps != 1e-5:
            extra.append(f"eps={self.eps}")
        if self.momentum != 0.1:
            extra.append(f"momentum={self.momentum}")
        if self.stats_interval != 1:
            extra.append(f"stats_interval={self.stats_interval}, stats_warmup={self.stats_warmup}")
        return ", ".join(extra)
