"""Which configuration runs: the heuristic one, a measured one, never one that does not fit; and the file on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import interpreting  # noqa: F401  (before the kernels)

pytest.importorskip("triton")
from triton.runtime import OutOfResources

from tdeconv.kernels import tuning
from tdeconv.kernels.configs import Config, Limits, cuda_limits, legal

CPU = torch.device("cpu")
SLOWER, FASTER, HUGE = Config.of(4, 2, BLOCK=32), Config.of(8, 3, BLOCK=64), Config.of(8, 4, BLOCK=256)
TIMES = {SLOWER: 2.0, FASTER: 1.0, HUGE: 0.5}


class Measured:
    """In the GPU's place: each configuration takes its time, and HUGE does not fit."""

    def __init__(self) -> None:
        self.ran: list[Config] = []

    def __call__(self, config: Config) -> None:
        if config == HUGE:
            raise OutOfResources(300000, 232448, "shared memory")
        self.ran.append(config)

    def time(self, run, device) -> float:
        run()
        return TIMES[self.ran[-1]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("TDECONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_dropped", set())
    monkeypatch.setattr(tuning, "_measurable", lambda device: True)


@pytest.fixture
def run(monkeypatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(tuning, "_measure", measured.time)
    return measured


def choose(run, candidates=(SLOWER, FASTER), sizes="rows=64", kernel="some_kernel") -> Config:
    return tuning.choose(kernel, sizes, candidates, run, CPU)


def measured_file() -> Path:
    (path,) = tuning.folder().glob("*.json")
    return path


def test_the_heuristic_choice_unless_told_to_measure(run):
    assert choose(run) == SLOWER
    assert not run.ran
    assert not tuning.folder().exists()


def test_the_fastest_is_found_kept_and_used(run, monkeypatch):
    with tuning.tune():
        assert choose(run) == FASTER
        measured = len(run.ran)
        assert choose(run) == FASTER
    assert measured == len(run.ran) == 2
    monkeypatch.setattr(tuning, "_known", {})  # as another process finds it
    assert choose(run) == FASTER
    with tuning.tune():
        assert choose(run) == FASTER
        assert len(run.ran) == measured
        choose(run, sizes="rows=128")
        assert len(run.ran) == 2 * measured


def test_contexts_nest_and_end(run):
    with tuning.tune():
        with tuning.tune(False):
            assert choose(run) == SLOWER
        with pytest.raises(RuntimeError, match="within"), tuning.tune():
            raise RuntimeError("within")
        assert choose(run) == FASTER
    assert not tuning._tuning


def test_a_single_candidate_is_not_measured(run):
    with tuning.tune():
        assert choose(run, (SLOWER,)) == SLOWER
    assert not run.ran


def test_nothing_is_measured_inside_a_captured_graph(run, monkeypatch):
    monkeypatch.setattr(tuning, "_measurable", lambda device: False)
    with tuning.tune():
        assert choose(run) == SLOWER
    assert not run.ran


def test_what_does_not_fit_is_dropped_while_measuring(run):
    with tuning.tune():
        assert choose(run, (HUGE, SLOWER, FASTER)) == FASTER
    assert choose(run, (HUGE, SLOWER), sizes="rows=1") == SLOWER


def test_what_does_not_fit_is_dropped_while_running(run):
    assert tuning.run_best("some_kernel", "rows=1", (HUGE, SLOWER), run, CPU) == SLOWER
    assert run.ran == [SLOWER]
    assert tuning.run_best("some_kernel", "rows=1", (HUGE, SLOWER), run, CPU) == SLOWER
    assert choose(run, (HUGE, SLOWER)) == SLOWER


def test_if_nothing_fits_the_reason_is_raised(run):
    with pytest.raises(OutOfResources, match="shared memory"):
        tuning.run_best("some_kernel", "rows=1", (HUGE,), run, CPU)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"format": 99, "entries": {}}',
        b"\xff\xfe\x00",
        json.dumps({"format": 1, "kind": "another GPU", "entries": {"some_kernel: rows=64": {"blocks": {}}}}),
        json.dumps({"format": 1, "kind": None, "entries": 7}),
    ],
)
def test_a_file_that_is_not_ours_is_ignored_and_rewritten(content, run):
    path = tuning._file(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert choose(run) == SLOWER
    with tuning.tune():
        assert choose(run) == FASTER
    entries = json.loads(path.read_text())["entries"]
    assert entries == {"some_kernel: rows=64": {"blocks": {"BLOCK": 64}, "num_warps": 8, "num_stages": 3}}


@pytest.mark.parametrize("entry", [None, {}, {"blocks": {"BLOCK": 512}, "num_warps": 8, "num_stages": 3}])
def test_an_entry_that_is_no_candidate_is_measured_again(entry, run, monkeypatch):
    with tuning.tune():
        choose(run)
    path = measured_file()
    content = json.loads(path.read_text())
    content["entries"]["some_kernel: rows=64"] = entry
    path.write_text(json.dumps(content))
    monkeypatch.setattr(tuning, "_known", {})
    assert choose(run) == SLOWER
    with tuning.tune():
        assert choose(run) == FASTER
    assert json.loads(path.read_text())["entries"]["some_kernel: rows=64"]["num_warps"] == 8


def test_another_processs_measurements_are_kept(run, monkeypatch):
    """The file is read again before it is replaced."""
    with tuning.tune():
        assert choose(run, sizes="rows=1") == FASTER
        path = measured_file()
        tuning._save(path, {"theirs: rows=2": tuning._written(SLOWER)})
        assert choose(run, sizes="rows=4") == FASTER
    assert set(json.loads(path.read_text())["entries"]) == {
        "some_kernel: rows=1",
        "some_kernel: rows=4",
        "theirs: rows=2",
    }


def _write_many(path: Path, writer: int) -> None:
    for i in range(20):
        tuning._save(path, {f"kernel {writer}: {i}": tuning._written(SLOWER)})


def test_processes_at_the_same_time_lose_nothing():
    path = tuning._file(CPU)
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    writers = [context.Process(target=_write_many, args=(path, w)) for w in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
        assert writer.exitcode == 0
    assert len(tuning._load(path)) == 60
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".lock"}


def test_a_folder_that_cannot_be_written_costs_only_the_file(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("TDECONV_CACHE", str(tmp_path / "file" / "below"))
    with tuning.tune():
        assert choose(run) == FASTER
    assert choose(run) == FASTER  # remembered all the same


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TDECONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "tdeconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.folder() == Path.home() / ".cache" / "tdeconv"
    assert torch.__version__ in tuning._file(CPU).name


def test_keys_are_bucketed():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 64, 65, 1000)] == [0, 1, 2, 4, 64, 128, 1024]
    assert tuning.key(rows=100, dtype="float32", exact=True) == "rows=128 dtype=float32 exact=True"


def test_the_legality_predicate():
    config, hopper = Config.of(4, 3, BLOCK=64), cuda_limits(9, 0)
    assert legal(config, hopper, staged=32768, held=8192, divisible=[(128, 64)])
    assert not legal(config, cuda_limits(8, 6), staged=34816)
    assert not legal(config, hopper, held=4 * 32 * 255)
    assert not legal(config, hopper, divisible=[(96, 64)])
    assert not legal(Config.of(64, 1, BLOCK=64), hopper)
    assert not legal(Config.of(3, 1, BLOCK=64), hopper)
    assert not legal(Config.of(4, 1, BLOCK=48), hopper)
    assert legal(config, Limits(shared=65536), staged=16384, kept=16384)
