"""What a weight's norm survives: every tool of torch that saves, regroups or steps an optimizer."""

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import SGD, Adam, AdamW, Optimizer

from lawn import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.optim.keys import NORM
from lawn.optim.phase import begin_step
from tests.optim.helpers import fixed_norms, with_gradients

NEW = (AdamLAWN, SGDLAWN, LAMBLAWN)
FORMS = ("AdamLAWN", "SGDLAWN", "LAMBLAWN", "LAWN(AdamW)", "LAWN(SGD)")
every_form = pytest.mark.parametrize("form", FORMS)
own_form = pytest.mark.parametrize("form", FORMS[:3])
wrapped_form = pytest.mark.parametrize("form", FORMS[3:])


def base(form: str, params: Any, lr: float | Tensor = 0.05) -> Optimizer:
    """The optimizer that the form is, or is of the kind of, without LAWN."""
    if "SGD" in form:
        return SGD(params, lr, momentum=0.9)
    return AdamW(params, lr, weight_decay=0.0) if "AdamW" in form else Adam(params, lr, eps=1e-6)


def make(form: str, params: Any, lr: float | Tensor = 0.05, **keys: Any) -> tuple[Optimizer, Any]:
    """The optimizer that is stepped, and what knows its phase."""
    if form.startswith("LAWN("):
        optimizer = base(form, params, lr)
        return optimizer, LAWN(optimizer, **keys)
    optimizer = dict(zip(FORMS, NEW, strict=False))[form](params, lr, **keys)
    return optimizer, optimizer


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers whose weights have norms that differ by a factor of five."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    made[1].weight.data.mul_(5)
    return made.to(dtype)


def train(network: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    """Updates `first` to `last`, each on a batch of its own."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 4, generator=generator).to(next(network.parameters()).dtype)
        optimizer.zero_grad()
        network(x).pow(2).mean().backward()
        optimizer.step()


def norms(network: nn.Module) -> list[float]:
    return [p.detach().double().norm().item() for p in network.parameters() if p.ndim > 1]


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


# Checkpoints

Carry = Callable[[nn.Module, Optimizer, nn.Module, Optimizer, Any], None]


def by_state_dict(network: nn.Module, optimizer: Optimizer, into: nn.Module, fresh: Optimizer, folder: Any) -> None:
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, folder / "file.pt")
    loaded = torch.load(folder / "file.pt", weights_only=True)
    into.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])


def by_json(network: nn.Module, optimizer: Optimizer, into: nn.Module, fresh: Optimizer, folder: Any) -> None:
    """Tensors in a file of their own, as safetensors keeps them, and everything else as JSON."""
    into.load_state_dict(network.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    tensors = {(p, k): v for p, kept in saved["state"].items() for k, v in kept.items() if isinstance(v, Tensor)}
    rest = {p: {k: v for k, v in kept.items() if not isinstance(v, Tensor)} for p, kept in saved["state"].items()}
    rest, groups = json.loads(json.dumps([list(rest.items()), saved["param_groups"]]))
    state = {p: {**kept, **{k: v for (q, k), v in tensors.items() if q == p}} for p, kept in rest}
    fresh.load_state_dict({"state": state, "param_groups": groups})


def by_dcp(flat: bool, background: bool = False) -> Carry:
    def carry(network: nn.Module, optimizer: Optimizer, into: nn.Module, fresh: Optimizer, folder: Any) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, state = get_state_dict(network, optimizer, options=options)
        if background:
            dcp.async_save({"model": weights, "optimizer": state}, checkpoint_id=folder).result()
        else:
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        weights, state = get_state_dict(into, fresh, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(into, fresh, model_state_dict=weights, optim_state_dict=state, options=options)

    return carry


CARRIES = {
    "state_dict": by_state_dict,
    "json": by_json,
    "dcp": by_dcp(flat=False),
    "dcp, flattened": by_dcp(flat=True),
    "dcp, async": by_dcp(flat=False, background=True),
    "dcp, async, flattened": by_dcp(flat=True, background=True),
}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_every_way() -> list[Any]:
    """All ways with all dtypes; those that say little more are for the slow suite."""
    fast = {torch.float32: ("state_dict", "json", "dcp, flattened"), torch.bfloat16: ("state_dict",)}
    return [
        pytest.param(carry, dtype, id=f"{name}, {dtype}", marks=() if name in few else pytest.mark.slow)
        for dtype, few in fast.items()
        for name, carry in CARRIES.items()
    ]


@every_form
@pytest.mark.parametrize(("carry", "dtype"), by_every_way())
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_checkpoint_goes_on_bit_for_bit(form, carry, dtype, tmp_path, one_process):
    """Saved while free, at the switch and in the second phase; loaded into a fresh optimizer or a constrained one."""
    for saved_after, stepped in ((1, 0), (2, 4), (4, 0)):
        network, into = model(dtype=dtype), model(1, dtype)
        optimizer, _ = make(form, network.parameters(), free_steps=2)
        fresh, lawn = make(form, into.parameters(), free_steps=2)
        train(network, optimizer, 0, saved_after)
        train(into, fresh, 0, stepped)
        fresh.zero_grad()
        folder = tmp_path / str(saved_after)
        folder.mkdir()
        carry(network, optimizer, into, fresh, folder)
        assert lawn.constrained == (saved_after > 2)
        pairs = zip(network.parameters(), into.parameters(), strict=True)
        assert all(optimizer.state[p][NORM] == fresh.state[q][NORM] for p, q in pairs)
        train(network, optimizer, saved_after, 7)
        train(into, fresh, saved_after, 7)
        assert lawn.constrained
        assert_equal(network, into)


@every_form
@pytest.mark.parametrize("flat", [False, True])
def test_by_name_the_order_does_not_matter(form, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer, options=options))
    into = copy.deepcopy(network)
    fresh, _ = make(form, reversed(list(into.parameters())), free_steps=1)
    into.zero_grad()
    set_optimizer_state_dict(into, fresh, saved, options=options)
    train(network, optimizer, 3, 6)
    train(into, fresh, 3, 6)
    assert_equal(network, into)


@every_form
def test_groups_may_be_split(form):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer, options=options))
    into = copy.deepcopy(network)
    into.zero_grad()
    fresh, _ = make(form, [{"params": layer.parameters()} for layer in into], free_steps=1)
    set_optimizer_state_dict(into, fresh, saved, options=options)
    train(network, optimizer, 3, 6)
    train(into, fresh, 3, 6)
    assert_equal(network, into)


def loaded_in_another_order(form: str) -> tuple[nn.Module, Optimizer, Any]:
    """A network, and an optimizer that has loaded each weight's state for the other, with what knows its phase."""
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight.data.mul_(5)
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    fresh, lawn = make(form, reversed(list(network.parameters())), free_steps=1)
    fresh.load_state_dict(optimizer.state_dict())
    return network, fresh, lawn


@every_form
def test_by_position_a_foreign_norm_is_refused(form):
    """torch attaches state by position: moments cannot be told apart, norms can."""
    network, fresh, lawn = loaded_in_another_order(form)
    before = copy.deepcopy(network)
    with pytest.raises(ValueError, match=r"another order.*constrain\(again=True\)"):
        train(network, fresh, 3, 4)
    assert_equal(network, before)
    lawn.constrain(again=True)
    train(network, fresh, 3, 4)
    assert norms(network) == pytest.approx(norms(before), rel=1e-5)


@every_form
def test_blocks_belong_to_the_order_of_the_parameters(form):
    """A weight and its bias share a norm; loaded by name into an optimizer that has them the other way round."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def grouped(network: nn.Module, *order: int) -> list[dict[str, Any]]:
        chosen = [p for i in order for p in network[i].parameters()]
        return [{"params": chosen, "constrain": True, "blocks": [b for i in order for b in (i, i)]}]

    optimizer, _ = make(form, grouped(network, 0, 1), free_steps=1)
    train(network, optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer))
    into = copy.deepcopy(network)
    into.zero_grad()
    fresh, _ = make(form, [{**grouped(into, 1, 0)[0], "blocks": [7, 7, 5, 5]}], free_steps=1)
    set_optimizer_state_dict(into, fresh, saved)
    train(network, optimizer, 3, 6)
    train(into, fresh, 3, 6)
    assert_equal(network, into)


@every_form
def test_a_checkpoint_before_the_first_update_counts_for_nothing(form):
    """torch.distributed.checkpoint calls `step` with rates and gradients of zero, to have the state made."""
    plain, saved = model(), model()
    (optimizer, _), (seen, lawn) = (make(form, m.parameters(), free_steps=2) for m in (plain, saved))
    state = get_optimizer_state_dict(saved, seen)["state"]
    assert {kept[NORM] for kept in state.values()} == {0.0}
    assert seen.param_groups[0]["steps"] == 0
    for t in range(4):
        train(plain, optimizer, t, t + 1)
        train(saved, seen, t, t + 1)
        assert lawn.constrained == (t >= 2)
    if not form.startswith("LAWN("):  # torch's own Adam counts the dummy step
        assert_equal(plain, saved)


@every_form
def test_a_checkpoint_before_the_first_update_may_meet_zeros(form):
    network = model()
    nn.init.zeros_(network[0].weight)
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    get_optimizer_state_dict(network, optimizer)
    with pytest.raises(ValueError, match="norm is 0"):
        train(network, optimizer, 0, 1)


@every_form
def test_an_update_at_a_rate_of_zero_counts(form):
    """A warmup that begins at zero is no dummy step: there are gradients."""
    network = model()
    optimizer, _ = make(form, network.parameters(), lr=0.0, free_steps=2)
    train(network, optimizer, 0, 1)
    assert optimizer.param_groups[0]["steps"] == 1


@every_form
def test_state_has_the_same_keys_in_both_phases(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    keys = []
    for t in range(3):
        train(network, optimizer, t, t + 1)
        saved = optimizer.state_dict()
        keys.append(([sorted(kept) for kept in saved["state"].values()], [*saved["param_groups"][0]]))
        assert all(isinstance(kept[NORM], float) for kept in saved["state"].values())
    assert keys[0] == keys[1] == keys[2]


@every_form
def test_a_norm_is_not_rounded_to_the_weights_dtype(form):
    network = model(dtype=torch.bfloat16)
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 1)
    saved = optimizer.state_dict()
    saved["state"][0][NORM] = 1.23456789
    optimizer.load_state_dict(saved)
    assert optimizer.state[network[0].weight][NORM] == 1.23456789


@pytest.mark.parametrize("before", [0, 1, 3])
@every_form
def test_warm_start_from_the_base_optimizer(form, before):
    """Its checkpoint has none of LAWN's keys: they stay as they are, and updates are counted from the load."""
    network = model()
    plain = base(form, network.parameters())
    train(network, plain, 0, 1)
    optimizer, lawn = make(form, network.parameters(), free_steps=2)
    train(network, optimizer, 0, before)
    assert lawn.constrained == (before > 2)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["free_steps"] == 2
    phases = []
    for t in range(4):
        train(network, optimizer, t, t + 1)
        phases.append(lawn.constrained)
    assert phases == [False, False, True, True]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["AdamLAWN", "SGDLAWN", "LAWN(AdamW)", "LAWN(SGD)"])
