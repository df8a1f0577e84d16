"""One template for every optimizer of the package: what any torch optimizer is expected to do."""

import copy
import io
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import optim as timm_optim
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer, RMSprop

from lawn import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN, LAMBPlus
from lawn.optim import cpu_kernels, keys, phase
from tests.optim.helpers import Maker, fixed_norms, wrapped

OWN: dict[str, Maker] = {"AdamLAWN": AdamLAWN, "SGDLAWN": SGDLAWN, "LAMBLAWN": LAMBLAWN}
WRAPPED = {
    "LAWN(Adam)": wrapped(Adam),
    "LAWN(AdamW)": wrapped(AdamW, weight_decay=0.0),
    "LAWN(SGD)": wrapped(SGD, momentum=0.9),
    "LAWN(RMSprop)": wrapped(RMSprop),
}
PLAIN: dict[str, Maker] = {"LAMB": LAMB, "LAMBPlus": LAMBPlus}


def each(makers: dict[str, Maker]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", makers.values(), ids=makers)


every_optimizer = each(OWN | WRAPPED | PLAIN)
every_lawn = each(OWN | WRAPPED)
both_copiers = pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)


def switching(make: Maker, free_steps: int) -> dict[str, int]:
    """The argument `free_steps`, for those that have it."""
    return {} if make in PLAIN.values() else {"free_steps": free_steps}


def quadratic(optimizer: Optimizer, weight: nn.Parameter, bias: nn.Parameter, steps: int) -> list[float]:
    """Least squares with a fixed batch; the losses before each step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, weight.shape[1], generator=generator, dtype=torch.float64)
    y = torch.randn(20, weight.shape[0], generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x.to(weight.dtype) @ weight.T + bias - y.to(weight.dtype)).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def layer(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, generator=generator).to(dtype)
    return nn.Parameter(weight), nn.Parameter(torch.ones(3, dtype=dtype))


def norm(weight: Tensor) -> float:
    return weight.detach().double().norm().item()


# Minima


@every_optimizer
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_goes_down(make, lr):
    weight, bias = layer()
    losses = quadratic(make([weight, bias], lr=lr), weight, bias, 60)
    assert losses[-1] < 0.9 * losses[0]


@every_lawn
def test_goes_down_when_constrained(make):
    weight, bias = layer()
    c = norm(weight)
    losses = quadratic(make([weight, bias], lr=1e-2, free_steps=0), weight, bias, 60)
    assert losses[-1] < 0.9 * losses[0]
    assert norm(weight) == pytest.approx(c, rel=1e-6)


@every_optimizer
def test_rosenbrock(make):
    """From (-2, 2) towards the minimum at (1, 1), freely; LAMB's rate is relative to the parameter."""
    point = nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    optimizer = make([point], lr=1e-4 if make in (SGDLAWN, WRAPPED["LAWN(SGD)"]) else 2e-3)

    def value() -> Tensor:
        x, y = point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    start = value().item()
    for _ in range(200):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert value().item() < 0.5 * start


@every_lawn
def test_finds_the_nearest_point_of_the_sphere(make):
    """By a closure, at a rate that is a tensor, across the switch."""
    point, target = nn.Parameter(layer(torch.float64)[0].detach()[:, :3].clone()), torch.eye(3, dtype=torch.float64)
    optimizer = make([point], lr=torch.tensor(0.02), free_steps=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (point - target).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(250)]
    assert losses[-1] < losses[0]
    (c,) = fixed_norms(optimizer)
    assert c == pytest.approx(norm(point), rel=1e-6)
    torch.testing.assert_close(point.detach(), target * c / target.norm(), rtol=0, atol=0.05)


# Groups


@every_optimizer
def test_group_options(make):
    """A group's own lr is used, and 0 leaves its parameters alone."""
    moving, still = layer()[0], layer()[0]
    optimizer = make([{"params": [moving]}, {"params": [still], "lr": 0.0}], lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.0]
    before = still.detach().clone()
    for p in (moving, still):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(still, before)
    assert not torch.equal(moving, before)


