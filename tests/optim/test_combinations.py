"""What combines two of a practitioner's habits, and would be wrong without an error."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import parametrizations
from torch.optim import LBFGS, SGD, Adam, Optimizer

from lawn import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.diagnostics import LossSurface, UpdateMonitor, weight_norm
from lawn.optim import attenuate_logits, bound_norms, cpu_kernels, dispatch, output_layer, update
from lawn.optim.blocks import Blocks
from lawn.optim.keys import NORM
from lawn.optim.param_groups import all_weights, final_homogeneous
from tests.optim.helpers import with_gradients

OWN = (AdamLAWN, SGDLAWN, LAMBLAWN)


def take_steps(optimizer: Optimizer, w: Tensor, number: int) -> None:
    for _ in range(number):
        with_gradients(w)
        optimizer.step()


def loss_closure(optimizer: Optimizer, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("free_steps", [0, 2])
def test_groups_of_which_one_has_no_state(wrapped, free_steps):
    """SGD keeps state for the groups with momentum alone."""
    torch.manual_seed(0)
    without, with_momentum = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    groups = [{"params": [without], "momentum": 0.0}, {"params": [with_momentum], "momentum": 0.9}]
    if wrapped:
        optimizer = SGD(groups, lr=0.05)
        LAWN(optimizer, free_steps)
    else:
        optimizer = SGDLAWN(groups, lr=0.05, free_steps=free_steps)
    for _ in range(4):
        with_gradients(without, with_momentum)
        optimizer.step()
    norm = optimizer.state[without][NORM]
    assert norm == pytest.approx(without.detach().norm().item(), rel=1e-5)
    with torch.no_grad():
        without.mul_(3)
    with_gradients(without, with_momentum)
    optimizer.step()
    assert without.detach().norm().item() == pytest.approx(norm, rel=1e-5)  # rescaled, not adopted


def test_every_weight_of_an_optimizer_with_one_state_keeps_its_norm():
    """LBFGS keeps its state with the first parameter; the norms of the others are stored and saved, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = LBFGS(model.parameters(), max_iter=4)
    LAWN(optimizer, free_steps=0)
    x = torch.randn(8, 4)

    closure = loss_closure(optimizer, model, x)
    before = model[2].weight.detach().norm().item()
    optimizer.step(closure)
    assert optimizer.state_dict()["state"][2][NORM] == pytest.approx(before)
    with torch.no_grad():
        model[2].weight.mul_(3)
    optimizer.step(closure)
    assert model[2].weight.detach().norm().item() == pytest.approx(before)  # rescaled, not adopted


class LateAdam(Adam):
    """An optimizer that makes no update in its first steps, but may look at the gradients."""

    skipped = 2

    def step(self, closure: Any = None) -> Any:
        self.skipped -= 1
        return None if self.skipped >= 0 else super().step(closure)


class StateOfOneKey(Optimizer):
    """SGD with momentum that makes its buffer where the state holds only a count, as timm's Adahessian."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if len(self.state[p]) == 1:
                self.state[p]["buffer"] = torch.zeros_like(p)
            self.state[p]["count"] += 1
            p.sub_(self.state[p]["buffer"].mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


class CountInState(StateOfOneKey):
    """An optimizer with a value of its own beside the states of parameters, as MADGRAD has it."""

    def step(self, closure: Any = None) -> None:
        self.state["k"] = self.state.get("k", torch.tensor([0])) + 1
        super().step(closure)


@pytest.mark.parametrize("kind", [LateAdam, StateOfOneKey, CountInState])
def test_lawn_on_an_optimizer_that_has_trained(kind):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 4))
    optimizer = kind([w], lr=0.1)

    def train() -> None:
        for _ in range(3):
            with_gradients(w)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())

    train()
    lawn = LAWN(optimizer, 1)
    train()
    assert optimizer.state[w][NORM] == pytest.approx(w.detach().norm().item())
    lawn.detach()
    assert NORM not in optimizer.state[w]
    train()


class Raising(Adam):
    """Out of memory in a step, or whatever else."""

    raises = False

    def step(self, closure: Any = None) -> Any:
        if self.raises:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_what_a_step_that_raises_does_not_change():
    """A state dict of before, which shares the states; the phase of a copy; a state that is removed."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 4))
    optimizer = Raising([w], lr=0.1)
    LAWN(optimizer, free_steps=1)
    take_steps(optimizer, w, 3)
    norm, saved = optimizer.state[w][NORM], optimizer.state_dict()
    optimizer.raises = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert saved["state"][0][NORM] == norm
    assert LAWN(copy.deepcopy(optimizer), free_steps=1).constrained
    optimizer.state.clear()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("kind", [SGD, torch.optim.Adagrad], ids=["without state", "with state before its first step"])
