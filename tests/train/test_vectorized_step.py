"""The vectorized step of several optimizers equals the steps that each takes by itself."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn.optim import LAMB, LAMBLAWN, SGDLAWN, AdamLAWN, LAMBPlus
from lawn.optim.keys import NORM
from lawn.train.vectorized_step import RULES, VectorizedStep
from lawn.train.vectorized_weight import CPUWeights
from tests.optim.helpers import fixed_norms

# What members of one class may differ in; the third has the defaults.
NUMBERS: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [{"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, {"momentum": 0.5}, {}],
    SGDLAWN: [{"momentum": 0.9, "free_steps": 3}, {"momentum": 0.5, "free_steps": 0}, {}],
    Adam: [{"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}, {}],
    AdamW: [{"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0}, {}],
    AdamLAWN: [{"free_steps": 3}, {"betas": (0.5, 0.9), "eps": 1e-3, "free_steps": 0}, {}],
    LAMB: [{"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3}, {}],
    LAMBPlus: [{"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3}, {}],
    LAMBLAWN: [{"free_steps": 3}, {"betas": (0.5, 0.9), "eps": 1e-3, "free_steps": 0}, {}],
}
SHAPES = ((3, 4), (4,), (1, 3), (2, 2, 3))


def gradient_of(seed: int, step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + step)
    return [torch.randn(3, *shape, generator=generator, dtype=dtype) for shape in SHAPES]


class Members:
    """Three optimizers of one class, on weights that are slices of stacked tensors."""

    def __init__(
        self,
        kind: type[Optimizer],
        seed: int,
        dtype: torch.dtype = torch.float64,
        norm_axes: Any = None,
        fused: bool | None = None,
    ) -> None:
        self.stacks = gradient_of(seed, 0, dtype)
        self.slices = [[nn.Parameter(row) for row in stack] for stack in self.stacks]
        self.optimizers = []
        for k, numbers in enumerate(NUMBERS[kind]):
            first, *others = [own[k] for own in self.slices]
            groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 0.02}]
            if norm_axes is not None:
                groups[1]["norm_axes"] = norm_axes
            self.optimizers.append(kind(groups, lr=0.05 + 0.01 * k, **numbers))
            for group in self.optimizers[-1].param_groups:
                group["fused"] = fused

    def alone(self, gradients: list[Tensor], first: int = 0) -> None:
        """Each takes its own step, from this one on."""
        for own, stack in zip(self.slices, gradients, strict=True):
            for p, g in zip(own, stack, strict=True):
                p.grad = g.clone()
        for optimizer in self.optimizers[first:]:
            optimizer.step()


def update(vectorized: VectorizedStep, gradients: list[Tensor]) -> set[int]:
    """One update of every weight, by its gradient [K, ...]; the optimizers whose weights were not finite."""
    failed, _ = vectorized.prepare()
    vectorized.apply(gradients)
    return failed


def check(one: Members, other: Members) -> None:
    for a, b in zip(one.stacks, other.stacks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_every_rule_is_tried():
    assert NUMBERS.keys() == RULES.keys()


def test_compiled_code_updates_what_it_can():
    """All rules but LAMB+, LAMB with weight decay and SGD with Nesterov's momentum."""
    for kind in RULES:
        members = Members(kind, 0, torch.float32)
        vectorized = VectorizedStep(members.optimizers, members.stacks, members.slices)
        assert isinstance(vectorized._together, CPUWeights) == (kind not in (SGD, LAMB, LAMBPlus))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", RULES)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 8), resumed=st.integers(0, 8))
@settings(max_examples=6, deadline=None)
def test_the_vectorized_step_is_the_steps_of_all(kind, fused, seed, steps, resumed):
    """Whatever was done alone before and after: the state is the optimizers' own."""
    check_equal(Members(kind, seed, fused=fused), Members(kind, seed, fused=fused), seed, steps, resumed)


@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN, LAMBLAWN])
@given(
    seed=st.integers(0, 1000), steps=st.integers(1, 8), resumed=st.integers(0, 8), norm_axes=st.sampled_from([-1, 0])
)
@settings(max_examples=5, deadline=None)
def test_the_vectorized_step_keeps_norms_of_slices(kind, seed, steps, resumed, norm_axes):
    joint, alone = (Members(kind, seed, norm_axes=norm_axes) for _ in range(2))
    check_equal(joint, alone, seed, steps, resumed)


def check_equal(joint: Members, alone: Members, seed: int, steps: int, resumed: int) -> None:
    for step in range(resumed):
        joint.alone(gradient_of(seed, step + 1))
        alone.alone(gradient_of(seed, step + 1))
    check(joint, alone)
    assert VectorizedStep.is_supported(joint.optimizers)
    vectorized = VectorizedStep(joint.optimizers, joint.stacks, joint.slices)
    for step in range(resumed, resumed + steps):
        assert update(vectorized, gradient_of(seed, step + 1)) == set()
        alone.alone(gradient_of(seed, step + 1))
    check(joint, alone)
    for one, other in zip(joint.optimizers, alone.optimizers, strict=True):
        for mine, expected in zip(one.param_groups, other.param_groups, strict=True):
            assert mine.get("steps") == expected.get("steps")
            assert mine.get("switched") == expected.get("switched")
        for mine, expected in zip(fixed_norms(one), fixed_norms(other), strict=True):
            assert mine == pytest.approx(expected, rel=1e-9)
        kept, needed = one.state_dict()["state"], other.state_dict()["state"]
        assert {p for p in kept if NORM in kept[p]} == {p for p in needed if NORM in needed[p]}
    joint.alone(gradient_of(seed, 99))
    alone.alone(gradient_of(seed, 99))
    check(joint, alone)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN, LAMBLAWN])
