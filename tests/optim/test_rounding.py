"""Stochastic rounding of half-precision weights: unbiased, reproducible, and absent unless asked for."""

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from lawn.optim import blocks, rounding
from lawn.optim.keys import NORM

KINDS = (AdamLAWN, SGDLAWN, LAMBLAWN)
every_kind = pytest.mark.parametrize("kind", KINDS)
both_phases = pytest.mark.parametrize("free_steps", [None, 0], ids=["free", "constrained"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SIZES = [(40, 30), (7,), (3, 2, 3, 3)]


def make_params(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def advance(optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, stop):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * t + i)
            p.grad = (0.5 + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_parameter_in_the_place_of_a_removed_one_has_a_seed_of_its_own():
    a, b, c, d = (nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(4))
    optimizer = SGDLAWN([{"params": [a]}, {"params": [b]}], rounding="stochastic")
    advance(optimizer, 0, 1)
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [c, d]})
    advance(optimizer, 1, 2)
    assert [optimizer.state[p][rounding.SEED] for p in (b, c, d)] == [1, 2, 3]


@both_dtypes
def test_the_mean_is_the_value(dtype):
    """Each mean of n roundings, in units of its standard error; subnormal numbers, both signs and zero among them."""
    n, values = 2000, torch.randn(500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 500)
    values[0] = 0.0
    rounded = torch.stack(
        [rounding.stochastic(values, dtype, torch.tensor([37 * t], dtype=torch.int32), [500]) for t in range(n)]
    )
    assert torch.equal(rounded.to(dtype).float(), rounded)
    low, high = rounded.amin(0).double(), rounded.amax(0).double()
    assert (low <= values).all()
    assert (values <= high).all()
    gap = (high - low).clamp(min=1e-30)
    share = (values.double() - low) / gap
    error = (rounded.double().mean(0) - values.double()) / gap
    sigma = (share * (1 - share) / n).sqrt()
    assert (error.abs() <= 5 * sigma + 1e-12).all()
    assert abs((error / sigma.clamp(min=1e-6))[sigma > 1e-3].mean()) < 5 / 500**0.5


@both_dtypes
def test_what_is_not_finite_or_exact_stays(dtype):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.5, -2.0])
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])  # other NaNs
    for t in range(50):
        rounded = rounding.stochastic(values, dtype, torch.tensor([t], dtype=torch.int32), [8])
        torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)


def test_batches_and_shards_draw_the_numbers_of_the_whole():
    values, streams = torch.randn(100), torch.tensor([5, 2**31 - 1], dtype=torch.int32)
    together = rounding.stochastic(values, torch.bfloat16, streams, [60, 40])
    first = rounding.stochastic(values[:60], torch.bfloat16, streams[:1], [60])
    second = rounding.stochastic(values[60:], torch.bfloat16, streams[1:], [40])
    assert torch.equal(together, torch.cat([first, second]))
    shard = rounding.stochastic(values[20:60], torch.bfloat16, streams[:1] + 20, [40])
    assert torch.equal(shard, first[20:])


@every_kind
@both_phases
def test_small_updates_move_the_weights(kind, free_steps):
    """Their mean follows the updates, of which rounding to nearest loses nearly all."""
    moved = {}
    for mode in rounding.MODES:
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(128, 128, generator=generator).to(torch.bfloat16))
        before = p.detach().clone()
        optimizer = kind([p], lr=1e-6 if kind is SGDLAWN else 1e-5, free_steps=free_steps, rounding=mode)
        exact = nn.Parameter(p.detach().float())
        reference = kind([exact], lr=optimizer.param_groups[0]["lr"], free_steps=free_steps)
        for _ in range(20):
            p.grad = 1 + 0.1 * torch.randn(128, 128, generator=generator).to(torch.bfloat16)
            exact.grad = p.grad.float()
            optimizer.step()
            reference.step()
        drift = (exact.detach() - before.float()).mean()
        moved[mode] = ((p.detach().float() - before.float()).mean() / drift).item(), (p == before).float().mean().item()
    assert moved["nearest"][0] < 0.1
    assert moved["nearest"][1] > 0.98  # the share of entries that have not changed
    assert moved["stochastic"][0] == pytest.approx(1, abs=0.1)
    assert moved["stochastic"][1] < 0.95


@every_kind
def test_the_norm_holds_in_expectation(kind):
    (p, *_) = params = make_params()
    optimizer = kind(params, lr=1e-3, free_steps=0, rounding="stochastic")
    c = p.detach().double().norm().item()
    ratios = []
    for t in range(100):
        advance(optimizer, t, t + 1)
        ratios.append(p.detach().double().norm().item() / c - 1)
    assert abs(sum(ratios) / 100) < 2e-5
    assert max(map(abs, ratios)) < 5e-4
    assert optimizer.state[p][NORM] == pytest.approx(c, rel=1e-6)