def test_group_dicts_of_another_optimizer_begin_with_the_free_phase(kind):
    """Those of one that has trained, and those that another one has as well."""
    w = nn.Parameter(torch.ones(3, 4))
    first = AdamLAWN([w], lr=0.1, free_steps=2)
    take_steps(first, w, 3)
    assert not LAWN(kind(first.param_groups, lr=0.1), free_steps=9).constrained
    groups = [{"params": [w]}]
    first, second = AdamLAWN(groups, lr=0.1, free_steps=2), kind(groups, lr=0.1)
    lawn = LAWN(second)
    take_steps(first, w, 3)
    assert first.constrained
    assert not lawn.constrained


def test_values_beside_the_states_of_parameters_are_left_alone():
    w = nn.Parameter(torch.randn(4, 4))
    for optimizer in (AdamLAWN([w], free_steps=1), Adam([w])):
        if not isinstance(optimizer, AdamLAWN):
            LAWN(optimizer, free_steps=1)
        values = {"history": torch.zeros(3), "counts": {"k": 3}, "number": 5, "text": "steps"}
        optimizer.state.update(values)
        for _ in range(3):
            with_gradients(w)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert {key: optimizer.state[key] for key in list(values)[1:]} == {
            "counts": {"k": 3},
            "number": 5,
            "text": "steps",
        }


class IgnoresClosures(SGD):
    def step(self, closure: Any = None) -> None:
        super().step()


