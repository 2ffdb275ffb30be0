"""Statistics over all processes of a group, as those of one process with the whole batch.

One packed all-reduce per layer carries every rank's sample count and mean, each in a row of its own, and the sum of the
ranks' scatter matrices, each centred by its own mean. Together they are the whole batch's moments, with no cancellation
however far from zero the means are. The collective is differentiable and torch.compile traces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.nn import functional as F

from tdeconv import ops, reference, transforms
from tdeconv.geometry import Geometry
from tdeconv.precision import statistics_dtype
from tdeconv.products import product
from tdeconv.running import tells

Module = TypeVar("Module", bound=nn.Module)


def convert_sync_deconv(module: Module, process_group: Any = None) -> Module:
    """Let all deconvolution layers of a model take their statistics over all ranks, as ``convert_sync_batchnorm``.

    In training a layer then computes the mean and covariance of the batches of all ranks together, whatever their
    sizes (a rank's batch may be empty), by one all-reduce in forward and one in backward. Gradients flow through it:
    the gradients of the ranks' inputs are those of the sum of all ranks' losses, and the sum of the ranks' parameter
    gradients is one process's with the whole batch. ``DistributedDataParallel`` and ``fully_shard`` average them, as
    they do with any layer: a loss that is a mean over equal batches then gives the mean over the whole batch; of uneven
    ones, take the sum over the rank's images times the number of ranks over the whole batch's size.

    Every rank updates its running statistics by the same values. So ``DistributedDataParallel`` need not broadcast
    them before each step: ``forward_sync_buffers=False`` (``broadcast_buffers=False`` in older versions of torch).
    With ``no_sync`` the statistics are still those of all ranks, of each micro-batch. Evaluation, steps that take no
    statistics (``freeze``, ``stats_interval``) and a group of one process communicate nothing.

    Every rank of the group has to call this, with the same layers, and then to run them in the same order and mode;
    where one does not, the others wait for it until the process group's timeout. So that all take statistics in the
    same steps, their counts of steps become those of the group's first rank, which may have loaded a checkpoint.

    A layer with a 1x1 kernel samples every k-th pixel of each rank's batch from that rank's first one on, as does
    :class:`tdeconv.ChannelDeconv`.

    Args:
        module: changed in place: its deconvolution layers get an attribute ``process_group``, which ``deepcopy`` and
            ``pickle`` keep and ``state_dict`` does not. Convert a model to deconvolution layers before.
        process_group: a ``torch.distributed.ProcessGroup`` this process belongs to; None means all processes.

    Returns:
        The module itself.

    Raises:
        TypeError: ``process_group`` is neither None nor a process group of this process.
        ValueError: torch.distributed is not initialised; or, on every rank, the ranks' layers differ.
    """
    group = StatisticsGroup.of(process_group)
    layers = [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "running_deconv")]
    steps = _check_agreement(layers, group, process_group)
    for (_, layer), step in zip(layers, steps, strict=True):
        layer.process_group = group
        layer._set_steps(step)
    return module


@dataclass(frozen=True)
class StatisticsGroup:
    """The processes that share a layer's statistics: what its ``process_group`` holds.

    A copy, or what is unpickled, looks for the process group of the same name in its own process; ``size`` is 0 where
    there is none.
    """

    name: str
    rank: int
    size: int

    @staticmethod
    def of(process_group: Any) -> StatisticsGroup:
        """From a ``torch.distributed.ProcessGroup``, or None for all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "convert_sync_deconv needs torch.distributed, which is not initialised in this process: start it with "
                "torchrun and call torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD if process_group is None else process_group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be None or a torch.distributed.ProcessGroup that this process belongs to, got "
                f"{type(group).__name__} (of a DeviceMesh, pass mesh.get_group())"
            )
        return StatisticsGroup(group.group_name, dist.get_rank(group), dist.get_world_size(group))

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _group_of_name, (self.name,)


def _group_of_name(name: str) -> StatisticsGroup:
    if dist.is_available() and dist.is_initialized():
        try:
            return StatisticsGroup.of(c10d._resolve_process_group(c10d.GroupName(name)))
        except (LookupError, RuntimeError):
            pass
    return StatisticsGroup(name, -1, 0)


def _describe(name: str, layer: nn.Module) -> tuple[Any, ...]:
    """What has to be the same on all ranks for their collectives to meet."""
    deconv = layer.running_deconv
    assert isinstance(deconv, Tensor)
    freeze = layer.freeze_iter if getattr(layer, "freeze", False) else None
    return (
        name,
        type(layer).__name__,
        tuple(deconv.shape),
        str(deconv.dtype),
        freeze,
        layer.stats_interval,
        layer.stats_warmup,
    )