def test_the_base_optimizer_takes_a_lawn_checkpoint(form, wrapped):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    plain = base(form, network.parameters())
    if wrapped:
        LAWN(plain)
    plain.load_state_dict(optimizer.state_dict())
    train(network, plain, 3, 5)


@every_form
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused(form):
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"parameter 1 of param group 0 \(shape \(2, 2\)\) is there twice"):
        make(form, [b, w, w])


@every_form
@pytest.mark.parametrize("value", [float("inf"), 5.0, -1, True, "3"])
def test_free_steps_that_are_no_number_of_steps_are_refused_by_the_next_step(form, value):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=3)
    train(network, optimizer, 0, 1)
    optimizer.param_groups[0]["free_steps"] = value
    with pytest.raises(ValueError, match="param group 0: free_steps must be a non-negative integer or None, got"):
        train(network, optimizer, 1, 2)


@own_form
@pytest.mark.parametrize("name", ["maximize", "amsgrad", "nesterov", "dampening"])
def test_an_option_that_is_set_later_is_refused_by_the_next_step(form, name):
    network = model()
    optimizer, _ = make(form, network.parameters())
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"param group 0: {form} has no {name}"):
        train(network, optimizer, 0, 1)


@every_form
def test_a_group_that_is_added_and_moved_to_the_front_has_the_phase_of_the_others(form):
    network, head = model(), nn.Linear(4, 3)
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    optimizer.add_param_group({"params": head.parameters()})
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    before = norms(head)
    optimizer.zero_grad()
    head(torch.randn(5, 4)).pow(2).mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["switched"]
    assert norms(head) == pytest.approx(before)


@every_form
def test_half_precision_weights_go_on_in_float32(form):
    refused = 0
    for seed in range(20):
        small = model(seed, torch.bfloat16)
        optimizer, _ = make(form, small.parameters(), free_steps=1)
        train(small, optimizer, 0, 4)
        into = copy.deepcopy(small).float()
        fresh, _ = make(form, into.parameters(), free_steps=1)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        exact = optimizer.state[small[0].weight][NORM]
        refused += abs(norms(into)[0] / exact - 1) > 1e-3  # by the tolerance of float32
        train(into, fresh, 4, 5)
        assert norms(into)[0] == pytest.approx(exact, rel=1e-5)
    assert refused


@every_form
def test_a_closure_in_inference_mode(form):
    """As evolution strategies compute gradients."""
    with torch.inference_mode():
        w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer, _ = make(form, [w], free_steps=0)

        def closure() -> float:
            w.grad = torch.tensor([[1.0, -1.0]])
            return 0.5

        assert optimizer.step(closure) == 0.5
        assert w.norm().item() == pytest.approx(5.0)