def test_a_closure_that_is_not_called_is_an_error():
    w = nn.Parameter(torch.randn(4, 4))
    optimizer = IgnoresClosures([w], lr=0.1)
    LAWN(optimizer, free_steps=0)
    with_gradients(w)
    with pytest.raises(RuntimeError, match="IgnoresClosures does not call the closure of a step"):
        optimizer.step(lambda: torch.zeros(()))
    optimizer.step()


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("kind", [LateAdam, StateOfOneKey, CountInState])
def test_an_optimizer_finds_its_state_as_it_left_it(kind, raises):
    """It may ask whether a state is empty. Norms are there before and after a step, also one that raised."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 4))
    optimizer = kind([w], lr=0.1)
    LAWN(optimizer, free_steps=1)
    take_steps(optimizer, w, 4)
    norm = optimizer.state[w][NORM]
    if raises:
        failing = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            optimizer.step()
        failing.remove()
    assert optimizer.state_dict()["state"][0][NORM] == norm
    with_gradients(w)
    optimizer.step()
    assert optimizer.state[w][NORM] == norm == pytest.approx(w.detach().norm().item())


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_fused_optimizer_leaves_every_gradient_unscaled(kind):
    """GradScaler lets a fused optimizer divide the gradients by the scale itself, in place."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer = kind(layer.parameters(), lr=0.1, fused=True)
    LAWN(optimizer, free_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        expected = torch.autograd.grad(loss, tuple(layer.parameters()), retain_graph=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        for p, g in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)


class SharpnessAware(Optimizer):
    """Sharpness-aware minimization with a base optimizer, as https://github.com/davda54/sam writes it."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **keys: Any) -> None:
        super().__init__(params, {"rho": rho, **keys})
        self.base_optimizer = base(self.param_groups, **keys)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        before = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / norm.item())
        with torch.enable_grad():
            closure()
        for p, w in zip(params, before, strict=True):
            p.data = w
        self.base_optimizer.step()


def test_lawn_belongs_on_the_base_of_a_sharpness_aware_optimizer():
    """Around it, LAWN would take norms and tangent spaces of the perturbed weights."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer = SharpnessAware(layer.parameters(), SGD, lr=0.1)

    closure = loss_closure(optimizer, layer, x)
    outer = LAWN(optimizer, free_steps=None)
    closure()
    with pytest.raises(RuntimeError, match="put LAWN on its base optimizer"):
        optimizer.step(closure)
    outer.detach()
    LAWN(optimizer.base_optimizer, free_steps=0)
    norm = layer.weight.detach().norm().item()
    for _ in range(3):
        closure()
        optimizer.step(closure)
    assert optimizer.base_optimizer.state[layer.weight][NORM] == pytest.approx(norm)
    assert layer.weight.detach().norm().item() == pytest.approx(norm)


@pytest.mark.parametrize("make", OWN)
def test_a_lawn_optimizer_as_base_of_a_sharpness_aware_one(make):
    """The param groups, which both share, have the key rho."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer = SharpnessAware(layer.parameters(), make, lr=0.1, free_steps=1)

    closure = loss_closure(optimizer, layer, x)
    norms = []
    for _ in range(4):
        closure()
        optimizer.step(closure)
        norms.append(layer.weight.detach().norm().item())
    assert norms[1:] == pytest.approx([norms[0]] * 3)
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_logits_of_a_computed_weight_are_not_attenuated(wrap):
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="the weight of the output layer is computed from others"):
        attenuate_logits(model, 0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_logits_of_a_bound_or_a_tied_weight_are_not_attenuated():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    bound_norms(model)
    with pytest.raises(ValueError, match="computed from others"):
        attenuate_logits(model, 0.2)
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="the output layer shares its weight or bias with another module"):
        attenuate_logits(tied, 0.2)
    for factor in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor must be positive and finite"):
            attenuate_logits(nn.Linear(2, 2), factor)


class Adapted(nn.Module):
    """A linear layer with LoRA beside it: below it as `base_layer`, as PEFT has it, or its own weight."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        if own:
            self.weight = nn.Parameter(torch.randn(3, 4))
        else:
            self.base_layer = nn.Linear(4, 3, bias=False)
        self.lora_a = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_b = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if hasattr(self, "weight") else self.base_layer.weight
        return nn.functional.linear(x, weight) + self.lora_b["default"](self.lora_a["default"](x))


@pytest.mark.parametrize("own", [False, True])
def test_an_adapter_is_no_output_layer(own):
    model = nn.Sequential(nn.Linear(4, 4), Adapted(own))
    with pytest.raises(ValueError, match=r"inside the adapter '1' \(Adapted\)"):
        attenuate_logits(model, 0.2)
    with pytest.raises(ValueError, match="inside the adapter 'the model itself'"):
        attenuate_logits(model[1], 0.2)
    x, model = torch.randn(2, 4), nn.Sequential(Adapted(own), nn.ReLU(), nn.Linear(3, 3))
    before = model(x)
    attenuate_logits(model, 0.2)  # the adapter is not at the end
    torch.testing.assert_close(model(x), 0.2 * before)


class Model(nn.Module):
    """With parameters of its own and a part of a name that adapters use, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 4))
        self.base_layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)


def test_the_head_of_a_model_with_weights_of_its_own_is_found():
    model = Model()
    assert output_layer(model) is model.head
    del model.base_layer
    assert output_layer(model) is model.head


@pytest.mark.parametrize("make", OWN)
def test_flat_parameters_beside_a_matrix_are_refused(make):
    flat, matrix = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(3, 4))
    flat._fsdp_flattened = True  # as FullyShardedDataParallel marks them
    with pytest.raises(TypeError, match="flat parameters of FullyShardedDataParallel"):
        make([flat, matrix], 1e-2)
    whole = nn.Parameter(torch.randn(3, 4))
    whole._fsdp_flattened = True  # NO_SHARD keeps the shapes
    make([whole, matrix], 1e-2)


def test_lamb_refuses_flat_parameters():
    """Its trust ratios would be of parts of several weights."""
    flat = nn.Parameter(torch.ones(12))
    flat._fsdp_flattened = True
    flat.grad = torch.ones(12)
    with pytest.raises(TypeError, match="param group 0 holds flat parameters of FullyShardedDataParallel"):
        LAMB([flat]).step()
    assert torch.equal(flat, torch.ones(12))


@pytest.mark.parametrize("constrain", [None, True])
@pytest.mark.parametrize("make", [*OWN, lambda params, lr: LAWN(torch.optim.Adam(params, lr), free_steps=2).optimizer])
def test_weights_that_are_replaced_by_flat_ones_are_refused(make, constrain):
    """As DeepSpeed's ZeRO replaces them, before the first step: nothing that it trains has the norm of a weight."""
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    optimizer = make([{"params": weights, "constrain": constrain}], 1e-2)
    optimizer.load_state_dict(optimizer.state_dict())
    flat = nn.Parameter(torch.cat([w.detach().flatten() for w in weights]))
    optimizer.param_groups[0]["params"] = [flat]
    if constrain:
        optimizer.param_groups[0]["blocks"] = None
    flat.grad = torch.ones_like(flat)
    with pytest.raises(TypeError, match=r"holds flat parameters .* those of DeepSpeed's ZeRO, .*; use fully_shard"):
        optimizer.step()
    optimizer.param_groups[0]["constrain"] = False
    optimizer.step()
    flat.ds_id = 0  # as its stage 3 marks them, before there is an optimizer
    with pytest.raises(TypeError, match="param group 0 holds flat parameters of DeepSpeed's ZeRO"):
        make([flat], 1e-2)


@pytest.mark.parametrize("make", [*OWN, lambda params, lr: LAWN(torch.optim.Adam(params, lr), free_steps=2).optimizer])
def test_added_weights_that_are_replaced_by_flat_ones_are_refused(make):
    """The optimizer was made with biases alone."""
    bias, weight = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
    optimizer = make([bias], 1e-2)
    optimizer.add_param_group({"params": [weight]})
    take_steps(optimizer, weight, 1)
    optimizer.param_groups[1]["params"] = [nn.Parameter(torch.randn(12))]
    with pytest.raises(TypeError, match="holds flat parameters in the place of the weights"):
        optimizer.step()


def test_a_new_layout_of_a_constrained_weight_under_a_fused_optimizer():
    """torch's fused optimizers take gradients for as strided as their weights."""
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        LAWN(optimizer, free_steps=1)
        for t in range(6):
            if t == 3:
                layer.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
            optimizer.step()
        trained.append(layer.weight.detach().contiguous())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_group_that_zero_fills_in_joins_the_phase():
    """ZeroRedundancyOptimizer gives an added group every default."""
    first, late = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = ZeroRedundancyOptimizer([first], AdamLAWN, lr=1e-2, free_steps=2)
    for _ in range(4):
        with_gradients(first)
        optimizer.step()
    optimizer.add_param_group({"params": [late]})
    norm = late.detach().norm().item()
    with_gradients(first, late)
    optimizer.step()
    assert [group["switched"] for group in optimizer.optim.param_groups] == [True, True]
    assert late.detach().norm().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_the_final_homogeneous_part_of_a_sharded_model():
    """fully_shard derives a type of its own from that of each layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    whole = final_homogeneous(model)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    sharded = final_homogeneous(model)
    assert [[tuple(p.shape) for p in group["params"]] for group in sharded] == [
        [tuple(p.shape) for p in group["params"]] for group in whole
    ]
    assert len(sharded[0]["params"]) == 3


def test_a_group_with_a_count_of_its_own_is_free_for_as_long():
    first, late = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = AdamLAWN([first], 1e-2, free_steps=2)
    for _ in range(4):
        with_gradients(first)
        optimizer.step()
    optimizer.add_param_group({"params": [late], "free_steps": 3})
    assert [group["switched"] for group in optimizer.param_groups] == [True, False]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("make", [*OWN, lambda params, lr, **keys: LAWN(Adam(params, lr), **keys).optimizer])
def test_autograd_sees_that_a_step_changed_the_weights(make, fused):
    """A second backward pass through the old graph would mix old and new weights."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    optimizer = make(model.parameters(), 1e-2, free_steps=0, fused=fused)
    y = model(torch.randn(8, 4))
    y.mean().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y**2).mean().backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_after_a_step_that_raised(monkeypatch, set_to_none):
    """The next step takes the new gradients, not those of the step that raised."""
    torch.manual_seed(0)
    module = sys.modules["torch.optim.sgd"]
    w = nn.Parameter(torch.randn(3, 4))
    optimizer = SGD([w], lr=0.1)
    LAWN(optimizer, 0)
    w.grad = torch.full((3, 4), 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sgd", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    x = torch.randn(3, 4)
    before = w.detach().clone()
    (w * x).sum().backward()
    optimizer.step()
    assert torch.equal(w.grad, x)
    tangent = x - before * (before * x).sum() / before.square().sum()
    moved = before - 0.1 * tangent
    torch.testing.assert_close(w.detach(), moved * before.norm() / moved.norm())


@pytest.mark.parametrize("make", OWN)
def test_a_single_number_stays_free(make):
    """A temperature [1, 1] would never move on its sphere, which has two points."""
    temperature, weight = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.randn(2, 2))
    optimizer = make([temperature, weight], 0.1, free_steps=0)
    for _ in range(3):
        temperature.grad, weight.grad = torch.ones(1, 1), torch.randn(2, 2)
        optimizer.step()
    assert temperature.item() < 0.9
    assert optimizer.state[temperature][NORM] == 0
    assert optimizer.state[weight][NORM] > 0