@every_lawn
def test_groups_with_and_without_constraint(make):
    """The group's key stands above the rule that constrains what has two or more dimensions."""
    matrix, vector, free = layer()[0], nn.Parameter(torch.arange(1.0, 4.0)), layer()[0]
    groups = [{"params": [matrix, vector], "constrain": True}, {"params": [free], "constrain": False}]
    optimizer = make(groups, lr=1e-2, free_steps=1)
    after = []
    for _ in range(5):
        for p in (matrix, vector, free):
            p.grad = torch.ones_like(p)
        optimizer.step()
        after.append([norm(matrix), norm(vector), norm(free)])
    assert after[-1][:2] == pytest.approx(after[0][:2], rel=1e-6)
    assert after[-1][2] != pytest.approx(after[0][2], rel=1e-3)
    assert fixed_norms(optimizer) == pytest.approx([*after[0][:2], 0.0], rel=1e-6)


@every_lawn
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_group_that_comes_later_is_in_the_phase_of_the_others(make, stepped, by_hand):
    first, second = layer()[0], layer()[0]
    optimizer = make([first], lr=1e-2, free_steps=None if by_hand else 0)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    if by_hand:
        phase.constrain(optimizer, {}, again=False)
    if stepped:
        optimizer.step()
    optimizer.add_param_group({"params": [second]})
    c = norm(second)
    optimizer.step()
    assert norm(second) == pytest.approx(c, rel=1e-6)
    assert fixed_norms(optimizer)[1] == pytest.approx(c, rel=1e-6)


@every_lawn
def test_a_failed_switch_changes_nothing(make):
    matrix, zero = layer()[0], nn.Parameter(torch.zeros(2, 2))
    before = matrix.detach().clone()
    optimizer = make([{"params": [matrix]}, {"params": [zero]}], lr=1e-2, free_steps=0)
    matrix.grad, zero.grad = torch.ones_like(matrix), torch.ones_like(zero)
    for attempt in (optimizer.step, lambda: phase.constrain(optimizer, {}, again=False)):
        with pytest.raises(ValueError, match="norm is 0"):
            attempt()
        assert not keys.is_constrained(optimizer.param_groups)
        assert [group["steps"] for group in optimizer.param_groups] == [0, 0]
        assert not any(optimizer.state.values())
        assert torch.equal(matrix, before)


# State


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_exact(make, dtype):
    """Three steps, through a file into a new optimizer, three more on both: bit-identical."""
    weight, bias = layer(dtype)
    optimizer = make([weight, bias], lr=1e-2, **switching(make, 2))
    quadratic(optimizer, weight, bias, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin_weight, twin_bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    twin = make([twin_weight, twin_bias], lr=1.0, **switching(make, 5))
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert quadratic(optimizer, weight, bias, 3) == quadratic(twin, twin_weight, twin_bias, 3)
    assert torch.equal(weight, twin_weight)
    assert torch.equal(bias, twin_bias)


@each(OWN | {"LAWN(Adam)": WRAPPED["LAWN(Adam)"]})
def test_a_checkpoint_with_norms_by_position_is_refused(make):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["target_norms"] = [norm(weight), None]
    with pytest.raises(ValueError, match="earlier version"):
        optimizer.load_state_dict(saved)


@each(OWN | PLAIN)
@both_copiers
def test_copies_go_on_alike(make, copier):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2, **switching(make, 2))
    quadratic(optimizer, weight, bias, 3)
    twin = copier(optimizer)
    twin_weight, twin_bias = twin.param_groups[0]["params"]
    before = weight.detach().clone()
    losses = quadratic(twin, twin_weight, twin_bias, 3)
    assert torch.equal(weight, before)
    assert quadratic(optimizer, weight, bias, 3) == losses
    assert torch.equal(weight, twin_weight)
    assert make in PLAIN.values() or twin.constrained
    twin.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


@pytest.mark.parametrize("steps", [1, 3])
@both_copiers
def test_copies_of_a_wrapper_go_on_alike_with_their_own_optimizer(steps, copier):
    weight, bias = layer()
    lawn = LAWN(Adam([weight, bias], lr=1e-2), free_steps=2)
    quadratic(lawn.optimizer, weight, bias, steps)
    twin = copier(lawn)
    twin_weight, twin_bias = twin.optimizer.param_groups[0]["params"]
    assert twin_weight is not weight
    assert quadratic(lawn.optimizer, weight, bias, 3) == quadratic(twin.optimizer, twin_weight, twin_bias, 3)
    assert torch.equal(weight, twin_weight)
    assert twin.constrained
    assert twin.optimizer.param_groups[0]["steps"] == steps + 3
    twin.detach()
    assert lawn.constrained
    late = copier(twin)  # of one that is detached
    quadratic(late.optimizer, *late.optimizer.param_groups[0]["params"], 3)
    assert not late.constrained
    assert "switched" not in late.optimizer.param_groups[0]