@wrapped_form
def test_lawn_on_an_optimizer_that_has_loaded_its_checkpoint(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    into = copy.deepcopy(network)
    fresh = base(form, into.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lawn = LAWN(fresh, free_steps=1)
    assert lawn.constrained
    train(network, optimizer, 3, 6)
    train(into, fresh, 3, 6)
    assert_equal(network, into)
    with pytest.raises(ValueError, match="already"):
        LAWN(fresh)


@every_form
def test_a_checkpoint_with_decay_is_refused_when_it_is_loaded(form):
    network = model()
    plain = AdamW(network.parameters()) if "SGD" not in form else SGD(network.parameters(), momentum=0.9)
    plain.param_groups[0]["weight_decay"] = 0.01
    train(network, plain, 0, 1)
    optimizer, _ = make(form, network.parameters(), free_steps=3)
    with pytest.raises(ValueError, match=r"the loaded param group 0: weight_decay=0\.01"):
        optimizer.load_state_dict(plain.state_dict())


@every_form
@pytest.mark.parametrize("copier", [lambda o: o.load_state_dict(o.state_dict()), copy.deepcopy])
def test_a_group_that_comes_after_the_switch_is_copied(form, copier):
    network, head = model(), nn.Linear(3, 2)
    optimizer, lawn = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 2)
    optimizer.add_param_group({"params": head.parameters()})
    train(nn.Sequential(*network, head), optimizer, 2, 4)
    kept = norms(head)
    copier(optimizer)
    copier(lawn) if lawn is not optimizer and copier is copy.deepcopy else None
    train(nn.Sequential(*network, head), optimizer, 4, 6)
    assert norms(head) == pytest.approx(kept, rel=1e-6)
    assert optimizer.state[head.weight][NORM] == pytest.approx(kept[0], rel=1e-6)


# When norms are fixed


@every_form
def test_an_optimizer_for_each_parameter(form):
    """Some hold nothing that could be constrained."""
    network = model()
    held = [make(form, [p], free_steps=2) for p in network.parameters()]
    for p, (optimizer, _) in zip(network.parameters(), held, strict=True):

        def hook(_: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    for t in range(5):
        before = norms(network)
        network(torch.randn(8, 4, generator=torch.Generator().manual_seed(t))).pow(2).mean().backward()
        if t >= 2:
            assert norms(network) == pytest.approx(before, rel=1e-6)
    assert [lawn.constrained for _, lawn in held] == [True] * 4


@pytest.mark.parametrize("kind", NEW)
def test_in_backward(kind):
    network = model()
    _apply_optimizer_in_backward(kind, network.parameters(), {"free_steps": 2})
    for _ in range(2):
        network(torch.randn(8, 4)).pow(2).mean().backward()
    before = norms(network)
    network(torch.randn(8, 4)).pow(2).mean().backward()
    assert norms(network) == pytest.approx(before, rel=1e-6)


@every_form
def test_fewer_free_steps_than_are_done_switch_now(form):
    network = model()
    optimizer, lawn = make(form, network.parameters(), free_steps=100)
    train(network, optimizer, 0, 5)
    optimizer.param_groups[0]["free_steps"] = 3
    before = norms(network)
    train(network, optimizer, 5, 6)
    assert lawn.constrained
    assert norms(network) == pytest.approx(before, rel=1e-6)


@every_form
@pytest.mark.parametrize("free_steps", [(2, 5), (5, 2), (None, 2), (2, None)])
def test_free_steps_of_a_group(form, free_steps):
    network = model()
    groups: list[dict[str, Any]] = [{"params": layer.parameters()} for layer in network]
    for group, steps in zip(groups, free_steps, strict=True):
        if steps is not None:
            group["free_steps"] = steps
    optimizer, lawn = make(form, groups)
    for t in range(7):
        before = norms(network)
        train(network, optimizer, t, t + 1)
        fixed = [now == pytest.approx(then, rel=1e-6) for now, then in zip(norms(network), before, strict=True)]
        assert fixed == [steps is not None and t >= steps for steps in free_steps]
        assert lawn.constrained == any(fixed)
    if None in free_steps:
        lawn.constrain()
        before = norms(network)
        train(network, optimizer, 7, 9)
        assert norms(network) == pytest.approx(before, rel=1e-6)
    with pytest.raises(ValueError, match="already"):
        lawn.constrain()


@own_form
def test_an_empty_first_group(form):
    network = model()
    groups = [{"params": []}, {"params": network.parameters()}]
    optimizer, lawn = make(form, groups, free_steps=2)
    train(network, optimizer, 0, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    train(network, optimizer, 1, 3)
    assert lawn.constrained


@every_form
def test_a_weight_that_is_unfrozen_joins(form):
    network = model()
    network[0].requires_grad_(False)
    optimizer, _ = make(form, network.parameters(), free_steps=2)
    train(network, optimizer, 0, 4)
    network[0].requires_grad_(True)
    before = norms(network)
    train(network, optimizer, 4, 20)
    assert norms(network) == pytest.approx(before, rel=1e-5)


@every_form
def test_a_parameter_that_is_appended_joins(form):
    network, late = model(), nn.Linear(3, 3, bias=False)
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 2)
    optimizer.param_groups[0]["params"].append(late.weight)
    train(network, optimizer, 2, 3)
    before = norms(late)
    train(nn.Sequential(*network, late), optimizer, 3, 9)
    assert norms(late) == pytest.approx(before, rel=1e-5)


@every_form
def test_constrained_by_hand_before_the_first_update(form):
    network = model()
    optimizer, lawn = make(form, network.parameters())
    lawn.constrain()
    assert lawn.constrained
    assert not optimizer.state_dict()["state"]  # part of a state would keep torch from making the rest
    before = norms(network)
    train(network, optimizer, 0, 5)
    assert norms(network) == pytest.approx(before, rel=1e-5)


@every_form
@pytest.mark.parametrize("free_steps", [1, 2])
def test_a_group_that_comes_later_with_free_steps_of_its_own(form, free_steps):
    """Even if they are those of the constructor."""
    network, head = model(), nn.Linear(3, 2)
    optimizer, _ = make(form, network.parameters(), free_steps=free_steps)
    train(network, optimizer, 0, 3)
    optimizer.add_param_group({"params": head.parameters(), "free_steps": 2})
    moved = []
    for t in range(3, 7):
        before = norms(head)
        train(nn.Sequential(*network, head), optimizer, t, t + 1)
        moved.append(norms(head) != pytest.approx(before, rel=1e-6))
    assert moved == [True, True, False, False]


@every_form
@pytest.mark.parametrize("told", ["edited", "loaded", "in the group"])
def test_a_group_that_comes_later_switches_with_the_others(form, told):
    """Whatever the number of free steps was when the optimizer was made."""
    network, head = model(), nn.Linear(3, 2)
    if told == "in the group":
        optimizer, _ = make(form, [{"params": [*network.parameters()], "free_steps": 5}])
    else:
        optimizer, _ = make(form, network.parameters(), free_steps=2)
    if told == "edited":
        optimizer.param_groups[0]["free_steps"] = 5
    elif told == "loaded":
        optimizer.load_state_dict(make(form, model().parameters(), free_steps=5)[0].state_dict())
    train(network, optimizer, 0, 3)
    optimizer.add_param_group({"params": head.parameters()})
    both = nn.Sequential(*network, head)
    for t in range(3, 8):
        assert {group.get("switched", False) for group in optimizer.param_groups} == {t > 5}, t
        train(both, optimizer, t, t + 1)
    assert optimizer.state[head.weight][NORM] == pytest.approx(norms(head)[0], rel=1e-6)


@every_form
def test_a_phase_that_was_begun_by_hand_before_the_first_update(form):
    """A group that is added takes it over, and it survives the load of an optimizer without phase."""
    network, added = model(), nn.Parameter(torch.eye(3))
    optimizer, lawn = make(form, network.parameters())
    lawn.constrain()
    optimizer.add_param_group({"params": [added]})
    stepped(optimizer, added)
    assert fixed_norms(optimizer)[-1] == pytest.approx(3**0.5)
    theirs = base(form, network.parameters())
    train(network, theirs, 0, 1)
    optimizer, lawn = make(form, network.parameters())
    lawn.constrain()
    optimizer.load_state_dict(theirs.state_dict())
    assert lawn.constrained


@every_form
def test_a_group_that_comes_later_switches_with_the_last_of_several(form):
    network, heads = model(), [nn.Linear(3, 3) for _ in range(2)]
    optimizer, _ = make(form, network.parameters(), free_steps=2)
    train(network, optimizer, 0, 5)
    optimizer.add_param_group({"params": heads[0].parameters(), "free_steps": 6})
    train(nn.Sequential(network, heads[0]), optimizer, 5, 8)
    optimizer.add_param_group({"params": heads[1].parameters()})
    for t in range(8, 14):
        train(nn.Sequential(network, *heads), optimizer, t, t + 1)
        assert [group["switched"] for group in optimizer.param_groups] == [True, t > 10, t > 10], t


@every_form
def test_before_the_first_step_a_group_is_as_in_the_constructor(form):
    network, head = model(), nn.Linear(3, 2)
    optimizer, _ = make(form, [{"params": [*network.parameters()], "free_steps": None}], free_steps=4)
    optimizer.add_param_group({"params": head.parameters()})
    train(nn.Sequential(*network, head), optimizer, 0, 6)
    assert [group["switched"] for group in optimizer.param_groups] == [False, True]


@wrapped_form
def test_a_group_that_comes_between_a_checkpoint_and_lawn_switches_with_the_others(form):
    network, head = model(), nn.Linear(3, 2)
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    again = base(form, network.parameters())
    again.load_state_dict(optimizer.state_dict())
    again.add_param_group({"params": head.parameters()})
    LAWN(again, free_steps=1000)
    before = norms(head)
    train(nn.Sequential(*network, head), again, 3, 6)
    assert norms(head) == pytest.approx(before, rel=1e-6)


@every_form
def test_a_group_that_comes_later_does_not_wait_for_one_that_is_always_free(form):
    network, head = model(), nn.Linear(3, 2)
    weights, biases = ([p for p in network.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": weights, "free_steps": 1}, {"params": biases, "constrain": False}]
    optimizer, _ = make(form, groups)
    train(network, optimizer, 0, 3)
    optimizer.add_param_group({"params": head.parameters()})
    before = norms(head)
    train(nn.Sequential(*network, head), optimizer, 3, 6)
    assert norms(head) == pytest.approx(before, rel=1e-6)


@wrapped_form
@pytest.mark.parametrize("fails_at", [2, 3])
def test_a_step_that_fails_late_does_not_change_the_norms(form, fails_at):
    """It has moved the weights already, be it the first constrained step or another."""
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=2)
    train(network, optimizer, 0, 2)
    fixed = norms(network)
    train(network, optimizer, 2, fails_at)

    def interrupted() -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_post_hook(lambda *_: interrupted())
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    with pytest.raises(KeyboardInterrupt):
        train(network, optimizer, fails_at, fails_at + 1)
    handle.remove()
    assert norms(network) != pytest.approx(fixed, rel=1e-4)
    saved = [kept[NORM] for kept in optimizer.state_dict()["state"].values() if kept[NORM]]
    assert saved == pytest.approx(fixed, rel=1e-6)
    train(network, optimizer, fails_at, fails_at + 1)
    assert norms(network) == pytest.approx(fixed, rel=1e-6)


@wrapped_form
def test_a_state_dict_of_the_free_phase_does_not_get_the_norms_of_the_switch(form):
    """torch's state dicts share the states of the optimizer."""
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=2)
    train(network, optimizer, 0, 2)
    saved = optimizer.state_dict()
    train(network, optimizer, 2, 3)
    assert [kept[NORM] for kept in saved["state"].values()] == [0.0] * 4


@every_form
def test_replaced_parameters_are_not_kept_in_memory(form):
    """As where a model grows or shrinks while it is trained."""
    optimizer, _ = make(form, [nn.Parameter(torch.randn(5, 3))], free_steps=0)
    replaced = []
    for rows in range(6, 11):
        (group,) = optimizer.param_groups
        replaced.append(weakref.ref(group["params"][0]))
        group["params"][0] = nn.Parameter(torch.randn(rows, 3))
        group["params"][0].grad = torch.randn(rows, 3)
        optimizer.state.clear()
        optimizer.step()
    gc.collect()
    assert not [reference for reference in replaced[:-1] if reference() is not None]


@every_form
def test_gradients_without_autograd_reach_joined_tensors(form):
    """Evolution strategies set gradients of tensors that do not require any."""
    w, b = torch.randn(3, 2), torch.randn(3)
    optimizer, _ = make(form, [{"params": [w, b], "constrain": True, "blocks": [0, 0]}], free_steps=1)
    for t in range(4):
        before = torch.cat([w.flatten(), b])
        w.grad, b.grad = torch.randn(3, 2), torch.randn(3)
        optimizer.step()
        now = torch.cat([w.flatten(), b])
        assert (now != before).all()
        assert t == 0 or now.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    before = torch.cat([w.flatten(), b])
    b.grad = None  # which is a gradient of zero in a block
    optimizer.step()
    assert torch.cat([w.flatten(), b]).norm().item() == pytest.approx(before.norm().item(), rel=1e-5)


@every_form
def test_other_weights_take_their_norms_anew(form):
    network, other = model(), model(1)
    other[0].weight.data.mul_(3)
    optimizer, lawn = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 2)
    before = norms(network)
    network.load_state_dict(other.state_dict())
    train(network, optimizer, 2, 3)
    assert norms(network) == pytest.approx(before, rel=1e-5)  # as documented
    network.load_state_dict(other.state_dict())
    lawn.constrain(again=True)
    train(network, optimizer, 3, 5)
    assert norms(network) == pytest.approx(norms(other), rel=1e-5)


@every_form
def test_groups_that_are_used_again_begin_anew(form):
    """torch's optimizers write to the dicts that they are given."""
    network = model()
    groups = [{"params": [p]} for p in network.parameters()]
    for _ in range(2):
        optimizer, lawn = make(form, groups, free_steps=2)
        for t in range(3):
            assert not lawn.constrained
            train(network, optimizer, t, t + 1)
        assert lawn.constrained


@every_form
def test_an_optimizer_whose_groups_another_gets_stays_in_its_phase(form):
    """The other may be refused, or be a probe such as a search for the learning rate."""
    network = model()
    optimizer, lawn = make(form, network.parameters(), free_steps=6)
    train(network, optimizer, 0, 4)
    with pytest.raises(ValueError, match="appear in more than one"):
        optimizer.add_param_group(optimizer.param_groups[0])
    make(form, optimizer.param_groups, free_steps=6)
    train(network, optimizer, 4, 6)
    assert not lawn.constrained
    train(network, optimizer, 6, 7)
    assert lawn.constrained


@every_form
def test_a_group_that_is_released_and_bound_again(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 2)
    fixed = norms(network)
    optimizer.param_groups[0]["constrain"] = False
    train(network, optimizer, 2, 5)
    free = norms(network)
    assert free != pytest.approx(fixed, rel=1e-4)
    optimizer.param_groups[0]["constrain"] = None
    train(network, optimizer, 5, 8)
    assert norms(network) == pytest.approx(free, rel=1e-5)


# What a group may ask for


@every_form
def test_a_group_with_decay_is_refused_every_time(form):
    network, head = model(), nn.Linear(3, 2)
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 1)
    before = norms(head)

    def attempt() -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": head.parameters(), "weight_decay": 0.1})
        train(nn.Sequential(*network, head), optimizer, 1, 2)

    for _ in range(3):
        with pytest.raises(ValueError, match=r"param group 1: weight_decay=0\.1"):
            attempt()
    assert norms(head) == before
    optimizer.param_groups[-1]["weight_decay"] = 0.0
    train(network, optimizer, 1, 2)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"param group 0: weight_decay=0\.1"):
        train(network, optimizer, 1, 2)