def test_a_single_number_is_no_weight():
    layer, head = nn.Linear(1, 1), nn.Linear(2, 2)
    model = nn.ModuleList([layer, head])
    optimizer = AdamLAWN(all_weights(model), 0.1, free_steps=0)
    with_gradients(*model.parameters())
    optimizer.step()
    assert [bool(optimizer.state[p][NORM]) for p in (layer.weight, head.weight)] == [False, True]


class Wrapper(Tensor):
    """A tensor without memory of its own, as those of float8 training are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))  # no operation is needed to choose the code


def test_tensors_without_memory_do_not_reach_compiled_code():
    w = Wrapper(torch.randn(4, 4))
    assert cpu_kernels.load([[w]]) is None
    assert dispatch.backend(Blocks([w], [1], [1.0]), None) is update


def test_deterministic_sums_with_many_threads(monkeypatch):
    weights = [[torch.randn(4, 4)]]
    if cpu_kernels.load(weights) is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for threads, compiled in ((2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert (cpu_kernels.load(weights) is not None) == compiled


def test_stochastic_rounding_of_a_block_of_two_dtypes_is_refused():
    layer = nn.Linear(4, 3)
    layer.weight.data = layer.weight.data.bfloat16()
    optimizer = AdamLAWN(all_weights(layer, include_bias=True), 1e-2, free_steps=0, rounding="stochastic")
    with_gradients(*layer.parameters())
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match="needs blocks of one dtype"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


class CosineHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class LoRAHead(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(1, sizes[0])), nn.Parameter(torch.randn(sizes[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class DroppingHead(nn.Linear):
    """DropConnect: random in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training), self.bias)