def test_norms_hold_over_many_steps_in_float32(kind, fused):
    members = Members(kind, 0, torch.float32, fused=fused)
    vectorized = VectorizedStep(members.optimizers, members.stacks, members.slices)
    norms = [own[1].norm().item() for own in members.slices]
    for step in range(400):
        update(vectorized, gradient_of(1, step, torch.float32))
    for own, shape, norm in zip(members.slices, SHAPES, norms, strict=True):
        if len(shape) > 1:
            assert own[1].norm().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9, 1e15])
def test_norms_hold_after_a_huge_gradient(size, fused):
    """The momentum that it leaves lies along the weight, and digits cancel."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 300, 170, generator=generator)
    members = [nn.Parameter(row) for row in w]
    norms = [p.norm().item() for p in members]
    optimizers = [SGDLAWN([p], lr=0.05, free_steps=0, fused=fused) for p in members]
    vectorized = VectorizedStep(optimizers, [w], [members])
    for step in range(6):
        g = torch.randn(w.shape, generator=generator) * 0.1
        update(vectorized, [g * torch.tensor([1, size if step == 2 else 1])[:, None, None]])
        assert [p.norm().item() for p in members] == pytest.approx(norms, rel=3e-6)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", [LAMB, LAMBLAWN])
def test_numbers_that_are_parameters_are_kept_apart(kind, fused):
    joint, alone = ([nn.Parameter(torch.tensor(x)) for x in (1.0, 2.0, 3.0)] for _ in range(2))
    w = torch.stack([p.data for p in joint])
    for p, row in zip(joint, w, strict=True):
        p.data = row
    vectorized, own = ([kind([{"params": [p], "fused": fused}], lr=0.1) for p in params] for params in (joint, alone))
    step_of_all = VectorizedStep(vectorized, [w], [joint])
    for step in range(3):
        update(step_of_all, [torch.tensor([1.0, -2.0, step])])
        for p, optimizer, g in zip(alone, own, (1.0, -2.0, step), strict=True):
            p.grad = torch.tensor(float(g))
            optimizer.step()
    torch.testing.assert_close(w, torch.stack([p.data for p in alone]))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", RULES)
def test_a_member_that_is_not_finite_touches_no_other(kind, fused):
    joint, alone = (Members(kind, 0, fused=fused) for _ in range(2))
    vectorized = VectorizedStep(joint.optimizers, joint.stacks, joint.slices)
    lost = set()
    for step in range(5):
        gradients = gradient_of(0, step + 1)
        alone.alone(gradients, first=1)
        gradients = [g.clone().index_fill_(0, torch.tensor([0]), torch.nan) for g in gradients]
        lost |= update(vectorized, gradients)
    assert lost == ({0} if "free_steps" in NUMBERS[kind][0] else set())
    for a, b in zip(joint.stacks, alone.stacks, strict=True):
        assert a[0].isnan().any()
        torch.testing.assert_close(a[1:], b[1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Adam, AdamLAWN, SGDLAWN])
def test_gradients_may_have_any_strides(kind):
    joint, alone = Members(kind, 0), Members(kind, 0)
    vectorized = VectorizedStep(joint.optimizers, joint.stacks, joint.slices)
    for step in range(5):
        gradients = gradient_of(0, step + 1)
        update(vectorized, [g.movedim(0, -1).contiguous().movedim(-1, 0) for g in gradients])
        alone.alone(gradients)
    check(joint, alone)


def test_optimizers_without_a_vectorized_step_take_their_own():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    assert VectorizedStep.is_supported([SGD([w], lr=0.1) for w in weights])
    assert not VectorizedStep.is_supported([SGD([weights[0]], lr=0.1), Adam([weights[1]])])
    assert not VectorizedStep.is_supported([Adam([w], amsgrad=True) for w in weights])
    assert not VectorizedStep.is_supported([SGD([w], momentum=0.9, dampening=0.5) for w in weights])
    assert not VectorizedStep.is_supported([torch.optim.RMSprop([w]) for w in weights])
    assert not VectorizedStep.is_supported([AdamLAWN([{"params": [w], "blocks": [0]}]) for w in weights])
    assert not VectorizedStep.is_supported([AdamLAWN([w.bfloat16().detach().requires_grad_()]) for w in weights])
    others = [[{"params": [w]}, {"params": [nn.Parameter(torch.ones(2))], "betas": (0.5, 0.9)}] for w in weights]
    assert not VectorizedStep.is_supported([Adam(groups) for groups in others])
    behind = [Adam([w, nn.Parameter(torch.ones(2))]) for w in weights]
    weights[0].grad = torch.ones(2, 2)
    behind[0].step()
    assert not VectorizedStep.is_supported(behind)
    rows, columns = ([AdamLAWN([{"params": [w], "norm_axes": axes}]) for w in weights] for axes in (1, 0))
    assert VectorizedStep.is_supported(rows)
    assert not VectorizedStep.is_supported([rows[0], columns[1]])


def test_a_copy_of_the_state_is_whole():
    """The moments are slices; a checkpoint of one optimizer goes on by itself."""
    members = Members(AdamLAWN, 0)
    vectorized = VectorizedStep(members.optimizers, members.stacks, members.slices)
    for step in range(5):
        update(vectorized, gradient_of(0, step + 1))
    fresh = Members(AdamLAWN, 0)
    for optimizer, other, k in zip(fresh.optimizers, members.optimizers, range(3), strict=True):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        for own, others in zip(fresh.slices, members.slices, strict=True):
            own[k].data.copy_(others[k].data)
    fresh.alone(gradient_of(0, 6))
    members.alone(gradient_of(0, 6))
    check(fresh, members)
