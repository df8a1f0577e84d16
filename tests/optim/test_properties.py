"""The optimizers against Algorithm 1 and against what the constraint promises."""

import copy
from collections.abc import Sequence
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lawn import LAMB, LAMBLAWN, SGDLAWN, AdamLAWN
from lawn.optim import NonFiniteError, blocks, cpu_kernels, update
from lawn.optim.keys import is_constrained
from lawn.optim.reference import ReferenceLAWN
from tests.optim.helpers import Maker, fixed_norms, wrapped

Sizes = Sequence[tuple[int, ...]]
shapes = st.lists(
    st.sampled_from([(3,), (1,), (2, 3), (1, 2), (4, 1, 2), (5, 4), (2, 3, 2, 2), (60, 70)]), min_size=1, max_size=4
).filter(lambda sizes: any(len(size) > 1 for size in sizes))
seeds = st.integers(0, 10**6)

wrapped_adam, wrapped_sgd = wrapped(Adam, eps=1e-6), wrapped(SGD, momentum=0.9)
RULES: dict[str, tuple[Maker, str]] = {
    "AdamLAWN": (AdamLAWN, "adam"),
    "SGDLAWN": (SGDLAWN, "sgd"),
    "LAMBLAWN": (LAMBLAWN, "lamb"),
    "LAWN(Adam)": (wrapped_adam, "adam"),
    "LAWN(SGD)": (wrapped_sgd, "sgd"),
}
every_kind = pytest.mark.parametrize("kind", [kind for kind, _ in RULES.values()], ids=RULES)
in_both_ways = pytest.mark.parametrize("fused", [None, False])


def random_weights(sizes: Sizes, seed: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(size, generator=generator) + 0.1).to(dtype)) for size in sizes]