class MaskedHead(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


def test_logits_of_subclasses_are_attenuated_where_they_are_linear():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    for kind in (CosineHead, LoRAHead):
        model = nn.Sequential(nn.Linear(4, 4), kind(4, 3))
        before = model(x)
        for factor in (0.2, 0.98, 1.0):
            with pytest.raises(ValueError, match=f"a {kind.__name__}, whose logits are not proportional"):
                attenuate_logits(model, factor)
        assert torch.equal(model(x), before)
    model = nn.Sequential(nn.Linear(4, 4), DroppingHead(4, 3))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    attenuate_logits(model, 1.0)
    assert (calls, model[1].training) == ([], True)
    before = model.eval()(x)
    attenuate_logits(model.train(), 0.2)
    torch.testing.assert_close(model.eval()(x), 0.2 * before)
    with pytest.raises(ValueError, match="a MaskedHead, which cannot be called with inputs alone"):
        attenuate_logits(MaskedHead(4, 3), 0.2)


class MergingHead(nn.Linear):
    """Merges its adapter in eval mode, as loralib does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.added, self.merged = nn.Parameter(torch.randn(sizes[::-1])), False

    def train(self, mode: bool = True) -> "MergingHead":
        if self.merged == mode:
            self.weight.data += -self.added.data if mode else self.added.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.added.T


def test_an_adapter_that_eval_merges_is_not_merged_by_measurements():
    model = nn.Sequential(nn.Linear(4, 4), MergingHead(4, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="a MergingHead, whose logits are not proportional"):
        attenuate_logits(model, 0.5)
    gradient = LossSurface(model, nn.functional.cross_entropy, x, y).gradient()
    nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not model[1].merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class SavedModules(nn.Module):
    """A layer and its copies for adapters, as PEFT's `modules_to_save` has them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(layer) for name in ("default", "second")})
        self.active_adapters, self.disable_adapters = ["default"], False

    def forward(self, x: Tensor) -> Tensor:
        used = self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapters[0]]
        return used(x)


