"""The optimizers against Algorithm 1 and against what the constraint promises."""

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.optim import native
from lawn.optim.reference import ReferenceLAWN

shapes = st.lists(
    st.sampled_from([(3,), (1,), (2, 3), (1, 2), (4, 1, 2), (5, 4), (2, 3, 2, 2), (60, 70)]), min_size=1, max_size=4
).filter(lambda s: any(len(shape) > 1 for shape in s))


class Wrapped:
    """LAWN on another optimizer, with the methods of one of this package's."""

    def __init__(self, base: torch.optim.Optimizer, **keys) -> None:
        self.base, self.lawn = base, LAWN(base, **keys)

    def __getattr__(self, name: str):
        return getattr(self.lawn if name in ("constrained", "constrain") else self.base, name)


def wrapped_adam(params, lr, **keys):
    return Wrapped(torch.optim.Adam(params, lr, eps=1e-6), **keys)


def wrapped_sgd(params, lr, **keys):
    return Wrapped(torch.optim.SGD(params, lr, momentum=0.9), **keys)


EVERY = [(AdamLAWN, "adam"), (SGDLAWN, "sgd"), (LAMBLAWN, "lamb"), (wrapped_adam, "adam"), (wrapped_sgd, "sgd")]
KINDS = [kind for kind, _ in EVERY]


def make(kind, params: list[Tensor], **keys):
    return kind(params, lr=0.05, **keys)


def random_weights(sizes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(s, generator=generator) + 0.1).to(dtype)) for s in sizes]


def random_grads(sizes: list[tuple[int, ...]], seed: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step + 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("kind", "rule"), EVERY)
@given(
    sizes=shapes,
    seed=st.integers(0, 10**6),
    free_steps=st.integers(0, 6),
    steps=st.integers(1, 12),
    cut=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_equals_algorithm_1(kind, rule, fused, sizes, seed, free_steps, steps, cut):
    assert native.library(True, random_weights([(2, 2)], 0)) is not None, "these tests want a C compiler"
    params = random_weights(sizes, seed)
    cut = min(cut, len(params) - 1)  # two param groups with rates of their own, or one
    parts = [part for part in (params[:cut], params[cut:]) if part]
    rates = [0.05, 0.02][: len(parts)]
    references = [
        ReferenceLAWN(rule, [p.detach().clone() for p in part], lr=lr, free_steps=free_steps)
        for part, lr in zip(parts, rates, strict=True)
    ]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, rates, strict=True)]
    optimizer = make(kind, groups, free_steps=free_steps, fused=fused)
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


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), scale=st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_gradient_along_the_weight_has_no_effect(kind, seed, scale):
    sizes = [(3, 4), (2, 5)]
    plain, shifted = random_weights(sizes, seed), random_weights(sizes, seed)
    optimizers = [make(kind, plain, free_steps=0), make(kind, shifted, free_steps=0)]
    for t in range(5):
        for p, q, g in zip(plain, shifted, random_grads(sizes, seed, t), strict=True):
            p.grad = g.clone()
            q.grad = g + scale * q.detach()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, shifted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_norms_stay(kind, dtype, tolerance):
    params = random_weights([(32, 16), (8, 4, 3, 3), (16,)], 0, dtype)
    optimizer = make(kind, params, free_steps=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    targets = optimizer.param_groups[0]["target_norms"]
    assert targets[2] is None
    assert all(c.dtype == torch.float32 for c in targets[:2])
    if dtype == torch.bfloat16 and kind in (wrapped_adam, wrapped_sgd):
        tolerance = 4e-3  # the base optimizer rounds the weight before LAWN sees it: see the wrapper's docstring
    for p, c in zip(params[:2], targets[:2], strict=True):
        assert abs(p.detach().float().norm() / c - 1) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_orthogonal_to_the_weight(kind):
    """w - lr r with r tangent: what the rescaled weight says r was must have no share along w."""
    (p,) = random_weights([(6, 5)], 1)
    optimizer = make(kind, [p], free_steps=0)
    for t in range(10):
        before = p.detach().clone()
        p.grad = random_grads([(6, 5)], 2, t)[0]
        optimizer.step()
        c = before.norm()
        cosine = (before * p.detach()).sum() / c**2
        update = p.detach() / cosine - before
        assert abs((update * before).sum()) < 1e-10 * c**2


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (AdamLAWN, lambda p: torch.optim.Adam(p, eps=1e-6, fused=True)),
        (partial(AdamLAWN, fused=False), lambda p: torch.optim.Adam(p, eps=1e-6)),
        (SGDLAWN, lambda p: torch.optim.SGD(p, momentum=0.9)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_free_phase_is_torchs_own_bit_for_bit(kind, base, dtype):
    sizes = [(7, 5), (5,), (3, 2, 2)]
    ours, theirs = random_weights(sizes, 3, dtype), random_weights(sizes, 3, dtype)
    optimizers = [kind(ours), base(theirs)]
    for t in range(20):
        for p, q, g in zip(ours, theirs, random_grads(sizes, 4, t), strict=True):
            p.grad, q.grad = g.to(dtype), g.to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_after", [1, 3, 6])
def test_resume_from_a_file_is_exact(kind, dtype, saved_after):
    sizes = [(7, 5), (5,)]

    def advance(params, optimizer, start, stop):
        for t in range(start, stop):
            for p, g in zip(params, random_grads(sizes, 5, t), strict=True):
                p.grad = g.to(dtype)
            optimizer.step()

    params = random_weights(sizes, 6, dtype)
    optimizer = make(kind, params, free_steps=3)
    advance(params, optimizer, 0, saved_after)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    advance(params, optimizer, saved_after, 9)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in state["params"]]
    again = make(kind, resumed, free_steps=None)
    again.load_state_dict(state["optimizer"])
    assert again.constrained == (saved_after > 3)
    advance(resumed, again, saved_after, 9)
    assert again.constrained
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def test_older_checkpoints_get_defaults():
    (p,) = random_weights([(2, 2)], 0)
    optimizer = AdamLAWN([p])
    state = optimizer.state_dict()
    for key in ("constrain", "free_steps", "steps", "target_norms"):
        del state["param_groups"][0][key]
    optimizer.load_state_dict(state)
    assert not optimizer.constrained
    assert optimizer.param_groups[0]["steps"] == 0


def test_deepcopy_goes_its_own_way():
    (p,) = random_weights([(2, 2)], 0)
    optimizer = AdamLAWN([p], free_steps=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    before = p.detach().clone()
    twin.param_groups[0]["params"][0].grad = torch.ones_like(p)
    twin.step()
    assert twin.constrained
    assert torch.equal(p, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [None, False])
def test_joined_parameters_are_one_vector(kind, fused):
    """A weight and a bias that share a norm move like the one weight that holds both."""
    (whole,) = random_weights([(4, 6)], 7)
    weight, bias = nn.Parameter(whole.detach()[:, :5].clone()), nn.Parameter(whole.detach()[:, 5].clone())
    apart = make(kind, [{"params": [weight, bias], "constrain": True, "blocks": [3, 3]}], free_steps=2, fused=fused)
    together = make(kind, [whole], free_steps=2, fused=fused)
    if kind is LAMBLAWN:  # its free phase has a trust ratio for each parameter
        apart.constrain()
        together.constrain()
    for t in range(8):
        (g,) = random_grads([(4, 6)], 8, t)
        whole.grad, weight.grad, bias.grad = g.clone(), g[:, :5].clone(), g[:, 5].clone()
        apart.step()
        together.step()
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), whole, rtol=1e-9, atol=1e-11)


