"""The optimizers beyond the paper: each departs from its base in the way that its own paper says."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from lawn.optimizers import OPTIMIZERS
from tests.helpers import compose

ADAM = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}


def networks(count: int) -> list[nn.Sequential]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def step(network: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    """An update on labels that are separable, so that weights grow."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(t))
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), x[:, :3].argmax(1)).backward()
    optimizer.step()


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters() if p.ndim > 1]


@pytest.mark.slow  # the package compiles its updates when it is imported
def test_cpr_bounds_norms_by_those_after_the_warm_start():
    """Adam until then; from there on the bounds are finite, active, and hold (Franke et al. 2024)."""
    pytest.importorskip("pytorch_cpr")
    ours, plain = networks(2)
    optimizer = OPTIMIZERS["adam_cpr"](ours, **ADAM, warm_start_steps=50)
    adam = Adam(plain.parameters(), lr=0.01, foreach=True)
    for t in range(50):
        step(ours, optimizer, t)
        step(plain, adam, t)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))
    bounds = [w.square().sum().item() for w in weights(ours)]
    states = [optimizer.state[p] for p in ours.parameters() if p.ndim > 1]
    assert [state["kappa"].item() for state in states] == pytest.approx(bounds)
    for t in range(50, 800):
        step(ours, optimizer, t)
        step(plain, adam, t)
    assert all(state["lagmul"].item() > 0 for state in states)
    for ended, free, bound in zip(weights(ours), weights(plain), bounds, strict=True):
        assert free.square().sum() > 1.5 * bound
        assert ended.square().sum() < 1.1 * bound


def test_cprs_warm_start_is_a_share_of_the_budget():
    assert compose("optim=adam_cpr", "train.epochs=300").optim.warm_start_epochs == 30


def test_adamp_leaves_out_the_radial_part_where_the_gradient_has_none():
    """Of a weight whose gradient is orthogonal to it, as a scale-invariant one's is (Heo et al. 2021)."""
    pytest.importorskip("adamp")

    def cosine(name: str) -> float:
        """Of weight and update, after gradients that are orthogonal to the weight but not to each other."""
        torch.manual_seed(0)
        layer = nn.Linear(8, 1, bias=False)
        optimizer = OPTIMIZERS[name](layer, **ADAM, weight_decay=0.0)
        w = layer.weight
        for t in range(5):
            before = w.detach().clone()
            g = torch.randn(1, 8, generator=torch.Generator().manual_seed(t))
            w.grad = g - before * (g * before).sum() / before.square().sum()
            optimizer.step()
        update = w.detach() - before
        return abs((update * before).sum() / update.norm() / before.norm()).item()

    assert cosine("adamp") < 1e-5
    assert cosine("adamw") > 1e-2


def test_muons_updates_have_equal_singular_values():
    """The momentum is replaced by the nearest orthogonal matrix, about (Jordan et al. 2024)."""
    network, plain = networks(2)
    optimizer = OPTIMIZERS["muon"](network, lr=0.01, betas=[0.9, 0.999], momentum=0.95, weight_decay=0.0)
    adam = Adam(plain.parameters(), lr=0.01)
    spreads = []
    for stepped, by in ((network, optimizer), (plain, adam)):
        before = weights(stepped)[1]
        step(stepped, by, 0)
        values = torch.linalg.svdvals((weights(stepped)[1] - before).float())
        spreads.append((values.max() / values.min()).item())
    assert spreads[0] < 2 < spreads[1]


def test_schedule_free_evaluates_the_average_of_its_iterates():
    """x is the mean of all z at a constant rate, and y, where gradients are taken, between (Defazio et al. 2024)."""
    pytest.importorskip("schedulefree")
    (network,) = networks(1)
    optimizer = OPTIMIZERS["schedule_free"](network, **ADAM, weight_decay=0.0)
    optimizer.train()
    p = next(network.parameters())
    iterates = []
    for t in range(20):
        step(network, optimizer, t)
        iterates.append(optimizer.state[p]["z"].clone())
    y = p.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(p.detach(), torch.stack(iterates).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, 0.9 * p.detach() + 0.1 * iterates[-1], rtol=1e-4, atol=1e-5)