@pytest.mark.parametrize("active", ["default", "second", None])
def test_logits_of_the_active_copy_are_attenuated(active):
    model = nn.Sequential(nn.Linear(4, 4), SavedModules(nn.Linear(4, 3)))
    heads = model[1]
    heads.active_adapters, heads.disable_adapters = [active or "default"], active is None
    used = heads.original_module if active is None else heads.modules_to_save[active]
    x = torch.randn(5, 4)
    before, weights = model(x), copy.deepcopy(heads.state_dict())
    attenuate_logits(model, 0.5)
    torch.testing.assert_close(model(x), 0.5 * before)
    changed = {name for name, value in heads.state_dict().items() if not torch.equal(value, weights[name])}
    own = {id(p) for p in used.parameters()}
    assert changed == {name for name, p in heads.named_parameters() if id(p) in own}


def test_an_output_layer_in_the_memory_of_another_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match="shares its weight or bias with another module"):
        attenuate_logits(model, 0.5)


class Multiplied(nn.Module):
    """A linear layer with a product of parameters beside it, as PEFT's LoHa has it."""

    def __init__(self, adapted: bool) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 3, bias=False)
        self.factors = nn.ParameterDict({"default": torch.randn(3, 4)} if adapted else {})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + sum(nn.functional.linear(x, p.square()) for p in self.factors.values())


def test_the_layer_of_an_adapter_of_parameters_is_no_output_layer():
    with pytest.raises(ValueError, match=r"inside the adapter '1' \(Multiplied\)"):
        attenuate_logits(nn.Sequential(nn.Linear(4, 4), Multiplied(True)), 0.2)
    x, model = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 4), Multiplied(False))
    before = model(x)
    attenuate_logits(model, 0.2)
    torch.testing.assert_close(model(x), 0.2 * before)


@pytest.mark.parametrize("first", [0, 1])
def test_an_output_layer_beside_another_in_one_memory_is_attenuated(first):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    parts = torch.ones(2, 5, 4)
    model[0].weight.data, model[1].weight.data = parts[first], parts[1 - first]
    attenuate_logits(model, 0.5)
    assert [p.weight.mean().item() for p in model] == [1.0, 0.5]