@pytest.mark.parametrize("kind", NEW)
def test_a_free_group_decays_as_the_class_says(kind):
    """Of a gradient of zero: Adam's is decoupled, SGD's goes through the momentum, LAMB's through the trust ratio."""
    free, theirs = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    bound = nn.Parameter(torch.randn(4, 4))
    decayed = {"params": [free], "constrain": False, "weight_decay": 0.5, "lr": 0.1}
    optimizer = kind([decayed, {"params": [bound]}])
    if kind is LAMBLAWN:
        from lawn import LAMB

        plain: Optimizer = LAMB([theirs], lr=0.1, weight_decay=0.5)
    else:
        how = {"lr": 0.1, "weight_decay": 0.5}
        plain = SGD([theirs], momentum=0.9, **how) if kind is SGDLAWN else AdamW([theirs], eps=1e-6, fused=True, **how)
    for _ in range(10):
        free.grad, theirs.grad, bound.grad = torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
        optimizer.step()
        plain.step()
    assert free[0, 0] < 0.7
    assert torch.equal(free, theirs)


@pytest.mark.parametrize("kind", [*NEW, LAMB])
@pytest.mark.parametrize(
    "keys",
    [{"maximize": True}, {"amsgrad": True}, {"nesterov": True}, {"dampening": 0.1}, {"foreach": True}],
)
def test_keys_of_other_optimizers_are_refused_by_name(kind, keys):
    (name,) = keys
    with pytest.raises(ValueError, match=f"param group 0: {kind.__name__} has no {name}"):
        kind([{"params": [nn.Parameter(torch.ones(2, 2))], **keys}])
    kind([{"params": [nn.Parameter(torch.ones(2, 2))], name: False, "name": "trunk", "lr_scale": 0.5}])


@pytest.mark.parametrize("kind", NEW)
def test_keys_of_the_user_are_kept(kind):
    """A wrapper such as SAM has keys of its own in the param groups, `rho` among them; so has Adadelta."""
    own = {"rho": 0.05, "lr_decay": 0.9, "alpha": 1, "d": 2.0}
    optimizer = kind([{"params": [nn.Parameter(torch.ones(2, 2))], **own}])
    optimizer.load_state_dict(optimizer.state_dict())
    assert own.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("other", ["Adadelta", "RMSprop", "NAdam"])
def test_a_checkpoint_of_another_optimizer_is_refused(kind, other):
    network = model()
    plain = getattr(torch.optim, other)(network.parameters())
    train(network, plain, 0, 1)
    with pytest.raises(ValueError, match=f"{kind.__name__} has no "):
        kind(network.parameters()).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", [AdamLAWN, LAMBLAWN, LAMB])
@pytest.mark.parametrize(
    ("make_other", "problem"),
    [
        (lambda params: SGD(params, lr=5.0), "has no betas: it is of another optimizer than"),
        (torch.optim.Adagrad, "has no betas"),
        (torch.optim.Adamax, "the loaded state has no exp_avg"),
        (torch.optim.RAdam, "of another optimizer than"),
        (partial(Adam, maximize=True), "has no maximize"),
        (partial(Adam, amsgrad=True), "has no amsgrad"),
    ],
)
def test_a_checkpoint_of_another_rule_is_refused(kind, make_other, problem):
    network = model()
    plain = make_other(network.parameters())
    train(network, plain, 0, 1)
    with pytest.raises(ValueError, match=problem):
        kind(network.parameters()).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "make_other", [partial(Adam, fused=True), partial(Adam, foreach=True), partial(AdamW, weight_decay=0)]
)
def test_lamb_takes_what_adam_has_computed_in_any_way(make_other):
    network = model()
    plain = make_other(network.parameters(), lr=0.125)
    train(network, plain, 0, 1)
    optimizer = LAMB(network.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125
    train(network, optimizer, 1, 2)
    assert optimizer.state[network[0].weight]["step"] == 2


@pytest.mark.parametrize("kind", [AdamLAWN, LAMBLAWN])
@pytest.mark.parametrize("other", [Adam, AdamW])
def test_weight_decay_that_acts_in_another_way_is_refused(kind, other):
    """That of Adam is added to the gradient, that of AdamW is not, that of LAMB is in the trust ratio."""
    network = model()

    def groups(**keys: Any) -> list[dict[str, Any]]:
        weights, biases = ([p for p in network.parameters() if (p.ndim > 1) == chosen] for chosen in (True, False))
        return [{"params": weights}, {"params": biases, "constrain": False, **keys}]

    plain = other(groups(weight_decay=0.5), weight_decay=0.0)
    train(network, plain, 0, 1)
    optimizer = kind(groups())
    if (kind, other) == (AdamLAWN, AdamW):
        optimizer.load_state_dict(plain.state_dict())
        assert optimizer.param_groups[1]["weight_decay"] == 0.5
        return
    with pytest.raises(ValueError, match=f"weight_decay=0.5 of {other.__name__} acts in another way than that of"):
        optimizer.load_state_dict(plain.state_dict())


def test_lamb_warns_of_norms_that_it_does_not_keep():
    network = model()
    constrained = LAMBLAWN(network.parameters(), free_steps=0)
    optimizer = LAMB(network.parameters())
    optimizer.load_state_dict(constrained.state_dict())  # is free yet
    train(network, constrained, 0, 1)
    with pytest.warns(UserWarning, match="fixed norms, which LAMB does not keep"):
        optimizer.load_state_dict(constrained.state_dict())
    lawn = LAWN(LAMB(network.parameters()))
    lawn.optimizer.load_state_dict(constrained.state_dict())  # which `LAWN` keeps
    assert lawn.constrained


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (AdamLAWN, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
        (LAMB, {"betas": "0.9"}),
        (LAMBLAWN, {"betas": None}),
        (AdamLAWN, {"eps": torch.tensor(1e-8)}),
        (SGDLAWN, {"momentum": torch.tensor(0.9)}),
        (SGDLAWN, {"lr": "0.1"}),
        (LAMB, {"lr": None}),
        (AdamLAWN, {"weight_decay": None}),
    ],
)
def test_what_is_no_number_is_refused_by_name(kind, keys):
    """Only a learning rate may be in a tensor."""
    (name,) = keys
    params = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=f"{name} must be"):
        kind([{"params": params, **keys}])
    optimizer = kind(params)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(keys)
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.load_state_dict(saved)


@own_form
def test_a_norm_that_is_no_number_is_refused(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 1)
    for norm in (float("nan"), float("inf"), -1.0):
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry[NORM] = norm if entry[NORM] else 0.0
        optimizer.load_state_dict(saved)
        with pytest.raises(ValueError, match="but its state says"):
            train(network, optimizer, 1, 2)


@own_form
def test_a_hook_mends_a_checkpoint_before_it_is_checked(form):
    network = model()
    optimizer, _ = make(form, network.parameters())
    train(network, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["maximize"] = True

    def mend(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "maximize"} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    with pytest.raises(ValueError, match="has no maximize"):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(mend)
    optimizer.load_state_dict(saved)
    train(network, optimizer, 1, 2)


@every_form
@pytest.mark.parametrize(
    ("typed", "meant"), [("constrained", "constrain"), ("free_step", "free_steps"), ("block", "blocks")]
)
def test_a_key_that_is_nearly_one_is_refused(form, typed, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        make(form, [{"params": [nn.Parameter(torch.ones(2, 2))], typed: 1}])


@pytest.mark.parametrize("kind", NEW)
def test_a_hyperparameter_that_is_nearly_one_is_refused(kind):
    for typed, meant in (("wieght_decay", "weight_decay"), ("roundng", "rounding")):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            kind([{"params": [nn.Parameter(torch.ones(2, 2))], typed: 1}])


def test_rounding_is_not_the_wrappers():
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "rounding": "stochastic"}
    with pytest.raises(ValueError, match="rounding='stochastic', but the wrapped optimizer rounds the weights itself"):
        LAWN(AdamW([group], weight_decay=0.0))


@pytest.mark.parametrize(("key", "value"), [("rounding", "stochastic"), ("differentiable", True)])
def test_an_option_that_the_wrapper_refuses_is_refused_in_a_checkpoint(key, value):
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW([w], weight_decay=0.0)
    LAWN(optimizer, free_steps=3)
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"the loaded param group 0: {key}={value!r}, but"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].get(key, False) is False  # nothing is loaded


def test_lamb_refuses_what_it_would_not_do():
    w = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="param group 0: LAMB rounds to nearest, got rounding='stochastic'"):
        LAMB([{"params": [w], "rounding": "stochastic"}])
    with pytest.raises(ValueError, match="param group 0: norm_axes must be None, an int or a tuple of ints, got 'row'"):
        LAMB([{"params": [w], "norm_axes": "row"}])


@every_form
def test_a_zero_mask_of_a_gpu_is_checked_once_when_it_has_arrived(form):
    class Event:
        """Of a copy to the host that is seen to be complete when it is asked for the second time."""

        asked = 0

        def query(self) -> bool:
            self.asked += 1
            return self.asked > 1

    w = nn.Parameter(torch.ones(2, 2))
    optimizer, lawn = make(form, [w], free_steps=0)
    w.grad = torch.rand_like(w)
    optimizer.step()
    (group_update,) = begin_step(optimizer, lawn._known)
    lawn._zero_check._pending.append((group_update, torch.tensor([True]), Event()))
    optimizer.step()
    with pytest.raises(ValueError, match="is zero or underflows when squared, but was constrained"):
        optimizer.step()
    optimizer.step()  # the weight has been restored
    lawn._zero_check._pending.append((group_update, torch.tensor([True]), Event()))
    optimizer.load_state_dict(optimizer.state_dict())  # perhaps with other weights, to which it does not apply
    for _ in range(2):
        optimizer.step()


