"""The suites: which rows each has, how its works are prepared, and what each row must cost at least."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tdeconv.bench import nets, stages, steps
from tdeconv.bench.cases import Layer
from tdeconv.bench.implementations import Implementation
from tdeconv.bench.measure import Prepared, Row, Variant
from tdeconv.bench.roofline import Ceilings
from tdeconv.bench.sets import Plan


class Session(NamedTuple):
    """What a run measures, where, and who can run there."""

    plan: Plan
    device: torch.device
    everyone: tuple[Implementation, ...]

    def shown(self, names: Sequence[str]) -> list[Implementation]:
        """Those of these names that can run; all, if there are no names."""
        return [one for one in self.everyone if not names or one.name in names]

    def one(self, name: str) -> Implementation:
        return next(one for one in self.everyone if one.name == name)

    def intervals(self, name: str) -> dict[str, list[int]]:
        """Of a stale step's row: the intervals over which its mean with fresh ones is reported."""
        return {"stats_intervals": list(self.plan.intervals)} if self.one(name).stale else {}

    def variants(self, names: Sequence[str]) -> Iterator[Variant]:
        for one in self.shown(names):
            for layout in [x for x in self.plan.layouts if x in one.layouts] or one.layouts[:1]:
                for dtype in self.plan.dtypes:
                    yield Variant(one.name, layout, dtype)


class Suite(NamedTuple):
    """``rows`` of a session; ``prepare`` a case's works; ``about`` what a row says beside its times."""

    rows: Callable[[Session], Iterable[Row]]
    prepare: Callable[[Session, str, Sequence[Variant]], Iterator[tuple[Variant, Prepared]]]
    about: Callable[[Session, Row, Ceilings], dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------- layers


def _layer_rows(session: Session) -> Iterator[Row]:
    for case in session.plan.layers:
        for variant in session.variants(session.plan.implementations):
            for kind in steps.KINDS:
                yield Row(case, *variant, kind)


@functools.cache
def _problem(layer: Layer, batch: int, device: torch.device) -> steps.Problem:
    return steps.problem(layer, batch, device)


def _chosen(session: Session, variants: Sequence[Variant]) -> list[tuple[Implementation, Variant]]:
    return [(session.one(variant.implementation), variant) for variant in variants]


def _prepare_layer(session: Session, case: str, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Prepared]]:
    problem = _problem(*session.plan.layers[case], session.device)
    return steps.prepare(problem, _chosen(session, variants), getattr(torch, session.plan.oracle))


def _of_layer(layer: Layer) -> dict[str, Any]:
    return {"network": layer.network, "case": layer.name, "count": layer.count}


def _about_layer(session: Session, row: Row, ceilings: Ceilings) -> dict[str, Any]:
    layer, batch = session.plan.layers[row.case]
    floor = steps.floors(layer, session.one(row.implementation).method, batch, row.dtype, ceilings)[row.part]
    return {"suite": "layer", **_of_layer(layer), "kind": row.part, **session.intervals(row.implementation), **floor}


# ------------------------------------------------------------------------------------------------------------- stages


def _stage_variant(name: str) -> Variant:
    return Variant(name, "contiguous", "float32")


def _stage_rows(session: Session) -> Iterator[Row]:
    for case, (layer, _) in session.plan.stages.items():
        for one in session.shown(session.plan.stage_implementations):
            for part in stages.parts(one.name, layer):
                if part != "step":
                    yield Row(case, *_stage_variant(one.name), part)


def _prepare_stages(session: Session, case: str, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Prepared]]:
    problem = _problem(*session.plan.stages[case], session.device)
    return stages.prepare(problem, [variant.implementation for variant in variants])


def _part(part: str) -> dict[str, str]:
    stage, _, direction = part.partition(" ")
    return {"stage": stage, "direction": direction} if direction else {"kind": part}


def _about_stage(session: Session, row: Row, ceilings: Ceilings) -> dict[str, Any]:
    layer, batch = session.plan.stages[row.case]
    return {
        "suite": "stage",
        **_of_layer(layer),
        **_part(row.part),
        **stages.floors(layer, batch, ceilings).get(row.part, {}),
    }


# ----------------------------------------------------------------------------------------------------------- networks


def _model_rows(session: Session) -> Iterator[Row]:
    for case in session.plan.networks:
        for variant in session.variants(session.plan.network_implementations):
            for kind in steps.KINDS:
                yield Row(case, *variant, kind)


def _prepare_model(session: Session, case: str, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Prepared]]:
    problem = nets.problem(session.plan.networks[case], session.device)
    return nets.prepare(problem, _chosen(session, variants))


def _about_model(session: Session, row: Row, ceilings: Ceilings) -> dict[str, Any]:
    about = {"suite": "model", "network": row.case, "case": row.case, "count": 1, "kind": row.part}
    return {**about, **session.intervals(row.implementation)}


# ------------------------------------------------------------------------------------------------------------ scaling


def _sweep_rows(session: Session) -> Iterator[Row]:
    for case, (layer, _) in session.plan.sweeps.items():
        for one in session.shown(session.plan.implementations):
            parts = ["step"] if one.method == "conv_bn_relu" else stages.parts(one.name, layer)
            for part in parts:
                yield Row(case, *_stage_variant(one.name), part)


def _prepare_sweep(session: Session, case: str, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Prepared]]:
    problem = _problem(*session.plan.sweeps[case], session.device)
    chosen = _chosen(session, variants)
    replaced = [(one, variant) for one, variant in chosen if one.method == "conv_bn_relu"]
    yield from steps.prepare(problem, replaced, torch.float32)
    yield from stages.prepare(problem, [one.name for one, _ in chosen if one.method == "deconv"])


def _about_sweep(session: Session, row: Row, ceilings: Ceilings) -> dict[str, Any]:
    layer, batch = session.plan.sweeps[row.case]
    axis, _, value = row.case.partition(" ")
    if row.implementation.startswith("conv_bn_relu"):
        floor = steps.floors(layer, "conv_bn_relu", batch, row.dtype, ceilings)["step"]
    else:
        floor = stages.floors(layer, batch, ceilings).get(row.part, {})
    about = {"suite": "scaling", **_of_layer(layer), "axis": axis, "value": int(value)}
    return {**about, **_part(row.part), **floor}


BY_TEST = {
    "test_layer": Suite(_layer_rows, _prepare_layer, _about_layer),
    "test_stage": Suite(_stage_rows, _prepare_stages, _about_stage),
    "test_model": Suite(_model_rows, _prepare_model, _about_model),
    "test_scaling": Suite(_sweep_rows, _prepare_sweep, _about_sweep),
}


def median(seconds: Mapping[str, Sequence[float]], part: str) -> float:
    """Of a part's recorded seconds. Patches count with moments, whose floor is that of reading them, too."""
    patches = seconds.get(part.replace("moments", "patches"), ()) if part.startswith("moments") else ()
    return statistics.median(map(sum, itertools.zip_longest(seconds[part], patches, fillvalue=0.0)))