def random_grads(sizes: Sizes, seed: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step + 1)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def advance(optimizer: Optimizer, seed: int, start: int, stop: int, *, gaps: bool = False) -> list[Tensor]:
    """Updates `start` to `stop` by random gradients; the parameters. With `gaps` each misses every third gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, stop):
        for i, (p, g) in enumerate(zip(params, random_grads([p.shape for p in params], seed, t), strict=True)):
            p.grad = None if gaps and (i + t) % 3 == 0 else g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


@in_both_ways
@pytest.mark.parametrize(("kind", "rule"), RULES.values(), ids=RULES)
@given(sizes=shapes, seed=seeds, free_steps=st.integers(0, 6), steps=st.integers(1, 12), cut=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_equals_algorithm_1(kind, rule, fused, sizes, seed, free_steps, steps, cut):
    assert cpu_kernels.load([random_weights([(2, 2)], 0)]) is not None, "these tests want a C compiler"
    params = random_weights(sizes, seed)
    cut = min(cut, len(params) - 1)  # two param groups with rates of their own, or one
    parts = [part for part in (params[:cut], params[cut:]) if part]
    rates = [0.05, 0.02][: len(parts)]
    references = [
        ReferenceLAWN(rule, [p.detach().clone() for p in part], lr=lr, free_steps=free_steps)
        for part, lr in zip(parts, rates, strict=True)
    ]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, rates, strict=True)]
    optimizer = kind(groups, lr=1.0, free_steps=free_steps, fused=fused)
    for t in range(steps):
        grads = random_grads(sizes, seed, t)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        references[0].step(grads[: len(parts[0])])
        if len(parts) == 2:
            references[1].step(grads[len(parts[0]) :])
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, g), "the gradient must be left as it was"
    for p, w in zip(params, [w for reference in references for w in reference.weights], strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-11)
    norms = [c for reference in references for c in reference.c]
    assert fixed_norms(optimizer) == pytest.approx([0.0 if c is None else c.item() for c in norms], rel=1e-9)


@in_both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_kind
@given(seed=seeds, spike=st.integers(0, 15))
@settings(max_examples=10, deadline=None)
def test_norms_stay_after_a_huge_gradient(kind, fused, dtype, seed, spike):
    """It leaves a momentum along the weight: the next updates are differences of vectors that hardly differ."""
    sizes = [(5, 4), (2, 3, 2, 2), (60, 70)]  # where the differences of all elements are not zero at once
    optimizer = kind(random_weights(sizes, seed, dtype), lr=0.1, free_steps=0, fused=fused)
    advance(optimizer, seed, 0, 2)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(2, 6):
        for p, g in zip(params, random_grads(sizes, seed, t), strict=True):
            p.grad = (g * (10.0**spike if t == 2 else 1.0)).to(dtype)
        optimizer.step()
        now = [p.detach().double().norm().item() for p in params]
        for norm, c in zip(now, fixed_norms(optimizer), strict=True):
            tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 0.01)
            assert c == 0 or norm == pytest.approx(c, rel=tolerance)


@pytest.mark.parametrize("kind", [SGDLAWN, wrapped_sgd], ids=["SGDLAWN", "LAWN(SGD)"])
@pytest.mark.parametrize("spike", [1e20, 1e25])
def test_squares_of_a_gradient_may_overflow(kind, spike):
    """In the compiled update, that is; the plain one leaves zero, which the next step refuses."""
    optimizer = kind(random_weights([(5, 4), (60, 70)], 0, torch.float32), lr=0.1, free_steps=0)
    for p, g in zip(optimizer.param_groups[0]["params"], random_grads([(5, 4), (60, 70)], 0, 0), strict=True):
        p.grad = (spike * g).float()
    optimizer.step()
    params = advance(optimizer, 0, 1, 4)
    assert [p.double().norm().item() for p in params] == pytest.approx(fixed_norms(optimizer), rel=2e-6)


@in_both_ways
@pytest.mark.parametrize(("kind", "rule"), RULES.values(), ids=RULES)
@given(seed=seeds, missing=st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=10, deadline=None)
def test_each_weight_counts_its_own_updates(kind, rule, fused, seed, missing):
    """Algorithm 1 for each weight by itself, where one of them has no gradient at a step."""
    sizes = [(2, 3), (5, 4), (60, 70)]
    params = random_weights(sizes, seed)
    references = [ReferenceLAWN(rule, [p.detach().clone()], lr=0.05, free_steps=0) for p in params]
    optimizer = kind(params, lr=0.05, free_steps=0, fused=fused)
    for t, absent in enumerate(missing):
        for i, (p, g) in enumerate(zip(params, random_grads(sizes, seed, t), strict=True)):
            p.grad = None if i == absent else g.clone()
            if i != absent:
                references[i].step([g])
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach(), reference.weights[0], rtol=1e-9, atol=1e-11)


@every_kind
@given(seed=seeds, scale=st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_gradient_along_the_weight_has_no_effect(kind, seed, scale):
    sizes = [(3, 4), (2, 5)]
    plain, shifted = random_weights(sizes, seed), random_weights(sizes, seed)
    optimizers = [kind(params, lr=0.05, free_steps=0) for params in (plain, shifted)]
    for t in range(5):
        for p, q, g in zip(plain, shifted, random_grads(sizes, seed, t), strict=True):
            p.grad = g.clone()
            q.grad = g + scale * q.detach()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, shifted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"),
    [(torch.float32, 300, 1e-6), (torch.bfloat16, 150, 1e-3)],
    ids=["float32", "bfloat16"],
)
def test_norms_stay(kind, dtype, steps, tolerance):
    """Those that weights, and blocks of them, had at the switch, over many steps; vectors have none."""
    params = random_weights([(32, 16), (8, 4, 3, 3), (16,), (12, 8), (12,)], 0, dtype)
    blocks = [params[:1], params[1:2], params[3:]]
    joined = {"params": params[3:], "constrain": True, "blocks": [0, 0]}
    optimizer = kind([{"params": params[:3]}, joined], lr=0.05, free_steps=3)
    generator = torch.Generator().manual_seed(0)

    def norms() -> list[float]:
        return [torch.cat([p.detach().double().flatten() for p in block]).norm().item() for block in blocks]

    expected: list[float] = []
    for t in range(steps):
        if t == 3:
            expected = norms()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    first, second, joint = expected
    assert fixed_norms(optimizer) == pytest.approx([first, second, 0.0, joint, joint], rel=1e-6)
    if dtype == torch.bfloat16 and kind in (wrapped_adam, wrapped_sgd):
        tolerance = 4e-3  # the base optimizer rounds the weight before LAWN sees it: see the wrapper's docstring
    assert norms() == pytest.approx(expected, rel=tolerance)


@every_kind
def test_update_is_orthogonal_to_the_weight(kind):
    """w - lr r with r tangent: what the rescaled weight says r was must have no share along w."""
    (p,) = random_weights([(6, 5)], 1)
    optimizer = kind([p], lr=0.05, free_steps=0)
    for t in range(10):
        before = p.detach().clone()
        advance(optimizer, 2, t, t + 1)
        c = before.norm()
        cosine = (before * p.detach()).sum() / c**2
        moved = p.detach() / cosine - before
        assert abs((moved * before).sum()) < 1e-10 * c**2


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (AdamLAWN, partial(Adam, eps=1e-6, fused=True)),
        (partial(AdamLAWN, fused=False), partial(Adam, eps=1e-6)),
        (SGDLAWN, partial(SGD, momentum=0.9)),
        (LAMBLAWN, LAMB),
        (wrapped_adam, partial(Adam, eps=1e-6)),
        (wrapped_sgd, partial(SGD, momentum=0.9)),
    ],
    ids=["AdamLAWN", "AdamLAWN, fused=False", *[*RULES][1:]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_free_phase_is_the_base_optimizers_own_bit_for_bit(kind, base, dtype):
    sizes = [(7, 5), (5,), (3, 2, 2)]
    ours, theirs = (advance(make(random_weights(sizes, 3, dtype), lr=0.01), 4, 0, 20) for make in (kind, base))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@every_kind
@in_both_ways
def test_joined_parameters_are_one_vector(kind, fused):
    """A weight and a bias that share a norm move like the one weight that holds both."""
    (whole,) = random_weights([(4, 6)], 7)
    weight, bias = nn.Parameter(whole.detach()[:, :5].clone()), nn.Parameter(whole.detach()[:, 5].clone())
    keys = {
        "lr": 0.05,
        "free_steps": 0 if kind is LAMBLAWN else 2,
        "fused": fused,
    }  # its trust ratios are of parameters
    apart = kind([{"params": [weight, bias], "constrain": True, "blocks": [3, 3]}], **keys)
    together = kind([whole], **keys)
    for t in range(8):
        (g,) = random_grads([(4, 6)], 8, t)
        whole.grad, weight.grad, bias.grad = g.clone(), g[:, :5].clone(), g[:, 5].clone()
        apart.step()
        together.step()
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), whole, rtol=1e-9, atol=1e-11)
    assert fixed_norms(apart) == pytest.approx(2 * fixed_norms(together), rel=1e-9)


@every_kind
@given(
    sizes=st.lists(st.sampled_from([(3,), (2, 3), (1, 2), (5, 4), (2, 3, 2, 2)]), min_size=2, max_size=6),
    seed=seeds,
    limit=st.integers(1, 60),
    joined=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None)
def test_the_plain_update_in_batches_is_that_of_the_whole(kind, sizes, seed, limit, joined, dtype):
    """So are the norms that are measured at the switch. With `joined`, neighbours share a norm."""
    keys = {"constrain": True, "blocks": [i // 2 for i in range(len(sizes))] if joined else None}

    def run() -> tuple[list[Tensor], list[float]]:
        params = random_weights(sizes, seed, dtype)
        optimizer = kind([{"params": params, **keys}], lr=0.05, free_steps=1, fused=False)
        return advance(optimizer, seed, 0, 5, gaps=True), fixed_norms(optimizer)

    whole, norms = run()
    with mock.patch.dict(blocks.BATCH_ELEMENTS, cpu=limit):
        parts, others = run()
    exact = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]  # sums are added in another order
    assert norms == pytest.approx(others, rel=1e-12 if dtype == torch.float64 else 1e-6)
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(p, q, rtol=exact, atol=exact)


@every_kind
@given(
    sizes=shapes,
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    fused=st.sampled_from([None, False]),
    free_steps=st.integers(0, 4),
    saved_after=st.integers(0, 7),
    gaps=st.booleans(),
    joined=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_resume_is_exact(kind, sizes, seed, dtype, fused, free_steps, saved_after, gaps, joined):
    """From any point, also into an optimizer that was made without `free_steps`."""
    keys = {"constrain": True, "blocks": [i // 2 for i in range(len(sizes))]} if joined else {}
    params = random_weights(sizes, seed, dtype)
    optimizer = kind([{"params": params, **keys}], lr=0.05, free_steps=free_steps, fused=fused)
    saved = [nn.Parameter(p.clone()) for p in advance(optimizer, seed, 0, saved_after, gaps=gaps)]
    again = kind([{"params": saved, **keys}], lr=0.05, fused=fused)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert is_constrained(again.param_groups) == (saved_after > free_steps)
    through, resumed = (advance(stepped, seed, saved_after, 9, gaps=gaps) for stepped in (optimizer, again))
    assert is_constrained(again.param_groups)
    assert all(torch.equal(p, q) for p, q in zip(through, resumed, strict=True))
    assert fixed_norms(again) == fixed_norms(optimizer)


@in_both_ways
@pytest.mark.parametrize("kind", [SGDLAWN, wrapped_sgd], ids=["SGDLAWN", "LAWN(SGD)"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 19), (torch.bfloat16, 19), (torch.float64, 154)])
def test_norms_that_cannot_be_squared_are_refused_at_the_switch(kind, dtype, limit, fused):
    """Before a weight changes. One that is too large is a divergence of the free phase."""
    for power, error in ((limit + 1, NonFiniteError), (-limit - 1, ValueError), (limit - 1, None), (1 - limit, None)):
        weight = torch.nn.Parameter(torch.full((4, 4), 10.0**power / 4, dtype=torch.float64).to(dtype))
        before = weight.detach().clone()
        optimizer = kind([weight], lr=0.1, free_steps=0, fused=fused)
        weight.grad = torch.eye(4).to(dtype)
        if error is None:
            optimizer.step()
            assert weight.double().norm().item() == pytest.approx(10.0**power, rel=0.02)
        else:
            with pytest.raises(error, match="its norm is "):
                optimizer.step()
            assert torch.equal(weight, before)


@in_both_ways
@every_kind
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_weight_that_has_no_length_any_more_is_refused(kind, fused, scale):
    """Whether it is zero or its squares are."""
    optimizer = kind(random_weights([(5, 4)], 0, torch.float32), lr=0.1, free_steps=0, fused=fused)
    (weight,) = advance(optimizer, 0, 0, 2)
    weight.mul_(scale)
    with pytest.raises(ValueError, match="is zero or underflows when squared, but was constrained to the norm"):
        advance(optimizer, 0, 2, 3)
    assert weight.isfinite().all()


@in_both_ways
@pytest.mark.parametrize("kind", [partial(SGDLAWN, momentum=0.5), AdamLAWN], ids=["SGDLAWN", "AdamLAWN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e6, 1e18])
def test_a_long_step_along_the_weight_leaves_its_norm_or_zero(kind, dtype, lr, fused):
    """Of the weight, which is the difference of two much longer vectors, few digits are left, or none."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = kind([weight], lr=lr, free_steps=0, fused=fused)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    for name, value in (("momentum_buffer", before), ("exp_avg", before), ("exp_avg_sq", 1.0)):
        if name in optimizer.state[weight]:
            optimizer.state[weight][name].copy_(torch.as_tensor(value))
    optimizer.step()
    norm, c = weight.double().norm().item(), fixed_norms(optimizer)[0]
    assert norm == 0 or norm == pytest.approx(c, rel=1e-6)


