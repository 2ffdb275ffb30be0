"""The command line: ``python -m tdeconv``, or ``tdeconv``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from tdeconv import __version__, backends, checks
from tdeconv.arguments import positive_int
from tdeconv.convert import convert_deconv
from tdeconv.named_models import FORMS, load_model, random_input, some_loss, to_layout

# pip's extras, and the modules they bring that a command may find missing.
_EXTRAS = {
    "demo": ("matplotlib", "rich", "skimage", "sklearn", "tqdm"),
    "bench": ("cpuinfo", "jinja2", "matplotlib", "pytest", "pytest_benchmark", "tqdm"),
    "vision": ("timm", "torchvision"),
}


class _Command(NamedTuple):
    """A command with a module of its own: ``add_arguments(parser)`` and ``run(args) -> int``."""

    module: str
    extra: str  # asked for if one of its modules is missing
    about: str


_COMMANDS = {
    "demo": _Command("tdeconv.demo", "demo", "train batch norm against network deconvolution on real images"),
    "bench": _Command("tdeconv.bench.run", "bench", "measure what deconvolution costs on this machine"),
    "report": _Command("tdeconv.bench.reports.command", "bench", "make a page with plots of what bench saved"),
    "profile": _Command("tdeconv.bench.profiles.command", "bench", "show where a model's training step takes its time"),
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
        extra = _extra(module, argv)
        if extra is None:
            raise
        print(f"tdeconv: {module} is not installed; pip install 'tdeconv[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tdeconv: interrupted", file=sys.stderr)
        return 130


def _extra(module: str, argv: Sequence[str]) -> str | None:
    """Which extra brings a module: the asked for command's own if it does."""
    extras = [extra for extra, modules in _EXTRAS.items() if module in modules]
    own = _COMMANDS[argv[0]].extra if argv and argv[0] in _COMMANDS else None
    return own if own in extras else next(iter(extras), None)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of ``argv``; a command's module is imported only when it is what ``argv`` asks for."""
    parser = argparse.ArgumentParser(prog="tdeconv", description="Network deconvolution for PyTorch.")
    parser.add_argument("--version", action="version", version=f"tdeconv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, devices, and which backend runs on each")
    info.set_defaults(run=_info)

    for name, command in _COMMANDS.items():
        about = f"{command.about[0].upper()}{command.about[1:]}."
        subparser = commands.add_parser(name, help=command.about, description=about)
        if argv[:1] == [name]:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)

    _add_warmup(commands)
    return parser


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
    add("model", metavar="MODEL", help=FORMS)
    shape = {"type": positive_int, "nargs": "+", "default": [64, 3, 224, 224], "metavar": "N"}
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
        model = convert_deconv(load_model(args.model))
    except (ValueError, TypeError) as error:
        print(f"tdeconv: {error}", file=sys.stderr)
        return 2
    tuning = import_module("tdeconv.kernels.tuning")
    known = tuning._entries(tuning._file(device))
    before = len(known)
    x = random_input(args.shape, args.layout, device)
    model = to_layout(model.to(device).train(), args.layout if x.ndim == 4 else "contiguous")
    dtype = getattr(torch, args.dtype)
    try:
        with backends.use_backend("triton"), tuning.tune():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(x)
            some_loss(output).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        problem = (
            f"MODEL cannot take a training step on an input of shape {tuple(x.shape)}: {error}; try another --shape"
        )
        print(f"tdeconv: {problem}", file=sys.stderr)
        return 2
    why = "; a CPU's times would mean nothing" if device.type == "cpu" else ""
    print(f"measured {len(known) - before} sizes, {before} were known{why}; kept in {tuning.folder()}")
    return 0
