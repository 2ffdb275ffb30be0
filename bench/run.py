"""``python -m tdeconv bench``: measure a set, save it, print the tables."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tdeconv.arguments import check_writable, nonempty_path, positive_int, why
from tdeconv.backends import BackendUnavailable
from tdeconv.bench import results
from tdeconv.bench.implementations import OURS, implementations
from tdeconv.bench.machine import describe
from tdeconv.bench.reports import tables
from tdeconv.bench.sets import has_torchvision
from tdeconv.bench.steps import FORMATS
from tdeconv.named_models import load_model

SUITES = Path(__file__).parent
REFUSED = 2  # exit status of what cannot be done as asked


def _percent(text: str) -> int:
    """Whole ones: pytest-benchmark takes no others."""
    digits = text.removesuffix("%")
    if not digits.isdecimal() or not 1 <= int(digits) <= 99:
        raise argparse.ArgumentTypeError(f"must be a whole percentage from 1% to 99%, got {text}")
    return int(digits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m tdeconv bench``."""
    which = parser.add_argument_group("what to measure (one of them)").add_mutually_exclusive_group()
    about = {
        "quick": "VGG-11's layers and their stages, and ResNet-18: two minutes on two cores (default)",
        "layers": "all layers of VGG-11 and ResNet-50, and the stages, in both memory layouts",
        "models": "training steps of VGG-11, ResNet-18, ResNet-50 and MobileNetV2",
        "scaling": "how the cost grows with batch, channels, kernel, image, block, n_iter and sampling stride",
    }
    for name, text in about.items():
        which.add_argument(f"--{name}", dest="set", action="store_const", const=name, help=text)
    which.add_argument("--model", metavar="NAME", help="one network: torchvision:NAME, timm:NAME or MODULE:FUNCTION")
    parser.set_defaults(set=None)
    add = parser.add_argument
    add("--out", type=nonempty_path, default=Path("bench-out"), metavar="DIR", help="results (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--backend", action="append", choices=OURS, help="measure this one of ours (default: all that can run)")
    add("--rounds", type=positive_int, metavar="N", help="rounds of every measurement (default: the set's)")
    add("--batch", type=positive_int, metavar="N", help="batch size (default: the set's)")
    add("--size", type=positive_int, metavar="N", help="height and width of the images (default: the set's)")
    block = "channels whitened together; several are measured side by side (default: 64, a converted network's own)"
    add("--block", action="append", type=positive_int, metavar="N", help=block)
    interval = (
        "report the mean step with statistics in every Kth only: of a fresh step, which takes them, and K-1 stale ones "
        "(default 10; may be repeated)"
    )
    add("--stats-interval", action="append", type=positive_int, metavar="K", help=interval)
    add("--layout", action="append", choices=tuple(FORMATS), help="memory layout (default: the set's)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", action="append", choices=dtypes, help="half precision by autocast (default: the set's)")
    add("--paper-code", type=nonempty_path, metavar="DIR", help="a checkout of the paper's repository, to measure too")
    add("--compare", type=nonempty_path, metavar="FILE", help="earlier results of this device to compare with")
    add("--fail-above", type=_percent, metavar="10%", help="with --compare: fail if a median grew by more")
    add("--select", metavar="EXPR", help="only rows whose names match (pytest's -k): 512-512, reference, step, ...")


def run(args: argparse.Namespace) -> int:
    """Measure into ``--out``: ``SET.json`` and ``SET.md``. Earlier results stay until the new ones are complete."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.set = "model" if args.model is not None else args.set or "quick"
    try:
        check(args)
        code, text = _measure(args)
        if not text:
            print("tdeconv bench: nothing was measured; see above", file=sys.stderr)
            return REFUSED if code == pytest.ExitCode.USAGE_ERROR else code or 1
        report = _save(args, text)
    except (ValueError, BackendUnavailable) as error:
        print(f"tdeconv bench: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"tdeconv bench: the results cannot be written to {args.out}: {why(error)}", file=sys.stderr)
        return REFUSED
    print(f"\n{report}\nsaved in {args.out}: {_name(args)}.json, {_name(args)}.md")
    print(f"as a page with plots: python -m tdeconv report {args.out}")
    return code


def check(args: argparse.Namespace) -> None:
    """Whatever can be refused before minutes of measuring.

    Raises:
        ValueError, BackendUnavailable: why the measurement cannot be made as asked.
        ModuleNotFoundError: the library that the networks come from is not installed.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no GPU")
    if args.block and args.set == "scaling":
        raise ValueError("--block is one of the sizes that --scaling varies; give it with another set")
    if args.fail_above is not None and args.compare is None:
        raise ValueError("--fail-above needs --compare FILE, the results to compare with")
    try:
        implementations(torch.device(args.device), backends=args.backend or (), paper_code=args.paper_code)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if args.set == "quick" and not has_torchvision():
        print("torchvision is not installed: layers only, no whole networks; pip install 'tdeconv[vision]'")
    if args.set in ("models", "model"):
        load_model("torchvision:resnet18" if args.model is None else args.model, argument="--model")
    if args.compare is not None:
        _check_comparable(args)
    check_writable(args.out)
    if args.select:
        _check_selection(args)


