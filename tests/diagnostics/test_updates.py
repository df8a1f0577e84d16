import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lookahead
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lawn import LAWN, AdamLAWN
from lawn.diagnostics import UpdateMonitor


def vector(*values: float, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Parameter]:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([values], dtype=dtype))
    return model, model.w


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, *gradient: float) -> None:
    p.grad = torch.tensor([gradient], dtype=p.dtype)
    optimizer.step()


def test_by_hand():
    """From (3, 4), gradient (4, -3) / 10 across it, rate 2: a right triangle of legs 5 and 1."""
    model, w = vector(3, 4)
    optimizer = torch.optim.SGD([w], lr=2)
    monitor = UpdateMonitor(model, optimizer)
    step(optimizer, w, 0.4, -0.3)
    (found,) = monitor.means().values()
    expected = {"norm": 5, "gradient_norm": 0.5, "radial": 0, "angle": math.atan2(1, 5)}
    expected["effective_lr"] = math.atan2(1, 5) / 2.5
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_gradient_along_the_weight_turns_nothing():
    model, w = vector(3, 4)
    optimizer = torch.optim.SGD([w], lr=0.1)
    monitor = UpdateMonitor(model, optimizer)
    step(optimizer, w, -6, -8)
    assert monitor.means()["w"] == pytest.approx(
        {"norm": 5, "gradient_norm": 10, "radial": 1, "angle": 0, "effective_lr": 0}, abs=1e-7
    )


def test_a_weight_that_turns_round():
    """An update that goes through the origin: the angle is pi."""
    model, w = vector(3, 4)
    optimizer = torch.optim.SGD([w], lr=2)
    monitor = UpdateMonitor(model, optimizer)
    step(optimizer, w, 3, 4)
    assert monitor.means()["w"]["angle"] == pytest.approx(math.pi)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.floats(1e-7, 10))
