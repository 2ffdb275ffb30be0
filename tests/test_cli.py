"""The commands as typed: exit status, standard output, standard error."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import tdeconv
from tdeconv import cli


def fake_demo(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    demo = ModuleType("tdeconv.demo")
    demo.add_arguments = lambda parser: parser.add_argument("--epochs", type=int, default=3)
    demo.run = run
    monkeypatch.setitem(sys.modules, "tdeconv.demo", demo)


def test_info_names_versions_devices_and_backends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDECONV_BACKEND", raising=False)
    assert cli.main(["info"]) == 0
    head, cpu, *_ = capsys.readouterr().out.split("\n\n")
    rows = dict(line.split(maxsplit=1) for line in head.splitlines())
    assert rows["tdeconv"] == tdeconv.__version__
    assert rows["python"].startswith(platform.python_version())
    assert rows["torch"] == torch.__version__
    assert rows["backend"] == "auto (TDECONV_BACKEND is not set)"
    assert cpu.startswith("cpu: ")
    rows = dict(line.split(maxsplit=1) for line in cpu.splitlines()[1:])
    assert rows["torch"] == rows["reference"] == "yes"
    assert rows["triton"].startswith("no: ")
    assert rows["chosen"].startswith("torch, automatic: ")


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        ("reference", "reference, asked for by TDECONV_BACKEND"),
        ("triton", "none: backend 'triton' was asked for by TDECONV_BACKEND but cannot run"),
        ("cuda", "none: environment variable TDECONV_BACKEND must be one of"),
    ],
)
def test_info_says_what_the_environment_asks_for(
    request_: str, chosen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDECONV_BACKEND", request_)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"backend  {request_} (TDECONV_BACKEND)\n" in out
    assert f"  chosen     {chosen}" in out


@pytest.mark.parametrize(
    ("import_", "version"),
    [(lambda name: argparse.Namespace(__version__="3.7.1"), "3.7.1"), (None, "not installed")],
)
def test_info_gives_tritons_version(
    import_: object, version: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if import_ is None:
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it then raises ModuleNotFoundError
    else:
        monkeypatch.setattr(cli, "import_module", import_)
    cli.main(["info"])
    assert f"triton   {version}\n" in capsys.readouterr().out


def test_demo_gets_its_arguments_and_gives_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_demo(monkeypatch, lambda args: 40 + args.epochs)
    assert cli.main(["demo", "--epochs", "2"]) == 42
    assert cli.main(["demo"]) == 43


def test_demo_help_lists_the_demos_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_demo(monkeypatch, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--help"])
    assert stopped.value.code == 0
    assert "--epochs" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "extra"), [("skimage.data", "demo"), ("torchvision", "vision")])
def test_a_missing_extra_is_one_line_naming_the_command(
    module: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    fake_demo(monkeypatch, run)
    assert cli.main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    top = module.partition(".")[0]
    assert captured.err == f"tdeconv: {top} is not installed; pip install 'tdeconv[{extra}]'\n"


def test_a_missing_module_that_no_extra_brings_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'tdeconv.nowhere'", name="tdeconv.nowhere")

    fake_demo(monkeypatch, run)
    with pytest.raises(ModuleNotFoundError, match=r"tdeconv\.nowhere"):
        cli.main(["demo"])


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    fake_demo(monkeypatch, run)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "tdeconv: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "status", "stream", "text"),
    [
        (["--version"], 0, "out", f"tdeconv {tdeconv.__version__}\n"),
        (["--help"], 0, "out", "demo"),
        ([], 2, "err", "required: COMMAND"),
        (["whiten"], 2, "err", "invalid choice: 'whiten'"),
        (["info", "--epochs", "3"], 2, "err", "unrecognized arguments: --epochs 3"),
    ],
)
def test_help_and_refusals(
    argv: list[str], status: int, stream: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == status
    assert text in getattr(capsys.readouterr(), stream)


def test_as_a_module_help_loads_neither_the_demo_nor_triton() -> None:
    """``python -m tdeconv --help`` in a process of its own; -X importtime names what it loads."""
    command = [sys.executable, "-X", "importtime", "-m", "tdeconv", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("usage: tdeconv")
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "tdeconv.cli" in loaded
    heavy = ("triton", "tdeconv.demo", "matplotlib", "skimage", "sklearn", "torch._dynamo", "torch._inductor")
    assert [name for name in sorted(loaded) if name.startswith(heavy)] == []
