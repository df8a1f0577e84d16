"""Every trainable parameter in one group, once, and the right ones constrained."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization as parametrize

from lawn.models.mlp import mlp
from lawn.models.ncf import NCFMLP
from lawn.models.vgg import VGG19
from lawn.optim import SGDLAWN, bound_norms
from lawn.optim.param_groups import all_weights, final_homogeneous, matching, per_row, stacked

LAYERS = {
    "linear": lambda: nn.Linear(3, 3),
    "no bias": lambda: nn.Linear(3, 3, bias=False),
    "conv": lambda: nn.Conv1d(2, 3, 1),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 1),
    "frozen": lambda: nn.Linear(3, 3).requires_grad_(False),
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
    "norm": lambda: nn.BatchNorm1d(3),
    "embedding": lambda: nn.Embedding(4, 3),
    "gelu": nn.GELU,
}
OFFENDERS = {"norm", "embedding", "gelu"}
WEIGHTED = {"linear", "no bias", "conv", "transposed"}


def bound_names(model: nn.Module, groups: list[dict]) -> set[str]:
    bound = {id(p) for group in groups if group["constrain"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in bound}


def joined(model: nn.Module, groups: list[dict]) -> set[frozenset[str]]:
    """The blocks of several parameters, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    blocks: dict[int, set[str]] = {}
    for p, block in zip(groups[0]["params"], groups[0]["blocks"], strict=True):
        blocks.setdefault(block, set()).add(names[id(p)])
    return {frozenset(block) for block in blocks.values() if len(block) > 1}


def check_complete(model: nn.Module, groups: list[dict], include_bias: bool) -> None:
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        assert group["params"]
        assert ("blocks" in group) == (include_bias and group["constrain"])
        assert len(group.get("blocks", group["params"])) == len(group["params"])


def select(rule: str, model: nn.Module, include_bias: bool = False) -> list[dict]:
    rules = {"all_weights": all_weights, "final": final_homogeneous, "matching": lambda m, **k: matching(m, ".", **k)}
    return rules[rule](model, include_bias=include_bias)


@given(
    kinds=st.lists(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4), min_size=1, max_size=4),
    rule=st.sampled_from(["all_weights", "final", "matching"]),
    include_bias=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_model(kinds, rule, include_bias):
    model = nn.Sequential(*(nn.Sequential(*(LAYERS[kind]() for kind in stage)) for stage in kinds))
    flat = [(f"{i}.{j}", kind) for i, stage in enumerate(kinds) for j, kind in enumerate(stage)]
    if rule == "final":
        after = max((k + 1 for k, (_, kind) in enumerate(flat) if kind in OFFENDERS), default=0)
        expected = {name for name, kind in flat[after:] if kind in WEIGHTED}
    else:
        expected = {name for name, kind in flat if kind in WEIGHTED | {"embedding"}}
    if not expected:
        with pytest.raises(ValueError, match="no trainable"):
            select(rule, model, include_bias)
        return
    groups = select(rule, model, include_bias)
    check_complete(model, groups, include_bias)
    weights = {f"{name}.weight" for name in expected}
    biases = {f"{name}.bias" for name, kind in flat if name in expected and kind not in ("no bias", "embedding")}
    assert bound_names(model, groups) == (weights | biases if include_bias else weights)
    if include_bias:
        assert joined(model, groups) == {frozenset({b, b.replace("bias", "weight")}) for b in biases}


def test_vgg19_ends_in_its_head():
    model = VGG19((3, 32, 32), 10, batch_norm=True)
    assert bound_names(model, final_homogeneous(model)) == {"head.weight"}
    assert bound_names(model, final_homogeneous(model, include_bias=True)) == {"head.weight", "head.bias"}
    plain = VGG19((3, 32, 32), 10, batch_norm=False)
    assert len(bound_names(plain, final_homogeneous(plain))) == 17


def test_mlp_is_homogeneous_as_a_whole():
    model = mlp((1, 4, 4), 3, widths=[5, 6])
    for groups in (all_weights(model), final_homogeneous(model, include_bias=True)):
        assert len(groups) == 1
        assert bound_names(model, groups) == {"1.weight", "3.weight", "5.weight"}


