import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lawn import LAWN, LinearWarmupDecay
from lawn.optim import LinearWarmup


def rates(warmup: int, total: int, peak: float = 0.5) -> list[float]:
    """The rate of every update, and then the one at the end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    schedule = LinearWarmupDecay(optimizer, warmup, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def test_warmup_alone_is_the_first_part():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = LinearWarmup(optimizer, 3)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == [*rates(3, 50)[:4], 0.5, 0.5]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="warmup_steps"):
            LinearWarmup(optimizer, wrong)


def test_a_group_that_is_added_later_follows_the_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = LinearWarmupDecay(optimizer, 2, 10)
    for t in range(10):
        optimizer.step()
        if t == 4:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.25})
        schedule.step()
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == [rates(2, 10)[t + 1], rates(2, 10, peak=0.25)[t + 1]][: len(found)]
        assert len(found) == 1 + (t >= 4)
    again = LinearWarmupDecay(optimizer, 2, 10)
    again.load_state_dict(schedule.state_dict())
    assert again.base_lrs == [0.5, 0.25]


def test_a_schedule_has_an_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    for wrong in (3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="total_steps"):
            LinearWarmupDecay(optimizer, 3, wrong)


def advance(optimizer, schedule, updates):
    for _ in range(updates):
        optimizer.step()
        schedule.step()


def test_by_hand():
    assert rates(3, 7, peak=1.0) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(0, 2, peak=1.0) == [1.0, 0.5, 0.0]


def test_updates_after_the_last_one_have_a_rate_of_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = LinearWarmupDecay(optimizer, 1, 3)
    advance(optimizer, schedule, 6)
    assert schedule.get_last_lr() == [0.0]


@given(total=st.integers(1, 60), data=st.data())
def test_shape(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    seen = rates(warmup, total)
    assert all(rate > 0 for rate in seen[:-1])
    assert seen[-1] == 0
    assert max(seen) == seen[warmup] == 0.5
    assert seen[: warmup + 1] == sorted(seen[: warmup + 1])
    assert seen[warmup:] == sorted(seen[warmup:], reverse=True)


def test_survives_a_checkpoint():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = LinearWarmupDecay(optimizer, 2, 10)
    advance(optimizer, schedule, 4)
    twin_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    twin = LinearWarmupDecay(twin_optimizer, 2, 10)
    twin_optimizer.load_state_dict(optimizer.state_dict())
    twin.load_state_dict(schedule.state_dict())
    for s, o in ((schedule, optimizer), (twin, twin_optimizer)):
        advance(o, s, 1)
    assert twin.get_last_lr() == schedule.get_last_lr() == [0.625]


@pytest.mark.parametrize(("warmup", "total"), [(-1, 3), (3, 3), (0, 0)])
def test_bad_lengths(warmup, total):
    with pytest.raises(ValueError, match="warmup_steps"):
        LinearWarmupDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), warmup, total)


def test_a_loaded_schedule_of_another_length_warns():
    """It would train on at a rate of zero, in silence."""
    optimizer, other = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0) for _ in range(2))
    longer = LinearWarmupDecay(other, 2, 20)
    with pytest.warns(UserWarning, match="^the loaded schedule has total_steps=10, which replaces 20; to keep that, "):
        longer.load_state_dict(LinearWarmupDecay(optimizer, 2, 10).state_dict())
    longer.total_steps = 20
    advance(other, longer, 12)
    assert longer.get_last_lr() == [pytest.approx(8 / 18)]
    with pytest.warns(UserWarning, match="^the loaded schedule has warmup_steps=2, which replaces 3; to keep that, "):
        LinearWarmup(optimizer, 3).load_state_dict(LinearWarmup(other, 2).state_dict())


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("own", [None, 0.5])
def test_an_added_group_has_the_rate_that_it_was_given(tensor, own):
    """The optimizer's default is a tensor that the schedule fills, too."""
    made = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = torch.optim.Adam(made[:1], lr=torch.tensor(1.0) if tensor else 1.0)
    schedule = LinearWarmupDecay(optimizer, 3, 12)
    for step in range(8):
        if step == 2:
            optimizer.add_param_group({"params": made[1:], **({} if own is None else {"lr": own})})
        optimizer.step()
        schedule.step()
    first, added = (float(group["lr"]) for group in optimizer.param_groups)
    assert first == pytest.approx(4 / 9)
    assert added == pytest.approx((own or 1.0) * 4 / 9)


