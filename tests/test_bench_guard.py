"""The guard: exact numbers are exact, changes are named, limits hold, the file is only written when asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tdeconv.bench import guard, measure
from tdeconv.bench.cases import Layer
from tdeconv.bench.clock import CpuClock

TINY = Layer(8, 6, 7)
FIRST = Layer(3, 4, 7, stride=2, input_grad=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers too small to time, no networks, and ratios that do not depend on the machine."""
    monkeypatch.setattr(guard, "EXACT", (TINY, FIRST))
    monkeypatch.setattr(guard, "EXACT_STALE", (FIRST,))
    monkeypatch.setattr(guard, "TIMED", (TINY,))
    monkeypatch.setattr(guard, "networks", lambda: {"vgg11 float32": {"conv_bn_relu": 100, "torch": 60}})
    monkeypatch.setattr(guard, "device_name", lambda: "this machine")
    _ratios(monkeypatch, 0.5, 2.0)


def _ratios(monkeypatch: pytest.MonkeyPatch, *reference: float) -> None:
    """Of the reference, one measurement after the other; the last stays."""
    values = list(reference)

    def ratios(layers: Any, rounds: int) -> guard.Numbers:
        value = values.pop(0) if len(values) > 1 else values[0]
        return {layer.name: {"reference": value, "conv_bn_relu": 2.0} for layer in layers}

    monkeypatch.setattr(guard, "ratios", ratios)