def test_ncf_ends_in_its_hidden_layers_and_score():
    model = NCFMLP(5, 6, factors=2, layers=2, init="he2017")
    layers = {"hidden.0", "hidden.2", "score"}
    assert bound_names(model, final_homogeneous(model)) == {f"{name}.weight" for name in layers}
    assert bound_names(model, all_weights(model)) == {
        *(f"{name}.weight" for name in layers | {"user", "item"}),
    }
    groups = final_homogeneous(model, include_bias=True)
    check_complete(model, groups, include_bias=True)
    assert joined(model, groups) == {frozenset({f"{name}.weight", f"{name}.bias"}) for name in layers}


class Scaled(nn.Linear):
    """Not homogeneous, though a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class Tokens(nn.Module):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.tokens = nn.Parameter(torch.ones(1, 3))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(3, 3)
        self.shortcut = nn.Sequential()
        self.unused = None


@pytest.mark.parametrize(
    ("offender", "after"),
    [
        (Scaled(3, 3), {"2.weight"}),
        (Gain(), {"2.weight"}),
        (nn.LSTM(3, 3), {"2.weight"}),
        (nn.MultiheadAttention(3, 1), {"2.weight"}),  # its out_proj, of a subclass of Linear, is not counted either
        (nn.Softmax(dim=1), {"2.weight"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), {"2.weight"}),
        (prune.identity(nn.Linear(3, 3), "weight"), {"2.weight"}),
        (prune.identity(nn.Linear(3, 3), "bias"), {"0.weight", "1.weight", "2.weight"}),
        (Tokens(), {"1.head.weight", "2.weight"}),
        (Skip(), {"0.weight", "1.branch.weight", "2.weight"}),  # opened, and homogeneous
        (nn.Sequential(), {"0.weight", "2.weight"}),
    ],
)
def test_what_ends_the_final_network(offender, after):
    model = nn.Sequential(nn.Linear(3, 3), offender, nn.Linear(3, 3))
    groups = final_homogeneous(model)
    check_complete(model, groups, include_bias=False)
    assert bound_names(model, groups) == after


def test_a_weight_of_one_element_is_free_in_the_final_network():
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1))
    assert bound_names(model, final_homogeneous(model)) == {"0.weight"}


def test_a_layer_of_computed_weight_has_a_name():
    with pytest.raises(ValueError, match=r"after '0' \(Linear, whose weight is computed\)"):
        final_homogeneous(nn.Sequential(prune.identity(nn.Linear(3, 3), "weight"), nn.ReLU()))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_bias_of_a_computed_weight_cannot_join_it(name):
    for layer in (prune.identity(nn.Linear(3, 3), name), parametrize(nn.Linear(3, 3), name, nn.Identity())):
        model = nn.Sequential(nn.Linear(3, 3), layer)
        assert len(all_weights(model)[0]["params"]) == 2
        with pytest.raises(ValueError, match="the bias of '1' cannot share the norm of its weight"):
            all_weights(model, include_bias=True)
        assert len(matching(model, "^0", include_bias=True)[0]["params"]) == 2
    model = nn.Sequential(nn.Linear(3, 3), prune.identity(nn.Linear(3, 3, bias=False), "weight"))
    assert len(all_weights(model, include_bias=True)[0]["params"]) == 3


def test_an_offender_used_twice_counts_twice():
    gelu = nn.GELU()
    model = nn.Sequential(nn.Linear(3, 3), gelu, nn.Linear(3, 3), gelu, nn.Linear(3, 3))
    assert bound_names(model, final_homogeneous(model)) == {"4.weight"}


def test_no_final_network():
    with pytest.raises(ValueError, match=re.escape("no trainable linear or convolutional layer after '1' (Sigmoid)")):
        final_homogeneous(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.ReLU()))
    with pytest.raises(ValueError, match="after the start of the model"):
        final_homogeneous(nn.ReLU())
    with pytest.raises(ValueError, match=r"after 'the model itself' \(BatchNorm1d\)"):
        final_homogeneous(nn.BatchNorm1d(3))
    assert len(final_homogeneous(nn.Linear(3, 3))) == 2


def test_the_final_network_is_homogeneous():
    """Each of its weights scaled by a > 0 scales the logits by a, biases apart."""
    layers = [nn.Conv2d(1, 4, 3), nn.PReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2)]
    layers += [nn.LeakyReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Identity(), nn.Dropout(0.5), nn.Linear(8, 3)).eval().double()
    groups = final_homogeneous(model)
    for name, p in model.named_parameters():
        if "bias" in name:
            p.detach().zero_()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    assert len(groups[0]["params"]) == 3
    for weight in groups[0]["params"]:
        with torch.no_grad():
            weight.mul_(2.5)
        torch.testing.assert_close(model(x), 2.5 * logits)
        with torch.no_grad():
            weight.div_(2.5)


def test_matching():
    model = NCFMLP(5, 6, factors=2, layers=2, init="torch")
    assert bound_names(model, matching(model, "^hidden")) == {"hidden.0.weight", "hidden.2.weight"}
    assert bound_names(model, matching(model, ["user", re.compile("score"), "user|score"])) == {
        "user.weight",
        "score.weight",
    }
    groups = matching(model, "score", include_bias=True)
    check_complete(model, groups, include_bias=True)
    assert joined(model, groups) == {frozenset({"score.weight", "score.bias"})}
    for nothing in ("nowhere", ["score", "nowhere"], re.compile("nowhere")):
        with pytest.raises(ValueError, match="'nowhere' matches no"):
            matching(model, nothing)
    with pytest.raises(ValueError, match="matches no"):
        matching(model, "bias")
    for search in (matching, stacked):
        with pytest.raises(ValueError, match=r"pattern '\[' cannot be read: "):
            search(model, "[")
    with pytest.raises(ValueError, match="no pattern"):
        matching(model, [])


def test_tied_weights_come_once():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    for groups in (all_weights(model, include_bias=True), final_homogeneous(model, include_bias=True)):
        check_complete(model, groups, include_bias=True)
        assert joined(model, groups) == {frozenset({"embed.weight", "head.bias"})}
    assert bound_names(model, matching(model, "head")) == {"embed.weight"}


def test_frozen_parameters_are_not_grouped():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    groups = all_weights(model, include_bias=True)
    check_complete(model, groups, include_bias=True)
    assert bound_names(model, groups) == {"1.weight"}
    assert groups[1]["params"] == [model[0].bias]  # its weight has no norm to share


@pytest.mark.parametrize("include_bias", [False, True])
def test_the_optimizer_holds_these_norms(include_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    optimizer = SGDLAWN(final_homogeneous(model, include_bias=include_bias), lr=0.1, free_steps=0)

    def norms() -> list[float]:
        return [
            torch.cat([layer.weight.flatten(), layer.bias][: 1 + include_bias]).norm().item()
            for layer in model
            if hasattr(layer, "in_features")
        ]

    before = norms()
    x = torch.randn(16, 3, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
    assert norms()[1:] == pytest.approx(before[1:], rel=1e-12)
    assert abs(norms()[0] / before[0] - 1) > 1e-4


@pytest.mark.parametrize(
    "make", [all_weights, final_homogeneous, lambda m: matching(m, "weight"), lambda m: stacked(m, "1"), bound_norms]
)
def test_lazy_modules_without_shapes_are_refused(make):
    """Their weights have no dimensions yet, and would stay free."""
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet, as its module is lazy: run the model"):
        make(model)
    model(torch.zeros(1, 4))
    if make is all_weights:
        assert [p.ndim for p in make(model)[0]["params"]] == [2, 2]


def test_lazy_weights_of_free_groups_may_have_decay():
    lazy = nn.LazyLinear(2)
    SGDLAWN([{"params": lazy.parameters(), "weight_decay": 0.1, "constrain": False}], lr=0.1)


def test_rows_of_a_single_number_stay_free():
    """They could not move on a fixed norm."""
    model = nn.ModuleList([nn.Embedding(6, 3), nn.Embedding(6, 1)])
    rows, free = per_row(all_weights(model))
    assert [rows["params"][0] is model[0].weight, rows["norm_axes"]] == [True, (1,)]
    assert [free["params"][0] is model[1].weight, free["constrain"], "norm_axes" in free] == [True, False, False]
    optimizer = SGDLAWN([rows, free], lr=0.1, free_steps=0)
    before = model[1].weight.detach().clone()
    model[1].weight.grad = torch.ones(6, 1)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before - 0.1)


def test_rows_keep_the_other_keys_of_their_group():
    model = nn.ModuleList([nn.Embedding(6, 3), nn.Embedding(6, 1)])
    (group,) = all_weights(model)
    assert [each["lr"] for each in per_row([{**group, "lr": 0.5}])] == [0.5, 0.5]


def test_empty_containers_of_parameters_do_not_end_the_sub_network():
    """Models of PEFT have them in each of their layers."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ParameterDict(), nn.ParameterList(), nn.Linear(3, 2))
    assert [tuple(p.shape) for p in final_homogeneous(model)[0]["params"]] == [(3, 4), (2, 3)]
    model[2].append(torch.ones(2, 2))
    assert [tuple(p.shape) for p in final_homogeneous(model)[0]["params"]] == [(2, 3)]