def assert_compiled_is_plain(kind: Maker, sizes: Sizes) -> None:
    found = [
        advance(kind(random_weights(sizes, 0), lr=0.1, free_steps=0, fused=fused), 0, 0, 3) for fused in (None, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@every_kind
@pytest.mark.parametrize("size", [2048, 2049, 32768, 32769])
def test_compiled_code_updates_weights_of_any_size_once(kind, size):
    """Around the numbers of elements of a chunk and of a block that one thread updates."""
    assert_compiled_is_plain(kind, [(1, size), (3, 4)])


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@every_kind
def test_threads_add_up_to_the_whole(four_threads, kind):
    """All compute sums over a large weight; small weights are distributed, as together they are large."""
    assert_compiled_is_plain(kind, [(300, 200), (4, 1, 2), *[(50, 30)] * 30])


def test_a_trust_ratio_magnifies_short_tangent_components_but_no_rounding_errors():
    """Updates of about length 1 of a weight of norm 2: all but a short part lies along it, or they are zero."""
    rr = torch.tensor([1 + 1e-10, 1 + 2 * 2.0**-52, 0.0], dtype=torch.float64)
    wr = torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)
    ww, c = torch.full_like(wr, 4.0), torch.full_like(wr, 2.0)
    keep, take, _ = update.coefficients(ww, wr, rr, c, 0.1, trust=True)
    along = keep - take * wr / ww  # of the new weight, as a share of the old one
    assert along.tolist() == pytest.approx([1 / 1.01**0.5, 1, 1], abs=1e-7)  # turned by atan(0.1), or not at all


@in_both_ways
@pytest.mark.parametrize(("length", "slope"), [(1.0, 0.1), (1e-5, 0.1), (1e-9, 0.0)])
def test_lamb_turns_a_weight_by_the_learning_rate_unless_its_update_lies_along_it(fused, length, slope):
    """`length`: of the update's tangent component, as a share of that along the weight."""
    w, tangent = (torch.randn(5, 4, generator=torch.Generator().manual_seed(k)).double() for k in range(2))
    w = w / w.norm()
    tangent -= w * (w * tangent).sum()
    weight = nn.Parameter(w.clone())
    optimizer = LAMBLAWN([weight], lr=0.1, free_steps=0, fused=fused)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, w)  # an update of zero turns nothing
    optimizer.state[weight]["exp_avg"].copy_(w + length * tangent / tangent.norm())
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)  # the same for all elements: the update has the moment's direction
    optimizer.step()
    along = (w * weight.detach()).sum()
    assert ((weight.detach() - along * w).norm() / along).item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_by_the_momentum_that_is_stored(dtype, fused):
    """The next step reads the rounded one."""
    (w,) = random_weights([(6, 5)], 0, dtype)
    optimizer = SGDLAWN([w], lr=5.0, free_steps=0, fused=fused)
    for t in range(4):
        before = w.detach().double()
        advance(optimizer, 0, t, t + 1)
        r, c = optimizer.state[w]["momentum_buffer"].double(), fixed_norms(optimizer)[0]
        moved = before - 5.0 * (r - before * (before * r).sum() / before.square().sum())
        assert (w == (c * moved / moved.norm()).to(dtype)).double().mean() > 0.9