# Gradients


@every_optimizer
def test_none_gradients_and_a_closure(make):
    """A parameter without a gradient is left alone, in both phases."""
    weight, bias = layer()
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = make([weight, bias, unused], lr=1e-2, **switching(make, 3))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.sum() + bias.sum()).square()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(unused, torch.ones(2, 2))
    assert make in PLAIN.values() or keys.is_constrained(optimizer.param_groups)


@every_lawn
def test_gradients_are_given_back(make):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2, free_steps=0)
    for _ in range(3):
        gradient = torch.randn_like(weight)
        weight.grad = gradient
        expected = gradient.clone()
        optimizer.step()
        assert weight.grad is gradient
        assert torch.equal(gradient, expected)


@every_lawn
def test_a_closure_sees_its_own_gradients(make):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2, free_steps=0)
    c = norm(weight)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = weight.detach().clone()
        optimizer.step(closure)
        torch.testing.assert_close(weight.grad, 2 * (before - 1))
        assert norm(weight) == pytest.approx(c, rel=1e-6)


def test_every_evaluation_of_a_closure_is_projected():
    """On the tangent space where the step began."""
    weight, _ = layer()
    seen: list[Tensor] = []

    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            before = weight.detach().clone()
            for _ in range(2):
                closure()
                seen.append((weight.grad * before).sum() / weight.grad.norm())
            return super().step()

    optimizer = wrapped(Twice)([weight], lr=1e-2, free_steps=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) == 2
    assert torch.stack(seen).abs().max() < 1e-5


@every_optimizer
def test_sparse_gradients_are_refused(make):
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = make(embedding.parameters(), lr=1e-2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"sparse gradients, as of a parameter of shape \(4, 3\)"):
        optimizer.step()


class LoadsWithoutHooks(AdamW):
    """As the optimizers of bitsandbytes: no hooks run, and the groups are those of the checkpoint alone."""

    def load_state_dict(self, state_dict):
        saved = copy.deepcopy(state_dict)
        pairs = list(zip(saved["param_groups"], self.param_groups, strict=True))
        params = {k: p for old, own in pairs for k, p in zip(old["params"], own["params"], strict=True)}
        groups = [{**old, "params": own["params"]} for old, own in pairs]
        state = {params[k]: entry for k, entry in saved["state"].items()}
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))


def take_steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("before", [0, 3])
def test_a_warm_start_without_hooks_is_that_with_them(before):
    results = []
    for kind in (AdamW, LoadsWithoutHooks):
        model = two_layers()
        base = kind([{"params": [layer.weight]} for layer in model], lr=1e-2, weight_decay=0.0)
        take_steps(model, base, 3)
        first, second = model
        given = [{"params": [first.weight], "constrain": False}, {"params": [second.weight], "norm_axes": 1}]
        optimizer = kind(given, lr=1e-2, weight_decay=0.0)
        LAWN(optimizer, free_steps=2)
        take_steps(model, optimizer, before)
        optimizer.load_state_dict(base.state_dict())
        take_steps(model, optimizer, 5)
        norms = [torch.as_tensor(optimizer.state[p][keys.NORM]) for p in model.parameters()]
        results.append([*model.parameters(), *norms])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert [norm.numel() for norm in results[0][2:]] == [1, 6]