@settings(deadline=None)
def test_angles_are_those_of_an_independent_formula(values, lr):
    """Kahan's, which is exact for small angles and for large ones."""
    before, gradient = torch.tensor(values, dtype=torch.float64).add(0.01).view(2, 3)
    model, w = vector(*before.tolist())
    optimizer = torch.optim.SGD([w], lr=lr)
    monitor = UpdateMonitor(model, optimizer)
    step(optimizer, w, *gradient.tolist())
    a, b = before / before.norm(), w.detach()[0] / w.detach().norm()
    if a.isfinite().all() and b.isfinite().all():
        expected = 2 * math.atan2((a - b).norm().item(), (a + b).norm().item())
        assert monitor.means()["w"]["angle"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_effective_rate_of_sgd_on_a_scale_invariant_weight():
    """lr / ||w||^2, for small angles."""
    torch.manual_seed(0)
    model = nn.Module()
    model.w = nn.Parameter(3 * torch.randn(4, 5, dtype=torch.float64))
    target = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = UpdateMonitor(model, optimizer)
    norm = model.w.detach().norm().item()
    (model.w * target).sum().div(model.w.norm()).backward()
    optimizer.step()
    found = monitor.means()["w"]
    assert found["radial"] == pytest.approx(0, abs=1e-12)
    assert found["effective_lr"] == pytest.approx(1e-3 / norm**2, rel=1e-4)


def test_small_angles_in_float32():
    model, w = vector(*[1.0] * 1000, dtype=torch.float32)
    optimizer = torch.optim.SGD([w], lr=1)
    monitor = UpdateMonitor(model, optimizer)
    w.grad = torch.full_like(w, 1e-4)
    w.grad[0, ::2] *= -1
    optimizer.step()
    assert monitor.means()["w"]["angle"] == pytest.approx(1e-4, rel=1e-3)


def test_every_third_update_and_a_state_in_between():
    """Updates 0, 3 and 6 of 7 count, whether or not the monitor is saved and loaded in the middle."""
    gradients = torch.arange(1.0, 8).tolist()
    found = []
    for interrupted in (False, True):
        model, w = vector(1, 0)
        optimizer = torch.optim.SGD([w], lr=0)
        monitor = UpdateMonitor(model, optimizer, every=3)
        for k, g in enumerate(gradients):
            if interrupted and k == 5:
                state = monitor.state_dict()
                monitor.detach()
                monitor = UpdateMonitor(model, optimizer, every=3)
                monitor.load_state_dict(state)
            step(optimizer, w, 0, g)
        found.append(monitor.means()["w"])
    assert found[0] == found[1]
    assert found[0]["gradient_norm"] == (1 + 4 + 7) / 3
    assert all(map(math.isnan, monitor.means()["w"].values()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_after_lawn_has_done_its_part(wrapped):
    """The norm stays, and the angle is that of the weight as LAWN leaves it."""
    model, w = vector(3, 4)
    if wrapped:
        optimizer = torch.optim.Adam([w], lr=0.1)
        LAWN(optimizer, free_steps=0)
    else:
        optimizer = AdamLAWN([w], lr=0.1, free_steps=0)
    monitor = UpdateMonitor(model, optimizer)
    before = w.detach().clone()
    step(optimizer, w, 1, 1)
    after = w.detach()
    assert after.norm().item() == pytest.approx(5)
    assert monitor.means()["w"]["angle"] == pytest.approx(math.acos((before * after).sum().item() / 25))
    assert optimizer.state  # the same object, not a copy


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_gradient_is_that_before_lawns_projection(first, closure):
    model, w = vector(3, 4)
    optimizer = torch.optim.SGD([w], lr=0.1)
    monitor = UpdateMonitor(model, optimizer) if first else None
    LAWN(optimizer, free_steps=0)
    monitor = monitor or UpdateMonitor(model, optimizer)
    for gradient in (torch.tensor([[6.0, 8.0]]), torch.tensor([[0.0, 5.0]])):
        before = w.detach().double().squeeze(0).clone()

        def give(gradient=gradient):
            w.grad = gradient.double()
            return 1.0

        if closure:
            assert optimizer.step(give) == 1.0
        else:
            give()
            optimizer.step()
        found, g = monitor.means()["w"], gradient.double().squeeze(0)
        assert found["gradient_norm"] == pytest.approx(g.norm().item())
        assert found["radial"] == pytest.approx((before @ g / before.norm() / g.norm()).item())


def test_the_first_call_of_a_closure_is_measured():
    """Also where it is a keyword, and one that calls it again: a line search moves the weights meanwhile."""
    model, w = vector(3, 4)
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=4)
    monitor = UpdateMonitor(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure=closure)
    found = monitor.means()["w"]
    assert (found["norm"], found["gradient_norm"]) == pytest.approx((5, 5))


class Descendant(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_inside_a_step_counts_once(every):
    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # whose `step` has hooks from now on
    model, w = vector(3, 4)
    monitor = UpdateMonitor(model, optimizer := Descendant([w], lr=0.1), every)
    for _ in range(4):
        step(optimizer, w, 1, 1)
    assert monitor.state_dict()["updates"] == 4
    assert monitor.state_dict()["sums"][0, 0] == 4 // every


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_skipped_updates_not_measured(fused):
    model, w = vector(3, 4, dtype=torch.float32)
    optimizer = torch.optim.Adam([w], lr=0.1, fused=fused)
    monitor = UpdateMonitor(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert monitor.state_dict()["sums"][0, 0] == 2
    found = monitor.means()["w"]
    assert found["gradient_norm"] == pytest.approx(2**0.5)
    assert found["effective_lr"] == pytest.approx(found["angle"] / 5 / 2**0.5, rel=0.1)


def test_complex_weights():
    """A gradient i w turns a weight without changing its norm."""
    model, w = vector(3 + 1j, 4 - 2j, dtype=torch.complex64)
    optimizer = torch.optim.SGD([w], lr=0.1)
    monitor = UpdateMonitor(model, optimizer)
    w.grad = 1j * w.detach()
    optimizer.step()
    found = monitor.means()["w"]
    assert found["radial"] == pytest.approx(0, abs=1e-6)
    assert found["angle"] == pytest.approx(math.atan(0.1), rel=1e-5)


def test_only_weights_with_gradients_are_measured():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = UpdateMonitor(model, optimizer)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = monitor.means()
    assert list(found) == ["0.weight", "1.weight"]
    assert found["0.weight"]["gradient_norm"] == pytest.approx(6**0.5)
    assert all(map(math.isnan, found["1.weight"].values()))


def test_nothing_is_changed_and_bfloat16_is_widened():
    model = nn.Linear(8, 4, dtype=torch.bfloat16)
    twin = nn.Linear(8, 4, dtype=torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        monitor = UpdateMonitor(net, optimizer) if net is model else None
        net(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        gradient = net.weight.grad.clone()
        optimizer.step()
        assert torch.equal(net.weight.grad, gradient)
        if monitor:
            assert monitor.means()["weight"]["gradient_norm"] == pytest.approx(32**0.5)
    assert torch.equal(model.weight, twin.weight)


def test_a_weight_of_zeros_and_a_step_that_failed():
    model, w = vector(0, 0)
    optimizer = torch.optim.SGD([w], lr=1)
    monitor = UpdateMonitor(model, optimizer, every=3)
    w.grad = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no loss")))
    step(optimizer, w, 1, 1)  # is not measured: the one before would have been
    assert math.isnan(monitor.means()["w"]["norm"])
    step(optimizer, w, 1, 1)
    with torch.no_grad():
        w.zero_()
    step(optimizer, w, 1, 1)
    found = monitor.means()["w"]
    assert found.pop("gradient_norm") == pytest.approx(2**0.5)
    assert found == {"norm": 0, "radial": 0, "angle": 0, "effective_lr": 0}


def test_an_update_that_raised_is_not_measured_with_the_next():
    model, w = vector(3, 4)
    monitor = UpdateMonitor(model, optimizer := torch.optim.SGD([w], lr=1), every=3)

    def fail(*_: object) -> None:
        raise RuntimeError("not finite")

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="not finite"):
        step(optimizer, w, 1, 1)
    hook.remove()
    step(optimizer, w, 1, 1)  # the second of three
    assert math.isnan(monitor.means()["w"]["norm"])


def test_an_optimizer_of_copies_is_followed():
    model, w = vector(3, 4)

    class Master(torch.optim.SGD):
        def step(self, closure=None):
            (p,) = self.param_groups[0]["params"]
            p.grad = w.grad
            super().step(closure)
            w.data.copy_(p.data)

    monitor = UpdateMonitor(model, optimizer := Master([w.detach().clone().requires_grad_()], lr=2))
    step(optimizer, w, 0.4, -0.3)
    assert monitor.means()["w"]["angle"] == pytest.approx(math.atan2(1, 5))


def test_a_state_is_a_copy():
    model, w = vector(1, 0)
    optimizer = torch.optim.SGD([w], lr=1)
    monitor = UpdateMonitor(model, optimizer)
    step(optimizer, w, 1, 1)
    state = monitor.state_dict()
    expected = monitor.means()
    monitor.load_state_dict(state)
    assert monitor.means() == expected


@pytest.mark.parametrize(
    ("model", "every", "message"), [(nn.Linear(2, 2), 0, "at least 1"), (nn.LayerNorm(3), 1, "nothing to follow")]
)
def test_refused(model, every, message):
    with pytest.raises(ValueError, match=message):
        UpdateMonitor(model, torch.optim.SGD(model.parameters(), lr=1), every)


def test_a_gradient_of_zero_does_not_spoil_the_mean():
    """The momentum still turns the weight."""
    model, w = vector(3, 4)
    monitor = UpdateMonitor(model, optimizer := torch.optim.SGD([w], lr=0.1, momentum=0.9))
    step(optimizer, w, 4, -3)
    first = monitor.means()["w"]
    step(optimizer, w, 0, 0)
    found = monitor.means()["w"]
    assert found["angle"] > 0.5 * first["angle"]
    assert (found["gradient_norm"], found["radial"], found["effective_lr"]) == (0, 0, 0)


def test_an_optimizer_that_moves_the_weights_before_its_closure():
    class Ascent(torch.optim.SGD):
        def step(self, closure):
            (p,) = self.param_groups[0]["params"]
            before = p.detach().clone()
            p.data += 1.0
            loss = closure()
            p.data.copy_(before)
            super().step()
            return loss

    model, w = vector(3, 4)
    monitor = UpdateMonitor(model, optimizer := Ascent([w], lr=2))

    def closure():
        w.grad = torch.tensor([[0.4, -0.3]], dtype=torch.float64)

    optimizer.step(closure)
    found = monitor.means()["w"]
    assert (found["norm"], found["angle"]) == pytest.approx((5, math.atan2(1, 5)))


def test_weights_of_other_optimizers_are_not_measured():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    monitor = UpdateMonitor(model, first)
    model(torch.ones(1, 2)).sum().backward()
    first.step()
    second.step()
    found = monitor.means()
    assert found["0.weight"]["gradient_norm"] > 0
    assert math.isnan(found["1.weight"]["norm"])


def test_an_optimizer_of_biases_alone_measures_no_weight():
    """As beside Muon, which has the matrices."""
    model = nn.Linear(2, 2)
    first, second = (torch.optim.SGD([p], lr=0.1) for p in (model.bias, model.weight))
    monitor = UpdateMonitor(model, first)
    model(torch.ones(1, 2)).sum().backward()
    first.step()
    second.step()
    assert math.isnan(monitor.means()["weight"]["norm"])


def test_the_step_that_makes_the_state_for_a_checkpoint_is_no_update():
    model = nn.Linear(3, 3)
    optimizer = AdamLAWN(model.parameters(), lr=0.1, free_steps=5)
    monitor = UpdateMonitor(model, optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert monitor.state_dict()["updates"] == 0
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert monitor.means()["weight"]["gradient_norm"] == pytest.approx(model.weight.grad.norm().item())


def test_sparse_gradients():
    model = nn.Embedding(5, 3, sparse=True)
    monitor = UpdateMonitor(model, optimizer := torch.optim.SparseAdam(model.parameters()))
    model(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    assert monitor.means()["weight"]["gradient_norm"] == pytest.approx(12**0.5)


def test_what_would_measure_nothing_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = UpdateMonitor(model, optimizer)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a copy would measure nothing"):
            attempt(monitor)
    with pytest.raises(TypeError, match="Lookahead calls no hooks"):
        UpdateMonitor(model, Lookahead(optimizer))
    other = UpdateMonitor(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), optimizer)
    with pytest.raises(ValueError, match="the state is of 1 weights, not of 2"):
        other.load_state_dict(monitor.state_dict())


def test_what_is_not_finite_is_not_measured_as_zero():
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    monitor = UpdateMonitor(layer, optimizer)
    for _ in range(2):  # the second finds a weight that is lost
        layer.weight.grad = torch.tensor([[torch.nan, 1.0]])
        optimizer.step()
        measured = monitor.means()["weight"]
        assert all(math.isnan(measured[name]) for name in ("gradient_norm", "radial", "angle", "effective_lr"))
