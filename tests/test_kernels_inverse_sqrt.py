"""The Triton inverse root against the float64 reference, its products counted, its rounding bounded."""

from __future__ import annotations

import importlib

import pytest
import torch

import tdeconv
from cases import SPECTRA
from helpers import assert_close, difference, randn
from interpreting import DEVICE, poison  # noqa: F401  (a fixture; and it must come before the kernels)
from tdeconv import reference

pytest.importorskip("triton")
stage = importlib.import_module("tdeconv.kernels.inverse_sqrt")  # the package's name for it is the function's
newton_schulz = importlib.import_module("tdeconv.kernels.newton_schulz")
precision = importlib.import_module("tdeconv.kernels.precision")

pytestmark = pytest.mark.usefixtures("poison")
SLOW = pytest.mark.slow
CONDITIONS = {1e3: 2e-5, 1e4: 1e-4, 1e5: 1e-3, 1e6: 2e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter is slow: fewer partial sums."""
    monkeypatch.setattr(stage, "PARTS", 2)


@pytest.fixture
def phases(monkeypatch):
    """Small matrices as large ones: phase by phase over tiles."""
    monkeypatch.setattr(stage, "SMALL", 0)


def covariance(d: int, condition: float = 1e3, batch: int = 1, scale: float = 1.0, rank: int | None = None):
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), d, dtype=torch.float64) * scale
    if rank is not None:
        values[rank:] = 0
    covs = []
    for i in range(batch):
        q = torch.linalg.qr(randn(d, d, seed=i))[0]
        covs.append((q * values) @ q.mT)
    cov = torch.stack(covs)
    return ((cov + cov.mT) / 2).float()


def by_reference(cov, grad, n_iter: int, dtype: torch.dtype):
    leaf = cov.to(dtype).requires_grad_()
    root = reference.inverse_sqrt(leaf, n_iter)
    (g,) = torch.autograd.grad(root, leaf, grad.to(dtype))
    return root.detach(), (g + g.mT) / 2


def exactly(cov, grad, n_iter: int):
    return by_reference(cov, grad, n_iter, torch.float64)


def errors_of_plain_torch(cov, grad, n_iter: int) -> list[float]:
    """In float32, the root's and the gradient's: the largest of the covariance at a few scales, as one may be lucky."""
    errors = []
    for scale in (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7):
        pair = by_reference(scale * cov, grad, n_iter, torch.float32), exactly(scale * cov, grad, n_iter)
        errors.append([difference(plain, exact) for plain, exact in zip(*pair, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


def run(cov, grad, n_iter: int):
    root, *saved = stage.inverse_sqrt(cov.to(DEVICE), n_iter)
    for tensor, empty in zip(saved, stage.inverse_sqrt_saved(cov.to(DEVICE), n_iter), strict=True):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (empty.shape, empty.dtype, empty.stride())
        assert torch.isfinite(tensor).all()
    back = stage.inverse_sqrt_backward(grad.to(DEVICE), *saved, n_iter)
    assert torch.equal(root, root.mT)
    assert torch.equal(back, back.mT)
    return root.cpu(), back.cpu()


def check(cov, n_iter: int, bound: float, grad_bound: float) -> None:
    grad = randn(*cov.shape, dtype=torch.float32, seed=5)
    actual, expected = run(cov, grad, n_iter), exactly(cov, grad, n_iter)
    # on some CPUs, above all after many steps, plain torch's own rounding is beyond the bounds
    plain = errors_of_plain_torch(cov, grad, n_iter)
    allowed = [max(b, 2 * e) for b, e in zip((bound, grad_bound), plain, strict=True)]
    assert_close(actual[0], expected[0], allowed[0])
    assert_close(actual[1], expected[1], allowed[1])


# --------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("d", [1, 9, 16, 17, 33, *(pytest.param(d, marks=SLOW) for d in (2, 27, 64))])
def test_a_program_per_matrix(d):
    check(covariance(d), 5, 1e-6, 2e-6)


@pytest.mark.parametrize("d", [33, pytest.param(5, marks=SLOW), pytest.param(97, marks=SLOW)])
def test_phases(d, phases):
    check(covariance(d), 5, 1e-6, 2e-6)


def test_the_size_from_which_phases_run():
    check(covariance(stage.SMALL + 1), 2, 1e-6, 2e-6)


@pytest.mark.parametrize("n_iter", [*range(1, 8), *(pytest.param(n, marks=SLOW) for n in (8, 11, 15, 20))])
@pytest.mark.parametrize("d", [9, pytest.param(20, marks=SLOW)])
def test_every_number_of_steps(d, n_iter):
    bound = 1e-6 if n_iter <= 5 else 2e-5
    check(covariance(d, 100), n_iter, bound, 2 * bound)


@pytest.mark.parametrize("n_iter", [1, 2, 4, *(pytest.param(n, marks=SLOW) for n in (3, 6, 7, 8, 20))])
def test_every_number_of_steps_in_phases(n_iter, phases):
    bound = 1e-6 if n_iter <= 5 else 2e-5
    check(covariance(20, 100), n_iter, bound, 2 * bound)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("d", [12, pytest.param(40, marks=SLOW)])
def test_fifteen_steps(d, condition):
    check(covariance(d, condition), 15, CONDITIONS[condition], 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_fifteen_steps_in_phases(condition, phases):
    check(covariance(33, condition), 15, CONDITIONS[condition], 2e-3)


@pytest.mark.parametrize("d", [9, 20])
@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_scale(d, scale):
    check(covariance(d, scale=scale), 5, 1e-6, 2e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_scale_in_phases(scale, phases):
    check(covariance(20, scale=scale), 3, 1e-6, 2e-6)


@pytest.mark.parametrize("d", [9, 20])
def test_a_batch(d):
    check(covariance(d, batch=3), 3, 1e-6, 2e-6)


def test_a_batch_in_phases(phases):
    check(covariance(33, batch=2), 2, 1e-6, 2e-6)


@pytest.mark.parametrize("d", [9, 20])
def test_rank_deficient(d):
    """Without eps: the root of the missing directions is the polynomial at zero."""
    check(covariance(d, rank=d // 2), 5, 1e-6, 2e-6)


# larger ones take minutes under the interpreter
SHORT = [s for s in SPECTRA if len(s.eigenvalues) <= 64]


@pytest.mark.parametrize(
    "spectrum", [pytest.param(s, id=s.name, marks=SLOW if len(s.eigenvalues) > 16 else ()) for s in SHORT]
)
def test_designed_spectra(spectrum):
    cov = spectrum.tensor(torch.float32)
    check(cov.reshape(-1, *cov.shape[-2:]), 5, 2e-6, 5e-6)


@pytest.mark.parametrize("d", [9, 20, 80])
def test_an_empty_batch(d):
    root, *saved = stage.inverse_sqrt(torch.empty(0, d, d, device=DEVICE), 5)
    assert root.shape == (0, d, d)
    assert stage.inverse_sqrt_backward(root, *saved, 5).shape == (0, d, d)


@pytest.mark.parametrize("d", [9, 20])
def test_strides(d):
    """Transposed, sliced, expanded: values count, not how they lie."""
    cov = covariance(d, batch=2)
    wide = torch.zeros(2, d, 2 * d)
    wide[:, :, ::2] = cov.mT
    grad = torch.ones(1, 1, 1).expand_as(cov)
    for actual, expected in zip(run(wide[:, :, ::2].mT, grad, 3), run(cov, grad.contiguous(), 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("d", [9, 20])
def test_what_is_not_quite_symmetric_counts_by_its_symmetric_part(d):
    cov = covariance(d)
    skew = randn(*cov.shape, dtype=torch.float32) * 1e-7
    assert difference(run(cov + skew - skew.mT, cov, 3)[0], run(cov, cov, 3)[0]) < 1e-5


@pytest.mark.parametrize("d", [9, 20])
def test_not_finite_stays_not_finite(d):
    cov = covariance(d, batch=2)
    cov[0, 0, 0] = torch.nan
    root = stage.inverse_sqrt(cov.to(DEVICE), 3)[0]
    assert root[0].isnan().all()
    assert root[1].isfinite().all()


@pytest.mark.parametrize("d", [9, 20])
def test_twice_the_same(d):
    cov, grad = covariance(d, batch=2), randn(2, d, d, dtype=torch.float32)
    for first, second in zip(run(cov, grad, 3), run(cov, grad, 3), strict=True):
        assert torch.equal(first, second)


def test_float64_is_the_torch_backends():
    cov = covariance(6).double().requires_grad_()
    actual, expected = (tdeconv.inverse_sqrt(cov, backend=b) for b in ("triton", "torch"))
    assert torch.equal(actual, expected)
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), cov) for y in (actual, expected))
    assert torch.equal(actual, expected)


def test_a_matrix_past_counting_is_the_torch_backends():
    """Offsets within a matrix, filled up to whole tiles, are counted in 32 bits."""
    small, large = (torch.empty(1, d, d, device="meta") for d in (46_000, 46_300))
    assert stage._takes(small)
    assert not stage._takes(large)


def test_the_public_function():
    cov = covariance(20)[0].requires_grad_()
    root = tdeconv.inverse_sqrt(cov, backend="triton")
    assert_close(root, tdeconv.inverse_sqrt(cov.double(), backend="reference"), 1e-6)
    assert torch.autograd.grad(root.sum(), cov)[0].shape == cov.shape


def test_opcheck():
    torch.library.opcheck(torch.ops.tdeconv.inverse_sqrt, (covariance(9).requires_grad_(), 5, "triton"))


# ----------------------------------------------------------------------------------------- the polynomial as a program


@pytest.mark.parametrize(("n_iter", "products", "chain"), [(5, 10, 9), (15, 35, 29), (1, 0, 1), (2, 2, 2), (4, 7, 7)])
def test_products(n_iter, products, chain):
    program = newton_schulz.program(n_iter)
    assert sum(newton_schulz.plan(n_iter)) == n_iter
    assert sum(len(op.factors) for ops in program.phases for op in ops) == products
    assert len(program.phases) == chain
    both = program.with_tangents()
    assert sum(len(op.factors) for ops in both.phases for op in ops if op.out >= newton_schulz.TANGENT) == 2 * products
    assert len(both.phases) == chain


@pytest.mark.parametrize("n_iter", [5, 15])
def test_what_the_kernels_launch(n_iter, phases, monkeypatch):
    """Counted where they run: a tile product per operation, and phases in a chain."""
    launched = []
    monkeypatch.setattr(stage, "launch", lambda kernel, grid, **kw: launched.append((kernel.__name__, grid, kw)))
    cov = covariance(20)
    stage.inverse_sqrt(cov, n_iter)
    products = [grid for name, grid, _ in launched if name == "_inverse_sqrt_product_kernel"]
    assert (sum(n for (n,) in products), len(products)) == {5: (10, 9), 15: (35, 29)}[n_iter]
    launched.clear()
    stage.inverse_sqrt_backward(cov, cov, cov[:, 0, 0], n_iter)
    products = [grid for name, grid, _ in launched if name == "_inverse_sqrt_product_kernel"]
    assert (sum(n for (n,) in products), len(products)) == {5: (20, 9), 15: (70, 29)}[n_iter]


@pytest.mark.parametrize("n_iter", range(1, 21))
def test_no_operation_overwrites_what_its_phase_reads(n_iter):
    for ops in newton_schulz.program(n_iter).with_tangents().phases:
        written = [slot for op in ops for slot in (op.out, op.out2) if slot >= 0]
        assert len(written) == len(set(written))
        assert not {slot for op in ops for pair in op.factors for slot in pair} & set(written)
        others = [{op.out, op.out2} - {-1} for op in ops]
        assert all(op.c not in slots for i, op in enumerate(ops) for j, slots in enumerate(others) if i != j)


# -------------------------------------------------------------------------------------------------------------- policy


def test_default_precision_rounds_to_three_bfloat16_passes(phases, monkeypatch):
    """By the interpreter as by a GPU: the halves of the mantissa are rounded, not cut."""
    monkeypatch.setattr(precision, "_SMALL", 0)
    cov, grad = covariance(20), randn(1, 20, 20, dtype=torch.float32)
    expected = exactly(cov, grad, 5)
    for name, low, high, grad_high in (("default", 1e-6, 3e-5, 5e-5), ("strict", 0.0, 1e-6, 2e-6)):
        with precision.use(name):
            actual = run(cov, grad, 5)
        assert low <= difference(actual[0], expected[0]) <= high
        assert difference(actual[1], expected[1]) <= grad_high


@pytest.mark.parametrize(
    ("features", "n_iter", "policy", "exact"),
    [(129, 7, "default", False), (129, 8, "default", True), (128, 5, "default", True), (576, 5, "strict", True)],
)
def test_policy(features, n_iter, policy, exact):
    with precision.use(policy):
        how = precision.root_products(torch.device("cuda"), features, n_iter)
    assert how == ("tf32x3" if exact else "bf16x3")


def test_policy_by_environment(monkeypatch):
    monkeypatch.setenv("TDECONV_PRECISION", "strict")
    assert precision.policy() == "strict"
    with precision.use("default"):
        assert precision.policy() == "default"
    monkeypatch.setenv("TDECONV_PRECISION", "loose")
    with pytest.raises(ValueError, match="precision must be one of 'default', 'strict', got 'loose'"):
        precision.policy()


@pytest.mark.parametrize("features", [65, 576, 4096])
def test_candidates_sum_in_the_same_order(features):
    configs = importlib.import_module("tdeconv.kernels.configs")
    for within in (configs.Limits(shared=65536), configs.cuda_limits(9, 0)):
        assert {c["BLOCK_K"] for c in stage.candidates(features, within)} == {stage.BLOCK_K}


def test_tiles_of_any_size_agree():
    configs = importlib.import_module("tdeconv.kernels.configs")
    cov, root = covariance(33), []
    for size in (32, 64):
        out = [torch.empty_like(cov), torch.empty_like(cov), torch.empty(1)]
        stage._forward(cov, *out, 3, configs.Config.of(4, 2, BLOCK=size, BLOCK_K=stage.BLOCK_K))
        root.append(out[0])
    assert difference(root[0], root[1]) <= 2e-7


@pytest.mark.parametrize(("asked", "expected"), [(None, False), ("0", False), ("1", True)])
def test_one_launch_with_barriers_only_where_asked_for(asked, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TDECONV_COOPERATIVE", raising=False)
    if asked is not None:
        monkeypatch.setenv("TDECONV_COOPERATIVE", asked)
    assert stage._cooperative(torch.device("cuda"), 576) is expected
    assert not stage._cooperative(torch.device("cpu"), 576)