def test_a_key_of_the_wrapped_optimizer_is_its_own():
    class Constrained(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.defaults["constrained"] = True
            self.param_groups[0]["constrained"] = True

    assert LAWN(Constrained([nn.Parameter(torch.ones(2, 2))])).optimizer.param_groups[0]["constrained"]


@pytest.mark.parametrize("kind", NEW)
def test_a_checkpoint_with_keys_that_mean_something_else_is_refused(kind):
    network = model()
    plain = SGD(network.parameters(), lr=0.1, maximize=True, momentum=0.9)
    train(network, plain, 0, 1)
    with pytest.raises(ValueError, match=f"{kind.__name__} has no (maximize|momentum)"):
        kind(network.parameters()).load_state_dict(plain.state_dict())


@every_form
@pytest.mark.parametrize(("value", "steps"), [(np.int64(3), 3), (0, 0), (None, None)])
def test_numbers_of_free_steps(form, value, steps):
    optimizer, _ = make(form, model().parameters(), free_steps=value)
    assert optimizer.param_groups[0]["free_steps"] == steps
    json.dumps(optimizer.state_dict()["param_groups"])


@every_form
@pytest.mark.parametrize("value", [True, -1, 1.5, "3", np.float64(3)])
def test_no_numbers_of_free_steps(form, value):
    with pytest.raises(ValueError, match="free_steps"):
        make(form, model().parameters(), free_steps=value)
    with pytest.raises(ValueError, match="free_steps"):
        make(form, [{"params": model().parameters(), "free_steps": value}])


# What cannot be constrained


@every_form
@pytest.mark.parametrize("named", [False, True])
def test_messages_name_the_parameter(form, named):
    network = model()
    nn.init.zeros_(network[1].weight)
    optimizer, lawn = make(form, network.named_parameters() if named else network.parameters(), free_steps=0)
    name = "'1.weight'" if named else r"2 of param group 0 \(shape \(3, 4\)\)"
    before = copy.deepcopy(network)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"cannot constrain parameter {name}: its norm is 0.*constrain=False"):
            train(network, optimizer, 0, 1)
        with pytest.raises(ValueError, match=f"cannot constrain parameter {name}"):
            lawn.constrain()
    assert not lawn.constrained
    assert_equal(network, before)
    nn.init.constant_(network[1].weight, torch.nan)
    with pytest.raises(ValueError, match="norm is nan"):
        lawn.constrain()


@every_form
@pytest.mark.parametrize("fused", [None, False])
def test_a_weight_that_becomes_zero_is_named(form, fused):
    network = model()
    optimizer, _ = make(form, network.named_parameters(), free_steps=1, fused=fused)
    train(network, optimizer, 0, 2)
    nn.init.zeros_(network[0].weight)
    with pytest.raises(ValueError, match=r"parameter '0.weight' is zero"):
        train(network, optimizer, 2, 3)
    assert not network[0].weight.isnan().any()
    assert not any(v.isnan().any() for v in optimizer.state[network[0].weight].values() if isinstance(v, Tensor))
    nn.init.ones_(network[0].weight)
    train(network, optimizer, 3, 5)
    assert norms(network)[0] == pytest.approx(optimizer.state[network[0].weight][NORM], rel=1e-5)


@every_form
def test_a_weight_of_zero_is_named_after_a_load(form):
    """It is not taken for one in another order."""
    w = nn.Parameter(torch.ones(2, 2))
    optimizer, _ = make(form, [w], free_steps=0)
    stepped(optimizer, w)
    optimizer.load_state_dict(optimizer.state_dict())
    w.data.zero_()
    with pytest.raises(
        ValueError, match=r"parameter 0 .* is zero or underflows when squared, but was constrained to the norm 2"
    ):
        stepped(optimizer, w)


@every_form
def test_nothing_to_constrain_is_an_error_only_by_hand(form):
    bias = nn.Parameter(torch.ones(3))
    optimizer, lawn = make(form, [bias], free_steps=1)
    for _ in range(3):
        bias.grad = torch.ones(3)
        optimizer.step()
    assert lawn.constrained
    _, lawn = make(form, [bias])
    with pytest.raises(ValueError, match="nothing to constrain"):
        lawn.constrain()


@every_form
@pytest.mark.parametrize(("fused", "scale"), [(None, 3.0), (False, 1.0)])
def test_complex_weights_are_their_real_views(form, fused, scale):
    generator = torch.Generator().manual_seed(0)
    values = scale * torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    z, r = nn.Parameter(torch.view_as_complex(values)), nn.Parameter(values.clone())
    optimizers = [make(form, [p], free_steps=2, fused=fused)[0] for p in (z, r)]
    for _ in range(5):
        g = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
        z.grad, r.grad = torch.view_as_complex(g.clone()), g.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(torch.view_as_real(z.grad), g)
    torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach(), rtol=1e-10, atol=1e-12)
    assert optimizers[0].state[z][NORM] == pytest.approx(z.detach().norm().item())


@own_form
def test_a_gradient_may_be_a_lazy_conjugate(form):
    value, g = torch.randn(2, 3, 4, dtype=torch.complex64).unbind()
    params = [nn.Parameter(value.clone()) for _ in range(2)]
    for p, gradient in zip(params, (g, g.conj().resolve_conj().conj()), strict=True):
        optimizer, _ = make(form, [p], free_steps=0)
        p.grad = gradient
        optimizer.step()
    assert params[1].grad.is_conj()
    assert torch.equal(*params)


@every_form
@pytest.mark.parametrize("fused", [None, False])
def test_weights_without_elements(form, fused):
    network, empty = model(), nn.Parameter(torch.zeros(0, 4))
    optimizer, lawn = make(form, [*network.parameters(), empty], free_steps=1, fused=fused)
    for t in range(3):
        empty.grad = torch.zeros(0, 4)
        train(network, optimizer, t, t + 1)
        empty.grad = torch.zeros(0, 4)
    assert lawn.constrained
    lawn.constrain(again=True)


@every_form
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_another_dtype_goes_on_as_without_lawn(form, fused, to):
    """Some of torch's optimizers take it that moments stay in the old one, others do not."""
    network, plain = model(), model()
    theirs = base(form, plain.parameters())
    train(plain, theirs, 0, 2)
    plain.to(to)
    try:
        train(plain, theirs, 2, 4)
    except RuntimeError:
        pytest.skip("the base optimizer does not")
    optimizer, _ = make(form, network.parameters(), free_steps=1, fused=fused)
    train(network, optimizer, 0, 2)
    before = norms(network)
    network.to(to)
    train(network, optimizer, 2, 4)
    assert norms(network) == pytest.approx(before, rel=1e-6 if to == torch.float64 else 1e-2)


# What is put together from parts of others


