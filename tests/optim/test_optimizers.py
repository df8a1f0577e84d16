"""One template for every optimizer of the package: what any torch optimizer is expected to do."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lawn import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN, LAMBPlus


def wrapped(base, **keys):
    """The base optimizer itself: LAWN works through its hooks, which hold on to the wrapper."""

    def make(params, lr, **lawn):
        optimizer = base(params, lr=lr, **keys)
        LAWN(optimizer, **lawn)
        return optimizer

    return make


CONSTRAINED = {
    "AdamLAWN": AdamLAWN,
    "SGDLAWN": SGDLAWN,
    "LAMBLAWN": LAMBLAWN,
    "LAWN(Adam)": wrapped(torch.optim.Adam),
    "LAWN(AdamW)": wrapped(torch.optim.AdamW, weight_decay=0.0),
    "LAWN(SGD)": wrapped(torch.optim.SGD, momentum=0.9),
    "LAWN(RMSprop)": wrapped(torch.optim.RMSprop),
}
LAWNS = [pytest.param(make, id=name) for name, make in CONSTRAINED.items()]
PLAIN = [pytest.param(LAMB, id="LAMB"), pytest.param(LAMBPlus, id="LAMBPlus")]
EVERY = [*LAWNS, *PLAIN]


def quadratic(optimizer: torch.optim.Optimizer, weight: nn.Parameter, bias: nn.Parameter, steps: int) -> list[float]:
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


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_goes_down(make, lr):
    weight, bias = layer()
    losses = quadratic(make([weight, bias], lr=lr), weight, bias, 60)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("make", LAWNS)
def test_goes_down_when_constrained(make):
    weight, bias = layer()
    c = weight.detach().norm()
    losses = quadratic(make([weight, bias], lr=1e-2, free_steps=0), weight, bias, 60)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(weight.detach().norm(), c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", EVERY)
def test_rosenbrock(make):
    """From (-2, 2) towards the minimum at (1, 1), freely; LAMB's rate is relative to the parameter."""
    point = nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    optimizer = make([point], lr=1e-4 if "sgd" in str(make).lower() else 1e-3)

    def value() -> Tensor:
        x, y = point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    start = value().item()
    for _ in range(400):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert value().item() < 0.5 * start


@pytest.mark.parametrize("make", EVERY)
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


@pytest.mark.parametrize("make", LAWNS)
def test_groups_with_and_without_constraint(make):
    bound, free = layer()[0], layer()[0]
    optimizer = make([{"params": [bound]}, {"params": [free], "constrain": False}], lr=1e-2, free_steps=1)
    c = 0.0
    for step in range(5):
        for p in (bound, free):
            p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 0:
            c = bound.detach().norm().item()
    assert bound.detach().norm().item() == pytest.approx(c, rel=1e-6)
    assert free.detach().norm().item() != pytest.approx(c, rel=1e-3)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_exact(make, dtype):
    """Three steps, through a file into a new optimizer, three more on both: bit-identical."""
    keys = {"free_steps": 2} if make not in (LAMB, LAMBPlus) else {}
    weight, bias = layer(dtype)
    optimizer = make([weight, bias], lr=1e-2, **keys)
    quadratic(optimizer, weight, bias, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin_weight, twin_bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    twin = make([twin_weight, twin_bias], lr=1.0, **keys)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert quadratic(optimizer, weight, bias, 3) == quadratic(twin, twin_weight, twin_bias, 3)
    assert torch.equal(weight, twin_weight)
    assert torch.equal(bias, twin_bias)


@pytest.mark.parametrize("make", [p for p in EVERY if not p.id.startswith("LAWN(")])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_go_on_alike(make, copier):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2)
    quadratic(optimizer, weight, bias, 3)
    twin = copier(optimizer)
    twin_weight, twin_bias = twin.param_groups[0]["params"]
    assert quadratic(optimizer, weight, bias, 3) == quadratic(twin, twin_weight, twin_bias, 3)
    twin.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_of_a_wrapper_go_on_alike_with_their_own_optimizer(steps, copier):
    weight, bias = layer()
    lawn = LAWN(torch.optim.Adam([weight, bias], lr=1e-2), free_steps=2)
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