@pytest.mark.parametrize("layers", [[nn.LazyLinear(3)], [nn.Linear(2, 2), nn.LazyLinear(3)]])
def test_measurements_need_the_shapes_of_lazy_layers(layers):
    model = nn.Sequential(*layers)
    batch = torch.randn(2, 2), torch.zeros(2, dtype=torch.long)
    for measure in (
        lambda: UpdateMonitor(model, AdamLAWN([nn.Parameter(torch.ones(2, 2))])),
        lambda: weight_norm(model),
        lambda: attenuate_logits(model, 0.5),
        lambda: LossSurface(model, nn.functional.cross_entropy, *batch),
    ):
        with pytest.raises(ValueError, match="weight has no shape yet, as its module is lazy"):
            measure()


def test_a_joined_bias_that_is_frozen_and_trained_again():
    """The norm of the layer is that of its trained parameters: it is measured anew when these change."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 8)
    optimizer = AdamLAWN(all_weights(layer, include_bias=True), 1e-2, free_steps=0)

    def norm(*params: Tensor) -> float:
        return torch.cat([p.detach().flatten() for p in params]).norm().item()

    def keeps(*trained: nn.Parameter) -> None:
        for p in layer.parameters():
            p.requires_grad_(any(p is each for each in trained))
            p.grad = None
        before = norm(*trained)
        for _ in range(3):
            with_gradients(*trained)
            optimizer.step()
            assert norm(*trained) == pytest.approx(before, rel=1e-6)
            assert optimizer.state[trained[0]][NORM] == pytest.approx(before, rel=1e-6)

    weight, bias = layer.weight, layer.bias
    for trained in ((weight, bias), (weight,), (weight, bias), (bias,), (weight, bias), (bias,), (weight,)):
        keeps(*trained)


class Retrying(SGD):
    def step(self, closure=None):
        try:
            return super().step(closure)
        except RuntimeError:
            return super().step(closure)


@pytest.mark.parametrize("monitored", [False, True])
def test_a_parents_step_that_is_tried_again(monitored):
    """torch runs no post-hook of a step that raises."""
    SGD([nn.Parameter(torch.ones(1))])  # whose `step` has hooks from now on
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = Retrying([w], lr=0.5)
    LAWN(optimizer, 0)
    monitor = UpdateMonitor(nn.ParameterList([w]), optimizer) if monitored else None
    calls = []

    def closure() -> float:
        calls.append(1)
        w.grad = torch.tensor([[0.0, 5.0]])
        if len(calls) % 2:
            raise RuntimeError
        return 0.0

    for step in range(1, 4):
        optimizer.step(closure)
        assert w.norm().item() == pytest.approx(5.0)
        assert (optimizer.param_groups[0]["steps"], w.grad.tolist()) == (step, [[0.0, 5.0]])
    if monitor is not None:
        assert monitor.state_dict()["sums"][0, 0] == 3


def test_a_copy_of_a_detached_lawn_leaves_the_optimizer_to_another():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = SGD([w], lr=0.1)
    old = LAWN(optimizer)
    old.detach()
    new = LAWN(optimizer)
    new.constrain()
    old.detach()  # a second time
    for order in (1, -1):
        copies = copy.deepcopy([old, new][::order])[::order]
        (weight,) = copies[1].optimizer.param_groups[0]["params"]
        for _ in range(3):
            with_gradients(weight)
            copies[0].optimizer.step()
        assert (new.constrained, copies[1].constrained) == (True, True)
        assert weight.norm().item() == pytest.approx(5.0)


def test_a_group_that_a_closure_adds():
    first, second = (nn.Parameter(torch.ones(1, 2)) for _ in range(2))
    optimizer = SGD([first], lr=0.1)
    LAWN(optimizer, 0)

    def closure() -> float:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [second]})
        for p in (first, second):
            p.grad = torch.tensor([[1.0, -1.0]])
        return 1.0

    optimizer.step(closure)
    for p in (first, second):
        assert p.norm().item() == pytest.approx(2**0.5)
        assert p[0, 0] < 1


class TwoSteps(SGD):
    """Asks for the loss before each of two steps of gradient descent, as a line search does."""

    def step(self, closure: Any = None) -> None:
        for _ in range(2):
            closure()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=0.01)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_with_two_evaluations_by_hand(fused, set_to_none):
    """The second is at the weights with which the step would end there; the optimizer goes on where it was."""
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = TwoSteps([w])
    LAWN(optimizer, 0, fused=fused)

    def closure() -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        (w - target).pow(4).sum().backward()

    def tangent(v: Tensor, at: Tensor) -> Tensor:
        return v - at * (at * v).sum() / at.square().sum()

    def on_sphere(reached: Tensor) -> Tensor:
        moved = start + tangent(reached - start, start)
        return moved * start.norm() / moved.norm()

    optimizer.step(closure)
    reached = start - 0.01 * tangent(4 * (start - target) ** 3, start)
    second = on_sphere(reached)
    gradient = 4 * (second - target) ** 3
    torch.testing.assert_close(w.grad, gradient)
    torch.testing.assert_close(w.detach(), on_sphere(reached - 0.01 * tangent(gradient, second)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("with_closure", [False, True])
def test_norms_of_a_first_step_that_fails_late(momentum, with_closure):
    """It has fixed them and moved the weights; without momentum, SGD keeps no state that could tell."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = SGD(layer.parameters(), lr=0.5, momentum=momentum)
    LAWN(optimizer, 0)
    before = layer.weight.detach().norm().item()
    closure = loss_closure(optimizer, layer, torch.randn(8, 4))
    failing = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    optimizer._optimizer_step_post_hooks.move_to_end(failing.id, last=False)
    closure()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure if with_closure else None)
    failing.remove()
    assert layer.weight.detach().norm().item() != pytest.approx(before, rel=1e-3)
    optimizer.step(closure)
    assert layer.weight.detach().norm().item() == pytest.approx(before, rel=1e-6)