def stepped(optimizer: Optimizer, *params: Tensor, seed: int = 0) -> None:
    """An update by random gradients of these parameters alone."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@own_form
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("shape", [(2, 2), (6, 4)])
def test_state_of_another_shape_is_refused(form, fused, shape):
    """By position, or where a parameter has grown; compiled code would write beyond it."""
    small, large = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(4, 6))
    optimizer, _ = make(form, [small, large], fused=fused)
    stepped(optimizer, small, large)
    other, _ = make(form, [large, small], fused=fused)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"parameter 0 has the shape \(4, 6\), but its state"):
        stepped(other, large)


def test_a_parameter_without_a_name_in_a_group_of_names_has_its_position():
    """Names are given to the constructor; parameters can be appended to a group later."""
    optimizer = AdamLAWN([("w", nn.Parameter(torch.randn(3, 3)))], lr=1e-2, free_steps=2)
    added = nn.Parameter(torch.randn(3, 3))
    optimizer.param_groups[0]["params"].append(added)
    stepped(optimizer, added)
    added.data = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"parameter 1 has the shape \(5, 3\), but its state"):
        stepped(optimizer, added)


@wrapped_form
def test_a_step_that_calls_its_parents_counts_once(form):
    kind = AdamW if "AdamW" in form else SGD
    kind([nn.Parameter(torch.ones(1))])  # from here on torch hooks the parent's step, too

    class Mine(kind):
        def step(self, closure=None):
            return super().step(closure)

    network, plain = model(), model()
    optimizer = Mine(network.parameters(), lr=0.05, weight_decay=0.0)
    lawn = LAWN(optimizer, free_steps=2)
    theirs = kind(plain.parameters(), lr=0.05, weight_decay=0.0)
    LAWN(theirs, free_steps=2)
    for t in range(5):
        train(network, optimizer, t, t + 1)
        train(plain, theirs, t, t + 1)
        assert optimizer.param_groups[0]["steps"] == t + 1
        assert lawn.constrained == (t >= 2)
    assert_equal(network, plain)


@wrapped_form
def test_after_a_step_that_raised_the_next_is_by_its_own_gradient(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 1)
    fail = {"now": True}
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0 if fail["now"] else None)
    with pytest.raises(ZeroDivisionError):
        train(network, optimizer, 1, 2)
    hook.remove()
    p = network[0].weight
    mine = torch.ones_like(p)
    p.grad = mine
    optimizer.step()
    assert p.grad is mine
    assert torch.equal(mine, torch.ones_like(p))


@wrapped_form
@pytest.mark.parametrize("to_none", [True, False])
def test_a_hook_after_the_step_may_clear_gradients(form, to_none):
    network = model()
    optimizer = base(form, network.parameters())
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none=to_none))
    LAWN(optimizer, free_steps=0)
    train(network, optimizer, 0, 2)
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


@every_form
def test_a_foreign_norm_is_refused_whenever_its_weight_comes(form):
    """A weight without gradient in the first update after the load."""
    small, large = (nn.Parameter(scale * torch.eye(3)) for scale in (1.0, 5.0))
    optimizer, _ = make(form, [small, large], free_steps=0)
    stepped(optimizer, small, large)
    bias = nn.Parameter(torch.ones(3))
    other, _ = make(form, [{"params": [large, small]}], free_steps=0)
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": [bias]})
    stepped(other, bias)
    with pytest.raises(ValueError, match="another order"):
        stepped(other, large)


@every_form
def test_a_block_that_changes_is_not_rescaled(form):
    weight, bias, late = nn.Parameter(torch.eye(3)), nn.Parameter(5 * torch.ones(3)), nn.Parameter(torch.eye(3))
    group = {"params": [weight, bias], "constrain": True, "blocks": [0, 0]}
    optimizer, lawn = make(form, [group], free_steps=0)
    stepped(optimizer, weight, bias)
    group = optimizer.param_groups[0]
    group["params"].append(late)
    group["blocks"].append(0)
    before = late.detach().norm().item()
    stepped(optimizer, weight, bias, late)
    assert late.detach().norm().item() == pytest.approx(before, rel=0.2)  # joins, and the block is measured anew
    group["constrain"], group["blocks"] = None, [0, 1, 0]  # the bias leaves
    with pytest.raises(ValueError, match="other blocks"):
        stepped(optimizer, weight, bias, late)
    lawn.constrain(again=True)
    stepped(optimizer, weight, bias, late)


@every_form
def test_a_single_number_joins_a_block(form):
    """Alone it would be free."""
    weight, number = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(1, 1))
    optimizer, _ = make(form, [{"params": [weight, number], "blocks": [0, 0]}], free_steps=0)
    stepped(optimizer, weight, number)
    assert fixed_norms(optimizer) == pytest.approx([2.0, 2.0])


@every_form
def test_a_block_that_loses_a_member_and_gets_another_is_refused(form):
    """One that only loses a frozen member is measured anew."""
    params = [nn.Parameter(scale * torch.eye(3)) for scale in (1.0, 2.0, 3.0)]
    optimizer, _ = make(form, [{"params": params, "blocks": [0, 0, 1]}], free_steps=0)
    stepped(optimizer, *params)
    params[1].requires_grad_(False)
    optimizer.param_groups[0]["blocks"] = [0, 0, 0]
    with pytest.raises(ValueError, match="other blocks"):
        stepped(optimizer, params[0], params[2])


@every_form
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blocks": [0, 0]}, "blocks join a vector, which is free by default; set constrain=True"),
        ({"blocks": torch.tensor([0, 0]), "constrain": True}, "blocks must have an int for each of 2 parameters"),
        ({"blocks": [0.0, 0.0], "constrain": True}, "blocks must have an int for each of 2 parameters"),
        ({"blocks": [0]}, "blocks must have an int for each of 2 parameters"),
    ],
)
def test_blocks_that_would_join_nothing_are_refused(form, keys, message):
    params = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"param group 0: {message}"):
        make(form, [{"params": params, **keys}], free_steps=0)


@pytest.mark.parametrize("kind", [AdamLAWN, LAMBLAWN])
@pytest.mark.parametrize("first", ["early", "late"])
def test_a_late_member_of_a_block_has_the_count_of_the_others(kind, first):
    """Its earlier gradients count as zero, wherever it is listed."""

    def trained(absent):
        generator = torch.Generator().manual_seed(0)
        early, late = (nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64)) for _ in range(2))
        params = [early, late] if first == "early" else [late, early]
        optimizer = kind([{"params": params, "constrain": True, "blocks": [0, 0]}], lr=0.01, free_steps=6)
        for step in range(10):
            early.grad, late.grad = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
            if step < 6:
                late.grad = absent(late.grad)
            optimizer.step()
        assert optimizer.state[late]["step"] == optimizer.state[early]["step"] == 10
        return torch.stack([early, late]).detach()

    torch.testing.assert_close(trained(lambda _: None), trained(torch.zeros_like), rtol=1e-12, atol=0)


@every_form
def test_a_frozen_member_of_a_block_stays(form):
    weight, bias = nn.Parameter(torch.eye(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer, _ = make(form, [{"params": [weight, bias], "constrain": True, "blocks": [0, 0]}], free_steps=0)
    for t in range(3):
        stepped(optimizer, bias, seed=t)
    assert torch.equal(weight, torch.eye(3))
    assert bias.detach().norm().item() == pytest.approx(3**0.5, rel=1e-5)


@every_form
def test_norms_are_taken_anew_of_frozen_weights_too(form):
    network = model()
    optimizer, lawn = make(form, network.parameters(), free_steps=0)
    train(network, optimizer, 0, 2)
    network[0].requires_grad_(False)
    optimizer.zero_grad()  # or it would count as trained
    network[0].weight.data.mul_(7)
    lawn.constrain(again=True)
    network[0].requires_grad_(True)
    before = norms(network)
    train(network, optimizer, 2, 4)
    assert norms(network) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("kind", [AdamLAWN, LAMBLAWN])
def test_counters_count_on_in_any_default_dtype(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = nn.Parameter(torch.ones(2, 2, dtype=torch.float32))
        optimizer = kind([p], free_steps=150)
        for t in range(300):
            stepped(optimizer, p, seed=t)
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].item() == 300


@every_form
@pytest.mark.parametrize("fused", [None, False])
def test_dtypes_beside_each_other(form, fused):
    """Each is computed in its own precision."""
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for others in ([], [torch.float32, torch.bfloat16]):
        p, *rest = (nn.Parameter(start.to(dtype)) for dtype in (torch.float64, *others))
        optimizer, _ = make(form, [*rest, p], free_steps=1, fused=fused)
        for t in range(4):
            stepped(optimizer, p, *rest, seed=t)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


@every_form
def test_norms_of_dtypes_beside_each_other(form):
    """Each weight gets its own, in any order; what can be squared is what float32 can."""
    kinds = torch.float32, torch.float64, torch.float32
    params = [nn.Parameter(scale * torch.eye(3, dtype=dtype)) for scale, dtype in zip((1, 2, 3), kinds, strict=True)]
    optimizer, _ = make(form, params, free_steps=0)
    stepped(optimizer, *params)
    assert fixed_norms(optimizer) == pytest.approx([3**0.5, 2 * 3**0.5, 3 * 3**0.5])
    params[0].data.mul_(1e-20)
    optimizer, _ = make(form, params, free_steps=0)
    with pytest.raises(ValueError, match="cannot constrain parameter 0 of param group 0"):
        stepped(optimizer, *params)


@wrapped_form
def test_it_says_that_it_is_no_optimizer(form):
    _, lawn = make(form, model().parameters())
    with pytest.raises(AttributeError, match="it wraps an optimizer"):
        lawn.step()
    assert not hasattr(lawn, "param_groups")


@wrapped_form
def test_lawn_is_not_copied_onto_the_same_optimizer(form):
    network = model()
    optimizer, lawn = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 1)
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(lawn)
    train(network, optimizer, 1, 2)
    assert optimizer.param_groups[0]["steps"] == 2


@every_form
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_continues_with_weights_that_the_loop_has_moved(form, copier):
    """As clipping, masks and averages do: the next step scales them back, that of a copy too."""
    network = model()
    optimizer, lawn = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    for p in network.parameters():
        p.data.mul_(0.9)
    others, twin = copier((network, lawn))
    train(network, optimizer, 3, 5)
    train(others, getattr(twin, "optimizer", twin), 3, 5)
    assert_equal(network, others)


@every_form
def test_a_copy_compares_norms_that_were_only_loaded(form):
    network, _, lawn = loaded_in_another_order(form)
    others, twin = copy.deepcopy((network, lawn))
    with pytest.raises(ValueError, match="another order"):
        train(others, getattr(twin, "optimizer", twin), 3, 4)


@every_form
def test_steps_in_inference_mode(form):
    network = model()
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    fixed = []
    for t in range(4):
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        with torch.inference_mode():
            optimizer.step()
        fixed.append(norms(network))
    assert fixed[1] == pytest.approx(fixed[3], rel=1e-5)


@every_form
def test_weights_with_given_gradients_are_constrained_by_hand(form):
    """They are trained without autograd, for example by an evolution strategy."""
    weight = nn.Parameter(torch.eye(3), requires_grad=False)
    optimizer, lawn = make(form, [weight], free_steps=None)
    with pytest.raises(ValueError, match="nothing to constrain"):
        lawn.constrain()
    stepped(optimizer, weight)
    fixed = weight.norm().item()
    lawn.constrain()
    weight.mul_(2)
    stepped(optimizer, weight)
    assert weight.norm().item() == pytest.approx(fixed, rel=1e-5)


@wrapped_form
def test_detached_it_says_so(form):
    _, lawn = make(form, model().parameters())
    lawn.detach()
    with pytest.raises(ValueError, match="detached"):
        lawn.constrain()


@every_form
def test_a_group_that_is_saved_before_its_first_update(form):
    network, head = model(), nn.Linear(3, 2)
    optimizer, _ = make(form, network.parameters(), free_steps=1)
    train(network, optimizer, 0, 3)
    optimizer.add_param_group({"params": head.parameters()})
    saved = copy.deepcopy(optimizer.state_dict())
    fresh, _ = make(form, [{"params": network.parameters()}, {"params": head.parameters()}], free_steps=9)
    fresh.load_state_dict(saved)
    before = norms(head)
    train(nn.Sequential(*network, head), fresh, 3, 5)
    assert norms(head) == pytest.approx(before, rel=1e-5)


@every_form
def test_names_in_another_order_are_refused(form):
    """Also in the free phase, without norms to compare; a state dict by name has the order of the optimizer."""
    network, other = model(0), model(1)
    optimizer, _ = make(form, network.named_parameters(), free_steps=9)
    train(network, optimizer, 0, 2)
    order = list(other.named_parameters())[::-1]
    fresh, _ = make(form, order, free_steps=9)
    with pytest.raises(ValueError, match=r"another order: '0\.weight' where the optimizer has '1\.bias'"):
        fresh.load_state_dict(optimizer.state_dict())
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(network, optimizer))
    assert fresh.param_groups[0]["param_names"] == [name for name, _ in order]
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[q][key])), key


@every_form
def test_flat_parameters_are_refused(form):
    """As FullyShardedDataParallel marks what it has flattened."""
    flat = nn.Parameter(torch.ones(12))
    flat._fsdp_flattened = True
    with pytest.raises(TypeError, match="FullyShardedDataParallel"):
        make(form, [flat])


@pytest.mark.parametrize("trainable", [True, False])
@every_form
def test_a_parameter_that_is_a_lazy_conjugate_is_refused(form, trainable):
    p = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64).conj(), requires_grad=trainable)
    optimizer, _ = make(form, [p], free_steps=0)
    p.grad = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises((TypeError, RuntimeError), match="conj"):
        optimizer.step()


# The tools of torch


def graph_breaks(step: Callable[[], None], times: int) -> tuple[int, int]:
    """Breaks and graphs of a training step, compiled as a whole."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend="eager")
    for _ in range(times):
        compiled()
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["AdamLAWN", "LAWN(AdamW)"])
def test_a_compiled_training_step_breaks_once_more_than_torchs_at_most(form):
    x = torch.randn(8, 4)

    def step(network: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        def take() -> None:
            optimizer.zero_grad()
            network(x).pow(2).mean().backward()
            optimizer.step()

        return take

    networks = [model() for _ in range(3)]
    plain = step(networks[0], base(form, networks[0].parameters()))
    optimizer, lawn = make(form, networks[1].parameters(), free_steps=2)
    eager = step(networks[2], make(form, networks[2].parameters(), free_steps=2)[0])
    allowed, _ = graph_breaks(plain, 6)
    breaks, graphs = graph_breaks(step(networks[1], optimizer), 6)
    assert breaks <= allowed + 1
    assert graphs <= 4  # none for a phase or a step of its own
    assert lawn.constrained
    for _ in range(6):
        eager()
    for p, q in zip(networks[1].parameters(), networks[2].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@every_form
def test_a_step_without_learning_rate_and_with_a_closure_counts(form):
    """The closure makes the gradients; before it they are zero, as where torch only asks for the state."""
    weight = nn.Parameter(torch.eye(2))
    optimizer, lawn = make(form, [weight], free_steps=1)
    weight.grad = torch.zeros_like(weight)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = weight[0, 0] ** 2
        loss.backward()
        return loss

    rate = optimizer.param_groups[0]["lr"]
    for steps, lr in enumerate((0.0, rate), start=1):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(closure)
        assert optimizer.param_groups[0]["steps"] == steps
    assert lawn.constrained
    assert weight.norm().item() == pytest.approx(2**0.5)


@every_form
def test_weights_without_values_have_no_norms(form):
    _, lawn = make(form, [nn.Parameter(torch.empty(2, 2, device="meta"))])
    with pytest.raises(ValueError, match="param group 0 has weights on the meta device, which have no norms"):
        lawn.constrain()


def test_a_compiled_model_in_a_closure_stays_compiled():
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *values: (calls.append(1), graph(*values))[1]

    network = model()
    compiled, optimizer = torch.compile(network, backend=backend), AdamLAWN(network.parameters(), free_steps=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = compiled(torch.ones(8, 4)).pow(2).mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) == 3


def torchs(name: str, params: Any) -> Optimizer:
    """An optimizer of torch.optim without weight decay."""
    more = {"LBFGS": {"line_search_fn": "strong_wolfe", "max_iter": 4}, "SGD": {"momentum": 0.9, "lr": 0.05}}
    decays = {} if name in ("LBFGS", "Rprop") else {"weight_decay": 0.0}
    return getattr(torch.optim, name)(params, **decays, **more.get(name, {}))


TORCHS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
    *(["Muon"] if hasattr(torch.optim, "Muon") else []),  # of torch 2.9
)


def test_every_optimizer_of_torch_is_listed():
    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert kinds - {"Optimizer", "SparseAdam"} == set(TORCHS)


@pytest.mark.parametrize("name", TORCHS)
def test_lawn_on_every_optimizer_of_torch(name):
    """Phase, norms and resume, with a closure where there has to be one."""

    def take(network: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = (network(x) - 1).pow(2).mean()
                loss.backward()
                return loss

            if name != "LBFGS":
                closure()
            optimizer.step(closure if name == "LBFGS" else None)

    def fresh() -> nn.Module:
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))) if name == "Muon" else model()

    torch.manual_seed(0)
    network = fresh()
    optimizer = torchs(name, network.parameters())
    lawn = LAWN(optimizer, free_steps=2)
    take(network, optimizer, 0, 2)
    assert not lawn.constrained
    fixed = norms(network)
    take(network, optimizer, 2, 5)
    assert lawn.constrained
    assert norms(network) == pytest.approx(fixed, rel=1e-5)
    assert all(kept[NORM] >= 0 for kept in optimizer.state.values())

    into = copy.deepcopy(network)
    again = torchs(name, into.parameters())
    resumed = LAWN(again, free_steps=2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.constrained
    take(network, optimizer, 5, 8)
    take(into, again, 5, 8)
    assert_equal(network, into)
    assert norms(network) == pytest.approx(fixed, rel=1e-5)


@pytest.mark.parametrize("name", TORCHS)
def test_the_free_phase_of_every_optimizer_of_torch_is_its_own(name):
    """Bit for bit, with a closure: LBFGS holds on to its state while it asks for the loss."""
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
        optimizer = torchs(name, network.parameters())
        if wrap:
            LAWN(optimizer)
        for t in range(5):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))

            def closure(x: Tensor = x, optimizer: Optimizer = optimizer, network: nn.Module = network) -> Tensor:
                optimizer.zero_grad()
                loss = (network(x) - 1).pow(2).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        states = [{**optimizer.state.get(p, {})} for p in network.parameters()]
        assert not wrap or [state.pop(NORM) for state in states] == [0.0, 0.0]
        outcomes.append((network, states))
    (plain, ours), (network, theirs) = outcomes
    assert_equal(plain, network)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def closure_of(optimizer: Optimizer, network: nn.Module, then: Callable[[], object] = lambda: None) -> Any:
    """Computes the loss and its gradients, and does something more."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network(torch.ones(2, 4)).pow(2).mean()
        loss.backward()
        then()
        return loss

    return closure


class Counting(SGD):
    """Counts its steps in a state that it holds on to while it asks for the loss."""

    def step(self, closure: Any = None) -> Any:
        state = self.state[self.param_groups[0]["params"][0]]
        state.setdefault("count", 0)
        loss = super().step(closure)
        state["count"] += 1
        return loss


@pytest.mark.parametrize("free_steps", [0, 2, None])
def test_a_state_that_is_held_during_a_step_stays_the_optimizers(free_steps):
    network = model()
    optimizer = Counting(network.parameters(), lr=0.01)
    LAWN(optimizer, free_steps=free_steps)

    closure = closure_of(optimizer, network)
    for t in range(5):
        optimizer.step(closure)
        assert optimizer.state[network[0].weight]["count"] == t + 1
    saved = optimizer.state_dict()["state"]
    assert {p: kept[NORM] > 0 for p, kept in saved.items()} == dict(enumerate([free_steps is not None, False] * 2))


class AsksTwice(Adam):
    """Asks for the loss before its step, too."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@pytest.mark.parametrize("free_steps", [0, 1])
