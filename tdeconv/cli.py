"""The command line: ``python -m tdeconv``, or ``tdeconv``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tdeconv import __version__, backends, checks
from tdeconv.convert import convert_deconv
from tdeconv.vision import torchvision

# Which of pip's extras brings a module that a command may find missing.
_EXTRAS = {
    "matplotlib": "demo",
    "rich": "demo",
    "skimage": "demo",
    "sklearn": "demo",
    "tqdm": "demo",
    "torchvision": "vision",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit status.

    Args:
        argv: the arguments without the program's name; None takes ``sys.argv``'s.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
        return int(args.run(args))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        print(f"tdeconv: {module} is not installed; pip install 'tdeconv[{_EXTRAS[module]}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tdeconv: interrupted", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of ``argv``; the demo is imported only when it is what ``argv`` asks for."""
    parser = argparse.ArgumentParser(prog="tdeconv", description="Network deconvolution for PyTorch.")
    parser.add_argument("--version", action="version", version=f"tdeconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, devices, and which backend runs on each")
    info.set_defaults(run=_info)

    about = "train batch norm against network deconvolution on real images"
    demo = commands.add_parser("demo", help=about, description=f"{about[0].upper()}{about[1:]}.")
    if argv[:1] == ["demo"]:
        module = import_module("tdeconv.demo")
        module.add_arguments(demo)
        demo.set_defaults(run=module.run)

    _add_warmup(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _info(_: argparse.Namespace) -> int:
    print(f"tdeconv  {__version__}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    print(f"torch    {torch.__version__}")
    print(f"triton   {_triton_version()}")
    print(f"backend  {_requested()}")
    for device, name in _devices():
        print(f"\n{device}: {name}")
        for backend in checks.BACKENDS:
            print(f"  {backend:<10} {_availability(backend, device)}")
        print(f"  {'chosen':<10} {_choice(device)}")
    return 0


def _triton_version() -> str:
    try:
        triton = import_module("triton")
    except ModuleNotFoundError:
        return "not installed"
    except ImportError as error:
        return f"cannot be imported: {error}"
    return str(triton.__version__)


def _requested() -> str:
    name = os.environ.get("TDECONV_BACKEND")
    return f"{name} (TDECONV_BACKEND)" if name else "auto (TDECONV_BACKEND is not set)"


def _devices() -> Iterator[tuple[torch.device, str]]:
    """The CPU and every accelerator that torch sees, each with its name."""
    capability = torch.backends.cpu.get_cpu_capability()
    yield torch.device("cpu"), f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"
    if not torch.accelerator.is_available():
        return
    kind = torch.accelerator.current_accelerator()
    assert kind is not None  # one is available
    for index in range(torch.accelerator.device_count()):
        name = getattr(torch.get_device_module(kind), "get_device_name", None)
        yield torch.device(kind.type, index), name(index) if name else "unnamed"


def _availability(backend: str, device: torch.device) -> str:
    try:
        backends.choose(backend, device)
    except backends.BackendUnavailable:
        return f"no: {backends.why_no_triton(device)}"
    return "yes"


def _choice(device: torch.device) -> str:
    """What a layer without a backend of its own runs on this device."""
    try:
        choice = backends.choose(None, device)
    except (ValueError, backends.BackendUnavailable) as error:
        return f"none: {error}"
    return f"{choice.backend}, {choice.reason}"


# ------------------------------------------------------------------------------------------------------------- warmup


def _add_warmup(commands: Any) -> None:
    about = "measure on this GPU which configurations of the kernels are fastest for a model, and keep them"
    warmup = commands.add_parser("warmup", help=about, description=f"{about[0].upper()}{about[1:]}.")
    add = warmup.add_argument
    add("model", metavar="MODEL", help="a torchvision model's name, or MODULE:FUNCTION that returns a torch.nn.Module")
    shape = {"type": _positive, "nargs": "+", "default": [64, 3, 224, 224], "metavar": "N"}
    add("--shape", **shape, help="of the input, batch first (default 64 3 224 224)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="by autocast (%(default)s)")
    add("--layout", choices=("channels_last", "contiguous"), default="channels_last", help="of images (%(default)s)")
    warmup.set_defaults(run=_warmup)


def _warmup(args: argparse.Namespace) -> int:
    """A training step in which every kernel met for the first time is measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = backends.why_no_triton(device)
    if missing is not None:
        print(f"tdeconv: there is nothing to warm up here: {missing}", file=sys.stderr)
        return 1
    try:
        model = convert_deconv(_model(args.model))
    except (ValueError, TypeError) as error:
        print(f"tdeconv: {error}", file=sys.stderr)
        return 2
    tuning = import_module("tdeconv.kernels.tuning")
    known = tuning._entries(tuning._file(device))
    before = len(known)
    with backends.use_backend("triton"), tuning.tune():
        _train_a_step(model.to(device).train(), _input(args, device), getattr(torch, args.dtype))
    why = "; a CPU's times would mean nothing" if device.type == "cpu" else ""
    print(f"measured {len(known) - before} sizes, {before} were known{why}; kept in {tuning.folder()}")
    return 0


def _model(name: str) -> nn.Module:
    """From ``module:function``, the working directory's modules among them, or torchvision's of this name.

    Raises:
        ValueError: there is none.
    """
    module, colon, function = name.partition(":")
    if not colon:
        model = torchvision().models.get_model(name, weights=None)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            model = getattr(import_module(module), function)()
        except (AttributeError, ModuleNotFoundError) as error:
            raise ValueError(f"MODEL {name!r} cannot be made: {error}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL {name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _input(args: argparse.Namespace, device: torch.device) -> Tensor:
    x = torch.randn(args.shape, device=device)
    images = args.layout == "channels_last" and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if images else x


def _train_a_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype):
        output = model(x)
    losses = [t.float().square().mean() for t in _tensors(output) if t.requires_grad]
    torch.stack(losses).sum().backward()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, or a dict or sequence of such outputs."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)
