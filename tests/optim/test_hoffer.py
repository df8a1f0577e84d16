"""What fixed norms promise: the norm stays, the function is the same at first, the gradient is tangent."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lawn.models.mlp import mlp
from lawn.models.ncf import NCFMLP
from lawn.models.vgg import VGG19
from lawn.optim.hoffer import BoundedNorm, bound_norms, release


def norm(weight: Tensor) -> float:
    return weight.detach().double().norm().item()


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 2, 4, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).logsumexp(1).square().sum().backward()
        optimizer.step()


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda shape: max(shape) > 1),
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_weight(shape, seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    start = ((torch.randn(shape, generator=generator) + 0.1) * scale).to(dtype)
    model = nn.ParameterList([nn.Parameter(start.clone())])
    assert bound_norms(model) == ["0"]
    assert torch.equal(model[0], start)
    (v,) = model.parameters()
    eps = torch.finfo(dtype).eps
    for _ in range(3):
        h = torch.randn(shape, generator=generator).to(dtype)
        (v.grad,) = torch.autograd.grad((model[0] * h).sum(), v)
        radial = (v.grad.double() * v.detach().double()).sum()
        assert abs(radial) <= 8 * eps * start.numel() * h.double().norm() * norm(start)
        with torch.no_grad():
            v.add_(torch.randn(shape, generator=generator).to(dtype), alpha=scale)
        assert norm(model[0]) == pytest.approx(norm(start), rel=4 * eps)
    weight = model[0].detach().clone()
    with torch.no_grad():
        v.mul_(4)  # exact in every dtype
    torch.testing.assert_close(model[0].detach(), weight, rtol=4 * eps, atol=0)


def test_by_hand():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    bound_norms(model)
    v = model.parametrizations.weight.original
    with torch.no_grad():
        v.copy_(torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.0, 5.0]]))
    model(torch.tensor([[1.0, 7.0]])).sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([[2.5, 0.0]]))  # (c / ||v||) x the tangent part of (1, 7)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_norms_stay(kind, dtype, tolerance):
    model = small(dtype=dtype)
    before = {name: (p.detach().clone(), norm(p)) for name, p in model.named_parameters()}
    assert bound_norms(model) == ["0.weight", "4.weight"]
    for layer, name in ((model[0], "0.weight"), (model[4], "4.weight")):
        assert torch.equal(layer.weight, before[name][0])
        assert layer.weight.dtype == dtype
        assert layer.parametrizations.weight[0].norm.dtype == torch.float32
    train(model, kind(model.parameters(), lr=0.05), 100, dtype)
    for layer, name in ((model[0], "0.weight"), (model[4], "4.weight")):
        assert norm(layer.weight) == pytest.approx(before[name][1], rel=tolerance)
        assert not torch.allclose(layer.weight, before[name][0], rtol=0.1)
    assert norm(model[4].bias) != before["4.bias"][1]


def test_sgd_lets_v_grow():
    model = small(dtype=torch.float64)
    bound_norms(model)
    v = model[4].parametrizations.weight.original
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        before = norm(v) ** 2
        train(model, optimizer, 1, torch.float64)
        # orthogonal steps add up by Pythagoras
        assert norm(v) ** 2 == pytest.approx(before + 0.05**2 * norm(v.grad) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (mlp((1, 4, 4), 3, widths=[5, 6]), 3),
        (NCFMLP(5, 6, factors=2, layers=2, init="he2017"), 5),
        (VGG19((3, 32, 32), 10, batch_norm=True), 17),
    ],
)
def test_names_and_release(model, count):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = {id(p) for p in model.parameters()}
    names = bound_norms(model)
    assert names == [name for name, p in before.items() if p.ndim >= 2]
    assert len(names) == count
    assert {id(p) for p in model.parameters()} == identities
    release(model)
    after = dict(model.named_parameters())
    assert {id(p) for p in after.values()} == identities
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    for name, value in before.items():
        assert torch.equal(after[name], value)


def test_release_keeps_the_function():
    model = small()
    bound_norms(model)
    train(model, torch.optim.Adam(model.parameters(), lr=0.05), 10)
    x = torch.randn(3, 2, 4)
    logits, target = model(x), model[4].parametrizations.weight[0].norm.item()
    release(model)
    assert torch.equal(model(x), logits)
    assert norm(model[4].weight) == pytest.approx(target, rel=1e-6)
    release(model)  # nothing left to do
    assert set(model.state_dict()) == set(small().state_dict())


def test_param_groups():
    model = small()
    assert bound_norms(model, lambda name: name.startswith("4")) == ["4.weight"]
    assert not parametrize.is_parametrized(model[0])
    assert bound_norms(model, lambda name: name.startswith("0")) == ["0.weight"]


def test_state_dict():
    model, other = small(0), small(1)
    for m in (model, other):
        bound_norms(m)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), 5)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 2, 4)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].parametrizations.weight[0].norm, model[0].parametrizations.weight[0].norm)


def test_deepcopy_is_independent():
    """Also where torch would take the weight away from the original when it is released in the copy."""
    model = small()
    bound_norms(model)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(3, 2, 4)
    logits = model(x)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), 5)
    assert not torch.equal(twin(x), logits)
    release(twin)
    assert torch.equal(model(x), logits)
    release(model)
    assert torch.equal(third(x), logits)
    assert norm(third[4].weight) == pytest.approx(norm(model[4].weight))


def test_binding_more_of_a_copy_leaves_the_original():
    model = nn.LSTM(2, 3)
    bound_norms(model, lambda name: "ih" in name)
    twin = copy.deepcopy(model)
    assert bound_norms(twin, lambda name: "hh" in name) == ["weight_hh_l0"]
    x = torch.randn(4, 1, 2)
    assert torch.equal(twin(x)[0], model(x)[0])


def test_casting_the_model_keeps_the_norm():
    model = small()
    target = norm(model[4].weight)
    bound_norms(model)
    model.bfloat16()
    c = model[4].parametrizations.weight[0].norm
    assert c.dtype == torch.float32
    assert c.item() == pytest.approx(target, rel=1e-6)
    assert model[4].weight.dtype == torch.bfloat16
    assert model.float()(torch.randn(3, 2, 4)).dtype == torch.float32
    assert model.to("meta")[4].parametrizations.weight[0].norm.is_meta


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_norm_that_cannot_be_held_is_refused(value):
    model = small()
    with torch.no_grad():
        model[4].weight.fill_(value)
    with pytest.raises(ValueError, match=r"cannot fix the norm of 4\.weight"):
        bound_norms(model)
    assert not any(parametrize.is_parametrized(module) for module in model)  # not the first layer either
    assert bound_norms(model, lambda name: name == "0.weight") == ["0.weight"]


def test_other_refusals():
    model = small()
    bound_norms(model)
    with pytest.raises(ValueError, match=r"0\.weight is parametrized already"):
        bound_norms(model)
    with pytest.raises(ValueError, match=r"0\.weight is parametrized already"):
        bound_norms(nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(ValueError, match="nothing to bind"):
        bound_norms(small(), lambda name: False)
    with pytest.raises(ValueError, match="nothing to bind"):
        bound_norms(nn.LayerNorm(3))
    parametrize.register_parametrization(model[4], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"4\.weight has another parametrization"):
        release(model)
    assert parametrize.is_parametrized(model[0])


def test_a_tied_weight_stays_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    for only in ("embed", "head"):
        with pytest.raises(ValueError, match="is tied to"):
            bound_norms(model, lambda name, only=only: name.startswith(only))
    target = norm(model["head"].weight)
    assert bound_norms(model) == ["embed.weight", "head.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert len(optimizer.param_groups[0]["params"]) == 2  # v and the bias
    for _ in range(5):
        optimizer.zero_grad()
        model["head"](model["embed"](torch.arange(4))).square().sum().backward()
        optimizer.step()
    twin = copy.deepcopy(model)
    release(twin)
    assert twin["head"].weight is twin["embed"].weight
    for m in (model, twin):
        assert torch.allclose(m["head"].weight, m["embed"].weight, rtol=1e-6)
        assert norm(m["head"].weight) == pytest.approx(target, rel=1e-6)


def test_a_module_used_twice_is_bound_once():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert bound_norms(model) == ["0.weight"]
    assert [type(step) for step in layer.parametrizations.weight] == [BoundedNorm]


@pytest.mark.parametrize(
    "model", [nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)]
)
def test_modules_that_hand_their_weights_to_a_kernel(model):
    """They must not use v in place of w."""
    model.eval()
    x = torch.randn(2, 3, 4)

    def output() -> Tensor:
        y = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        before = output()
        bound_norms(model)
        torch.testing.assert_close(output(), before)
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(3)
        torch.testing.assert_close(output(), before)
    torch.testing.assert_close(output(), before)


def test_a_weight_of_one_element_stays_free():
    """It could only change its sign."""
    assert bound_norms(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 4))) == ["1.weight"]


@pytest.mark.parametrize("wrap", [partial(prune.l1_unstructured, name="weight", amount=0.5), nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_in_the_older_way_is_refused(wrap):
    """Its norm would not be that of what is bound."""
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"is what weight is computed from"):
        bound_norms(model)
    assert bound_norms(model, lambda name: name.startswith("0.")) == ["0.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["weight_g", "weight_v"])
def test_either_part_of_a_normalized_weight_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is what weight is computed from"):
        bound_norms(nn.utils.weight_norm(nn.Linear(4, 3)), lambda each: each == name)


def test_complex_weights_stay_free():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, dtype=torch.complex64))
    assert bound_norms(model) == ["0.weight"]


def test_what_a_parametrized_weight_is_computed_from_is_not_selected():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    assert bound_norms(model, lambda name: name != "0.weight") == ["1.weight"]
