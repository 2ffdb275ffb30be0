"""Running statistics estimated anew: for averaged weights, short trainings, other data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdeconv.schedule import every_step

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def update_stats(model: Model, loader: Iterable[Any], device: Any = None) -> Model:
    """Make a model's running statistics the plain average over the batches of one pass through some data.

    Training leaves an exponential average behind: with ``momentum=0.1`` the initial values still weigh 35% after 10
    steps and 0.5% after 50, and averaged weights (``torch.optim.swa_utils``) have no statistics of their own. This is
    what ``torch.optim.swa_utils.update_bn`` does for batch norms: for all deconvolution layers, and for the batch norms
    that are left in the model, in the same pass.

    These layers run in training mode, all others in evaluation mode (dropout is off, as it will be in evaluation), and
    take the statistics of every batch, also where training would not (``freeze``, ``stats_interval``). Modes, momenta
    and the counts of training steps are afterwards what they were; so is everything, if the pass fails. A layer that no
    batch reaches keeps its statistics.

    Args:
        model: changed in place. Every rank of a model with :func:`tdeconv.convert_sync_deconv` has to call this. Other
            ranks of a ``DistributedDataParallel`` model (pass its ``module``) would average their own data: call it on
            one of them, and broadcast the buffers.
        loader: its batches are tensors, tuples or lists whose first item is the input, or mappings of the model's
            keyword arguments. Batches as large as in training give the statistics that training had.
        device: where to move them to; None leaves them where they are.

    Returns:
        The model.

    Raises:
        TypeError: the model is no ``nn.Module``, or a batch is none of these.
        ValueError: the loader has no batches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if hasattr(m, "running_deconv") or _keeps_statistics(m)]
    empty = True
    with _averaging(model, layers):
        for batch in loader:
            empty = False
            run(model, batch, device)
        if empty:
            raise ValueError("loader must give at least one batch, got none (an iterator that was used up before?)")
    return model


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def run(model: nn.Module, batch: Any, device: Any = None) -> None:
    """Call the model with a batch as a loader gives it."""

    def move(value: Any) -> Any:
        return value.to(device) if device is not None and isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
        return
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            "a batch must be a tensor, a tuple or list that begins with one, or a mapping of keyword arguments, got "
            f"{type(batch).__name__}" + (f" beginning with {type(x).__name__}" if x is not batch else "")
        )
    model(move(x))


class _Kept:
    """What a layer was like before: its options and its buffers."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.momentum = layer, layer.momentum
        self.buffers = {name: b.clone() for name, b in layer.named_buffers(recurse=False)}

    def put_back(self, buffers: bool) -> None:
        """The momentum, the counters that no batch has reached, and, if asked for, all ``buffers``."""
        for name, count in _counts(self.layer).items():
            if name in self.buffers:
                count.copy_(torch.where(count == 0, self.buffers[name], count))
        self.layer.momentum = self.momentum
        for name, value in self.buffers.items() if buffers else ():
            self.layer.get_buffer(name).copy_(value)


@contextmanager
def _averaging(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Within the block, the layers average all batches from none on; after an exception they have what they had."""
    modes = {module: module.training for module in model.modules()}
    kept = [_Kept(layer) for layer in layers]
    failed = True
    try:
        model.eval()
        for layer in layers:
            _start(layer)
        with every_step(layers, fresh=True):
            yield
        failed = False
    finally:
        for one in kept:
            one.put_back(buffers=failed)
        for module, training in modes.items():
            module.training = training


def _start(layer: Any) -> None:
    """The next batch replaces the running statistics, those behind it are averaged."""
    layer.train()
    layer.momentum = None
    for count in _counts(layer).values():
        count.zero_()


def _counts(layer: Any) -> dict[str, Tensor]:
    """The counters of an average, not that of a layer's training steps, which stands still."""
    names = {"num_updates", "num_batches_tracked"} - {getattr(layer, "_counter", None)}
    return {name: layer._buffers[name] for name in names if layer._buffers.get(name) is not None}
