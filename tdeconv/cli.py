"""The command line: ``python -m tdeconv``, or ``tdeconv``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

import torch

from tdeconv import __version__, backends, checks

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