def _check_agreement(layers: list[tuple[str, Any]], group: StatisticsGroup, process_group: Any) -> list[int]:
    """Compare the layers of all ranks once, here: a layer's sizes never change, so that no later step has to. Returns
    how many steps each layer of the first rank has counted."""
    gathered: list[Any] = [None] * group.size
    mine = [_describe(name, layer) for name, layer in layers]
    steps = [0 if layer._steps is None else int(layer._steps) for _, layer in layers]
    dist.all_gather_object(gathered, (mine, steps), process_group)
    everyone = [theirs for theirs, _ in gathered]
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            longest = max(len(theirs), len(everyone[0]))
            pairs = zip(*(rows + [None] * (longest - len(rows)) for rows in (everyone[0], theirs)), strict=True)
            first, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                "module must have the same deconvolution layers on all ranks, but (name, type, shape of "
                "running_deconv, dtype, freeze_iter, stats_interval, stats_warmup) is "
                f"{first} on rank 0 and {other} on rank {rank} of the group"
            )
    first_steps: list[int] = gathered[0][1]
    return first_steps


def active(group: StatisticsGroup | None) -> StatisticsGroup | None:
    """The group a training step has to communicate with, or None.

    Raises:
        TypeError, ValueError: it is no such group, or this process has no group of its name.
    """
    if group is None:
        return None
    if not isinstance(group, StatisticsGroup):
        raise TypeError(
            f"process_group must come from convert_sync_deconv, got {type(group).__name__}; "
            "call convert_sync_deconv(model, process_group)"
        )
    if group.size == 1:
        return None
    if group.size == 0 or not dist.is_initialized():
        raise ValueError(
            f"this layer's statistics are those of the process group {group.name!r}, which is not initialised in this "
            "process: call torch.distributed.init_process_group and then convert_sync_deconv(model), or set the "
            "layer's process_group to None"
        )
    return group


# ------------------------------------------------------------------------------------------------- the collective


_PUBLIC = find_spec("torch.distributed.functional_collectives") is not None  # in newer versions of torch


def _all_reduce(x: Tensor, group: StatisticsGroup) -> Tensor:
    """Sum over the ranks: a new tensor; differentiable, traced by torch.compile."""
    transforms.no_collective()
    # loaded on first use: tdeconv itself shall cost little to import
    if _PUBLIC:
        from torch.distributed import functional_collectives as collectives  # type: ignore[attr-defined]  # noqa: PLC0415, I001
    else:
        from torch.distributed import _functional_collectives as collectives  # noqa: PLC0415
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group.name))


def gather_and_sum(row: Tensor, summand: Tensor, group: StatisticsGroup | None) -> tuple[Tensor, Tensor]:
    """Every rank's ``row (k)`` as ``(size, k)``, and the sum of their ``summand``, in one collective."""
    if group is None:
        return row.unsqueeze(0), summand
    k = row.shape[0]
    own_place = F.pad(row, (group.rank * k, (group.size - 1 - group.rank) * k))
    total = _all_reduce(torch.cat([own_place, summand.flatten()]), group)
    return total[: group.size * k].view(group.size, k), total[group.size * k :].view(summand.shape)


# ------------------------------------------------------------------------------------------- convolutions, Delinear


def _own_moments(x: Tensor, geo: Geometry, backend: str) -> tuple[Tensor, Tensor]:
    """Mean ``(b, D)`` and covariance ``(b, D, D)`` of this rank's batch; zeros for an empty one."""
    if x.shape[0] == 0:  # which still depend on x, so that this rank takes part in the backward's collective
        zero = x.to(statistics_dtype(x.dtype)).sum()
        return zero.expand(geo.groups, geo.features), zero.expand(geo.groups, geo.features, geo.features)
    return reference.patch_moments(x, geo) if backend == "reference" else ops.patch_moments(x, geo.pack(), backend)


def patch_moments(x: Tensor, geo: Geometry, backend: str, group: StatisticsGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(b, D)`` and covariance ``(b, D, D)`` of all ranks' patches, and how many patches those are (0-d)."""
    count = geo.patches(x.shape[0], tuple(x.shape[2:]))
    mean, cov = _own_moments(x, geo, backend)
    rows, within = gather_and_sum(torch.cat([mean.new_full((1,), count), mean.flatten()]), cov * count, group)
    counts = rows[:, 0].detach()
    total = counts.sum()
    share = (counts / total.clamp(min=1)).view(-1, 1, 1)
    means = rows[:, 1:].reshape(-1, *mean.shape)
    mean = (share * means).sum(0)
    between = (share.sqrt() * (means - mean)).transpose(0, 1)
    return mean, within / total.clamp(min=1) + product(between.mT, between), total


def deconvolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    geo: Geometry,
    eps: float,
    n_iter: int,
    backend: str,
    group: StatisticsGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fresh step: ``(y, mean (b, D), deconv (b, D, D), news (b))``, as :func:`reference.deconvolve`.

    Where the batches of all ranks are empty, the statistics are the running ones.
    """
    mean, cov, total = patch_moments(x, geo, backend, group)
    news = tells(mean, cov)
    cov = cov + eps * torch.eye(geo.features, dtype=cov.dtype, device=cov.device)
    root = reference.inverse_sqrt(cov, n_iter) if backend == "reference" else ops.inverse_sqrt(cov, n_iter, backend)[0]
    if running is not None:
        keep = total == 0
        pairs = zip(running, (mean, root), strict=True)
        mean, root = (torch.where(keep, old.to(new.dtype).reshape(new.shape), new) for old, new in pairs)
        news = news & ~keep
    return reference.convolve(x, *reference.fold(weight, bias, mean, root, geo), geo), mean, root, news
