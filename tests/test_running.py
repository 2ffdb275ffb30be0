"""Running statistics: moved in place by momentum, never by a value that is not finite, warned of once."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers import assert_close, randn
from tdeconv import running
from tdeconv.running import average_share, tells, update_

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(autouse=True)
def unwarned():
    running._warn_once.cache_clear()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
def test_moves_by_momentum_in_place(momentum):
    r = randn(3), randn(2, 2, seed=1)
    n = randn(3, seed=2), randn(2, 2, seed=3)
    kept = [t.clone() for t in r]
    pointers = [t.data_ptr() for t in r]
    assert bool(update_(r, n, momentum))
    assert [t.data_ptr() for t in r] == pointers
    assert_close(r, [(1 - momentum) * a + momentum * b for a, b in zip(kept, n, strict=True)], 1e-15)


def test_momentum_one_is_the_new_value_exactly():
    r, n = randn(50), randn(50, seed=1)
    update_((r,), (n,), 1.0)
    assert torch.equal(r, n)


def test_the_new_value_may_have_another_shape():
    r = torch.zeros(2, 3)
    update_((r,), (torch.ones(1, 6),), 1.0)
    assert torch.equal(r, torch.ones(2, 3))


def test_half_precision_buffers_are_updated_in_the_values_dtype():
    r = torch.full((1,), 1.0, dtype=torch.bfloat16)
    update_((r,), (torch.full((1,), 1.08),), 0.1)  # 1.008 rounds up to the next bfloat16; 0.1 * 0.08 alone would vanish
    assert r.dtype == torch.bfloat16
    assert r.item() == torch.tensor(1.008).bfloat16().item()


@pytest.mark.parametrize("momentum", [torch.tensor([0.0, 0.25, 1.0]), torch.tensor(0.5)])
def test_momentum_may_be_a_tensor(momentum):
    """One for each covariance, or one for all."""
    r, n = torch.zeros(6), torch.ones(3, 2)
    update_((r,), (n,), momentum)
    assert torch.equal(r, momentum.view(-1, 1).expand(3, 2).flatten())


def test_only_news_is_counted():
    r, n = [torch.zeros(6), torch.zeros(3, 2, 2)], [torch.ones(3, 2), torch.ones(3, 2, 2)]
    made = update_(r, n, 0.5, torch.tensor([True, False, True]))
    assert made.tolist() == [True, False, True]
    assert r[0].tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5]
    assert [m.unique().tolist() for m in r[1]] == [[0.5], [0], [0.5]]


def test_a_bad_value_that_is_no_news_is_no_harm():
    r, n = torch.zeros(2), torch.tensor([[1.0], [float("nan")]])
    assert update_((r,), (n,), 0.5, torch.tensor([True, False])).tolist() == [True, False]
    assert r.tolist() == [0.5, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 1000, 100_003])
@pytest.mark.parametrize("value", [0.0, 0.3, -1e-20, 1e20, 1e4])
def test_equal_samples_tell_nothing(dtype, count, value):
    """Whatever their mean's rounding."""
    samples = torch.full((count, 3), value, dtype=dtype)
    mean = samples.mean(0)
    centred = samples - mean
    cov = centred.T @ centred / count
    assert tells(mean[None], cov[None]).tolist() == [False]


def test_any_feature_that_differs_tells():
    """Beside one of any size, and by little, but more than its own rounding."""
    mean = torch.tensor([[1e9, 0.0], [0.0, 0.0], [0.0, 1e3], [1.0, 1e5]])
    cov = torch.diag_embed(torch.tensor([[0.0, 1.0], [1e-30, 0.0], [0.0, 3e-3**2], [1e-14, 0.05**2]]))
    assert tells(mean, cov).tolist() == [True, True, True, False]


def test_less_than_nothing_is_nothing():
    assert tells(torch.ones(1, 2), torch.full((1, 2, 2), -1e-20)).tolist() == [False]


def test_nan_is_for_the_update_to_refuse():
    mean, cov = torch.zeros(2, 2), torch.zeros(2, 2, 2)
    cov[0, 0, 0] = mean[1, 0] = float("nan")
    assert tells(mean, cov).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_covariance_whose_norm_overflows_tells_nothing(dtype):
    """Its root is zero, and finite."""
    most = torch.finfo(dtype).max ** 0.5
    cov = torch.eye(2, dtype=dtype) * torch.tensor([0.4 * most, 2 * most], dtype=dtype).view(2, 1, 1)
    assert tells(torch.zeros(2, 2, dtype=dtype), cov).tolist() == [True, False]


def test_a_plain_average_is_one():
    r, values = torch.zeros(2, dtype=torch.float64), randn(9, 2)
    for i, value in enumerate(values):
        update_((r,), (value,), average_share(torch.tensor(i), torch.float64))
    assert_close(r, values.mean(0), 1e-15)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1])
def test_nothing_moves_if_anything_is_not_finite(bad, which):
    r, n = [randn(3), randn(2, 2)], [randn(3, seed=1), randn(2, 2, seed=1)]
    kept = [t.clone() for t in r]
    n[which].view(-1)[1] = bad
    with pytest.warns(RuntimeWarning, match="met NaN or Inf in its statistics"):
        assert not bool(update_(r, n, 0.1))
    for now, then in zip(r, kept, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("bad", BAD)
def test_nothing_moves_where_values_are_not_read_either(bad, monkeypatch):
    """In a compiled graph, as on a GPU: no branch and no warning, the same statistics."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    r, n = [randn(3), randn(2, 2)], [randn(3, seed=1), torch.full((2, 2), bad, dtype=torch.float64)]
    kept = [t.clone() for t in r]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bool(update_(r, n, 0.1))
    for now, then in zip(r, kept, strict=True):
        assert torch.equal(now, then)


def test_overflow_of_the_buffers_dtype_is_not_finite():
    r = torch.ones(2, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="overflow of the buffers' dtype"):
        assert not bool(update_((r,), (torch.full((2,), 1e8),), 0.1))
    assert torch.equal(r, torch.ones(2, dtype=torch.float16))


def test_momentum_zero_still_notices():
    r = torch.ones(2)
    with pytest.warns(RuntimeWarning, match="NaN or Inf"):
        update_((r,), (torch.full((2,), float("nan")),), 0.0)
    assert torch.equal(r, torch.ones(2))


def test_warns_once_and_then_never():
    r, n = torch.ones(2), torch.full((2,), float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            update_((r,), (n,), 0.1)
    assert [w.category for w in caught] == [RuntimeWarning]


def test_finite_values_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update_((torch.ones(2),), (torch.zeros(2),), 0.1)


def test_no_gradient_flows_into_the_buffers():
    r, n = torch.zeros(2), torch.ones(2, requires_grad=True)
    update_((r,), (n * 2,), 0.5)
    assert not r.requires_grad
    assert torch.equal(r, torch.ones(2))


def test_no_host_synchronisation_off_the_cpu():
    """On a device whose values cannot be read, the update still runs: nothing waits for one."""
    r, n = torch.ones(2, device="meta"), torch.ones(2, device="meta")
    finite = update_((r,), (n,), 0.1)
    assert finite.device.type == "meta"