def test_a_state_dict_of_a_closure_leaves_new_states_empty(free_steps):
    network, saved = model(), []
    optimizer = AsksTwice(network.parameters(), lr=0.01)
    LAWN(optimizer, free_steps=free_steps)

    closure = closure_of(optimizer, network, lambda: saved.append(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(closure)
    fixed = [optimizer.state[layer.weight][NORM] for layer in network]
    assert norms(network) == pytest.approx(fixed, rel=1e-6)
    assert [saved[-1]["state"][position][NORM] for position in (0, 2)] == fixed


@pytest.mark.parametrize("free_steps", [0, 2])
@pytest.mark.parametrize("name", sorted(TORCHS))
def test_a_hook_before_the_step_that_saves_the_optimizer_changes_nothing(name, free_steps):
    """A hook that is registered after LAWN's runs inside its step; what it saves continues the same training."""
    outcomes = []
    for saves in (False, True):
        torch.manual_seed(0)
        network, saved = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))), []
        optimizer = torchs(name, network.parameters())
        LAWN(optimizer, free_steps=free_steps)
        if saves:
            optimizer.register_step_pre_hook(lambda it, *_, saved=saved: saved.append(copy.deepcopy(it.state_dict())))
        closure = closure_of(optimizer, network)
        for _ in range(4):
            closure()
            optimizer.step(closure if name == "LBFGS" else None)
        outcomes.append((network, optimizer.state_dict()["state"]))
    (plain, ours), (network, theirs) = outcomes
    assert_equal(plain, network)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    assert [saved[-1]["state"][position][NORM] for position in (0, 1)] == [state[NORM] for state in theirs.values()]
    assert [group["steps"] for group in saved[-1]["param_groups"]] == [3]