def test_lawn_is_copied_and_detached_after_a_step_that_raised():
    """The norms are not in the states during a step, and have not come back."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = Adam([w], lr=0.1)
    lawn = LAWN(optimizer, 0)
    take_steps(optimizer, w, 1)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        (state,) = copy.deepcopy(lawn).optimizer.state.values()
        assert state[NORM] == 5.0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    lawn.detach()
    copy.deepcopy(lawn)
    assert NORM not in optimizer.state[w]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_closure_that_removes_a_weight(momentum):
    """Its norm, which is not in the state during the step, does not come back."""
    first, second = (nn.Parameter(torch.ones(1, 2)) for _ in range(2))
    optimizer = SGD([first, second], lr=0.1, momentum=momentum)
    LAWN(optimizer, 0)
    take_steps(optimizer, second, 1)

    def closure() -> None:
        optimizer.param_groups[0]["params"] = [first]
        optimizer.state.pop(second, None)
        with_gradients(first)

    optimizer.step(closure)
    assert [*optimizer.state] == [first]
    assert first.norm().item() == pytest.approx(2**0.5)


def test_a_closure_that_begins_anew():
    """Without its state a weight has no norm to keep."""
    w = nn.Parameter(torch.ones(1, 2))
    optimizer = SGD([w], lr=0.1, momentum=0.9)
    LAWN(optimizer, 0)
    take_steps(optimizer, w, 1)

    def closure() -> None:
        optimizer.state.clear()
        w.data.mul_(3)
        with_gradients(w)

    optimizer.step(closure)
    assert w.norm().item() == pytest.approx(3 * 2**0.5)


def test_a_closure_is_not_kept_in_memory():
    """With it, the loss of its last call, and all that it refers to."""
    w = nn.Parameter(torch.ones(1, 2))
    optimizer = SGD([w], lr=0.1)
    LAWN(optimizer, 0)
    closure = loss_closure(optimizer, nn.Identity(), w)
    optimizer.step(closure)
    reference = weakref.ref(closure)
    del closure
    gc.collect()
    assert reference() is None
