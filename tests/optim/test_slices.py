"""A norm for each slice of a parameter: the group key `norm_axes`."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.optim import cpu_kernels, dispatch, slices, update
from lawn.optim.blocks import Blocks
from lawn.optim.keys import NORM
from lawn.optim.param_groups import all_weights, per_row, stacked
from tests.optim.helpers import Maker, fixed_norms, wrapped
from tests.optim.test_contract import CARRIES, one_process  # noqa: F401 (a fixture of this module, too)

KINDS: dict[str, Maker] = {
    "AdamLAWN": AdamLAWN,
    "SGDLAWN": SGDLAWN,
    "LAMBLAWN": LAMBLAWN,
    "LAWN(AdamW)": wrapped(AdamW, weight_decay=0.0),
    "LAWN(SGD)": wrapped(SGD, momentum=0.9),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
in_both_ways = pytest.mark.parametrize("fused", [None, False])
# Shapes with axes, as they are given and as they are meant.
CASES: list[tuple[tuple[int, ...], Any, tuple[int, ...]]] = [
    ((3, 4, 5), (1, 2), (1, 2)),
    ((3, 4, 5), (-2, -1), (1, 2)),
    ((3, 4, 5), -1, (2,)),
    ((3, 4, 5), (0, 2), (0, 2)),
    ((3, 4, 5), [2, 0, 1], (0, 1, 2)),
    ((6, 5), (1,), (1,)),
    ((6, 5), 0, (0,)),
    ((2, 3, 2, 2), (1, 2, 3), (1, 2, 3)),
    ((2, 3, 2, 2), (-1, -2), (2, 3)),
    ((5,), 0, (0,)),
    ((1, 70, 60), (1, 2), (1, 2)),
]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pieces(t: Tensor, axes: tuple[int, ...]) -> list[Tensor]:
    """The slices of a tensor over these axes, by indices."""
    others = [axis for axis in range(t.ndim) if axis not in axes]
    index = itertools.product(*[range(t.shape[axis]) for axis in others])
    return [t[tuple(row[others.index(a)] if a in others else slice(None) for a in range(t.ndim))] for row in index]


def norms(t: Tensor, axes: tuple[int, ...]) -> list[float]:
    return [piece.detach().norm().item() for piece in pieces(t, axes)]


@every_kind
@in_both_ways
@given(chosen=st.lists(st.sampled_from(CASES), min_size=1, max_size=3), seed=st.integers(0, 10**6), gaps=st.booleans())
@settings(max_examples=8, deadline=None)
def test_slices_equal_parameters_of_their_own(kind, fused, chosen, seed, gaps):
    """Over 20 steps with the switch at 10; with `gaps` the first parameter misses every third gradient."""
    together = [nn.Parameter(random(shape, seed + i)) for i, (shape, _, _) in enumerate(chosen)]
    apart = [
        [nn.Parameter(t.clone()) for t in pieces(w.detach(), over)]
        for w, (_, _, over) in zip(together, chosen, strict=True)
    ]
    keys = {"lr": 0.05, "free_steps": 10, "fused": fused}
    one = kind(
        [
            {"params": [w], "constrain": True, "norm_axes": given}
            for w, (_, given, _) in zip(together, chosen, strict=True)
        ],
        **keys,
    )
    other = kind([{"params": own, "constrain": True} for own in apart], **keys)
    for t in range(20):
        for i, (w, own, (_, _, over)) in enumerate(zip(together, apart, chosen, strict=True)):
            g = None if gaps and i == 0 and t % 3 == 0 else random(w.shape, 1000 + 100 * i + t)
            w.grad = g
            for p, piece in zip(own, [None] * len(own) if g is None else pieces(g, over), strict=True):
                p.grad = None if piece is None else piece.clone()
        one.step()
        other.step()
    for w, own, (_, _, over) in zip(together, apart, chosen, strict=True):
        for piece, p in zip(pieces(w.detach(), over), own, strict=True):
            torch.testing.assert_close(piece, p.detach(), rtol=1e-12, atol=1e-12)
        expected = [other.state[p][NORM] for p in own]
        assert one.state[w][NORM].tolist() == pytest.approx(expected, rel=1e-12)
        assert norms(w, over) == pytest.approx(expected, rel=1e-12)


@every_kind
def test_one_group_of_weights_of_several_shapes(kind):
    """Several weights are one batch of the plain update, and one call of the compiled one."""
    results = []
    for fused in (None, False):
        ps = [nn.Parameter(random(shape, i)) for i, shape in enumerate([(3, 4), (2, 5), (2, 3, 4)])]
        optimizer = kind([{"params": ps, "norm_axes": -1}], lr=0.05, free_steps=2, fused=fused)
        for t in range(5):
            for p in ps:
                p.grad = random(p.shape, 10 + t)
            optimizer.step()
        assert [len(optimizer.state[p][NORM]) for p in ps] == [3, 2, 6]
        results.append(ps)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "norm_axes", "channels_last", "fits"),
    [
        ((3, 4, 5), (1, 2), False, True),
        ((3, 4, 5), -1, False, True),
        ((3, 4, 5), (0, 2), False, False),
        ((4, 5), 0, False, False),
        ((2, 3, 2, 2), (1, 2, 3), True, True),
        ((2, 3, 2, 2), (2, 3), True, False),
    ],
)
def test_compiled_code_serves_contiguous_slices(shape, norm_axes, channels_last, fits):
    w = random(shape, 0)
    w = w.to(memory_format=torch.channels_last) if channels_last else w
    blocks = Blocks([w], [1], [0.0], slice_axes=[slices.slice_axes(norm_axes, w)])
    assert (dispatch.backend(blocks, None) is not update) == (fits and cpu_kernels.load([[w]]) is not None)


def test_each_expert_keeps_its_norm():
    """Experts of very different scales, with a stacked bias that stays free."""
    model = nn.Module()
    model.experts, model.bias = nn.Parameter(random((3, 4, 4), 0)), nn.Parameter(random((3, 4), 1))
    optimizer = AdamLAWN(stacked(model, "experts|bias"), lr=0.05, free_steps=0)
    before = norms(model.experts, (1, 2))
    target = random((3, 4, 4), 2) * torch.tensor([1.0, 3.0, 0.1])[:, None, None]
    for _ in range(50):
        optimizer.zero_grad()
        ((model.experts - target).pow(2).sum() + model.bias.pow(2).sum()).backward()
        optimizer.step()
    assert norms(model.experts, (1, 2)) == pytest.approx(before, rel=1e-12)
    assert optimizer.state[model.experts][NORM].tolist() == pytest.approx(before, rel=1e-12)
    assert optimizer.state[model.bias][NORM] == 0.0
    assert model.bias.norm() < 0.5


@every_kind
def test_complex_weights(kind):
    ps = [nn.Parameter(torch.complex(random((3, 4), 0), random((3, 4), 1))) for _ in range(2)]
    rows = [nn.Parameter(row.clone()) for row in ps[1].detach()]
    one = kind([{"params": ps[:1], "norm_axes": -1}], lr=0.05, free_steps=2)
    other = kind([{"params": rows, "constrain": True}], lr=0.05, free_steps=2)
    for t in range(5):
        g = torch.complex(random((3, 4), 10 + t), random((3, 4), 20 + t))
        ps[0].grad = g.clone()
        for p, row in zip(rows, g, strict=True):
            p.grad = row.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ps[0].detach(), torch.stack([p.detach() for p in rows]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN])
@pytest.mark.parametrize("norm_axes", [0, 1])
def test_random_numbers_are_of_elements(kind, norm_axes):
    """Whatever the slices are. Here their updates hardly depend on them, so that nearly all entries round alike."""

    def run(axes: int | None) -> Tensor:
        p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        keys = {} if axes is None else {"norm_axes": axes}
        optimizer = kind([{"params": [p], **keys}], lr=1e-3, free_steps=0, rounding="stochastic")
        p.grad = torch.ones(8, 8).triu().add(torch.ones(8, 8).tril().mT).to(torch.bfloat16)
        p.grad[::2] *= -1
        p.grad[:, ::2] *= -1
        optimizer.step()
        return p.detach()

    changed, expected = run(norm_axes), run(None)
    assert (changed != 1).any()
    assert (changed != expected).sum() <= 4


def make(kind: Maker, dtype: torch.dtype, seed: int = 0, **keys: Any) -> tuple[nn.Module, Optimizer]:
    model = nn.Module()
    model.experts, model.bias = nn.Parameter(random((3, 4, 5), seed, dtype)), nn.Parameter(random((5,), seed, dtype))
    groups: list[dict[str, Any]] = [{"params": [model.experts], "norm_axes": (1, 2)}, {"params": [model.bias]}]
    return model, kind(groups, lr=0.05, **keys)


def advance(model: nn.Module, optimizer: Optimizer, start: int, stop: int) -> None:
    for t in range(start, stop):
        for p in model.parameters():
            p.grad = random(p.shape, 100 + t, p.dtype)
        optimizer.step()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [2, 5])
@pytest.mark.parametrize("carry", ["state_dict", "json", pytest.param("dcp", marks=pytest.mark.slow), "dcp, flattened"])
@pytest.mark.usefixtures("one_process")
def test_resumes_bit_for_bit(kind, dtype, cut, carry, tmp_path):
    """Saved before and after the switch at 3."""
    model, optimizer = make(kind, dtype, free_steps=3)
    advance(model, optimizer, 0, cut)
    into, fresh = make(kind, dtype, seed=1, free_steps=3)
    CARRIES[carry](model, optimizer, into, fresh, tmp_path / "saved" if "dcp" in carry else tmp_path)
    assert fixed_norms(fresh) == fixed_norms(optimizer)
    advance(model, optimizer, cut, 8)
    advance(into, fresh, cut, 8)
    for p, q in zip(model.parameters(), into.parameters(), strict=True):
        assert torch.equal(p, q)
    assert fixed_norms(fresh) == fixed_norms(optimizer)
    assert fresh.state[into.experts][NORM].dtype == torch.float64


@every_kind
def test_copies_step_alike(kind):
    if kind in (KINDS["LAWN(AdamW)"], KINDS["LAWN(SGD)"]):
        pytest.skip("torch does not copy hooks")
    model, optimizer = make(kind, torch.float64, free_steps=1)
    advance(model, optimizer, 0, 3)
    copied = copy.deepcopy((model, optimizer))
    advance(model, optimizer, 3, 5)
    advance(*copied, 3, 5)
    assert torch.equal(model.experts, copied[0].experts)


@every_kind
def test_none_is_the_default(kind):
    """It adds no key, and changes no bit where it is given."""
    results = []
    for keys in ({}, {"norm_axes": None}):
        p = nn.Parameter(random((3, 4, 5), 0))
        optimizer = kind([{"params": [p], **keys}], lr=0.05, free_steps=1)
        for t in range(4):
            p.grad = random(p.shape, t)
            optimizer.step()
        results.append((p.detach(), optimizer))
    (plain, default), (given, _) = results
    assert torch.equal(plain, given)
    assert type(default.state_dict()["state"][0][NORM]) is float
    assert slices.KEY not in default.state_dict()["param_groups"][0]


@every_kind
def test_constrain_again_adopts_the_present_norms(kind):
    p = nn.Parameter(random((3, 4), 0))
    optimizer = kind([{"params": [p], "norm_axes": 1}], lr=0.05, free_steps=0)
    p.grad = random(p.shape, 1)
    optimizer.step()
    with torch.no_grad():
        p.mul_(torch.tensor([[1.0], [2.0], [3.0]]))
    expected = norms(p, (1,))
    constrain(optimizer)
    assert optimizer.state[p][NORM].tolist() == pytest.approx(expected, rel=1e-12)
    optimizer.step()
    assert norms(p, (1,)) == pytest.approx(expected, rel=1e-12)


def constrain(optimizer: Optimizer) -> None:
    """Adopt the present norms; the wrapper is found by its hooks."""
    if isinstance(optimizer, AdamLAWN | SGDLAWN):
        optimizer.constrain(again=True)
    else:
        next(iter(optimizer._optimizer_step_pre_hooks.values())).__self__.constrain(again=True)


@every_kind
@in_both_ways
def test_a_slice_of_zero_is_named(kind, fused):
    p = nn.Parameter(random((2, 3, 4), 0))
    with torch.no_grad():
        p[1, 2] = 0
    group = {"params": [("experts", p)] if kind is AdamLAWN else [p], "norm_axes": -1}
    name = "'experts'" if kind is AdamLAWN else "0 of param group 0"
    optimizer = kind([group], lr=0.05, free_steps=0, fused=fused)
    p.grad = random(p.shape, 1)
    with pytest.raises(ValueError, match=rf"cannot constrain slice \[1, 2, :\] of parameter {name}.*norm is 0.0"):
        optimizer.step()
    with torch.no_grad():
        p[1, 2] = 1
    optimizer.step()
    with torch.no_grad():
        p[1, 1] = 0
    with pytest.raises(
        ValueError,
        match=rf"slice \[1, 1, :\] of parameter {name}.* is zero or underflows when squared, but was constrained to",
    ):
        optimizer.step()


@every_kind
def test_norms_of_another_weight_are_refused(kind):
    model, optimizer = make(kind, torch.float64, free_steps=0)
    advance(model, optimizer, 0, 2)
    into, fresh = make(kind, torch.float64, seed=1, free_steps=0)
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"slice \[0, :, :\] of parameter .* has the norm .*, but its state says"):
        advance(into, fresh, 2, 3)


@every_kind
def test_a_change_of_the_slices_is_refused(kind):
    """While the norms are those of other slices; without a fixed norm it is none."""
    model, optimizer = make(kind, torch.float64, free_steps=2)
    advance(model, optimizer, 0, 1)
    optimizer.param_groups[0]["norm_axes"] = -1
    advance(model, optimizer, 1, 4)
    for axes, message in [
        ((1, 2), "has a norm for each of 3 slices, but its state a norm for each of 12 slices"),
        (None, "has a single norm, but its state a norm for each of 12 slices"),
    ]:
        optimizer.param_groups[0]["norm_axes"] = axes
        with pytest.raises(ValueError, match=message):
            advance(model, optimizer, 4, 5)
    constrain(optimizer)
    advance(model, optimizer, 4, 5)
    optimizer.param_groups[0]["norm_axes"] = -1
    with pytest.raises(ValueError, match="has a norm for each of 12 slices, but its state a single norm"):
        advance(model, optimizer, 5, 6)


@every_kind
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_axes": 2}, "norm_axes=2 are not different axes of a parameter of shape"),
        ({"norm_axes": (1, -1)}, "are not different axes"),
        ({"norm_axes": ()}, r"must be None, an int or a tuple of ints, got \(\)"),
        ({"norm_axes": True}, "must be None, an int or a tuple of ints"),
        ({"norm_axes": "row"}, "must be None, an int or a tuple of ints, got 'row'"),
        ({"norm_axes": (1.5,)}, "must be None, an int or a tuple of ints"),
        ({"norm_axes": 1, "blocks": [0]}, "blocks .include_bias. join parameters to one norm"),
    ],
)
def test_errors(kind, keys, message):
    with pytest.raises(ValueError, match=f"param group 0: .*{message}"):
        kind([{"params": [nn.Parameter(torch.ones(3, 4))], **keys}])


def test_axes_do_not_matter_for_free_parameters():
    """A group may hold vectors, which are free, beside weights."""
    w, b, free = nn.Parameter(random((3, 4), 0)), nn.Parameter(random((4,), 1)), nn.Parameter(random((4,), 1))
    optimizer = AdamLAWN(
        [{"params": [w, b], "norm_axes": (0, 1)}, {"params": [free], "constrain": False, "norm_axes": 1}], free_steps=0
    )
    for p in (w, b, free):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert fixed_norms(optimizer) == [[pytest.approx(random((3, 4), 0).norm().item())], 0.0, 0.0]


@pytest.mark.usefixtures("one_process")
def test_dtensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    with pytest.raises(TypeError, match="param group 0: norm_axes is not supported for DTensors"):
        AdamLAWN([{"params": [p], "norm_axes": 1}])
    AdamLAWN([{"params": [p], "norm_axes": 1, "constrain": False}])


def test_a_group_may_be_added_and_lawn_detached():
    optimizer = SGD([nn.Parameter(random((3, 4), 0))], lr=0.1)
    lawn = LAWN(optimizer, free_steps=0)
    optimizer.add_param_group({"params": [nn.Parameter(random((2, 4), 0))], "norm_axes": 1})
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = random(p.shape, 1)
    optimizer.step()
    assert [type(c) for c in fixed_norms(optimizer)] == [float, list]
    lawn.detach()
    assert all(slices.KEY not in group for group in optimizer.param_groups)


def test_per_row():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv2d(1, 4, 3), nn.Linear(16, 2))
    groups = per_row(all_weights(model))
    found = [(g.get("norm_axes"), [tuple(p.shape) for p in g["params"]]) for g in groups]
    assert found == [((1,), [(5, 4), (2, 16)]), ((1, 2, 3), [(4, 1, 3, 3)]), (None, [(4,), (2,)])]
    optimizer = SGDLAWN(groups, lr=0.1, free_steps=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [len(c) if isinstance(c, list) else c for c in fixed_norms(optimizer)] == [5, 2, 4, 0.0, 0.0]
    with pytest.raises(ValueError, match="include_bias"):
        per_row(all_weights(model, include_bias=True))
    with pytest.raises(ValueError, match="fewer than two dimensions has no rows"):
        per_row([{"params": [model[2].bias], "constrain": True}])


def test_stacked():
    model = nn.Module()
    model.head = nn.Linear(4, 3)
    model.w, model.b = nn.Parameter(torch.ones(2, 4, 4)), nn.Parameter(torch.ones(2, 4))
    model.kernel = nn.Parameter(torch.ones(2, 4, 1, 3, 3))
    frozen = nn.Parameter(torch.ones(2, 4, 4), requires_grad=False)
    model.frozen = frozen
    found = [
        (g["constrain"], g.get("norm_axes"), [tuple(p.shape) for p in g["params"]])
        for g in stacked(model, "^(w|b|kernel|frozen)$")
    ]
    assert found == [
        (True, (1, 2), [(2, 4, 4)]),
        (True, (1, 2, 3, 4), [(2, 4, 1, 3, 3)]),
        (True, None, [(3, 4)]),
        (False, 1, [(2, 4), (3,)]),
    ]
    for pattern in ("^b$", "frozen", "missing"):
        with pytest.raises(ValueError, match="matches no trainable parameter with three or more dimensions"):
            stacked(model, pattern)


def test_stacked_biases_have_the_trust_ratios_of_their_members():
    stack = nn.ParameterDict({"w": nn.Parameter(random((3, 4, 5), 0)), "b": nn.Parameter(random((3, 5), 1))})
    stack["b"].data *= torch.tensor([[1.0], [10.0], [100.0]])
    members = [[nn.Parameter(stack[name].detach()[k].clone()) for name in ("w", "b")] for k in range(3)]
    together = LAMBLAWN(stacked(stack, "."), lr=0.1, free_steps=2)
    alone = [LAMBLAWN(member, lr=0.1, free_steps=2) for member in members]
    for t in range(4):
        for i, name in enumerate(("w", "b")):
            stack[name].grad = random(tuple(stack[name].shape), 10 * t + i)
            for k in range(3):
                members[k][i].grad = stack[name].grad[k]
        for optimizer in (together, *alone):
            optimizer.step()
    for k in range(3):
        for i, name in enumerate(("w", "b")):
            torch.testing.assert_close(stack[name].detach()[k], members[k][i].detach())


@pytest.mark.slow
def test_a_compiled_step_runs_eagerly():
    p, q = (nn.Parameter(random((3, 4), 0)) for _ in range(2))
    ours, theirs = (AdamLAWN([{"params": [w], "norm_axes": 1}], lr=torch.tensor(0.05), free_steps=1) for w in (p, q))
    step = torch.compile(ours.step, backend="eager")
    for t in range(4):
        p.grad, q.grad = random(p.shape, t), random(p.shape, t)
        step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@every_kind
def test_weights_whose_slices_are_single_numbers_stay_free(kind):
    """As if they were in a group with constrain=False."""
    runs = []
    for groups in (
        lambda matrix, numbers: [{"params": [matrix, numbers], "norm_axes": 1}],
        lambda matrix, numbers: [{"params": [matrix], "norm_axes": 1}, {"params": [numbers], "constrain": False}],
    ):
        params = [nn.Parameter(random((4, 3), 0)), nn.Parameter(random((6, 1), 1))]
        optimizer = kind(groups(*params), lr=0.1, free_steps=2)
        for step in range(5):
            for k, p in enumerate(params):
                p.grad = random(p.shape, 10 * step + k)
            optimizer.step()
        assert optimizer.state[params[1]][NORM] == 0.0
        runs.append(params)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def pop_first(groups: list[dict[str, Any]]) -> None:
    groups.pop(0)


@pytest.mark.parametrize("steps", [1, 4], ids=["free", "constrained"])
@pytest.mark.parametrize("edit", [pop_first, list.reverse, list.clear], ids=["pop", "reverse", "clear"])
def test_groups_that_are_removed_or_moved_keep_their_keys(edit, steps):
    """Under LAWN as in AdamLAWN: by their positions they would get those of other groups."""
    seen = []
    for kind in (AdamLAWN, wrapped(torch.optim.Adam)):
        first, second, new = (nn.Parameter(random(shape, k)) for k, shape in enumerate([(4, 3), (5, 3), (6, 3)]))
        groups = [
            {"params": [first], "norm_axes": 1},
            {"params": [second]},
            {"params": [random((4,), 3)], "constrain": False},
        ]
        optimizer = kind(groups, lr=0.01, free_steps=3)

        def advance(optimizer=optimizer):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = random(p.shape, p.numel())
            optimizer.step()

        for _ in range(steps):
            advance()
        edit(optimizer.param_groups)
        optimizer.add_param_group({"params": [new]})
        for _ in range(4):
            advance()
        keys = ("constrain", "norm_axes", "free_steps", "steps", "switched")
        seen.append([[group.get(key) for key in keys] for group in optimizer.param_groups])
        assert optimizer.param_groups[-1]["switched"]
        assert optimizer.state[new][NORM] == pytest.approx(new.norm().item())
        present = [p for group in optimizer.param_groups for p in group["params"]]
        seen[-1].append([torch.as_tensor(optimizer.state[p][NORM]).shape for p in present])
    assert seen[0] == seen[1]


@every_kind
@pytest.mark.parametrize(("shape", "norm_axes", "other"), [((4, 4), 1, 0), ((4, 4, 4), (1, 2), (0, 1))])
def test_other_axes_with_as_many_slices_are_refused(kind, shape, norm_axes, other):
    """The norms of rows are not those of columns."""
    w = nn.Parameter(random(shape, 0))
    optimizer = kind([{"params": [w], "norm_axes": norm_axes}], lr=0.01, free_steps=0)
    w.grad = random(shape, 1)
    optimizer.step()
    optimizer.param_groups[0]["norm_axes"] = other
    before = w.detach().clone()
    with pytest.raises(ValueError, match="but its state says"):
        optimizer.step()
    assert torch.equal(w, before)
    optimizer.param_groups[0]["norm_axes"] = norm_axes
    optimizer.step()
