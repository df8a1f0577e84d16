"""torch.compile of an optimizer's step: no graph break but at the first update and the switch, and few graphs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lawn import LAMBLAWN, SGDLAWN, AdamLAWN

SIZES = [(6, 4), (6,), (3, 6), (3,)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make_pair(kind: Any, sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """Two optimizers of equal parameters; the last two of four are joined to one norm."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    made = []
    for _ in range(2):
        params = [nn.Parameter(w.clone()) for w in weights]
        groups: list[dict[str, Any]] = [{"params": params[:2]}]
        if params[2:]:
            groups.append({"params": params[2:], "constrain": True, "blocks": [0, 0]})
        made.append(kind(groups, lr=torch.tensor(0.02), **keys))
    return made


def advance(optimizer: Optimizer, step: Callable[[], Any], start: int, stop: int) -> None:
    for t in range(start, stop):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"].fill_(0.02 * (1 - t / 60))
        step()


def assert_close(ours: Optimizer, theirs: Optimizer, tolerance: float = 1e-6) -> None:
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (group["steps"], group["switched"]) == (other["steps"], other["switched"])
        for p, q in zip(group["params"], other["params"], strict=True):
            assert (p - q).norm() <= tolerance * q.norm()
            assert ours.state[p].keys() == theirs.state[q].keys()
            for key, value in theirs.state[q].items():
                torch.testing.assert_close(ours.state[p][key], value, rtol=1e-5, atol=1e-7)


def counts() -> tuple[int, int]:
    """Graphs and graph breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def check_across_the_switch(kind: Any, sizes: list[tuple[int, ...]], backend: str, **keys: Any) -> None:
    ours, theirs = make_pair(kind, sizes, free_steps=10, **keys)
    compiled = torch.compile(ours.step, backend=backend)
    advance(ours, compiled, 0, 1)
    _, first = counts()
    advance(ours, compiled, 1, 10)
    assert counts()[1] == first  # the first update makes the state
    advance(ours, compiled, 10, 11)
    _, switch = counts()
    assert switch <= first + 1
    advance(ours, compiled, 11, 30)
    graphs, breaks = counts()
    assert breaks == switch
    assert 2 <= graphs <= 4  # a free one with the first count of steps, one with any count, and a constrained one
    advance(theirs, theirs.step, 0, 30)
    assert_close(ours, theirs)


def test_sgd_lawn_across_the_switch():
    check_across_the_switch(SGDLAWN, SIZES[:1], "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN, LAMBLAWN])
def test_every_optimizer_across_the_switch(kind, backend):
    check_across_the_switch(kind, SIZES, backend)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN, LAMBLAWN])
def test_one_graph_without_a_break(kind):
    """Made by hand, the switch needs no step that is not traced."""
    ours, theirs = make_pair(kind, SIZES)
    compiled = torch.compile(ours.step, backend="eager", fullgraph=True)
    for optimizer, step in ((ours, compiled), (theirs, theirs.step)):
        advance(optimizer, optimizer.step, 0, 1)
        advance(optimizer, step, 1, 8)
        optimizer.constrain()
        advance(optimizer, step, 8, 16)
    assert_close(ours, theirs)
    assert counts()[0] <= 4


@pytest.mark.slow
def test_a_group_without_weights_switches():
    ours, theirs = make_pair(AdamLAWN, [(6,)], free_steps=3)
    advance(ours, torch.compile(ours.step, backend="eager"), 0, 6)
    advance(theirs, theirs.step, 0, 6)
    assert ours.constrained
    assert_close(ours, theirs)


def test_norms_that_change_later_are_followed():
    """By a checkpoint, which is compared with the weights in a step that is not traced, and by hand."""
    ours, theirs = make_pair(AdamLAWN, SIZES, free_steps=0)
    compiled = torch.compile(ours.step, backend="eager")
    for optimizer, step in ((ours, compiled), (theirs, theirs.step)):
        advance(optimizer, step, 0, 4)
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(2)
        optimizer.constrain(again=True)
        advance(optimizer, step, 4, 8)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        advance(optimizer, step, 8, 12)
    assert_close(ours, theirs)
    first = ours.param_groups[0]["params"][0]
    ours.state[first]["lawn_norm"] *= 2
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="its state says"):
        advance(ours, compiled, 12, 13)


@pytest.mark.parametrize("rows", [1, 3])
def test_norms_of_slices_without_slices_are_refused(rows):
    w = nn.Parameter(torch.randn(rows, 5))
    optimizer = AdamLAWN([{"params": [w], "norm_axes": 1}], lr=torch.tensor(0.01), free_steps=1)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        w.grad = torch.randn(rows, 5)
        compiled()
    optimizer.param_groups[0]["norm_axes"] = None
    with pytest.raises(ValueError, match="has a single norm, but its state"):
        compiled()


def test_what_the_eager_step_refuses_is_refused():
    """Options of a group, and the norm of a weight whose gradient comes late."""
    (ours, _) = make_pair(SGDLAWN, [(6, 4), (4, 4), (3, 6), (3,)], free_steps=0)
    compiled = torch.compile(ours.step, backend="eager")
    advance(ours, compiled, 0, 3)
    first, second = (group["params"] for group in ours.param_groups)
    before = [p.detach().clone() for p in (*first, *second)]

    def attempt(message: str) -> None:
        for p in (*first, *second):
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=message):
            compiled()
        assert all(torch.equal(p, q) for p, q in zip((*first, *second), before, strict=True))

    settings = ((0, "weight_decay", 0.1, 0.0), (1, "rounding", "up", "nearest"), (0, "maximize", True, False))
    for index, key, wrong, right in settings:
        ours.param_groups[index][key] = wrong
        attempt(f"param group {index}: .*{key}")
        ours.param_groups[index][key] = right
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][1]["lawn_norm"] *= 2
    ours.load_state_dict(saved)
    first[1].grad = None
    for _ in range(2):
        compiled()
    before = [p.detach().clone() for p in (*first, *second)]
    attempt("its state says")


def test_a_joined_parameter_that_is_frozen_and_trained_again():
    ours, theirs = make_pair(SGDLAWN, SIZES, free_steps=0)
    compiled = torch.compile(ours.step, backend="eager")
    for start, trained in ((0, True), (3, False), (6, True), (9, False)):
        for optimizer, step in ((ours, compiled), (theirs, theirs.step)):
            frozen = optimizer.param_groups[1]["params"][1]
            frozen.requires_grad_(trained)
            before = frozen.detach().clone()

            def without_its_gradient(p=frozen, step=step) -> None:
                p.grad = p.grad if p.requires_grad else None
                step()

            advance(optimizer, without_its_gradient, start, start + 3)
            assert torch.equal(frozen, before) != trained
    assert_close(ours, theirs)


@pytest.mark.slow
def test_stochastic_rounding_draws_the_same_numbers():
    ours, theirs = make_pair(SGDLAWN, SIZES[:1], torch.bfloat16, free_steps=3, rounding="stochastic")
    advance(ours, torch.compile(ours.step, backend="inductor"), 0, 8)
    advance(theirs, theirs.step, 0, 8)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert (p == q).float().mean() >= 0.9


def test_a_number_as_learning_rate_is_not_traced():
    """Each change of it would make a graph, so the step runs as it does without torch.compile."""
    (ours, _) = make_pair(AdamLAWN, SIZES[:1], free_steps=0)
    for group in ours.param_groups:
        group["lr"] = 0.02
    compiled = torch.compile(ours.step, backend="eager")
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    for _ in range(4):
        compiled()
    assert counts()[0] == 0
