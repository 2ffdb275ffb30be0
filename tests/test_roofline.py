"""The roofline's counts against numbers worked out by hand, and its floors against ceilings made up for the test."""

from __future__ import annotations

import math

import pytest
import torch

from tdeconv.bench import roofline
from tdeconv.bench.roofline import Ceilings, Shape, Work

# 3x3 at 16 x 16, two images: D = 4*9 = 36, G = 2; sampled at every third of 16 positions: 6 x 6 x 2 = 72 patches
SMALL = Shape(batch=2, channels=8, size=(16, 16), out=5, kernel=(3, 3), block=4, dtype=torch.bfloat16)
POINTWISE = Shape(batch=2, channels=8, size=(5, 5), out=4, kernel=(1, 1), block=4, dtype=torch.float32)
DEPTHWISE = Shape(batch=1, channels=6, size=(9,), out=6, kernel=(3,), groups=6, sampling_stride=1, n_iter=1)
MADE_UP = Ceilings(memory=100.0, matmul={torch.bfloat16: 1000.0, torch.float32: 10.0}, launch=0.5)


def work(shape: Shape, stage: str, direction: str) -> Work:
    (found,) = (w for w in roofline.works(shape) if (w.stage, w.direction) == (stage, direction))
    return found


def test_what_is_sampled():
    assert SMALL.samples == 72
    assert SMALL.sampled_values == SMALL.inputs == 2 * 8 * 256  # stride 3 under a 3x3 kernel: every pixel, once
    assert SMALL.outputs == 2 * 5 * 256
    assert SMALL.weights == 5 * 8 * 9
    assert POINTWISE.samples == 6  # every ninth of 50 pixels
    assert POINTWISE.sampled_values == 6 * 8
    assert DEPTHWISE.samples == 9
    # 2x2 at every fourth position of 9 (0, 4; 8 would end past the edge): 2 * 2 pixels of an axis
    sparse = Shape(1, 3, (9, 9), 3, (2, 2), padding=(0, 0), sampling_stride=4)
    assert sparse.samples == 4
    assert sparse.sampled_values == 3 * 16


def test_moments():
    forward, backward = (work(SMALL, "patch_moments", way) for way in ("forward", "backward"))
    # 144 vectors of 36: half of 2 * 144 * 36^2, diagonal included; x once in bfloat16; mean and covariance in float32
    assert forward.operations == 144 * 36 * 37
    assert forward.bytes == 4096 * 2 + (36 * 36 + 36) * 4
    assert backward.operations == 2 * 144 * 36 * 36
    assert backward.bytes == 3 * 4096 * 2 + (36 * 36 + 36) * 4  # x; the input's gradient read and written
    assert forward.dtype == backward.dtype == torch.bfloat16
    assert work(DEPTHWISE, "patch_moments", "forward").operations == 6 * 9 * 3 * 4


def test_a_stale_step_folds_and_convolves():
    works = roofline.works(SMALL, stale=True)
    assert [(w.stage, w.direction) for w in works] == [
        (stage, way) for stage in ("fold", "convolve") for way in ("forward", "backward")
    ]
    forward, backward, *convolutions = works
    assert forward == work(SMALL, "fold", "forward")
    assert backward.operations == forward.operations  # the weight's gradient alone
    assert backward.bytes == 360 * (4 + 2) + 36 * 36 * 4
    assert convolutions == [work(SMALL, "convolve", way) for way in ("forward", "backward")]


@pytest.mark.parametrize(("n_iter", "count", "chain"), [(1, 0, 1), (2, 2, 3), (5, 10, 9), (15, 35, 29)])
def test_products_of_the_inverse_root(n_iter, count, chain):
    assert roofline.products(n_iter) == (count, chain)


def test_inverse_root():
    forward, backward = (work(SMALL, "inverse_sqrt", way) for way in ("forward", "backward"))
    assert forward.operations == 10 * 36 * 36 * 37
    assert backward.operations == 20 * 36 * 36 * 37
    assert (forward.chain, backward.chain) == (9, 9)
    assert forward.dtype == torch.float32
    assert forward.bytes == 2 * 36 * 36 * 4
    assert work(DEPTHWISE, "inverse_sqrt", "forward").operations == 0


def test_fold():
    forward, backward = (work(SMALL, "fold", way) for way in ("forward", "backward"))
    assert forward.operations == 2 * 5 * 2 * 36 * 36  # 2 O G D^2
    assert forward.bytes == 360 * (2 + 4) + 36 * 36 * 4
    assert backward.operations == 2 * forward.operations


def test_convolution():
    forward, backward = (work(SMALL, "convolve", way) for way in ("forward", "backward"))
    assert forward.operations == 2 * 2 * 256 * 5 * 8 * 9
    assert forward.bytes == (4096 + 2560 + 360) * 2
    assert backward.operations == 2 * forward.operations
    assert backward.bytes == 2 * forward.bytes
    assert work(DEPTHWISE, "convolve", "forward").operations == 2 * 9 * 6 * 3
    strided = Shape(1, 4, (8, 8), 4, (3, 3), stride=(2, 2))
    assert strided.outputs == 4 * 16


def test_a_first_layer_has_no_gradient_through_its_statistics():
    first = Shape(2, 8, (16, 16), 5, (3, 3), block=4, input_grad=False)
    stages = [(w.stage, w.direction) for w in roofline.works(first)]
    assert ("patch_moments", "backward") not in stages
    assert ("inverse_sqrt", "backward") not in stages
    assert work(first, "convolve", "backward").operations == work(first, "convolve", "forward").operations
    assert work(first, "fold", "backward").operations == work(first, "fold", "forward").operations


def test_a_float32_layer_moves_twice_the_bytes():
    twice = Shape(2, 8, (16, 16), 5, (3, 3), block=4, dtype=torch.float32)
    assert work(twice, "convolve", "forward").bytes == 2 * work(SMALL, "convolve", "forward").bytes
    assert work(twice, "convolve", "forward").operations == work(SMALL, "convolve", "forward").operations


@pytest.mark.parametrize(
    ("one", "seconds", "bound"),
    [
        (Work("s", "d", bytes=300, operations=1000, dtype=torch.bfloat16), 3.0, "memory"),
        (Work("s", "d", bytes=300, operations=1000, dtype=torch.float32), 100.0, "arithmetic"),
        (Work("s", "d", bytes=300, operations=10, dtype=torch.float32, chain=9), 4.5, "latency"),
        (Work("s", "d", bytes=0, operations=0, dtype=torch.float64, chain=1), 0.5, "latency"),
    ],
)
def test_the_floor_is_the_largest_time(one, seconds, bound):
    assert one.floor(MADE_UP) == pytest.approx(seconds)
    assert one.bound(MADE_UP) == bound


def test_every_stage_has_a_floor():
    for shape in (SMALL, POINTWISE, DEPTHWISE):
        floors = roofline.floor(shape, MADE_UP)
        assert {stage for stage, _ in floors} == set(roofline.STAGES)
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in floors.values())


def test_measured_ceilings_are_positive():
    ceilings = roofline.measure_ceilings(torch.device("cpu"), size=1 << 16, matrix=32)
    assert ceilings.memory > 0
    assert ceilings.launch > 0
    assert set(ceilings.matmul) == {torch.float32, torch.float16, torch.bfloat16}