@every_kind
@both_dtypes
@pytest.mark.parametrize("cut", [2, 5])
def test_resumes_bit_for_bit(kind, dtype, cut):
    optimizer = kind(make_params(dtype), lr=1e-3, free_steps=4, rounding="stochastic")
    advance(optimizer, 0, cut)
    saved = copy.deepcopy(optimizer.state_dict())
    params = [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    fresh = kind(params, lr=1e-3, free_steps=4)  # a checkpoint sets the rounding, as it sets every key of a group
    fresh.load_state_dict(saved)
    assert_equal(advance(optimizer, cut, 8), advance(fresh, cut, 8))


def test_two_runs_are_equal_and_parameters_draw_their_own_numbers():
    runs = [advance(AdamLAWN(make_params(), free_steps=2, rounding="stochastic"), 0, 5) for _ in range(2)]
    assert_equal(*runs)
    ps = [nn.Parameter(torch.ones(200, 5, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SGDLAWN(ps, lr=1e-3, momentum=0.0, free_steps=0, rounding="stochastic")
    for p in ps:
        p.grad = torch.arange(1000.0).view(200, 5).to(torch.bfloat16) / 1000
    optimizer.step()
    assert not torch.equal(*ps)


@every_kind
def test_an_update_in_batches_rounds_with_the_numbers_of_the_whole(kind):
    """Sums in another order change a few roundings."""

    def run() -> Tensor:
        optimizer = kind(make_params(), lr=1e-2, free_steps=0, rounding="stochastic", fused=False)
        return torch.cat([p.view(-1) for p in advance(optimizer, 0, 1)])

    whole = run()
    with mock.patch.dict(blocks.BATCH_ELEMENTS, cpu=1):
        assert (run() == whole).double().mean() > 0.98


@every_kind
def test_blocks_and_groups_round_for_themselves(kind):
    """A joined block, a group that rounds to nearest, and one with a weight in float32."""
    params = [*make_params(), *make_params(), *make_params(torch.float32)]
    groups = [
        {"params": params[:3], "constrain": True, "blocks": [0, 0, 1]},
        {"params": params[3:6], "rounding": "nearest"},
        {"params": params[6:]},
    ]
    optimizer = kind(groups, lr=1e-3, free_steps=2, rounding="stochastic")
    ours = advance(optimizer, 0, 5)
    plain = kind([nn.Parameter(p) for p in map(torch.clone, make_params())], lr=1e-3, free_steps=2)
    exact = kind([nn.Parameter(p) for p in map(torch.clone, make_params(torch.float32))], lr=1e-3, free_steps=2)
    for t in range(5):
        for i, p in enumerate(plain.param_groups[0]["params"] + exact.param_groups[0]["params"]):
            generator = torch.Generator().manual_seed(100 * t + i + 3)
            p.grad = (0.5 + torch.randn(p.shape, generator=generator)).to(p.dtype)
        plain.step()
        exact.step()
    assert_equal(ours[3:6], [p.detach() for p in plain.param_groups[0]["params"]])
    assert_equal(ours[6:], [p.detach() for p in exact.param_groups[0]["params"]])
    assert [rounding.SEED in optimizer.state[p] for p in params] == [True] * 3 + [False] * 6


@every_kind
@both_phases
def test_a_group_may_have_several_dtypes(kind, free_steps):
    found = []
    for parts in (1, 2):
        params = [*make_params(torch.float32), *make_params()]
        groups = [{"params": params[:3]}, {"params": params[3:]}] if parts == 2 else [{"params": params}]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.ndim > 1]
        found.append(advance(kind(groups, lr=1e-3, free_steps=free_steps, rounding="stochastic"), 0, 3))
    assert_equal(*found)


@every_kind
def test_nothing_is_stored_by_default(kind):
    optimizer = kind(make_params(), free_steps=1)
    advance(optimizer, 0, 3)
    saved = optimizer.state_dict()
    assert all(rounding.KEY not in group for group in saved["param_groups"])
    assert all(rounding.SEED not in entry for entry in saved["state"].values())


@every_kind
def test_an_unknown_value_is_refused(kind):
    message = "rounding must be 'nearest' or 'stochastic', got 'up'"
    with pytest.raises(ValueError, match=message):
        kind(make_params(), rounding="up")
    with pytest.raises(ValueError, match=f"param group 0: {message}"):
        kind([{"params": make_params(), "rounding": "up"}])
    saved = kind(make_params()).state_dict()
    saved["param_groups"][0]["rounding"] = "up"
    with pytest.raises(ValueError, match=message):
        kind(make_params()).load_state_dict(saved)
    optimizer = kind(make_params())
    optimizer.param_groups[0]["rounding"] = "up"
    with pytest.raises(ValueError, match=f"param group 0: {message}"):
        advance(optimizer, 0, 1)


def test_the_wrapper_refuses_it():
    with pytest.raises(TypeError, match="rounding"):
        LAWN(torch.optim.SGD(make_params(), lr=0.1), rounding="stochastic")  # type: ignore[call-arg]  # which is refused