def test_group_key_overrides_the_rule():
    matrix, vector, other = random_weights([(2, 2), (3,), (2, 2)], 0)
    optimizer = AdamLAWN([{"params": [matrix, vector], "constrain": True}, {"params": [other], "constrain": False}])
    optimizer.constrain()
    assert [c is not None for g in optimizer.param_groups for c in g["target_norms"]] == [True, True, False]


def test_a_group_added_later_is_in_the_same_phase():
    first, second = random_weights([(2, 2), (3, 3)], 0)
    optimizer = SGDLAWN([first], free_steps=0)
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    assert optimizer.param_groups[1]["target_norms"][0] == second.detach().norm()


def test_parameters_without_gradient_are_left_alone():
    used, unused = random_weights([(2, 2), (2, 2)], 0)
    before = unused.detach().clone()
    optimizer = AdamLAWN([used, unused], free_steps=1)
    for _ in range(3):
        used.grad = torch.ones_like(used)
        optimizer.step()
    assert torch.equal(unused, before)
    assert optimizer.constrained


def test_closure_and_tensor_lr():
    (p,) = random_weights([(3, 3)], 0)
    target = torch.eye(3, dtype=torch.float64)
    optimizer = AdamLAWN([p], lr=torch.tensor(0.05), free_steps=10)

    def closure():
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < losses[0]
    c = optimizer.param_groups[0]["target_norms"][0]
    best = target * c / target.norm()  # the nearest point of the sphere
    torch.testing.assert_close(p.detach(), best, rtol=0, atol=0.05)


@pytest.mark.parametrize("bad", [-1, 1.5, "1"])
def test_bad_free_steps(bad):
    with pytest.raises(ValueError, match="free_steps"):
        AdamLAWN(random_weights([(2, 2)], 0), free_steps=bad)


def test_what_cannot_be_constrained_is_refused():
    matrix, zero, vector = random_weights([(2, 2), (2, 2), (3,)], 0)
    zero.data.zero_()
    with pytest.raises(ValueError, match=r"parameter 1 of param group 0 \(shape \(2, 2\)\): its norm is 0"):
        AdamLAWN([matrix, zero]).constrain()
    zero.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="norm is nan"):
        AdamLAWN([matrix, zero]).constrain()
    with pytest.raises(ValueError, match="nothing to constrain"):
        SGDLAWN([vector]).constrain()
    with pytest.raises(ValueError, match="param group 1: weight_decay"):
        AdamLAWN([{"params": [vector]}, {"params": [matrix], "weight_decay": 0.1}])
    with pytest.raises(ValueError, match="param group 0: weight_decay"):
        LAWN(torch.optim.AdamW([matrix]))
    with pytest.raises(ValueError, match="already"):
        LAWN(AdamLAWN([matrix]))
    base = torch.optim.AdamW([matrix], weight_decay=0.0)
    handle = LAWN(base)
    base.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="param group 0: weight_decay"):
        handle.constrain()
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamLAWN([])
    optimizer = AdamLAWN([matrix])
    optimizer.constrain()
    with pytest.raises(ValueError, match="already"):
        optimizer.constrain()


def test_a_failed_switch_changes_nothing():
    matrix, zero = random_weights([(2, 2), (2, 2)], 0)
    zero.data.zero_()
    optimizer = AdamLAWN([{"params": [matrix]}, {"params": [zero]}])
    with pytest.raises(ValueError, match="norm is 0"):
        optimizer.constrain()
    assert not optimizer.constrained


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = AdamLAWN(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (AdamLAWN, {"lr": -1}),
        (AdamLAWN, {"betas": (0.9, 1.0)}),
        (AdamLAWN, {"eps": -1e-8}),
        (SGDLAWN, {"momentum": 1.0}),
    ],
)
def test_bad_hyperparameters(kind, keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        kind(random_weights([(2, 2)], 0), **keys)