@pytest.mark.parametrize("axes", [None, 1], ids=["tensor", "rows"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_line_search_finds_the_minimum_on_the_spheres(axes, fused, dtype):
    """The smallest eigenvalue is the minimum; the closure finds the weights on the spheres whenever it is called."""
    generator = torch.Generator().manual_seed(0)
    root, start = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (6, 3))
    matrix = root @ root.T
    w = nn.Parameter(start.to(dtype))
    group = {"params": [w]} if axes is None else {"params": [w], "norm_axes": axes}
    optimizer = torch.optim.LBFGS([group], line_search_fn="strong_wolfe", max_iter=8)
    LAWN(optimizer, free_steps=0, fused=fused)
    fixed = start.norm(dim=axes)

    def closure() -> Tensor:
        torch.testing.assert_close(w.detach().double().norm(dim=axes), fixed, rtol=1e-6, atol=0)
        optimizer.zero_grad()
        loss = (w @ matrix.to(dtype) * w).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    lowest = np.linalg.eigvalsh(matrix.numpy())[0] * start.square().sum().item()
    assert closure().item() == pytest.approx(lowest, rel=1e-3)


class Iterating(SGD):
    """Has a hyperparameter with the name of a key of LAWN."""

    def __init__(self, params: Any, steps: int = 5) -> None:
        super().__init__(params, lr=0.1)
        self.defaults["steps"] = steps
        for group in self.param_groups:
            group["steps"] = steps


def test_what_lawn_cannot_be_put_on_does_not_change():
    """A hyperparameter of the name of one of LAWN's keys, derivatives through the step, norms that are rounded."""
    network = model(dtype=torch.bfloat16)
    slices = {"params": [network[0].weight], "norm_axes": 1}
    saved = Adam([{**slices}], lr=0.1)
    LAWN(saved, free_steps=0)
    train(network, saved, 0, 1)
    loaded = Adam([{**slices}], lr=0.1)
    loaded.load_state_dict(saved.state_dict())
    free = Adam([{**slices}], lr=0.1)
    LAWN(free, free_steps=9)
    train(network, free, 0, 1)
    still_free = Adam([{**slices}], lr=0.1)
    still_free.load_state_dict(free.state_dict())
    LAWN(still_free, free_steps=9)  # has no norms that could have been rounded
    for optimizer, message in (
        (Iterating(model().parameters()), "Iterating has a hyperparameter 'steps', the name of a key of LAWN"),
        (Adam(model().parameters(), differentiable=True), "param group 0: differentiable=True, but LAWN's part"),
        (loaded, "the optimizer has loaded norms of slices without LAWN, so torch has rounded them to torch.bfloat16"),
    ):
        before = [{**group} for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=message):
            LAWN(optimizer, free_steps=0)
        assert optimizer.param_groups == before
        assert not optimizer._optimizer_step_pre_hooks


def test_a_closure_is_taken_to_begin_where_the_step_does():
    """LBFGS asks for the loss several times; each gradient is projected, the whole step is rescaled."""
    network = model()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    LAWN(optimizer, free_steps=0)
    x, losses = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (network(x) - 1).pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert closure().item() < 0.5 * losses[0]


@every_form
def test_the_phase_is_that_of_the_groups_with_weights(form):
    """Biases that have nothing to fix do not make an optimizer constrained, whether they say so or not."""
    net = model()
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim < 2]
    groups = [
        {"params": weights, "free_steps": None},
        {"params": biases[:1], "constrain": False},
        {"params": biases[1:]},
    ]
    optimizer, lawn = make(form, groups, free_steps=2)
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not lawn.constrained
        assert not any(optimizer.state[w][NORM] for w in weights)
    lawn.constrain()
    assert lawn.constrained


@wrapped_form
def test_a_phase_without_an_update_survives_a_load_before_the_wrapping(form):
    optimizer, lawn = make(form, model().parameters(), free_steps=None)
    lawn.constrain()
    loaded = base(form, model().parameters())
    loaded.load_state_dict(optimizer.state_dict())
    assert LAWN(loaded, free_steps=None).constrained


def test_a_checkpoint_does_not_choose_how_a_step_is_computed():
    """Its other hyperparameters are loaded."""
    (w,) = params = [nn.Parameter(torch.ones(2, 2))]
    plain = Adam(params, lr=0.5, fused=True)
    w.grad = torch.ones(2, 2)
    plain.step()
    for fused in (None, False, True):
        optimizer = AdamLAWN(params, fused=fused)
        optimizer.load_state_dict(plain.state_dict())
        assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["lr"]) == (fused, 0.5)


def test_a_hyperparameter_that_is_refused_has_its_group():
    groups = [{"params": [torch.ones(2, 2)]}, {"params": [torch.ones(2, 2)], "eps": torch.tensor(1e-6)}]
    with pytest.raises(ValueError, match="param group 1: eps must be a number"):
        AdamLAWN(groups)


class Unflattened(Tensor):
    """Keeps its shape in `reshape`, as the weights of torchao's quantized training do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is Tensor.reshape else super().__torch_function__(function, types, args, kwargs)


@every_form
def test_weights_that_cannot_be_flattened_are_refused(form):
    """Compiled code would write beyond their memory."""
    w = nn.Parameter(torch.randn(4, 3).as_subclass(Unflattened))
    assert type(w) is Unflattened
    with pytest.raises(TypeError, match="weights of type Unflattened cannot be flattened"):
        make(form, [w], free_steps=0)
    frozen = w.requires_grad_(False)
    trained = nn.Parameter(torch.randn(4, 3))
    optimizer, _ = make(form, [frozen, trained], free_steps=0)
    with_gradients(trained)
    optimizer.step()
    assert optimizer.state[trained][NORM]
    frozen.requires_grad_()
    with_gradients(frozen)
    with pytest.raises(TypeError, match="weights of type Unflattened cannot be flattened"):
        optimizer.step()


@every_form
@pytest.mark.parametrize("alone", [True, False])
def test_a_vector_in_the_memory_of_a_weight_is_refused_when_it_comes_later(form, alone):
    """Also beside another weight, whose norm is fixed then."""
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer, _ = make(form, [weight], free_steps=0)
    stepped(optimizer, weight)
    added = [nn.Parameter(weight.detach()[1]), nn.Parameter(torch.randn(2, 2))][: 1 if alone else 2]
    optimizer.add_param_group({"params": added})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 0 of param group 0 .* and parameter 0 .* share memory"):
            stepped(optimizer, weight, *added)


@every_form
@pytest.mark.parametrize("by_hand", [False, True])
def test_weights_that_share_memory_are_refused_where_they_are_constrained(form, by_hand):
    """Each update begins with the weights as they were before the step, so that one would undo the other."""
    whole = torch.randn(3, 4)
    for first, second in (
        (whole, whole.view_as(whole)),
        (whole, whole[1:]),
        (whole.flatten()[:8].view(4, 2), whole.flatten()[2:10].view(4, 2)),
        (whole[:, :2], whole[:, :2]),
    ):
        params = [nn.Parameter(first), nn.Parameter(second), nn.Parameter(torch.ones(2, 2))]
        assert params[0].untyped_storage().data_ptr() == params[1].untyped_storage().data_ptr()
        optimizer, phase = make(form, params, free_steps=None if by_hand else 1)
        with_gradients(*params)
        optimizer.step()
        with_gradients(*params)
        for _ in range(2):
            before = [p.detach().clone() for p in params]
            with pytest.raises(ValueError, match=r"parameter 0 of .* and parameter 1 of .* share memory"):
                phase.constrain() if by_hand else optimizer.step()
            assert all(map(torch.equal, params, before))
    first, second = nn.Parameter(whole), nn.Parameter(whole[1:])
    optimizer, _ = make(form, [first, second], free_steps=0)
    with_gradients(first)  # the other one may get gradients in other steps
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    free = {"params": [nn.Parameter(whole[1:])], "constrain": False}
    optimizer, _ = make(form, [{"params": [nn.Parameter(whole)]}, free], free_steps=0)
    with_gradients(*(p for group in optimizer.param_groups for p in group["params"]))
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    flat = torch.randn(12)
    free = {"params": [nn.Parameter(flat), nn.Parameter(flat[1:3])], "constrain": False}  # which may share memory
    optimizer, lawn = make(form, [free, {"params": [nn.Parameter(flat[4:8].view(2, 2))]}])
    with pytest.raises(ValueError, match=r"parameter 0 of param group 0 .* and parameter 0 of param group 1 .* share"):
        lawn.constrain()
    apart = [nn.Parameter(part) for part in (whole[:1], whole[1:])]
    columns = [nn.Parameter(part) for part in torch.randn(3, 4).split(2, dim=1)]
    optimizer, _ = make(form, [*apart, *columns], free_steps=0)
    with_gradients(*apart, *columns)
    optimizer.step()
    assert all(optimizer.state[p][NORM] for p in (*apart, *columns))
    frozen, trained = nn.Parameter(whole, requires_grad=False), nn.Parameter(whole[1:])
    optimizer, _ = make(form, [frozen, trained], free_steps=0)
    with_gradients(trained)
    optimizer.step()
    assert optimizer.state[trained][NORM]


@every_form
def test_a_constrained_weight_that_joins_a_free_group_does_not_end_its_phase(form):
    moved, free = (nn.Parameter(torch.randn(3, 2)) for _ in range(2))
    optimizer, _ = make(
        form, [{"params": [moved], "free_steps": 1}, {"params": [free], "free_steps": 100}], free_steps=0
    )
    for _ in range(2):
        with_gradients(moved, free)
        optimizer.step()
    norm = moved.norm().item()
    assert optimizer.state[moved][NORM] == pytest.approx(norm)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    for step in range(4):
        with_gradients(moved, free)
        if step == 2:
            free.grad = None
        optimizer.step()
    assert moved.norm().item() == pytest.approx(norm)
    assert optimizer.state[free][NORM] == 0
    assert not optimizer.param_groups[1]["switched"]


@every_form
def test_norms_without_the_keys_of_their_group_begin_the_constrained_phase(form):
    """Also where another weight has no state yet."""
    network = model()
    fixed, later = network[0].weight, network[1].weight
    later.requires_grad_(False)
    optimizer, _ = make(form, [fixed, later], free_steps=0)
    with_gradients(fixed)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("steps", "switched", "free_steps"):
            group.pop(key, None)
    optimizer, phase = make(form, [fixed, later], free_steps=None)
    optimizer.load_state_dict(state)
    later.requires_grad_()
    for _ in range(2):
        with_gradients(fixed, later)
        optimizer.step()
        assert phase.constrained
    assert optimizer.state[later][NORM] > 0


@own_form
def test_a_weight_of_a_block_is_updated_once_in_the_step_that_fixes_its_norm(form):
    """Though the other weight of the block has been constrained before."""
    first, second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
    optimizer, _ = make(form, [{"params": [first]}, {"params": [second], "free_steps": 100}], free_steps=0, lr=0.01)
    with_gradients(first, second)
    optimizer.step()
    group = optimizer.param_groups[1]
    group["params"].append(optimizer.param_groups.pop(0)["params"].pop())
    group["blocks"] = [0, 0]
    steps = optimizer.state[second].get("step")
    steps = None if steps is None else steps.clone()
    with_gradients(first, second)
    optimizer.step()
    if steps is not None:
        assert optimizer.state[second]["step"] == steps + 1


def test_a_group_without_parameters_steps_at_a_rate_of_zero():
    AdamLAWN([{"params": []}, {"params": []}], lr=0.0).step()