def _held(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


@pytest.fixture
def file(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "guard.json"
    _ratios(monkeypatch, 0.5)
    assert guard.main(["--update", "--file", str(path)]) == 0
    capsys.readouterr()
    return path


def test_numbers_are_the_same_again_and_of_the_layer() -> None:
    with guard._one_thread():
        first, again = guard.exact(TINY), guard.exact(TINY)
        smaller = guard.exact(Layer(4, 6, 7))
    assert first == again
    assert first.keys() == smaller.keys()
    assert all(value > 0 for value in first.values())
    assert first["saved_bytes"] > smaller["saved_bytes"]
    assert first["peak_bytes"] > smaller["peak_bytes"]
    assert first["backward_operators"] > first["forward_operators"] / 4


def test_a_stale_step_keeps_no_factors_and_does_less() -> None:
    with guard._one_thread():
        fresh, stale = guard.exact(TINY), guard.exact(TINY, "torch stale")
    # 8 images, D = 8 * 9: the input, the folded weight, the mean and the root's copy; ReLU keeps only its output
    assert stale["saved_bytes"] == 4 * (8 * 8 * 49 + 6 * 72 + 72 + 72 * 72)
    assert all(stale[what] < fresh[what] for what in fresh)


def test_threads_are_as_before_even_after_an_error() -> None:
    before = torch.get_num_threads()

    @guard._one_thread()
    def fail() -> None:
        raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match="1"):
        fail()
    assert torch.get_num_threads() == before


def test_the_committed_file_is_of_these_layers() -> None:
    held = guard.load(guard.FILE)
    assert set(held["exact"]) == set(guard._exact_cases())
    assert set(guard.EXACT_STALE) <= set(guard.EXACT)
    assert set(held["limits"]) == {layer.name for layer in guard.TIMED}
    rows = {(name, base) for name, of in held["limits"].items() for base in of}
    assert rows == {(layer.name, base) for layer in guard.TIMED for base in guard.BASELINES} - set(guard.NOT_HELD)


def test_what_is_held_passes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--check", "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "worse" not in out
    assert TINY.name in out.splitlines()[-1]  # the last table is the ratios'
    assert "0.60" in out.splitlines()[-1]


@pytest.mark.parametrize(("change", "said"), [(-1, "(+1), worse"), (1, "(-1), better")])
def test_every_difference_is_named(file: Path, change: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    held = guard.load(file)
    held["exact"][FIRST.name]["allocations"] += change
    _held(file, exact=held["exact"])
    before = file.read_text()
    assert guard.main(["--file", str(file), "--rounds", "0"]) == 1
    out = capsys.readouterr().out
    assert f"{FIRST.name}: allocations" in out
    assert said in out
    assert "--update" in out
    assert file.read_text() == before
    assert guard.main(["--update", "--file", str(file), "--rounds", "0"]) == 0
    assert guard.main(["--file", str(file), "--rounds", "0"]) == 0


def test_layers_that_came_and_went() -> None:
    lines = guard.differences({"old": {"n": 1}, "same": {"n": 1}}, {"new": {"n": 1}, "same": {"n": 1}})
    assert lines == ["old: held, but not measured any more", "new: not held yet"]


def test_another_version_is_not_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _held(file, platform="torch 1.0, x86_64", exact={})
    assert guard.main(["--file", str(file)]) == 0
    assert "not comparable, skipped: the exact numbers are of torch 1.0, x86_64, this is torch 2" in (
        capsys.readouterr().out
    )


def test_a_ratio_twice_above_its_limit_fails(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ratios(monkeypatch, 0.8, 0.75)
    assert guard.main(["--file", str(file)]) == 1
    out = capsys.readouterr().out
    assert f"{TINY.name}: training step torch / reference 0.75, at most 0.60 (25% above)" in out
    assert "raise the limit" in out


def test_a_ratio_once_above_its_limit_was_noise(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ratios(monkeypatch, 0.8, 0.55)
    assert guard.main(["--file", str(file)]) == 0


def test_ratios_of_another_device_are_only_shown(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _held(file, device="another machine")
    _ratios(monkeypatch, 9.0)
    assert guard.main(["--file", str(file)]) == 0
    assert "their limits are of another machine, this is this machine" in capsys.readouterr().out


def test_a_ratio_without_a_limit_fails(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _held(file, limits={})
    assert guard.main(["--file", str(file)]) == 1
    assert f"{TINY.name}: no limits on its ratios" in capsys.readouterr().out


def test_update_leaves_limits_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = guard.load(file)["limits"]
    assert limits == {TINY.name: {"reference": 0.6, "conv_bn_relu": 2.4}}
    _ratios(monkeypatch, 0.1)
    assert guard.main(["--update", "--file", str(file)]) == 0
    assert guard.load(file)["limits"] == limits


def test_networks_have_a_limit(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(guard, "networks", lambda: {"vgg11 float32": {"conv_bn_relu": 100, "torch": 76}})
    assert guard.main(["--file", str(file), "--rounds", "0"]) == 1
    assert "vgg11 float32: keeps 0.760x of conv + batch norm + ReLU's bytes" in capsys.readouterr().out


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guard._ratio([1.0, 20.0, 3.0], [2.0, 40.0, 2.0]) == 0.5

    class Work:
        def __init__(self, *seconds: float) -> None:
            self.seconds = list(seconds)

        def run(self, clock: Any) -> dict[str, float]:
            return {"forward": 0.0, "step": self.seconds.pop(0)}

    works: dict[str, measure.Work] = {"torch": Work(3.0, 1.0), "reference": Work(4.0, 5.0)}
    assert guard._SideBySide(works).run(CpuClock()) == {"torch": 1.0, "reference": 4.0}


def test_ratios_are_measured() -> None:
    found = guard.ratios([TINY], 2)
    assert found.keys() == {TINY.name}
    assert all(found[TINY.name][base] > 0 for base in guard.BASELINES)


def test_what_cannot_be_checked(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--rounds", "-1"]) == 2
    assert "--rounds must be 0 or more, got -1" in capsys.readouterr().err
    path = tmp_path / "guard.json"
    assert guard.main(["--file", str(path)]) == 2
    assert "run this in a checkout, or make one with --update" in capsys.readouterr().err
    for text in ("", "[]", "{}", '{"platform": 1, "exact": {}, "device": "", "limits": {}}'):
        path.write_text(text)
        assert guard.main(["--file", str(path)]) == 2
        assert "is no JSON object with platform, exact, device, limits" in capsys.readouterr().err
        assert path.read_text() == text


def test_what_cannot_be_read_or_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "exact", lambda *case: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    assert guard.main(["--file", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"tdeconv guard: --file {tmp_path} cannot be read: Is a directory\n"
    assert guard.main(["--update", "--file", str(tmp_path / "file" / "guard.json")]) == 2
    assert f"{tmp_path / 'file'} cannot be written to: it is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wrong_answers_fail(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(layers: Any, rounds: int) -> guard.Numbers:
        raise AssertionError("torch: relative errors [1.0]")

    monkeypatch.setattr(guard, "ratios", wrong)
    assert guard.main(["--file", str(file)]) == 1
    assert "wrong answers: torch: relative errors" in capsys.readouterr().out
