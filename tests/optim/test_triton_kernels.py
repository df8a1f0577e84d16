"""The GPU kernels: in Triton's interpreter on the CPU (see tests/test_triton.py), and where there is a GPU for real."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import SGD, Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lawn import LAMBLAWN, SGDLAWN, AdamLAWN
from lawn.optim import update
from lawn.optim.blocks import Blocks
from lawn.optim.cache import ensure_triton_cache
from lawn.optim.reference import ReferenceLAWN
from tests.optim.helpers import fixed_norms, wrapped

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")


def adam(params: list[nn.Parameter], **keys) -> Optimizer:
    return Adam(params, eps=1e-6, fused=params[0].is_cuda, **keys)


KINDS = [(AdamLAWN, "adam"), (LAMBLAWN, "lamb"), (SGDLAWN, "sgd"), (wrapped(adam), "adam")]
SIZES = [(60, 70), (5, 4), (7,), (3, 2, 3, 3)]  # the first in two chunks


def run(
    kind, device: str, dtype: torch.dtype, fused: bool | None, steps: int = 4, spike: float = 1.0, **keys
) -> list[torch.Tensor]:
    """A few updates, of which that before the last has a gradient that is `spike` times larger."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in SIZES]
    optimizer = kind(params, **{"lr": 0.02, "free_steps": 2, "fused": fused, **keys})
    for step in range(steps):
        for p in params:
            size = spike if step == steps - 2 else 1.0
            p.grad = torch.randn(p.shape, generator=generator).mul_(size).to(device, dtype)
        optimizer.step()
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    for p, c in zip(params, fixed_norms(optimizer), strict=True):
        assert (c > 0) == (p.ndim > 1)
        if c > 0:
            assert update.norms([p.detach()], [1]).item() == pytest.approx(c, rel=tolerance)
    return [p.detach() for p in params]