def _check_comparable(args: argparse.Namespace) -> None:
    """Times of two machines say nothing about the code."""
    try:
        earlier = results.load(args.compare)
    except OSError as error:
        raise ValueError(f"--compare {args.compare} cannot be read: {why(error)}") from None
    here = {"machine_info": describe(torch.device(args.device))}
    if not results.same_device(earlier, here):
        there, this = (" / ".join(map(str, results.identity(one))) for one in (earlier, here))
        what = "device / cores / threads / driver"
        raise ValueError(f"--compare {args.compare} is from another device: {what} there {there}, here {this}")


def _check_selection(args: argparse.Namespace) -> None:
    """Pytest alone knows what its expressions match: it lists the rows, and measures none."""
    code, out, err = _listed(args)
    if code == pytest.ExitCode.USAGE_ERROR:
        problem = next((line for line in err.splitlines() if line.startswith("ERROR: ")), err)
        raise ValueError(f"--select {args.select!r} cannot be read: {problem.rpartition(f'{args.select}: ')[2]}")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        _, out, _ = _listed(argparse.Namespace(**{**vars(args), "select": None}))
        names = [line.rpartition("::")[2] for line in out.splitlines() if "::" in line]
        raise ValueError(
            f"--select {args.select!r} matches none of the {len(names)} rows; their names are like {names[0]!r} and "
            f"{names[-1]!r}, and a part of one is enough"
        )


def _listed(args: argparse.Namespace) -> tuple[int, str, str]:
    command = [*_command(args, os.devnull), "--collect-only"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def _name(args: argparse.Namespace) -> str:
    """Of the files, without ending: the set, and of a model its name."""
    return args.set if args.model is None else "model-" + args.model.replace(":", "-").replace("/", "-")


def _command(args: argparse.Namespace, json_path: str) -> list[str]:
    # no configuration: nothing that a project's own tests are run with may reach a measurement
    command = [sys.executable, "-m", "pytest", str(SUITES), "-c", os.devnull, f"--rootdir={SUITES.parent}"]
    command += ["-p", "no:cacheprovider", "-x", "-s", "-q", "--no-header", "--disable-warnings"]
    # its storage, which is not used, is the working directory: any other folder would be made
    command += [
        "--benchmark-storage=file://.",
        f"--benchmark-json={json_path}",
        f"--set={args.set}",
        f"--device={args.device}",
    ]
    if args.compare is None:
        command.append("--benchmark-quiet")
    else:
        command += [f"--benchmark-compare={args.compare.resolve()}", "--benchmark-columns=median,iqr,rounds"]
        command += ["--benchmark-group-by=group"]
    if args.fail_above is not None:
        command.append(f"--benchmark-compare-fail=median:{args.fail_above}%")
    for option in ("rounds", "batch", "size", "model"):
        if (value := getattr(args, option)) is not None:
            command.append(f"--{option}={value}")
    for option in ("backend", "block", "stats-interval", "layout", "dtype"):
        command += [f"--{option}={value}" for value in getattr(args, option.replace("-", "_")) or ()]
    if args.paper_code is not None:
        command.append(f"--paper-code={args.paper_code.resolve()}")
    return command + (["-k", args.select] if args.select else [])


def _environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # ceilings are measured anew in each run; whether the devices are the same was asked before
    ignored = ("Benchmark machine_info is different", "Not saving anything")
    return {**environment, "PYTHONWARNINGS": ",".join(f"ignore:{text}" for text in ignored)}


def _measure(args: argparse.Namespace) -> tuple[int, str]:
    """Run the suites in a process of their own: its status, and the JSON it gives at its end.

    That comes through a pipe, so that nothing but :func:`_save` writes files.
    """
    reading, writing = os.pipe()
    command = _command(args, f"/dev/fd/{writing}")
    with subprocess.Popen(command, env=_environment(), pass_fds=(writing,)) as child:
        os.close(writing)
        chunks: list[str] = []
        with os.fdopen(reading, encoding="utf-8") as pipe:
            reader = threading.Thread(target=lambda: chunks.append(pipe.read()))
            reader.start()
            code = child.wait()
            reader.join()
    return code, chunks[0] if chunks else ""


def _save(args: argparse.Namespace, text: str) -> str:
    """Write the files, each whole or not at all; the tables for the terminal."""
    data = json.loads(text)
    report = tables.summary(data)
    path = args.out / f"{_name(args)}.json"
    results.publish({path: json.dumps(data, separators=(",", ":")) + "\n", path.with_suffix(".md"): report + "\n"})
    return report