def test_a_weight_of_one_element_is_free_beside_stacks():
    model = nn.ModuleDict({"gate": nn.Linear(1, 1), "experts": nn.ParameterList([torch.ones(3, 4, 4)])})
    stacks, free = stacked(model, "^experts")
    assert stacks["params"] == [model["experts"][0]]
    assert free["params"] == [*model["gate"].parameters()]
    assert free["constrain"] is False
    del model["gate"].weight
    assert "norm_axes" not in stacked(model, "^experts")[1]  # vectors have no slices


class Transposed(nn.Module):
    """A linear layer as GPT-2 has it, with a weight [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))


def test_biases_join_the_weights_that_they_are_named_like():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "lstm": nn.LSTM(3, 4),
            "linear": Transposed(),
            "norm": nn.LayerNorm(4),
        }
    )
    assert joined(model, all_weights(model, include_bias=True)) == {
        frozenset(pair)
        for pair in (
            ("attention.in_proj_weight", "attention.in_proj_bias"),
            ("attention.out_proj.weight", "attention.out_proj.bias"),
            ("lstm.weight_ih_l0", "lstm.bias_ih_l0"),
            ("lstm.weight_hh_l0", "lstm.bias_hh_l0"),
            ("linear.weight", "linear.bias"),
        )
    }


def test_biases_of_computed_weights_are_refused_in_all_layers():
    lstm = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    attention = nn.MultiheadAttention(4, 2)
    prune.random_unstructured(attention, "in_proj_weight", 0.5)
    for module in (lstm, attention):
        with pytest.raises(ValueError, match="the bias of '0' cannot share the norm of its weight, because"):
            all_weights(nn.Sequential(module), include_bias=True)
        all_weights(nn.Sequential(module))
    other = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)  # has no weight with the name of the bias
    assert joined(other, all_weights(other, include_bias=True)) == {frozenset({"out_proj.weight", "out_proj.bias"})}


def test_a_bias_of_two_layers_cannot_join_either():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match="the bias of '1' cannot share the norm of its weight, because another layer"):
        all_weights(model, include_bias=True)
    model[1].weight = model[0].weight
    assert all_weights(model, include_bias=True)[0]["blocks"] == [0, 0]
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    model[0].bias.requires_grad_(False)  # it joins neither
    assert all_weights(model, include_bias=True)[0]["blocks"] == [0, 1]


def test_matrices_of_scales_and_offsets_have_norms_of_their_own():
    """Those of a normalization over two axes are named like weight and bias."""
    (constrained,) = all_weights(nn.LayerNorm([3, 4]), include_bias=True)
    assert [tuple(p.shape) for p in constrained["params"]] == [(3, 4), (3, 4)]
    assert constrained["blocks"] == [0, 1]


def test_a_subclass_at_the_end_is_named():
    with pytest.raises(ValueError, match=r"after '1' \(NonDynamicallyQuantizableLinear, a subclass of nn.Linear\)"):
        final_homogeneous(nn.Sequential(nn.Linear(3, 3), nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3)))