@pytest.mark.parametrize("make", EVERY)
def test_none_gradients_and_a_closure(make):
    weight, bias = layer()
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = make([weight, bias, unused], lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.sum() + bias.sum()).square()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(unused, torch.ones(2, 2))


@pytest.mark.parametrize("make", LAWNS)
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


@pytest.mark.parametrize("make", LAWNS)
def test_a_closure_sees_its_own_gradients(make):
    weight, bias = layer()
    optimizer = make([weight, bias], lr=1e-2, free_steps=0)
    c = weight.detach().norm()
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight - 1).square().sum()
            loss.backward()
            return loss

        before = weight.detach().clone()
        optimizer.step(closure)
        torch.testing.assert_close(weight.grad, 2 * (before - 1))
        torch.testing.assert_close(weight.detach().norm(), c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", LAWNS)
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


def test_wrapper_detaches_without_a_trace():
    weight, bias = layer()
    base = torch.optim.Adam([weight, bias], lr=1e-2)
    before = set(base.param_groups[0])
    handle = LAWN(base)
    handle.constrain()
    quadratic(base, weight, bias, 2)
    c = weight.detach().norm()
    handle.detach()
    assert set(base.param_groups[0]) == before
    quadratic(base, weight, bias, 5)
    assert abs(weight.detach().norm() / c - 1) > 1e-4
    LAWN(base).constrain()


def test_wrapper_takes_groups_that_come_later():
    first, second = layer()[0], layer()[0]
    base = torch.optim.SGD([first], lr=1e-2)
    LAWN(base, free_steps=0)
    base.add_param_group({"params": [second]})
    c = second.detach().norm()
    for p in (first, second):
        p.grad = torch.ones_like(p)
    base.step()
    torch.testing.assert_close(second.detach().norm(), c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Lamb", "Lion"])
def test_wrapper_on_timms(name):
    optim = pytest.importorskip("timm.optim")
    weight, bias = layer()
    optimizer = wrapped(getattr(optim, name), weight_decay=0.0)([weight, bias], lr=1e-2, free_steps=2)
    quadratic(optimizer, weight, bias, 2)
    c = weight.detach().norm()
    losses = quadratic(optimizer, weight, bias, 40)
    torch.testing.assert_close(weight.detach().norm(), c, rtol=1e-6, atol=0)
    assert losses[-1] < losses[0]


def test_wrapper_on_schedule_free():
    """In train mode the weights are on the sphere; the average that eval() swaps in is inside it."""
    schedulefree = pytest.importorskip("schedulefree")
    weight, bias = layer()
    base = schedulefree.AdamWScheduleFree([weight, bias], lr=1e-2)
    LAWN(base, free_steps=2)
    base.train()
    quadratic(base, weight, bias, 2)
    c = weight.detach().norm()
    quadratic(base, weight, bias, 40)
    torch.testing.assert_close(weight.detach().norm(), c, rtol=1e-6, atol=0)
    base.eval()
    assert weight.detach().norm() < c


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_wrapper_on_muon():
    weight, bias = layer()
    optimizer = wrapped(torch.optim.Muon, weight_decay=0.0)([weight], lr=1e-2, free_steps=0)
    c = weight.detach().norm()
    losses = quadratic(optimizer, weight, bias, 40)
    torch.testing.assert_close(weight.detach().norm(), c, rtol=1e-6, atol=0)
    assert losses[-1] < losses[0]


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


@pytest.mark.parametrize("fused", [None, True])
def test_without_a_compiler(monkeypatch, fused, recwarn):
    from lawn.optim import native

    monkeypatch.setattr(native, "_build", lambda dtype: None)
    weight, bias = layer()
    if fused:
        with pytest.warns(UserWarning, match="no C compiler"):
            quadratic(AdamLAWN([weight, bias], lr=1e-2, free_steps=0, fused=fused), weight, bias, 2)
    else:
        quadratic(AdamLAWN([weight, bias], lr=1e-2, free_steps=0, fused=fused), weight, bias, 2)
        assert not recwarn


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    from lawn.optim import native

    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._build.cache_clear()
    try:
        assert native._build(torch.float32) is None
        assert list(tmp_path.rglob("*.so")) == []
    finally:
        native._build.cache_clear()