@interpreted
@pytest.mark.parametrize("kind", [AdamLAWN, wrapped(Adam, eps=1e-6)], ids=["AdamLAWN", "LAWN(Adam)"])
def test_slices(kind):
    """Experts in two chunks each, rows, and columns, which the plain update serves."""
    weights = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(size, generator=generator)) for size in [(2, 60, 70), (5, 4), (5, 4)]]
        groups = [{"params": [p], "norm_axes": axes} for p, axes in zip(params, [(1, 2), 1, 0], strict=True)]
        optimizer = kind(groups, lr=0.02, free_steps=2, fused=fused)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        weights.append(params)
        assert params[0].detach().flatten(1).norm(dim=1).tolist() == pytest.approx(fixed_norms(optimizer)[0], rel=1e-5)
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize(("kind", "rule"), KINDS)
def test_equals_algorithm_1(kind, rule):
    got = run(kind, "cpu", torch.float32, None)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).double() for size in SIZES]
    reference = ReferenceLAWN(rule, weights, lr=0.02, free_steps=2)
    for _ in range(4):
        reference.step([torch.randn(size, generator=generator).double() for size in SIZES])
    for p, w in zip(got, reference.weights, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("kind", [AdamLAWN, *(pytest.param(k, marks=pytest.mark.slow) for k, _ in KINDS[1:])])
def test_bfloat16_equals_the_plain_update(kind):
    """To the resolution of the type: the kernels round once where torch's operations round twice."""
    for p, q in zip(*(run(kind, "cpu", torch.bfloat16, fused) for fused in (None, False)), strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.02)


@interpreted
def test_rounds_by_the_same_numbers_as_the_plain_update():
    """Entries differ only where the value is not quite the same; other numbers would change about half of them."""
    outcomes = [
        run(SGDLAWN, "cpu", torch.bfloat16, fused, steps=1, free_steps=0, rounding="stochastic")
        for fused in (None, False)
    ]
    for p, q in zip(*outcomes, strict=True):
        assert (p == q).float().mean() > 0.95


@interpreted
@pytest.mark.parametrize("kind", [SGDLAWN, wrapped(SGD, momentum=0.9)], ids=["SGDLAWN", "LAWN(SGD)"])
def test_norms_stay_after_a_huge_gradient(kind):
    run(kind, "cpu", torch.float32, None, spike=1e6)


@interpreted
def test_joined_blocks():
    keys = {"constrain": True, "blocks": [0, 0, 1, 1]}

    def kind(params, **more):
        return AdamLAWN([{"params": params, **keys}], **more)

    outcomes = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
        optimizer = kind(params, lr=0.02, free_steps=1, fused=fused)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        outcomes.append([p.detach() for p in params])
    for p, q in zip(*outcomes, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_stages_of_sharded_updates(rule):
    """Each stage on local shards, one of them empty, equals that in plain operations."""
    from lawn.optim import triton_kernels

    outcomes = []
    for backend in (update, triton_kernels):
        generator = torch.Generator().manual_seed(0)
        lists = [[torch.rand(size, generator=generator) for size in [(60, 70), (0, 4), (5, 4)]] for _ in range(6)]
        weights, grads, first, second, before, projected = lists
        along, keep, take = torch.rand(3, 3, generator=generator).double()
        scales = torch.rand(2, 3, generator=generator).double()
        blocks = Blocks(weights, [1, 1, 1], [], grads, first, second if rule == "adam" else [])
        wrapper = Blocks(weights, [1, 1, 1], [], grads, before, projected)
        difference = Blocks(weights, [1, 1, 1], [], first=before)
        backend.tangents(wrapper, along)
        sums = [backend.products(blocks), backend.advance(blocks, along, scales, (0.9, 0.1, 0.99, 0.01), 1e-6)]
        backend.move(blocks, keep, take, scales, 1e-6)
        sums.append(backend.differences(difference))
        backend.combine(difference, keep, take)
        outcomes.append([t.clone() for each in lists for t in each] + sums)
    for p, q in zip(*outcomes, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, check_dtype=False)


class Launches(TorchDispatchMode):
    """Counts the operations that would be kernels on a GPU, and those that would wait for it."""

    FREE = ("empty", "view", "as_strided", "detach", "select", "unbind", "pin_memory", "reshape", "lift_fresh")
    INTERPRETER = ("set_", "new_empty", "copy_", "_record_function")  # it fetches a kernel's arguments and returns them

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name != "_local_scalar_dense" and not name.startswith(self.FREE + self.INTERPRETER):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def many() -> list[nn.Parameter]:
    """120 weights, as a ResNet-50 and more has."""
    return [nn.Parameter(torch.randn(8, 4 + i % 7)) for i in range(120)]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("kind", [AdamLAWN, SGDLAWN])
def test_operations_do_not_grow_with_the_number_of_weights(kind):
    """Beside the six kernels: the tables, the norms, the rate, and the bias corrections, which the host makes."""

    def operations(params: list[nn.Parameter]) -> Counter[str]:
        optimizer = kind(params, free_steps=0)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            with Launches() as launches:
                optimizer.step()
        return launches.counts

    counts = operations(many())
    assert counts == operations(many()[:20])
    assert sum(counts.values()) <= 20, counts


@gpu
@pytest.mark.parametrize(("kind", "rule"), KINDS)
def test_on_a_gpu_equals_the_plain_update(kind, rule):
    for p, q in zip(*(run(kind, "cuda", torch.float32, fused) for fused in (True, False)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_at_most_40_launches_and_no_waiting(kind):
    from torch.profiler import ProfilerActivity, profile

    params = [nn.Parameter(p.detach().cuda()) for p in many()]
    params += [nn.Parameter(torch.randn(8, device="cuda")) for _ in range(60)]
    optimizer = kind(params, free_steps=0)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        optimizer.step()
    names = Counter({event.key: event.count for event in profiled.key_averages()})
    launches = sum(n for key, n in names.items() if "LaunchKernel" in key)
    assert launches <= 40, names
    assert not [key for key in names if "Synchronize" in key and "Device" not in key], names


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_without_a_home_kernels_are_compiled_into_a_temporary_folder(monkeypatch, tmp_path, home):

    for name in ("HOME", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if home is None:
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # of nobody that the system knows
    else:
        monkeypatch.setenv("HOME", home)
    ensure_triton_cache()
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    ensure_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own")


@pytest.mark.skipif(INTERPRETED, reason="Triton works there")
def test_without_a_compiler_the_step_is_plain(monkeypatch):
    """As in container images for running torch. Here Triton fails for want of a driver."""
    from lawn.models.lookup import relu_of_sum
    from lawn.optim import dispatch, triton_probe

    monkeypatch.setattr(triton_probe, "_known", {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # asks for Triton on the CPU; it was imported without
    problem = dispatch.triton_problem(torch.device("cpu"))
    assert problem.startswith("Triton cannot launch a kernel on cpu (")
    assert problem.endswith("it needs a C compiler, such as gcc")
    assert "\n" not in problem
    with FakeTensorMode():
        assert dispatch.triton_problem(torch.device("meta"))
    assert [*triton_probe._known] == [torch.device("cpu")]  # what has no memory tells nothing of a device
    plain = run(AdamLAWN, "cpu", torch.float32, False)
    for p, q in zip(run(AdamLAWN, "cpu", torch.float32, None), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="falls back to the plain one: Triton cannot launch a kernel"):
        run(AdamLAWN, "cpu", torch.float32, True)
    first, second = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    i, j = torch.randint(3, (2, 6)), torch.randint(5, (2, 6))
    assert "ReluOfSum" not in str(relu_of_sum(first.requires_grad_(), second, i, j).grad_fn)
