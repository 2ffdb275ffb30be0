"""Models by name, for the commands: torchvision's, timm's, and those that a function of the user's makes.

And what it takes to train a step of one that nothing is known of: a random input, and a loss of whatever comes out.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv.vision import torchvision

FORMS = "NAME or torchvision:NAME, timm:NAME, or MODULE:FUNCTION that returns a torch.nn.Module"


def load_model(name: str, *, argument: str = "MODEL", **options: Any) -> nn.Module:
    """Make a model with random weights, on the CPU; nothing is downloaded.

    Args:
        name: ``torchvision:NAME`` or just ``NAME``, ``timm:NAME``, or ``MODULE:FUNCTION``, a function that
            takes no arguments (but ``options``) in a module that can be imported, those of the working directory among
            them.
        argument: what errors call the name.
        options: of the model, ``num_classes`` say.

    Raises:
        ValueError: there is no such model, or it cannot be made; the message names those with similar names.
        ModuleNotFoundError: torchvision or timm is needed and not installed.
    """
    library, colon, inner = name.partition(":")
    shown = f"{argument} {name!r}"
    if not colon:
        return _torchvision(name, shown, options, bare=True)
    if library == "torchvision":
        return _torchvision(inner, shown, options)
    if library == "timm":
        return _timm(inner, shown, options)
    return _function(library, inner, shown, options)


def _torchvision(name: str, shown: str, options: dict[str, Any], bare: bool = False) -> nn.Module:
    models = torchvision().models
    names = models.list_models()
    if name.lower() not in names:
        raise ValueError(f"{shown}: torchvision has no such model{_similar(name, names)}{_forms(bare)}")
    builder = models.get_model_builder(name)
    options = {"weights": None, **options}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # or they would be downloaded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight init", FutureWarning)  # old models' weights start slowly
        return _checked(builder(**options), shown)


def _timm(name: str, shown: str, options: dict[str, Any]) -> nn.Module:
    torchvision()  # timm imports it
    timm = import_module("timm")
    if not timm.is_model(name):
        raise ValueError(f"{shown}: timm has no such model{_similar(name, timm.list_models())}")
    try:
        return _checked(timm.create_model(name, pretrained=False, **options), shown)
    except RuntimeError as error:  # a tag of weights that there are not
        raise ValueError(f"{shown} cannot be made: {error}") from error


def _function(module: str, function: str, shown: str, options: dict[str, Any]) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except (ImportError, ValueError, TypeError) as error:  # there is none, it needs one, or it is no module's name
        inside = getattr(error, "name", None) not in (None, module, module.partition(".")[0])
        raise ValueError(f"{shown} cannot be made: {error}{_forms(not inside)}") from error
    if not callable(maker := getattr(found, function, None)):
        names = [n for n, value in vars(found).items() if callable(value)]
        problem = f"module {module!r} has no function {function!r}"
        raise ValueError(f"{shown} cannot be made: {problem}{_similar(function, names)}")
    try:
        inspect.signature(maker).bind(**options)
    except TypeError as error:
        must = f"must take {', '.join(options)}" if options else "must do without arguments"
        raise ValueError(f"{shown} cannot be made: the function {must}: {error}") from error
    return _checked(maker(**options), shown)  # what goes wrong in there is shown with its traceback


def _checked(model: Any, shown: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{shown} gave {type(model).__name__}, not a torch.nn.Module")
    return model


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=4)
    return f"; similar: {', '.join(close)}" if close else ""


def _forms(show: bool = True) -> str:
    return f"; give {FORMS}" if show else ""


# -------------------------------------------------------------------------------------------------- a step of training


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """The model with the weights of its 2-D convolutions in the layout: ``"channels_last"`` or ``"contiguous"``."""
    if layout != "channels_last":
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def random_input(shape: Sequence[int], layout: str, device: torch.device) -> Tensor:
    """Standard normal values ``shape``; the layout ``"channels_last"`` is for images ``(N, C, H, W)`` only."""
    x = torch.randn(*shape, device=device)
    images = layout == "channels_last" and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if images else x


def some_loss(output: Any) -> Tensor:
    """A scalar that all differentiable tensors of a model's output take part in: of a tensor, or a dict or sequence.

    Raises:
        ValueError: there is none.
    """
    losses = [t.float().square().mean() for t in _tensors(output) if t.requires_grad]
    if not losses:
        raise ValueError(f"the model's output, a {type(output).__name__}, holds no differentiable tensor")
    return torch.stack(losses).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)