def test_other_weights_after_a_load_without_hooks_are_refused():
    model = two_layers()
    optimizer = LoadsWithoutHooks(model.parameters(), lr=1e-2, weight_decay=0.0)
    LAWN(optimizer, free_steps=2)
    take_steps(model, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    take_steps(model, optimizer, 1)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        model[0].weight.mul_(3)
    with pytest.raises(ValueError, match="has the norm"):
        take_steps(model, optimizer, 1)


def test_an_option_that_is_refused_is_refused_after_a_load_without_hooks():
    model = two_layers()
    optimizer = LoadsWithoutHooks(model.parameters(), lr=1e-2, weight_decay=0.0)
    LAWN(optimizer, free_steps=2)
    take_steps(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["rounding"] = "stochastic"
    optimizer.load_state_dict(saved)
    for _ in range(2):
        with pytest.raises(ValueError, match="the loaded param group 0: rounding='stochastic', but the wrapped"):
            take_steps(model, optimizer, 1)


def test_a_state_that_is_made_anew_at_each_access_is_not_taken_for_a_load():
    """As of optimizers that consist of several; weights that were clipped are then rescaled, not refused."""

    class Composite(AdamW):
        state = property(lambda self: defaultdict.copy(self.kept), lambda self, value: setattr(self, "kept", value))

        def __init__(self, *args: Any, **options: Any) -> None:
            self.kept: dict[Any, Any] = defaultdict(dict)
            super().__init__(*args, **options)

    model = two_layers()
    optimizer = Composite(model.parameters(), lr=1e-2, weight_decay=0.0)
    lawn = LAWN(optimizer, free_steps=None)
    known = lawn._known
    for _ in range(3):
        assert optimizer.state is not optimizer.state
        lawn._prepare_added()
    assert lawn._known is known


class Several(Optimizer):
    """Steps other optimizers, and saves their states."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__(
            [p for each in optimizers for group in each.param_groups for p in group["params"]], {"lr": 0.1}
        )

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class SavesList(Several):
    def state_dict(self) -> Any:
        return [optimizer.state_dict() for optimizer in self.optimizers]


class SavesByName(Several):
    def state_dict(self) -> Any:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}


class SavesTheirGroups(Several):
    def state_dict(self) -> Any:
        return self.optimizers[0].state_dict()


class SavesNothing(Several):
    def state_dict(self) -> Any:
        raise NotImplementedError("use another method")


class SavesMore(Several):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "more": 1}


class SavesBelowName(Several):
    def state_dict(self) -> Any:
        return {"base": super().state_dict()}


@pytest.mark.parametrize("kind", [SavesList, SavesByName, SavesTheirGroups])
def test_an_optimizer_that_saves_the_state_of_others_is_refused(kind):
    """Phase and norms would not be in its checkpoint: a resumed run would begin with the free phase again."""
    optimizer = kind(*(SGD(layer.parameters(), lr=0.1) for layer in two_layers()))
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(TypeError, match="put LAWN on each optimizer inside it"):
        LAWN(optimizer, free_steps=1)
    assert optimizer.param_groups == before
    for each in optimizer.optimizers:
        LAWN(each, free_steps=1)


@pytest.mark.parametrize("kind", [Several, SavesNothing, SavesMore, SavesBelowName])
def test_an_optimizer_that_saves_its_own_groups_or_nothing_is_wrapped(kind):
    LAWN(kind(*(SGD(layer.parameters(), lr=0.1) for layer in two_layers())), free_steps=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_norms_of_slices_that_were_moved_to_the_gpu_come_back():
    """Lightning moves all state to the device of the model after it has loaded it."""
    model = two_layers().cuda()
    optimizer = AdamLAWN([{"params": list(model.parameters()), "norm_axes": 1}], lr=1e-2, free_steps=1)
    for count in (3, 1):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for _ in range(count):
            optimizer.step()
        for entry in optimizer.state.values():
            assert entry[keys.NORM].device.type == "cpu"
            entry[keys.NORM] = entry[keys.NORM].cuda()


@every_lawn
def test_channels_last_and_strided_weights(make):
    images = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = nn.Parameter(images.clone())
    last = nn.Parameter(images.clone(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.zeros(4, 3, 3, 6)[..., ::2])
    gaps.data.copy_(images)
    for p in (plain, last, gaps):
        optimizer = make([p], lr=1e-2, free_steps=1)
        for t in range(4):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gaps, plain, rtol=1e-5, atol=1e-6)


# What is refused when an optimizer is made


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        *((make, {"lr": -1}) for make in (*OWN.values(), *PLAIN.values())),
        *((make, {"lr": float("nan")}) for make in (*OWN.values(), *PLAIN.values())),
        (AdamLAWN, {"betas": (0.9, 1.0)}),
        (AdamLAWN, {"eps": -1e-8}),
        (LAMBLAWN, {"betas": (0.9, 0.99, 0.999)}),
        (SGDLAWN, {"momentum": 1.0}),
        (LAMB, {"betas": (-0.1, 0.999)}),
        (LAMB, {"eps": -1e-8}),
        (LAMB, {"weight_decay": -0.1}),
    ],
)
def test_bad_hyperparameters(make, keys):
    """As a default, and in a group, which is then not added."""
    with pytest.raises(ValueError, match=next(iter(keys))):
        make([layer()[0]], **keys)
    optimizer = make([layer()[0]])
    with pytest.raises(ValueError, match=next(iter(keys))):
        optimizer.add_param_group({"params": [layer()[0]], **keys})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_an_empty_list_is_refused(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=1e-2)


@every_lawn
@pytest.mark.parametrize("value", ["no", 1, 0.0])
def test_constrain_is_a_bool_or_none(make, value):
    with pytest.raises(ValueError, match=f"param group 1: constrain={value!r}, but it must be True, False or None"):
        make([{"params": [layer()[0]]}, {"params": [layer()[0]], "constrain": value}], lr=1e-2, free_steps=0)


@each(OWN)
def test_decay_of_constrained_weights_is_refused(make):
    weight, bias = layer()
    with pytest.raises(ValueError, match="param group 1: weight_decay"):
        make([{"params": [bias]}, {"params": [weight], "weight_decay": 0.1}])


def test_wrapper_refuses_decay_and_leaves_no_trace():
    weight, bias = layer()
    base = AdamW([{"params": [weight], "weight_decay": 0.0}, {"params": [bias, layer()[0]], "weight_decay": 0.1}])
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match="param group 1: weight_decay"):
        LAWN(base)
    assert [dict(group) for group in base.param_groups] == before
    base.param_groups[1]["constrain"] = False
    handle = LAWN(base)
    base.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="param group 0: weight_decay"):
        handle.constrain()
    assert not handle.constrained


@every_lawn
def test_wrapper_refuses_what_is_lawn_already(make):
    with pytest.raises(ValueError, match="already"):
        LAWN(make([layer()[0]], lr=1e-2))


# The wrapper


def test_wrapper_detaches_without_a_trace():
    weight, bias = layer()
    base = Adam([weight, bias], lr=1e-2)
    before = set(base.param_groups[0])
    handle = LAWN(base)
    handle.constrain()
    quadratic(base, weight, bias, 2)
    c = norm(weight)
    handle.detach()
    assert set(base.param_groups[0]) == before
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in base.state.values())
    quadratic(base, weight, bias, 5)
    assert abs(norm(weight) / c - 1) > 1e-4
    LAWN(base).constrain()


@pytest.mark.parametrize("name", ["Lamb", "Lion"])
def test_wrapper_on_timms(name):
    optim = pytest.importorskip("timm.optim")
    goes_down_on_the_sphere(getattr(optim, name), layer(), free_steps=2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_wrapper_on_muon():
    goes_down_on_the_sphere(torch.optim.Muon, layer()[:1], free_steps=0)


def goes_down_on_the_sphere(base: Maker, params: tuple[nn.Parameter, ...], free_steps: int) -> None:
    """A weight, and a bias unless the base optimizer takes matrices only."""
    weight, bias = params if len(params) == 2 else (*params, layer()[1])
    optimizer = wrapped(base, weight_decay=0.0)(params, lr=1e-2, free_steps=free_steps)
    quadratic(optimizer, weight, bias, free_steps)
    c = norm(weight)
    losses = quadratic(optimizer, weight, bias, 40)
    assert norm(weight) == pytest.approx(c, rel=1e-6)
    assert losses[-1] < losses[0]


def test_wrapper_on_schedule_free():
    """In train mode the weights are on the sphere; the average that eval() swaps in is inside it."""
    schedulefree = pytest.importorskip("schedulefree")
    weight, bias = layer()
    base: Any = wrapped(schedulefree.AdamWScheduleFree)([weight, bias], lr=1e-2, free_steps=2)
    base.train()
    with pytest.warns(match=r"keeps a copy of the weights in its state \('z'\)"):
        quadratic(base, weight, bias, 2)
    c = norm(weight)
    quadratic(base, weight, bias, 40)
    assert norm(weight) == pytest.approx(c, rel=1e-6)
    base.eval()
    assert norm(weight) < c


class MasterWeights(SGD):
    """Updates a copy of the weights, in float32."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                master = self.state[p].setdefault("master", p.detach().float().clone())
                p.data.copy_(master.sub_(p.grad, alpha=group["lr"]))


class QuantizedState(Tensor):
    """Says that it has the shape and dtype of the weight, and can do hardly anything, as those of torchao."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.equal, Tensor.to, Tensor.any):
            raise NotImplementedError(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Quantizes(SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("quantized", torch.zeros_like(p).as_subclass(QuantizedState))
                self.state[p].setdefault("on meta", torch.zeros_like(p, device="meta"))
        super().step(closure)


def test_states_that_cannot_be_compared_with_the_weights_are_left_alone():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = wrapped(Quantizes)([weight], lr=1e-2, free_steps=1)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


class Stateless(timm_optim.Lion):
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", [timm_optim.Lion, Stateless])
def test_weights_are_copied_once_for_the_comparison(kind, closure, monkeypatch):
    """Not again where an optimizer keeps no state, nor those that get no gradient."""
    trained, frozen = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = kind([trained, frozen], lr=1e-2)
    compared = LAWN(optimizer, free_steps=None)._stored_weights
    copied, end = [], compared.end
    monkeypatch.setattr(compared, "end", lambda optimizer: (copied.append(list(compared._before)), end(optimizer)))
    for _ in range(3):
        trained.grad = torch.ones_like(trained)
        optimizer.step(*([lambda: torch.zeros(())] if closure else []))
    assert copied == [[trained], [], []]


class FirstGradient(SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("first", p.grad.clone())
        super().step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "key"), [(timm_optim.MADGRAD, "x0"), (MasterWeights, "master")])
def test_copies_of_the_weights_in_the_state_are_a_warning(kind, key, dtype):
    """New weights that are computed from them undo the projection: the updates grow, while the norms hold."""
    weight = nn.Parameter(torch.randn(4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    optimizer = wrapped(kind)([weight], lr=1e-2, free_steps=None)
    optimizer.step()  # without a gradient, so that it keeps nothing yet
    weight.grad = torch.ones_like(weight)
    with pytest.warns(match=f"{kind.__name__} keeps a copy of the weights in its state \\('{key}'\\)"):
        optimizer.step()
    optimizer.step()  # warns no more


class KeepsTheWeightItself(SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update({"weight": p.data, "scale": torch.ones_like(p)})
        super().step(closure)


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("kind", [FirstGradient, ASGD, MasterWeights, KeepsTheWeightItself])
def test_other_tensors_in_the_state_are_no_copies_of_the_weights(kind, fill):
    """Such as a gradient that equals the weight, averages that torch keeps, and equal numbers beside equal ones."""
    weight = nn.Parameter(torch.full((4, 4), fill))
    if kind is KeepsTheWeightItself and not fill:
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    free = nn.Parameter(torch.ones(4))
    groups = [{"params": [weight], "constrain": kind is not MasterWeights}, {"params": [free]}]
    optimizer = wrapped(kind)(groups, lr=1e-2, free_steps=None)
    for _ in range(3):
        weight.grad, free.grad = weight.detach().clone(), torch.ones_like(free)
        optimizer.step()


# LAMB by hand


def test_lamb_by_hand():
    """First step: m_hat / sqrt(v_hat) = sign(g), so r = sign(g) + decay w, and the step is lr ||w|| / ||r|| r."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    w.grad = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    before = w.detach().clone()
    LAMB([w], lr=0.1, eps=0.0, weight_decay=0.1).step()
    r = torch.tensor([[1.3, -0.6]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), before - 0.1 * 5 / r.norm() * r)


def test_lamb_plus_by_hand():
    """The ratio 50 / sqrt(2) is cut to 10; a bias has none."""
    w, b = (nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in ([[30.0, 40.0]], [30.0, 40.0]))
    for p in (w, b):
        p.grad = torch.full_like(p, 0.5)
    LAMBPlus([w, b], lr=0.1, eps=0.0).step()
    torch.testing.assert_close(w.detach(), torch.tensor([[29.0, 39.0]], dtype=torch.float64))
    torch.testing.assert_close(b.detach(), torch.tensor([29.9, 39.9], dtype=torch.float64))


def test_lamb_with_a_weight_of_zero_moves():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LAMB([w], lr=0.1).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [LAMB, LAMBPlus, LAMBLAWN])
def test_lamb_without_a_gradient_stays(kind):
    """As the row of a token that has not been seen."""
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.zeros(2, 2)
    kind([w], lr=0.1).step()
    assert torch.equal(w.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("kind", [LAMB, LAMBPlus, LAMBLAWN])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lamb_in_half_precision(kind, dtype):
    """Squares of gradients are below the range of float16, and norms of large updates above it."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(64, 64, generator=generator), 1e-3 * torch.randn(64, 64, generator=generator)
    ours, theirs = nn.Parameter(start.to(dtype)), nn.Parameter(start.clone())
    for p in (ours, theirs):
        p.grad = gradient.to(p.dtype)
        kind([p], lr=0.1).step()
    assert (ours.float() - theirs).norm() <= 0.03 * (theirs - start).norm()


@pytest.mark.parametrize("kind", [LAMB, LAMBPlus, LAMBLAWN])
def test_lamb_of_a_single_number_with_a_learning_rate_in_a_tensor(kind):
    ours, theirs = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(2.0))
    for p, lr in ((ours, torch.tensor([0.1])), (theirs, 0.1)):
        p.grad = torch.tensor(1.0)
        kind([p], lr=lr).step()
    torch.testing.assert_close(ours, theirs)


# Without compiled code


@pytest.mark.parametrize("fused", [None, True])
def test_without_a_compiler(monkeypatch, fused, recwarn):
    monkeypatch.setattr(cpu_kernels, "build", lambda dtype: (None, "no C compiler was found"))
    weight, bias = layer()
    if fused:
        with pytest.warns(UserWarning, match="no C compiler"):
            quadratic(AdamLAWN([weight, bias], lr=1e-2, free_steps=0, fused=fused), weight, bias, 2)
    else:
        quadratic(AdamLAWN([weight, bias], lr=1e-2, free_steps=0, fused=fused), weight, bias, 2)
        assert not recwarn


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Build as at the first use, with tmp_path as the only place for caches and a folder in it for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(cpu_kernels, "TEMPORARY", ())
    monkeypatch.setattr(cpu_kernels, "FLAGS", [flag for flag in cpu_kernels.FLAGS if not flag.startswith("-O")])
    (tmp_path / "temporary").mkdir()
    yield cpu_kernels.build.__wrapped__
    cpu_kernels.build.cache_clear()


def test_a_compiler_that_fails(build, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho one >&2\necho two >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    made, problem = build(torch.float32)
    assert made is None
    assert f"{broken} made nothing that works" in problem
    assert problem.count("two") == 1
    assert "one" not in problem
    assert list(tmp_path.rglob("*.so")) == []


def test_what_was_built_is_taken_from_the_cache(build, monkeypatch, tmp_path):
    assert build(torch.float32)[0] is not None
    (kept,) = (tmp_path / "cache" / "lawn").iterdir()
    monkeypatch.setattr(cpu_kernels, "_compile", lambda *_: pytest.fail("built again"))
    assert build(torch.float32)[0] is not None
    assert list((tmp_path / "cache" / "lawn").iterdir()) == [kept]


@pytest.mark.parametrize("damage", ["cut", "emptied", "folder", "other"])
def test_damaged_code_in_the_cache_is_rebuilt(build, damage, tmp_path):
    """To load a part of it can end the process."""
    build(torch.float32)
    (kept,) = (tmp_path / "cache" / "lawn").iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # writing into the loaded file would end this process
    if damage == "folder":
        kept.mkdir()
    else:
        kept.write_bytes({"cut": whole[:5000], "emptied": b"", "other": whole[:-1] + b"?"}[damage])
    assert build(torch.float32)[0] is not None
    assert kept.is_dir() or kept.read_bytes() == whole


def test_without_a_folder_that_keeps_it_code_is_built_for_one_process(build, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert build(torch.float32)[0] is not None
    assert list(tmp_path.rglob("*.so")) == []
    (tmp_path / "temporary").rmdir()
    made, problem = build(torch.float32)
    assert made is None
    assert "Not a directory" in problem
    assert "set XDG_CACHE_HOME" in problem


def test_the_compiler_does_not_need_the_folder_of_temporary_files(build, monkeypatch, tmp_path):
    """Which may be full."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\n[ "$TMPDIR" = {tmp_path}/temporary ] && exit 1\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert build(torch.float32)[0] is not None


def test_a_user_without_a_home(build, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # of nobody that the system knows
    with pytest.raises(RuntimeError):
        Path.home()
    assert build(torch.float32)[0] is not None
