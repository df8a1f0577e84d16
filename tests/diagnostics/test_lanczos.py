"""The top eigenvalue against dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lawn.diagnostics import top_eigenvalue


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ rotation.T


def top_of(matrix: Tensor, **options) -> float:
    return top_eigenvalue(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype, **options)


@given(seed=st.integers(0, 1000), size=st.integers(1, 30), shift=st.floats(-10, 10))
@settings(max_examples=40, deadline=None)
def test_top_eigenvalue_of_any_symmetric_matrix(seed, size, shift):
    """Definite ones and indefinite ones, with the largest in size at either end."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = matrix + matrix.T + shift * torch.eye(size, dtype=torch.float64)
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    assert top_of(matrix, seed=seed, steps=1000, tolerance=0.0) == pytest.approx(top, rel=1e-11, abs=1e-11)


@given(
    values=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=5),
    repeated=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_top_eigenvalue_may_be_repeated(values, repeated, seed):
    matrix = symmetric(values * repeated, seed)
    assert top_of(matrix, seed=seed) == pytest.approx(max(values), abs=1e-6)


def test_top_eigenvalue_of_nothing_and_of_one():
    assert top_of(torch.zeros(6, 6, dtype=torch.float64)) == 0
    assert top_of(torch.eye(6, dtype=torch.float64)) == pytest.approx(1, rel=1e-15)
    assert top_of(torch.full((1, 1), -3.0)) == pytest.approx(-3)


def test_the_start_vector_needs_no_generator_of_the_default_device():
    """The operator of a GPU is on it; meta stands for that here, where results have no values."""
    asked = []

    def operator(v: Tensor) -> Tensor:
        asked.append(v.device.type)
        raise StopIteration

    with torch.device("meta"), pytest.raises(StopIteration):
        top_eigenvalue(operator, 3)
    assert asked == ["meta"]


def test_top_eigenvalue_is_found_in_few_steps_where_it_stands_apart():
    """As curvature does: most of it near zero, a few directions of large curvature."""
    bulk = torch.linspace(-0.1, 0.1, 300, dtype=torch.float64).tolist()
    matrix = symmetric([*bulk, 5.0, 9.0, 10.0])
    calls = 0

    def operator(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix.to(v) @ v

    for dtype in (torch.float64, torch.float32):
        calls = 0
        found = top_eigenvalue(operator, len(matrix), dtype=dtype)
        assert found == pytest.approx(10, rel=1e-6)
        assert calls <= 20
        assert top_eigenvalue(operator, len(matrix), dtype=dtype) == found  # the start is the seed's


def test_too_few_steps_are_told():
    matrix = symmetric(torch.linspace(0, 1, 100, dtype=torch.float64).tolist())
    with pytest.warns(UserWarning, match="is only known to .* after 5 steps"):
        assert 0.5 < top_of(matrix, steps=5) < 1


def test_an_operator_that_is_not_finite_has_no_top():
    assert math.isnan(top_of(torch.full((3, 3), torch.nan)))
    assert math.isnan(top_of(torch.full((3, 3), torch.inf)))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("others", [[-10.0, -9.0], [-100.0]])
def test_a_large_negative_eigenvalue_does_not_hide_the_top(others, tolerance):
    """The tolerance is relative to the eigenvalue, not to the largest magnitude."""
    matrix = torch.tensor([*others, 1.0, *[0.0] * 300], dtype=torch.float64).diag()
    for seed in range(5):
        assert top_of(matrix, seed=seed, tolerance=tolerance) == pytest.approx(1.0, rel=tolerance)


def test_the_tolerance_of_a_negative_eigenvalue_is_that_of_its_magnitude():
    calls = 0

    def operator(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -torch.linspace(1, 2, 300) * v

    assert -2 < top_eigenvalue(operator, 300, tolerance=0.5) < -1
    assert calls == 1
