"""Norms of many elements: torch's own are off by 6e-5 at 4 million float32 elements on a CPU."""

import math

import pytest
import torch
from torch import Tensor, nn

from lawn.diagnostics import UpdateMonitor, top_eigenvalue
from lawn.optim import LAMB, LAMBLAWN, bound_norms, sums, update

MANY = 4 * 10**6
PRECISION = 1e-5


def numbers(seed: int = 0, size: int = MANY) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 17, sums.LARGE, sums.LARGE + 1, MANY])
def test_sums_are_those_in_float64(size):
    a, b = numbers(0, size), numbers(1, size)
    exact = a.double().norm()
    for found in (sums.norm(a), *sums.norms([a]), sums.dot(a, a).sqrt()):
        torch.testing.assert_close(found.double(), exact, rtol=PRECISION, atol=0)
        assert found.dtype == a.dtype
        assert found.ndim == 0
    bound = PRECISION * exact * b.double().norm()
    assert abs(sums.dot(a, b).double() - a.double() @ b.double()) <= bound


def test_norms_of_weights_beside_each_other():
    """Sums over their parts of one vector, which would be off by 5e-5 in float32."""
    ws = [numbers(seed, 3 * 10**5) for seed in range(3)]
    exact = torch.stack([w.double().norm() for w in ws])
    torch.testing.assert_close(update.norms(ws, [1, 1, 1]).double(), exact, rtol=1e-7, atol=0)
    joined = torch.stack([exact[:2].norm(), exact[2]])
    torch.testing.assert_close(update.norms(ws, [2, 1]).double(), joined, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_norms_of_equal_and_of_complex_numbers(dtype):
    """The worst case of float32 accumulators, and squares whose sum is another than that of absolute squares."""
    t = torch.full((MANY,), 0.037, dtype=dtype)
    if dtype.is_complex:
        t = t * (1 + 2j)
    exact = torch.linalg.vector_norm(torch.view_as_real(t) if dtype.is_complex else t, dtype=torch.float64)
    for found in (sums.norm(t), sums.norm(t.conj()), *sums.norms([t])):
        torch.testing.assert_close(found.double(), exact, rtol=PRECISION, atol=0)
        assert found.dtype == dtype.to_real()


def test_norms_of_several_tensors_of_any_layout():
    rows = numbers().view(1000, -1)
    tensors = [rows, rows.T, rows[:, ::2], torch.zeros(0), torch.tensor(-3.0), torch.zeros(sums.LARGE + 1)]
    for found, t in zip(sums.norms(tensors), tensors, strict=True):
        torch.testing.assert_close(found.double(), t.double().norm(), rtol=PRECISION, atol=0)


def test_the_derivative_of_the_norm():
    v = numbers().requires_grad_()
    sums.norm(v).backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, v.detach() / v.detach().double().norm().float(), rtol=PRECISION, atol=0)


def test_second_derivatives_where_a_part_is_zero():
    v = torch.ones(3 * sums.LARGE)
    v[: 2 * sums.LARGE] = 0
    direction = torch.ones_like(v)
    v.requires_grad_()
    (first,) = torch.autograd.grad(sums.norm(v), v, create_graph=True)
    (second,) = torch.autograd.grad(first @ direction, v)
    norm = math.sqrt(sums.LARGE)
    torch.testing.assert_close(second, direction / norm - v.detach() * sums.LARGE / norm**3)


@pytest.mark.parametrize("kind", [LAMB, LAMBLAWN])
@pytest.mark.parametrize("axes", [None, (1, 2)])
def test_trust_ratios_of_many_elements(kind, axes):
    """The first update of LAMB moves each slice by lr times its norm."""
    before = numbers().view(2, 1000, -1)
    w = nn.Parameter(before.clone())
    given = {"params": [w], **({} if axes is None else {"norm_axes": axes})}
    optimizer = kind([given], lr=0.1)
    w.grad = numbers(1).view_as(w)
    optimizer.step()
    for old, new in zip(
        before.double().split(1 if axes else 2), w.detach().double().split(1 if axes else 2), strict=True
    ):
        torch.testing.assert_close((new - old).norm() / old.norm(), torch.tensor(0.1).double(), rtol=PRECISION, atol=0)


def test_bounded_norms_of_many_elements():
    layer = nn.Linear(4000, 1000, bias=False)
    norm = layer.weight.detach().double().norm()
    bound_norms(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(numbers().view(1000, -1).abs().sqrt())
    torch.testing.assert_close(layer.weight.double().norm(), norm, rtol=PRECISION, atol=0)


def test_updates_of_many_elements_are_measured():
    layer = nn.Linear(4000, 1000, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    monitor = UpdateMonitor(layer, optimizer)
    before = layer.weight.detach().double().clone()
    layer.weight.grad = 2 * layer.weight.detach()
    optimizer.step()
    found = monitor.means()["weight"]
    assert math.isclose(found["norm"], before.norm(), rel_tol=PRECISION)
    assert math.isclose(found["gradient_norm"], 2 * before.norm(), rel_tol=PRECISION)
    assert math.isclose(found["radial"], 1, rel_tol=PRECISION)


def test_the_eigenvalue_of_a_large_operator():
    diagonal = torch.zeros(MANY)
    diagonal[: MANY // 2] = 2.0
    assert math.isclose(top_eigenvalue(lambda v: diagonal * v, MANY, steps=2), 2, rel_tol=PRECISION)
