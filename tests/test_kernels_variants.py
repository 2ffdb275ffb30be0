"""What is compiled ahead of time: few variants, each of them as its launcher starts the kernel."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

import interpreting  # noqa: F401  (before the kernels)

pytest.importorskip("triton")

from bench.gpu import aot
from tdeconv.kernels.configs import Config
from tdeconv.kernels.shipped import LIMITS, by_config

VARIANTS = list(aot.variants())


def test_few():
    """Every one costs compile time, on a user's machine while tuning too."""
    shipped = [v for v in VARIANTS if not v.name.endswith(aot.ONES)]
    assert 100 < len(shipped) <= 165
    assert {v.fn for v in VARIANTS if v not in shipped} == {v.fn for v in shipped}
    assert {v.default for v in VARIANTS} == {True, False}
    assert all(v.default for v in aot.variants(quick=True))


def test_names_tell_them_apart():
    keys = collections.Counter((v.name, str(v.config), t) for v in VARIANTS for t in v.targets or aot.TARGETS)
    assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.name} {v.config}".replace(" ", "_"))
def test_every_argument_is_given_once(variant):
    given = [*variant.signature, *variant.constexprs, *dict(variant.config.blocks)]
    assert sorted(given) == sorted(variant.fn.arg_names)
    assert set(variant.aligned or ()) <= set(variant.signature)


@pytest.mark.parametrize("target", LIMITS)
def test_every_kernel_and_half_precision_on_every_target(target):
    here = [v for v in VARIANTS if not v.targets or target in v.targets]
    alone = {"_inverse_sqrt_whole_fwd_kernel", "_inverse_sqrt_whole_bwd_kernel"}  # need NVIDIA's barrier
    alone |= {"_inverse_sqrt_cooperative_fwd_kernel", "_inverse_sqrt_cooperative_bwd_kernel"}
    kernels = {v.fn.__name__ for v in VARIANTS} - (alone if target == "gfx942" else set())
    assert {v.fn.__name__ for v in here} == kernels
    half = {"_convolve_kernel", "_convolve_bwd_weight_kernel", "_fold_product_kernel"}
    assert half <= {v.fn.__name__ for v in here if "*fp16" in v.signature.values()}


def test_the_kept_table_has_every_variant_and_no_problem():
    """``python -m bench.gpu.aot --out bench/results/aot`` fills it; what changed is compiled before it ships."""
    rows = json.loads((Path(aot.__file__).parents[1] / "results" / "aot" / "aot.json").read_text())["rows"]
    keys = {(v.name, str(v.config), t) for v in VARIANTS for t in v.targets or aot.TARGETS}
    assert {(row["name"], row["config"], row["target"]) for row in rows} == keys
    assert [row["name"] for row in rows if row["problem"]] == []
    assert [row["name"] for row in rows if row["spills"] and row["target"] == "sm_90"] == []


def test_configurations_by_target():
    """The first is the heuristic choice, which may be another for every device."""
    small, large = Config.of(4, 1, BLOCK=16), Config.of(8, 3, BLOCK=64)

    def options(within):
        return (large, small) if within.warp == 32 else (small,)

    found = list(by_config(options, ("sm_80", "sm_90", "gfx942")))
    assert found == [(large, True, ("sm_80", "sm_90")), (small, False, ("sm_80", "sm_90")), (small, True, ("gfx942",))]


def test_runs_add_up(tmp_path):
    """What an earlier run has found is kept, unless by another Triton or about a variant that is no more."""
    first, *_, last = (v for v in VARIANTS if {"sm_80", "sm_90"} <= set(v.targets))
    rows = [
        aot.Row(v.name, str(v.config), t, registers=n) for n, (v, t) in enumerate([(last, "sm_80"), (first, "sm_90")])
    ]
    path = tmp_path / "aot.json"

    def kept():
        return [(row["name"], row["target"], row["registers"]) for row in json.loads(path.read_text())["rows"]]

    aot._write(tmp_path, [rows[0], aot.Row("gone", "", "sm_80")])
    aot._write(tmp_path, [rows[1]])
    assert kept() == [(first.name, "sm_90", 1), (last.name, "sm_80", 0)]
    rows[1].registers = 7
    aot._write(tmp_path, [rows[1]])
    assert kept() == [(first.name, "sm_90", 7), (last.name, "sm_80", 0)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "0.1"}))
    aot._write(tmp_path, [rows[0]])
    assert kept() == [(last.name, "sm_80", 0)]
