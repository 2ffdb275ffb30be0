"""ChannelDeconv: whitening of channels as a layer of its own, without a convolution.

Source: Ye et al., *Network Deconvolution*, ICLR 2020, and its published code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tdeconv import checks, distributed, ops, running, tracing, transforms
from tdeconv.functional import inverse_sqrt
from tdeconv.precision import no_autocast, statistics_dtype
from tdeconv.products import product
from tdeconv.schedule import WARMUP, Scheduled, recomputing


class ChannelDeconv(Scheduled):
    """Whiten an activation's channels.

    The first ``c = floor(C / block) * block`` channels are one ``(block, -1)`` matrix (channel ``ch`` is feature
    ``ch // (c / block)``), multiplied by the inverse root of its second moment after its mean is subtracted. The
    channels that remain are normalised by one scalar mean and (unbiased) variance.

    Args:
        block: channels whitened together, at most C.
        eps: added to the second moment's diagonal and to the variance.
        n_iter: Newton-Schulz steps.
        momentum: share of the batch's statistics in the running ones, in [0, 1]; the first batch's replace them. None
            makes these the plain average of all batches.
        sampling_stride: the statistics take every ``sampling_stride**2``-th value of a row, where H and W allow it.
        stats_interval, stats_warmup: as in :class:`tdeconv.FastDeconv`.
        backend: see :func:`tdeconv.use_backend`.
        device, dtype: of the buffers.

    Shape:
        Input and output ``(N, C, H, W)``, or ``(N, C)`` as 1x1 images.

    Buffers:
        running_mean1 ``(block, 1)``, running_deconv ``(block, block)``: of the whitened channels.
        running_mean2 ``(1, 1)``, running_var ``(1, 1)``: of the remaining ones.
        num_batches_tracked: batches in the running statistics.
        num_steps: training steps seen, only with a ``stats_interval``.
        num_updates: ``(2)``, batches in the running statistics of the whitened channels and of the remaining ones, only
            with ``momentum=None``.

    Raises:
        TypeError, ValueError: an argument or input of the wrong type, shape, dtype, device or range.
    """

    process_group: distributed.StatisticsGroup | None = None  # see convert_sync_deconv
    running_mean1: Tensor
    running_deconv: Tensor
    running_mean2: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    num_steps: Tensor
    _version = 2
    _averages = 2
    _counter = "num_steps"  # num_batches_tracked counts batches that told something: the first replaces the buffers

    def __init__(
        self,
        block: int,
        eps: float = 1e-2,
        n_iter: int = 5,
        momentum: float | None = 0.1,
        sampling_stride: int = 3,
        *,
        stats_interval: int = 1,
        stats_warmup: int = WARMUP,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        eps, n_iter, momentum, block, sampling_stride = checks.options(eps, n_iter, momentum, block, sampling_stride)
        self.block, self.eps, self.n_iter = block, eps, n_iter
        self.sampling_stride = sampling_stride
        self.backend = checks.backend(backend)
        kind = {"device": device, "dtype": checks.float_dtype(dtype)}
        self.register_buffer("running_mean1", torch.empty(block, 1, **kind))
        self.register_buffer("running_deconv", torch.empty(block, block, **kind))
        self.register_buffer("running_mean2", torch.empty(1, 1, **kind))
        self.register_buffer("running_var", torch.empty(1, 1, **kind))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.momentum, self.stats_interval, self.stats_warmup = momentum, stats_interval, stats_warmup
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Means 0, deconvolution the identity, variance 1; the next batch counts as the first."""
        with torch.no_grad():
            for zero in (self.running_mean1, self.running_mean2, self.running_deconv, *self._counts().values()):
                zero.zero_()
            self.running_deconv.diagonal().fill_(1)
            self.running_var.fill_(1)
        self._follow()

    def reset_parameters(self) -> None:
        """Reset the running statistics; there are no parameters."""
        self.reset_running_stats()

    def _step(self, x: Tensor) -> int:
        """The flat sampling stride."""
        s = self.sampling_stride
        return s * s if min(x.shape[2:]) >= s else 1

    def _moments(
        self, x: Tensor, c: int, group: distributed.StatisticsGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The batch's, or all ranks': mean ``(block)`` and second moment of the blocks, scalar mean and variance of the
        rest, and the two numbers of samples ``(2)``; zero where there are none.
        """
        step, work = self._step(x), statistics_dtype(x.dtype)
        columns = x.shape[0] * (c // self.block) * math.prod(x.shape[2:])
        rows = x[:, :c].transpose(0, 1).reshape(self.block, columns)[:, ::step].to(work)
        rest = x[:, c:].flatten(1)[:, ::step].to(work)
        counts = [rows.shape[1], rest.numel()]
        mean, rest_mean = rows.sum(1) / max(counts[0], 1), rest.sum() / max(counts[1], 1)
        scatter = (rest - rest_mean).square().sum()
        row = torch.cat([*(mean.new_full((1,), k) for k in counts), mean, rest_mean.view(1)])
        # the blocks' is about zero, not about the mean: the method's definition
        summand = torch.cat([product(rows, rows.t()).flatten(), scatter.view(1)])
        ranks, total = distributed.gather_and_sum(row, summand, group)
        of_rank = ranks[:, :2].detach()
        samples = of_rank.sum(0)
        share = of_rank / samples.clamp(min=1)
        mean, rest_mean = (share[:, :1] * ranks[:, 2:-1]).sum(0), (share[:, 1] * ranks[:, -1]).sum()
        moment = total[:-1].view(self.block, self.block) / samples[0].clamp(min=1)
        scatter = total[-1] + (of_rank[:, 1] * (ranks[:, -1] - rest_mean).square()).sum()
        return mean, moment, rest_mean, scatter / (samples[1] - 1).clamp(min=1), samples

    def _buffers_averaged(self) -> tuple[Tensor, ...]:
        return self.running_mean1, self.running_deconv, self.running_mean2, self.running_var

    def _statistics(self, x: Tensor, c: int, group: distributed.StatisticsGroup | None) -> tuple[list[Tensor], Tensor]:
        """The batch's statistics, or the running ones where there are no samples; and whether these are to count those
        of the blocks, which must not be all zero, and those of the rest, which must differ ``(2)``.
        """
        mean, moment, rest_mean, var, samples = self._moments(x, c, group)
        eye = torch.eye(self.block, dtype=moment.dtype, device=x.device)
        root = inverse_sqrt(moment + self.eps * eye, self.n_iter, backend=self.backend)
        seen = samples > 0
        new = (mean.view(-1, 1), root, rest_mean.view(1, 1), var.view(1, 1))
        statistics = [
            torch.where(seen[i // 2], n, k.to(n.dtype))
            for i, (n, k) in enumerate(zip(new, self._buffers_averaged(), strict=True))
        ]
        some = running.tells(torch.zeros_like(mean), moment)  # about zero, as the moment is
        differ = running.tells(rest_mean.view(1), var.view(1, 1))
        return statistics, seen & torch.stack([some, differ.view(())])

    def _update(self, statistics: list[Tensor], news: Tensor) -> None:
        buffers, count = self._buffers_averaged(), self.num_batches_tracked
        if self.momentum is None:
            shares = running.average_share(self.num_updates, statistics[0].dtype)
        else:
            share: Any = self._share()  # a number or a tensor, both of which torch.where takes
            shares = torch.where(count == 0, torch.ones_like(statistics[-1]), share).expand(2, 1)
        parts = zip((slice(0, 2), slice(2, 4)), shares, news, strict=True)
        made = torch.stack([running.update_(buffers[at], statistics[at], share, counts) for at, share, counts in parts])
        count.add_(made[0])
        if self.momentum is None:
            self.num_updates.add_(made)

    def _apply_statistics(self, x: Tensor, c: int, mean1: Tensor, root: Tensor, mean2: Tensor, var: Tensor) -> Tensor:
        work = root.dtype
        # channel f*G + g is feature f of group g: with the pixels behind them, one (block, G*H*W) matrix per image
        blocks = x[:, :c].reshape(x.shape[0], self.block, c // self.block * math.prod(x.shape[2:])).to(work)
        y = (root @ (blocks - mean1)).reshape(x.shape[0], c, *x.shape[2:])
        if c < tracing.sizes(x)[1]:
            rest = (x[:, c:].to(work) - mean2) / (var + self.eps).sqrt()
            y = torch.cat([y, rest], dim=1)
        return y.to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        checks.float_tensor("input", x)
        if x.ndim not in (2, 4):
            raise ValueError(f"ChannelDeconv expects an input (N, C, H, W) or (N, C), got shape {tuple(x.shape)}")
        channels = tracing.sizes(x)[1]
        if channels < self.block:
            raise ValueError(
                f"ChannelDeconv with block={self.block} needs at least that many channels, got {channels} (shape "
                f"{tuple(x.shape)}); set block smaller"
            )
        checks.same_home(x, **dict(self.named_buffers()))
        image = x if x.ndim == 4 else x[:, :, None, None]
        c = channels // self.block * self.block
        fresh = self.training and self._takes_statistics(x)
        group = distributed.active(self.process_group) if fresh else None
        with no_autocast(x.device.type):
            if self.training:
                transforms.no_vmap_in_training()
            if fresh and (x.numel() > 0 or group is not None):
                statistics, news = self._statistics(image, c, group)
                if not recomputing():
                    self._update(statistics, news)
            elif self.training:
                statistics = ops.constants(list(self._buffers_averaged()), statistics_dtype(x.dtype))
            else:
                work, keep = statistics_dtype(x.dtype), torch.is_grad_enabled() or torch.jit.is_tracing()
                statistics = [(b.clone() if keep else b).to(work) for b in self._buffers_averaged()]
            y = self._apply_statistics(image, c, *statistics).reshape(x.shape)
        if self.training:
            self._count_step()
        return y

    def extra_repr(self) -> str:
        extra = (
            f", stats_interval={self.stats_interval}, stats_warmup={self.stats_warmup}"
            if self.stats_interval != 1
            else ""
        )
        return (
            f"block={self.block}, eps={self.eps}, n_iter={self.n_iter}, momentum={self.momentum}, "
            f"sampling_stride={self.sampling_stride}{extra}"
        )
