"""The first layer of several recommenders at once, with Triton's kernels: in Triton's interpreter (see
tests/test_triton.py), and on a GPU."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
SHAPES = [(1, 3, 2, 1, 1), (3, 7, 5, 33, 40), (2, 90, 40, 500, 64)]  # runs, rows, rows, samples, units


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("special", [False, True])
def test_relu_of_sum(device, shape, special):
    from lawn.models.lookup import look_up, relu_of_sum

    runs, first, second, samples, units = shape
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(runs, rows, units, generator=generator) for rows in (first, second)]
    i, j = (torch.randint(rows, (samples, runs), generator=generator).T for rows in (first, second))  # not contiguous
    if special:
        tables[0][0, 0, 0], tables[1][-1, -1, -1] = torch.nan, -torch.inf
    gradient = torch.randn(runs, samples, units, generator=generator)

    def units_and_gradients(function, device: str) -> tuple[Tensor, ...]:
        leaves = [table.to(device).requires_grad_() for table in tables]
        result = function(*leaves, i.to(device), j.to(device))
        return result, *torch.autograd.grad(result, leaves, gradient.to(device))

    got = units_and_gradients(relu_of_sum, device)
    assert "ReluOfSum" in str(got[0].grad_fn)
    expected = units_and_gradients(lambda a, b, i, j: (look_up(a, i) + look_up(b, j)).relu(), "cpu")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_relu_of_sum_has_no_second_derivatives(device):
    from lawn.models.lookup import relu_of_sum

    first, second = (torch.randn(1, 3, 4, device=device, requires_grad=True) for _ in range(2))
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    (gradient,) = torch.autograd.grad(relu_of_sum(first, second, ids, ids).pow(3).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [7, 5000, 4999])
def test_runs_at_once_on_a_gpu_equal_each_alone_on_a_cpu(samples, bias):
    from lawn.models.ncf import NCFMLP, batch_parts

    assert (batch_parts(samples) > 1) == (samples == 5000)
    models = [NCFMLP(30, 800, factors=8, layers=3, init="torch", bias=bias) for _ in range(3)]
    users, items = torch.randint(30, (3, samples)), torch.randint(800, (3, samples))
    stacks = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models]).cuda().requires_grad_()
        for name, _ in models[0].named_parameters()
    }
    logits = models[0].forward_vectorized(stacks, users.cuda(), items.cuda())
    logits.square().sum().backward()
    for k, model in enumerate(models):
        alone = model(users[k], items[k])
        alone.square().sum().backward()
        torch.testing.assert_close(logits[k].detach().cpu(), alone.detach(), rtol=1e-3, atol=1e-4)
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(stacks[name].grad[k].cpu(), p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 199, 943, 3706, 6040, 10_000, 99_991, 100_000, 1 << 20])
def test_parts_of_a_batch_are_equal_and_long(rows):
    from lawn.models.ncf import MAX_PARTS, PART_ROWS, batch_parts

    parts = batch_parts(rows)
    assert rows % parts == 0
    assert parts == 1 or rows // parts >= PART_ROWS
    assert parts <= MAX_PARTS
    assert {10_000: 50, 99_991: 1, 6040: 20}.get(rows, parts) == parts
