"""Turning a model's convolutions and batch norms into deconvolution layers, whoever wrote the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
from torch import nn

from tdeconv import cautions, checks, replacements, starts
from tdeconv.conversion_report import ConversionReport, ConversionRow, describe
from tdeconv.holders import carry_over, replace
from tdeconv.merging import bar_merging
from tdeconv.plan import BLOCK, Plan, is_norm

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("tdeconv")
_RECIPES: dict[str, dict[str, Any]] = {
    "tdeconv": {
        "block": None,
        "samples_per_feature": 4,
        "first_n_iter": 5,
        "keep_affine": True,
        "unnormalised": False,
    },
    "paper": {
        "block": BLOCK,
        "samples_per_feature": 0,
        "first_n_iter": 15,
        "keep_affine": False,
        "unnormalised": True,
    },
}


def convert_deconv(
    model: Model,
    *,
    recipe: str = "tdeconv",
    block: int | Mapping[str, int] | None = None,
    sampling_stride: int = 3,
    samples_per_feature: int | None = None,
    keep_affine: bool | None = None,
    unnormalised: bool | None = None,
    n_iter: int = 5,
    first_n_iter: int | None = None,
    freeze_first: bool = True,
    stats_interval: int = 1,
    stats_warmup: int = 100,
    linear: bool = False,
    block_fc: int = 512,
    exclude: Iterable[str | type[nn.Module]] = (),
    backend: str | None = None,
    report: ConversionReport | None = None,
) -> Model:
    """Replace a model's convolutions by deconvolution layers and take out the batch norms they make unnecessary.

    Call it before the optimiser is made (the layers get biases), before ``torch.compile`` and before wrappers such as
    ``DistributedDataParallel``. Calling it again changes nothing.

    A batch norm is taken out if deconvolution layers alone feed it, or if it feeds deconvolution layers alone (as in
    pre-activation networks); activations, dropout, pooling, reshaping and concatenation may stand between. One that
    normalises anything else, a sum of branches say, is left. What feeds what is traced by ``torch.fx``, and where the
    model's code cannot be traced, taken from the order in which its modules were registered.

    Where code behind a batch norm works in place on what others still read, an identity that copies takes its place.

    Methods without arguments by which modules merge their convolutions and batch norms to be deployed
    (``reparameterize``, ``fuse``, ``switch_to_deploy``, ``fuse_model``; timm's ``reparameterize_model`` calls these)
    raise an error where they would merge what was converted: :func:`tdeconv.fuse_deconv_eval` deploys the model.

    A layer that the model keeps in Python lists, dicts, objects, bound methods or partials too is replaced there as
    well. One that a closure or an iterator holds, or that has hooks, or a forward, parameters or buffers of its own, is
    left, and the report says why. Attributes that were set on a layer are carried over to what takes its place.

    Many networks of other makers do not learn if every convolution is replaced as the paper's code would. So, unless
    ``recipe="paper"`` or the arguments named say otherwise:

    - A convolution starts at the scale and shift of its batch norm, ``w_o <- gamma_o w_o / |w_o|`` and ``b <- beta``:
      what batch norm divided out, and the zeros with which residual branches start (``keep_affine``).
    - A convolution without a batch norm behind or before it stays (``unnormalised``): those of squeeze-and-excitation
      see one pixel of an image, from which there is little to whiten. In a model without any batch norm, all go.
    - A covariance of too few samples says nothing of the data, and whitening by it blows up noise. So a layer takes
      every ``sampling_stride``-th patch only where that leaves enough of them, and more, up to all of them, where maps
      or batches are small; and where all are few, fewer than five Newton-Schulz steps (``samples_per_feature``).
    - The convolutions that see the model's input take five steps, too (``first_n_iter``). The paper's 15 whiten an
      image completely: of one that was enlarged, or is smooth, they show what the enlargement or the noise added.
    - A covariance has at most 1,024 features, by a smaller ``block`` where kernels are large (not with groups, whose
      covariances are the groups').

    What was chosen for a layer is in the report. :func:`tdeconv.calibrate_deconv` can then set the layers' scales by a
    batch of data.

    Args:
        model: changed in place.
        recipe: ``"tdeconv"``, the rules above, or ``"paper"``: ``samples_per_feature=0``, ``first_n_iter=15``,
            ``keep_affine=False``, ``unnormalised=True``, ``block=64``. An argument that is not None takes precedence.
        block, sampling_stride, samples_per_feature, backend: as in :class:`tdeconv.FastDeconv`. By the rules
            ``samples_per_feature`` is 4; 0 always samples at ``sampling_stride`` and takes all steps. ``block`` is 64,
            and less for large kernels, unless given. It may differ by layer: ``{"head": 256, "layer[34].*": 128}`` maps
            names, as in ``exclude``, to blocks. Of several that fit a layer the first counts; the last may be ``"*"``.
        keep_affine: whether a convolution takes over the weight and bias of the batch norm that goes behind it.
        unnormalised: convert also convolutions that have no batch norm.
        n_iter: Newton-Schulz steps; at most 3 in group convolutions and 1 in depthwise ones, as in the paper.
        first_n_iter: those of the convolutions that see the model's input.
        freeze_first: whether these freeze their statistics (``freeze`` of :class:`tdeconv.FastDeconv`).
        stats_interval: behind the first ``stats_warmup`` training steps the convolutions take statistics in every
            ``stats_interval``-th only (see :class:`tdeconv.FastDeconv`); a step between is a fold and a convolution. 1
            is the paper's method. A :class:`tdeconv.Delinear` takes them in every step.
        stats_warmup: a network that has no Delinear before its loss needs more than a layer's default: ResNet-18 and
            MobileNetV2 diverged behind 20 steps, and not behind 100.
        linear: convert every ``nn.Linear`` into a :class:`tdeconv.Delinear` too. Its docs say what to mind before
            quantising such a model or adding adapters (LoRA) to it.
        block_fc: features that a :class:`tdeconv.Delinear` whitens together.
        exclude: names of modules as in ``model.named_modules()``, with shell-style wildcards, or classes of modules:
            these and all inside them stay as they are.
        report: filled with what was done, for the caller to print.

    Returns:
        The model. If it is a single layer, the new layer, although type checkers are told the class it had. A converted
        layer keeps its weight Parameter, device, dtype and mode; it gets a bias, zero if it had none. One line that
        counts what was done goes to the logger ``"tdeconv"``, at level INFO.

    Raises:
        TypeError: the model is no ``nn.Module``, is a ScriptModule, or is wrapped or sharded for several devices.
        ValueError: an option out of range, or a name in ``exclude`` or ``block`` that no module has.

    Warns:
        UserWarning: the model has been trained, as the statistics of its batch norms tell, so that its outputs change;
            or it has convolutions, and not one could be converted.
    """
    _check_model(model)
    if report is not None and not isinstance(report, ConversionReport):
        raise TypeError(f"report must be None or a ConversionReport to be filled, got {type(report).__name__}")
    rules = _rules(
        recipe,
        block=block,
        samples_per_feature=samples_per_feature,
        first_n_iter=first_n_iter,
        keep_affine=keep_affine,
        unnormalised=unnormalised,
    )
    blocks = _blocks(model, rules["block"], _RECIPES[recipe]["block"])
    options = replacements.Options(
        sampling_stride,
        rules["samples_per_feature"],
        n_iter,
        rules["first_n_iter"],
        freeze_first,
        stats_interval,
        stats_warmup,
        block_fc,
        backend,
    )
    options.check()
    excluded = _excluded(model, exclude)
    plan = Plan(model, linear, excluded, rules["unnormalised"])
    cautions.warn(plan, excluded)
    norm_of = plan.norm_of if rules["keep_affine"] else {}
    rows, new = _rows_and_layers(plan, norm_of, blocks, options)
    for module, norm in norm_of.items():
        starts.take_affine(new[module], norm)
    replace(model, new)
    for names, kind, why in bar_merging(model, set(new.values())):
        rows.append(ConversionRow(names, kind, "disabled", "-", why))
    report = ConversionReport() if report is None else report
    report.rows = rows
    _log.info("%s (report=tdeconv.ConversionReport() lists them)", report.summary)
    return cast(Model, new.get(model, model))


def _rows_and_layers(
    plan: Plan,
    norm_of: dict[nn.Module, nn.Module],
    blocks: dict[nn.Module, int | None],
    options: replacements.Options,
) -> tuple[list[ConversionRow], dict[nn.Module, nn.Module]]:
    """A row of the report for every layer, and what takes the place of those that go. No weight is changed as yet."""
    rows: list[ConversionRow] = []
    new: dict[nn.Module, nn.Module] = {}
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        for module, name in plan.layers.items():
            action, became, why = "left", "-", plan.why_left(module)
            if not why and is_norm(module):
                new[module] = replacements.without_norm(module, plan.links[module])
                action, became, why = "removed", type(new[module]).__name__, plan.removed[module]
            elif not why:
                new[module] = replacements.deconv(module, module in plan.first, blocks[module], options)
                hints = replacements.hints(new[module], blocks[module] is None)
                action, became = "converted", describe(new[module])
                why = plan.remark(module, norm_of.get(module)) + hints
            if module in new:
                carry_over(module, new[module])
            rows.append(ConversionRow(name or "(the model)", describe(module), action, became, why))
    return rows, new


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a ScriptModule, whose layers cannot be replaced; convert the model before scripting it"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(f"model is wrapped in {type(model).__name__}; convert the model before wrapping it")
    for name, module in model.named_modules():
        # which have made their lists of parameters; by name, since FSDP is slow to import
        if any(c.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") for c in type(module).__mro__):
            part = f"model's part {name!r}" if name else "model"
            raise TypeError(f"{part} is wrapped in {type(module).__name__}; convert the model before wrapping it")
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise TypeError("model has DTensor parameters (from fully_shard, say); convert the model before sharding it")


def _excluded(model: nn.Module, exclude: Iterable[str | type[nn.Module]]) -> set[nn.Module]:
    """The modules that ``exclude`` names, and all inside them."""
    if not isinstance(exclude, (str, type, Iterable)):
        raise TypeError(f"exclude must hold names and classes of modules, got {exclude!r}")
    chosen = set()
    for item in (exclude,) if isinstance(exclude, (str, type)) else exclude:
        if isinstance(item, str):
            found = _of_name(model, item, "exclude")
        elif isinstance(item, type):
            found = [m for m in model.modules() if isinstance(m, item)]
        else:
            raise TypeError(f"exclude must hold names and classes of modules, got {item!r}")
        chosen.update(found)
    return {inner for m in chosen for inner in m.modules()}


def _of_name(model: nn.Module, pattern: str, argument: str) -> list[nn.Module]:
    """The modules that a name with wildcards fits."""
    found = [m for name, m in model.named_modules(remove_duplicate=False) if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{argument} names {pattern!r}, but the model has no module of such a name")
    return found


def _rules(recipe: str, **given: Any) -> dict[str, Any]:
    """What the recipe says, and what is given besides."""
    for name in ("keep_affine", "unnormalised"):
        if not isinstance(given[name], (bool, type(None))):
            raise TypeError(f"{name} must be True, False or None, got {given[name]!r}")
    if recipe not in _RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(map(repr, _RECIPES))}, got {recipe!r}")
    return _RECIPES[recipe] | {name: value for name, value in given.items() if value is not None}


def _blocks(model: nn.Module, block: int | Mapping[str, int] | None, rest: int | None) -> dict[nn.Module, int | None]:
    """The block of every module; None where the default is meant. ``rest`` is that of the modules not named."""
    if not isinstance(block, Mapping):
        given = None if block is None else checks.positive_int("block", block)
        return {module: given for module in model.modules()}  # noqa: C420  # whose type mypy cannot tell
    blocks: dict[nn.Module, int | None] = dict.fromkeys(model.modules(), rest)
    for pattern, size in reversed(list(block.items())):  # so that the first one has the last word
        if not isinstance(pattern, str):
            raise TypeError(f"block must map names of modules to ints, got a name {pattern!r}")
        size = checks.positive_int(f"block[{pattern!r}]", size)
        blocks.update((inner, size) for m in _of_name(model, pattern, "block") for inner in m.modules())
    return blocks
