"""Converted networks learn: public ones of every family, against what batch norm reached on the same images.

Batch norm's runs are kept (``python -m tdeconv.bench.learning --data digits --rate-seeds first``); converted networks
are trained here, the first steps of the same runs: the expensive ones fewer. What is kept is the mean over three seeds
at the rate that was best, so no roundings of one CPU decide.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest
import torch

from tdeconv.bench.learning import report, store, tasks
from tdeconv.bench.learning.networks import NETWORKS
from tdeconv.bench.learning.train import LAST, Plan, run
from tdeconv.bench.results import RESULTS

KEPT = RESULTS / "learning"
SETTING = report.Setting("digits", size=64, batch=32, steps=40)
CHANCE = 0.1
TRAINED = {  # steps and learning rate, where the kept runs lie far apart
    "resnet26": (20, 0.02),
    "resnet50": (20, 0.02),
    "regnety_002": (30, 0.005),
    "resnext26ts": (40, 0.08),
    "densenet121": (30, 0.02),
    "mobilenetv2_100": (30, 0.02),
    "mobilenetv3_small_100": (30, 0.02),
    "efficientnet_b0": (20, 0.005),
    "vgg11_bn": (20, 0.005),
    "resnet18": (20, 0.02),
    "googlenet": (20, 0.08),
    "lraspp_mobilenet_v3_large": (30, 0.08),
}
CALIBRATED = ("resnext26ts",)
# Batch norm is ahead of these in short runs on digits (docs/learning.md): the loss that they have to get below.
SLOWER = {"densenet121": 1.4, "lraspp_mobilenet_v3_large": 1.4}


@cache
def kept() -> report.Sides:
    return report.settings(store.load(sorted(KEPT.glob("*.json")), "the kept runs").values())[SETTING]


def batch_norms(network: str) -> report.Side:
    return kept()[network][report.BATCH_NORM]


def test_every_network_is_trained_and_batch_norms_runs_are_kept() -> None:
    assert TRAINED.keys() == NETWORKS.keys() == kept().keys()
    for network, (steps, _) in TRAINED.items():
        assert set(batch_norms(network).runs) == {0, 1, 2}
        assert LAST < steps <= SETTING.steps


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("network", TRAINED)
def test_a_converted_network_learns_at_least_as_fast_as_with_batch_norm(network: str) -> None:
    steps, rate = TRAINED[network]
    theirs = batch_norms(network)
    plan = Plan(
        network, "converted", "digits", SETTING.size, SETTING.batch, steps, rate, 0, calibrate=network in CALIBRATED
    )
    task = tasks.Task(tasks.load("digits", SETTING.size), SETTING.size, NETWORKS[network].dense)
    found = run(plan, task, device=torch.device("cpu"), held_out=100)
    assert found["gradient"] <= report.STEEPER * theirs.runs[0]["gradient"]
    assert found["diverged"] is None
    assert found["last_loss"] <= SLOWER.get(network, statistics.fmean(theirs.loss_before(steps)) + report.MARGIN)
    evaluation = found["evaluations"][str(steps)]
    assert evaluation["loss"] is not None
    assert evaluation["accuracy"] >= 2 * CHANCE