@pytest.mark.parametrize("tensor", [False, True])
def test_groups_that_a_resumed_run_adds(tensor):
    """A load gives the groups other tensors than the default, which the schedule must not have filled."""

    def made() -> tuple[torch.optim.Optimizer, LinearWarmup]:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(1.0) if tensor else 1.0)
        return optimizer, LinearWarmup(optimizer, 9)

    optimizer, schedule = made()
    optimizer.step()
    schedule.step()
    saved = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = made()
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for number in (3, 4):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        optimizer.step()
        schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([number / 10] * (number - 1))


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("loads", [False, True])
def test_initial_rates_follow_their_groups(tensor, loads):
    """Groups are removed, moved, added, and made from another one's keys."""

    def rate(lr: float) -> float | torch.Tensor:
        return torch.tensor(lr) if tensor else lr

    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(6)]
    optimizer = torch.optim.Adam([{"params": [params[i]], "lr": rate(10.0**i)} for i in range(3)])
    schedule = LinearWarmup(optimizer, 9)
    expected = [1.0, 10.0, 100.0]

    def check(factor: float) -> None:
        optimizer.step()
        schedule.step()
        assert [float(lr) for lr in schedule.get_last_lr()] == pytest.approx([factor * lr for lr in expected])
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(
            [factor * lr for lr in expected]
        )
        if loads:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))

    check(0.2)
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    expected = [100.0, 1.0, 10.0]
    check(0.3)
    copied = {**optimizer.param_groups.pop(0), "params": params[3:4], "lr": rate(7.0)}
    optimizer.add_param_group(copied)
    expected = [1.0, 10.0, 7.0]
    check(0.4)
    del optimizer.param_groups[1]
    expected = [1.0, 7.0]
    check(0.5)
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": params[4:5], "lr": rate(3.0)})
    optimizer.param_groups.reverse()
    expected = [3.0, 7.0]
    check(0.6)
    optimizer.param_groups[1]["params"] = [params[5]]  # another list in the same group
    check(0.7)
    for group in optimizer.param_groups:
        group["params"] = [*group["params"]]
    check(0.8)
    optimizer.param_groups[:] = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    check(0.9)
    assert schedule.state_dict().keys() == torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict().keys() - {
        "factor",
        "total_iters",
    } | {"warmup_steps"}


def test_a_checkpoint_without_a_schedule_and_an_added_group():
    first, added = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    schedule = LinearWarmup(optimizer, 9)
    optimizer.load_state_dict(torch.optim.SGD([first], lr=1.0).state_dict())
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.4, 0.2])


def test_a_group_with_the_tensor_of_another_has_its_initial_rate():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.Adam(params[:1], lr=torch.tensor(1.0))
    schedule = LinearWarmup(optimizer, 9)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params[1:]})
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert [float(lr) for lr in schedule.get_last_lr()] == pytest.approx([0.4, 0.4])


def test_the_default_of_later_groups_is_not_scheduled():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = torch.optim.Adam(params[:1], lr=torch.tensor(1.0))
    schedule = LinearWarmup(optimizer, 9)
    for p in params[1:]:  # the second one in place of the first
        del optimizer.param_groups[1:]
        optimizer.add_param_group({"params": [p]})
        optimizer.step()
        schedule.step()
    assert [float(lr) for lr in schedule.get_last_lr()] == pytest.approx([0.3, 0.3])


def test_a_wrapper_is_refused():
    wrapped = LAWN(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=1.0))
    with pytest.raises(TypeError, match="LAWN is no torch optimizer; schedule the one that it wraps"):
        LinearWarmup(wrapped, 9)


def test_an_optimizer_without_defaults():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base, self.param_groups, self.state = base, base.param_groups, base.state

        def step(self, closure=None):
            return self.base.step(closure)

    schedule = LinearWarmup(Lookahead(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)), 9)
    assert schedule.get_last_lr() == [0.1]


def test_a_group_that_the_checkpoint_does_not_know_keeps_its_initial_rate():
    """The new schedule has scaled the rate that the optimizer was loaded with."""
    first, added = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    state = LinearWarmup(optimizer, 9).state_dict()
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    schedule = LinearWarmup(optimizer, 9)
    schedule.load_state_dict(state)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 0.5])
    assert state["base_lrs"] == [1.0]  # as it was
