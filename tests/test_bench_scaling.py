"""Sweeps cover what they must and stay affordable; power laws are found where there are some."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tdeconv.bench import measure, roofline, scaling, stages, steps
from tdeconv.bench.clock import CpuClock
from tdeconv.geometry import resolve_block

AXES = {"batch", "channels", "kernel_size", "image_size", "block", "n_iter", "sampling_stride"}
CEILINGS = roofline.Ceilings(memory=2e10, matmul={torch.float32: 1e11}, launch=1e-6)


def test_every_axis_has_five_or_six_values_and_changes_nothing_else() -> None:
    assert set(scaling.AXES) == AXES
    fields = {"channels": {"in_channels", "out_channels"}, "image_size": {"size"}, "kernel_size": {"kernel"}}
    for axis, sweep in scaling.AXES.items():
        values = [value for value, _, _ in sweep]
        assert values == sorted(set(values))
        assert 5 <= len(values) <= 6
        assert values[-1] >= 6 * values[0]
        varying = {name for name in vars(sweep[0][1]) if len({getattr(layer, name) for _, layer, _ in sweep}) > 1} | (
            {"batch"} if len({batch for _, _, batch in sweep}) > 1 else set()
        )
        assert varying == fields.get(axis, {axis})
        for value, layer, batch in sweep:
            assert all(({**vars(layer), "batch": batch})[name] == value for name in varying)


def test_kernels_go_from_1_to_15_and_no_root_is_too_large() -> None:
    assert [value for value, _, _ in scaling.AXES["kernel_size"]][:: len(scaling.AXES["kernel_size"]) - 1] == [1, 15]
    for _, layer, _ in (point for sweep in scaling.AXES.values() for point in sweep):
        assert resolve_block(layer.block, layer.in_channels) == layer.block  # the block is not cut down on the way
        assert layer.block * layer.kernel**2 <= 1200


def _row(value: int, seconds: float, floor: float | None = None, **info: Any) -> dict[str, Any]:
    about = {"suite": "scaling", "axis": "batch", "implementation": "torch", "value": value, "floor_s": floor}
    return {"stats": {"median": seconds}, "extra_info": {**about, **info}}


def test_a_power_law_is_found() -> None:
    rows = [_row(n, 0.01 * n**1.5, 1e-4 * n**2, kind="step") for n in (16, 2, 4, 8)]
    (fit,) = scaling.fits(rows)
    assert fit[:3] == ("batch", "torch", "step")
    assert (fit.exponent, fit.predicted, fit.r2) == pytest.approx((1.5, 2.0, 1.0))
    assert [value for value, _ in fit.values] == [2, 4, 8, 16]
    assert fit.values[0][1] == pytest.approx(0.01 * 2**1.5)


def test_fixed_costs_lower_the_exponent_and_the_fit() -> None:
    (fit,) = scaling.fits([_row(n, 1.0 + 0.05 * n, n / 100, kind="step") for n in (1, 4, 16, 64, 256)])
    assert fit.predicted == pytest.approx(1.0)
    assert 0.2 < fit.exponent < 0.8
    assert 0.5 < fit.r2 < 0.95


def test_what_does_not_grow_has_exponent_zero() -> None:
    (fit,) = scaling.fits([_row(n, 0.25, kind="step") for n in (1, 2, 4)])
    assert fit.exponent == pytest.approx(0.0, abs=1e-12)
    assert fit.r2 == 1.0
    assert fit.predicted is None


def test_both_directions_of_a_stage_are_one() -> None:
    rows = [
        _row(n, share * n**3, 2 * share * n, stage="fold", direction=direction)
        for n in (1, 2, 4)
        for direction, share in (("forward", 1.0), ("backward", 3.0))
    ]
    (fit,) = scaling.fits(rows)
    assert fit.stage == "fold"
    assert fit.values == ((1, 4.0), (2, 32.0), (4, 256.0))
    assert (fit.exponent, fit.predicted) == pytest.approx((3.0, 1.0))
    rows[-1]["extra_info"]["floor_s"] = None
    assert scaling.fits(rows)[0].predicted is None


def test_each_axis_implementation_and_stage_has_its_own() -> None:
    rows = [
        _row(n, float(n) ** (2 if name == "reference" else 1), kind="step", axis=axis, implementation=name)
        for axis in ("batch", "block")
        for name in ("reference", "torch")
        for n in (1, 2, 4)
    ]
    found = {fit[:2]: fit.exponent for fit in scaling.fits(rows)}
    assert found == {
        (axis, name): pytest.approx(exponent)
        for axis in ("batch", "block")
        for name, exponent in (("reference", 2.0), ("torch", 1.0))
    }


def test_what_no_law_goes_through_is_left_out() -> None:
    other = _row(4, 1.0, kind="step")
    other["extra_info"]["suite"] = "layer"
    assert scaling.fits([_row(2, 1.0, kind="step"), other, _row(4, 1.0, kind="forward")]) == []
    assert scaling.fits([]) == []


def test_a_sweep_measured_and_fitted() -> None:
    """The small end of an axis through the machinery that the suite uses."""
    rows = []
    for value, layer, batch in scaling.AXES["kernel_size"][:2]:
        problem = steps.problem(layer, 2)
        works = {v.implementation: p.work for v, p in stages.prepare(problem, ["reference", "torch"])}
        floors = stages.floors(layer, batch, CEILINGS)
        for name, seconds in measure.interleaved(works, 1, clock=CpuClock()).items():
            for part, (median,) in seconds.items():
                stage, _, direction = part.partition(" ")
                which = {"stage": stage, "direction": direction} if direction else {"kind": part}
                floor = floors.get(part, {}).get("floor_s")
                rows.append(_row(value, median, floor, axis="kernel_size", implementation=name, **which))
    found = {(fit.implementation, fit.stage): fit for fit in scaling.fits(rows)}
    assert {stage for name, stage in found if name == "torch"} == {*stages.STAGES, "step"}
    assert {stage for name, stage in found if name == "reference"} == {*stages.STAGES[:-1], "step"}
    assert found["torch", "patches"].predicted is None
    assert found["torch", "convolve"].predicted is not None
