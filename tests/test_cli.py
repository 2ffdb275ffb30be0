"""The commands as typed: exit status, standard output, standard error."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tdeconv
from tdeconv import arguments, cli

MODULES = {
    "demo": "tdeconv.demo",
    "bench": "tdeconv.bench.run",
    "report": "tdeconv.bench.reports.command",
    "profile": "tdeconv.bench.profiles.command",
}


def fake(command: str, monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    module = ModuleType(MODULES[command])
    module.add_arguments = lambda parser: parser.add_argument("--epochs", type=int, default=3)
    module.run = run
    monkeypatch.setitem(sys.modules, MODULES[command], module)


def fake_demo(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    fake("demo", monkeypatch, run)


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads the variable when it is imported, once for the tests' process: so that comes first."""
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("not_interpreted")
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


@pytest.mark.usefixtures("not_interpreted")
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


@pytest.mark.parametrize("command", MODULES)
def test_a_command_gets_its_arguments_and_gives_the_exit_status(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(command, monkeypatch, lambda args: 40 + args.epochs)
    assert cli.main([command, "--epochs", "2"]) == 42
    assert cli.main([command]) == 43


@pytest.mark.parametrize("command", MODULES)
def test_a_commands_help_lists_its_arguments(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(command, monkeypatch, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert "--epochs" in capsys.readouterr().out


def test_help_has_a_line_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert {*MODULES, "info", "warmup"} <= {words[0] for words in lines if len(words) == 2}
    assert ["profile", "show where a model's training step takes its time"] in lines  # one line, whole


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("demo", "skimage.data", "demo"),
        ("demo", "torchvision", "vision"),
        ("demo", "matplotlib.pyplot", "demo"),
        ("report", "matplotlib", "bench"),  # the demo's extra has it too, and much else
        ("report", "jinja2", "bench"),
        ("bench", "pytest_benchmark", "bench"),
        ("bench", "pytest", "bench"),
        ("profile", "tqdm", "bench"),
        ("profile", "timm", "vision"),
    ],
)
def test_a_missing_extra_is_one_line_naming_the_command(
    command: str, module: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    fake(command, monkeypatch, run)
    assert cli.main([command]) == 1
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


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a module ``nets`` of small models, and a cache of its own."""
    code = """
        from torch import nn

        def pixels():
            return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    """
    (tmp_path / "nets.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setenv("TDECONV_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("models", "not_interpreted")
def test_warmup_says_why_it_cannot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warmup", "nets:pixels"]) == 1
    captured = capsys.readouterr()
    assert "there is nothing to warm up here: on CPU tensors the kernels run only under" in captured.err
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_warmup_trains_a_converted_model_a_step_while_tuning(
    dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    tuning = importlib.import_module("tdeconv.kernels.tuning")
    asked: list[tuple[str, bool]] = []
    choose = tuning.choose

    def spy(kernel: str, *rest: object) -> object:
        asked.append((kernel, tuning._tuning))
        return choose(kernel, *rest)

    monkeypatch.setattr(tuning, "choose", spy)
    assert cli.main(["warmup", "nets:pixels", "--shape", "2", "2", "3", "3", "--dtype", dtype]) == 0
    assert {kernel for kernel, _ in asked} >= {"convolve"}
    assert all(tuned for _, tuned in asked)
    assert not tuning._tuning
    out = capsys.readouterr().out
    assert out.startswith("measured 0 sizes, 0 were known; a CPU's times would mean nothing; kept in ")


@pytest.mark.usefixtures("models")
def test_warmup_refuses_what_is_no_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.backends, "why_no_triton", lambda device: None)
    assert cli.main(["warmup", "nets:nobody"]) == 2
    error = capsys.readouterr().err
    assert error == "tdeconv: MODEL 'nets:nobody' cannot be made: module 'nets' has no function 'nobody'\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("shape", [["2"], ["2", "3", "4", "4"]])
def test_warmup_refuses_a_shape_that_the_model_does_not_take(
    shape: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    assert cli.main(["warmup", "nets:pixels", "--shape", *shape]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"tdeconv: MODEL cannot take a training step on an input of shape ({', '.join(shape)}")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", ["warmup", "profile"])
def test_a_models_missing_library_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("profile", monkeypatch, lambda args: cli.load_model("timm:resnet18"))
    monkeypatch.setattr(cli.backends, "why_no_triton", lambda device: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main([command, *(["timm:resnet18"] if command == "warmup" else [])]) == 1
    assert capsys.readouterr().err == "tdeconv: timm is not installed; pip install 'tdeconv[vision]'\n"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").touch()
    for folder in ("here", "new", "here/new/er"):
        arguments.check_writable(tmp_path / folder)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["here", "here/mine"]
    with pytest.raises(ValueError, match=r"--to .*/mine cannot be written to: it is a file; give another folder"):
        arguments.check_writable(tmp_path / "here" / "mine", "--to")
    with pytest.raises(ValueError, match=r"--out .*/mine/x cannot be written to: Not a directory"):
        arguments.check_writable(tmp_path / "here" / "mine" / "x")
    (tmp_path / "here" / "mine").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--in .* is no text"):
        arguments.read(tmp_path / "here" / "mine", "--in")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "torchrun starts the processes: torchrun --nproc-per-node 2 examples/train_ddp.py"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--batch-size", "-4"], "argument --batch-size: must be at least 1, got -4"),
    ],
)
def test_the_example_refuses_what_it_cannot_do(argv: list[str], text: str) -> None:
    example = Path(__file__).parents[1] / "examples" / "train_ddp.py"
    done = subprocess.run([sys.executable, str(example), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {text}\n")


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
        (["warmup"], 2, "err", "required: MODEL"),
        (["warmup", "--help"], 0, "out", "MODULE:FUNCTION"),
        (["warmup", "m:f", "--dtype", "float64"], 2, "err", "invalid choice: 'float64'"),
        (["warmup", "m:f", "--shape", "8", "0"], 2, "err", "must be at least 1, got 0"),
        (["warmup", "m:f", "--shape", "x"], 2, "err", "must be a whole number, got 'x'"),
        (["demo", "--out", ""], 2, "err", "argument --out: must not be empty"),
        (["report", ""], 2, "err", "argument RESULTS: must not be empty"),
        (["profile", "--model", "m:f", "--out", ""], 2, "err", "argument --out: must not be empty"),
    ],
)
def test_help_and_refusals(
    argv: list[str], status: int, stream: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == status
    assert text in getattr(capsys.readouterr(), stream)


def test_as_a_module_help_loads_no_command_and_not_triton() -> None:
    """``python -m tdeconv --help`` in a process of its own; -X importtime names what it loads."""
    command = [sys.executable, "-X", "importtime", "-m", "tdeconv", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("usage: tdeconv")
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "tdeconv.cli" in loaded
    heavy = ("triton", "tdeconv.demo", "tdeconv.bench", "torch._dynamo", "torch._inductor")
    heavy += ("matplotlib", "skimage", "sklearn", "torchvision", "timm", "pytest", "jinja2")
    assert [name for name in sorted(loaded) if name.startswith(heavy)] == []
