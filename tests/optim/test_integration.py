"""The optimizers in other people's loops, where only the line that makes the optimizer is ours."""

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN, LinearWarmupDecay

FREE_STEPS, STEPS = 4, 10
Batch = tuple[Tensor, Tensor]
ZERO = ("AdamLAWN", "SGDLAWN", "LAMBLAWN", "LAWN(AdamW)")


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def adam_lawn(model: nn.Module) -> tuple[Optimizer, AdamLAWN]:
    """The optimizer that the loop steps, and what knows the phase: here the same."""
    optimizer = AdamLAWN(model.parameters(), lr=0.01, free_steps=FREE_STEPS)
    return optimizer, optimizer


def lawn_on_adamw(model: nn.Module, **keys) -> tuple[Optimizer, LAWN]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, **keys)
    return optimizer, LAWN(optimizer, free_steps=FREE_STEPS)


def lawn_on_fused_adamw(model: nn.Module) -> tuple[Optimizer, LAWN]:
    return lawn_on_adamw(model, fused=True)


every_kind = pytest.mark.parametrize("make_optimizer", [adam_lawn, lawn_on_adamw])


def make_batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, 8, 6, generator=generator, dtype=dtype)
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def train(model: nn.Module, optimizer: Optimizer, batches: list[Batch]) -> list[float]:
    """The loop of every tutorial, and what the other loops are compared to."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@every_kind
def test_plain_loop(make_optimizer):
    """With what such loops have around the step: a schedule of torch and clipped gradients."""
    model = make_model()
    optimizer, lawn = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=60, cycle_momentum=False)
    losses, phases, norms = [], [], []
    for x, y in make_batches(60):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        phases.append(lawn.constrained)
        norms.append(torch.stack([p.detach().norm() for p in model.parameters() if p.ndim > 1]))
    assert phases == [t >= FREE_STEPS for t in range(60)]
    for later in norms[FREE_STEPS:]:
        torch.testing.assert_close(later, norms[FREE_STEPS - 1], rtol=1e-12, atol=0)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize(
    "make_optimizer",
    [
        adam_lawn,
        lawn_on_adamw,
        lawn_on_fused_adamw,  # torch steps a fused optimizer even so, and leaves it to its kernel to do nothing
    ],
)
def test_grad_scaler_skips_what_overflows(make_optimizer):
    """A step that the scaler skips did not happen: before the switch, at it and after it."""
    dtype = torch.float32
    plain, scaled = make_model(dtype), make_model(dtype)
    (plain_optimizer, _), (optimizer, lawn) = make_optimizer(plain), make_optimizer(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, (x, y) in enumerate(make_batches(dtype=dtype)):
        train(plain, plain_optimizer, [(x, y)])
        for overflow in (True, False) if t in (2, FREE_STEPS, 7) else (False,):
            before, phase, scale = weights_of(scaled), lawn.constrained, scaler.get_scale()
            optimizer.zero_grad()
            loss = cross_entropy(scaled(x), y)
            scaler.scale(loss * 1e38 if overflow else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                assert scaler.get_scale() == scale / 2
                assert_equal(weights_of(scaled), before)
                assert lawn.constrained == phase
        assert lawn.constrained == (t >= FREE_STEPS)
        assert_equal(weights_of(scaled), weights_of(plain))  # the scale is a power of two: nothing is rounded by it


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model(backend):
    plain, compiled = make_model(), make_model()
    train(plain, adam_lawn(plain)[0], make_batches())
    optimizer, lawn = adam_lawn(compiled)
    train(torch.compile(compiled, backend=backend), optimizer, make_batches())
    assert lawn.constrained
    assert_close(weights_of(compiled), weights_of(plain))


def train_in_ddp(rank: int) -> list[Tensor]:
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer, lawn = adam_lawn(model)
    train(model, optimizer, [(x[rank::2], y[rank::2]) for x, y in make_batches()])
    assert lawn.constrained
    return weights_of(model)


def train_locally(rank: int, free_steps: int) -> list[float]:
    """The norms that a rank fixes. The ranks average their weights after updates 3, 6 and 9."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = make_model()
    local = AdamLAWN(model.parameters(), lr=0.01, free_steps=free_steps)
    optimizer = PostLocalSGDOptimizer(local, PeriodicModelAverager(period=3, warmup_steps=2))
    train(model, optimizer, [(x[rank::2], y[rank::2]) for x, y in make_batches()])
    return [local.state[p]["lawn_norm"] for p in model.parameters() if p.ndim > 1]


def resume_zero(rank: int, kind: str) -> dict[str, object]:
    """Weights after an uninterrupted run, and after one that is saved at each owner, joined, and loaded anew."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(model: nn.Module) -> ZeroRedundancyOptimizer:
        if kind == "LAWN(AdamW)":
            zero = ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.01, weight_decay=0.0
            )
            zero.lawn = LAWN(zero.optim, free_steps=FREE_STEPS)
            return zero
        known = {"AdamLAWN": AdamLAWN, "SGDLAWN": SGDLAWN, "LAMBLAWN": LAMBLAWN}
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=known[kind], lr=0.01, free_steps=FREE_STEPS)

    outcomes: dict[str, object] = {}
    for saved_after in (FREE_STEPS - 1, FREE_STEPS, FREE_STEPS + 2):
        model, batches = make_model(), make_batches()
        model[2].weight.data.mul_(5)
        optimizer = make(model)
        train(model, optimizer, batches[:saved_after])
        optimizer.consolidate_state_dict(0)
        box = [optimizer.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        resumed = copy.deepcopy(model)
        again = make(resumed)
        again.load_state_dict(copy.deepcopy(box[0]))
        fixed = []
        for part, stepped in ((model, optimizer), (resumed, again)):
            train(part, stepped, batches[saved_after:FREE_STEPS])
            fixed.append([p.detach().norm().item() for p in part.parameters() if p.ndim > 1])
            train(part, stepped, batches[max(saved_after, FREE_STEPS) :])
        outcomes[str(saved_after)] = [weights_of(model), weights_of(resumed), fixed[0]]
    return outcomes


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    left = {"ddp": train_in_ddp(rank)}
    left |= {kind: resume_zero(rank, kind) for kind in ZERO}
    left |= {f"local, {free_steps} free steps": train_locally(rank, free_steps) for free_steps in (4, 6)}
    torch.save(left, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes that form a gloo group leave; one group for all tests, as starting it is what takes time."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("group")
    mp.start_processes(work, (folder,), nprocs=2, start_method="forkserver")  # which imports once for both
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ddp_equals_one_process(two_processes):
    """No rank looks at the other's weights: equal gradients are all that keeps their norms equal."""
    first, second = (left["ddp"] for left in two_processes)
    model = make_model()
    train(model, adam_lawn(model)[0], make_batches())
    assert_equal(first, second)
    assert_close(first, weights_of(model))


def test_local_sgd_switches_on_averaged_weights(two_processes):
    """Between two averages the ranks' weights differ, and so would the norms that they fix."""
    after_average, between = ([left[f"local, {n} free steps"] for left in two_processes] for n in (6, 4))
    assert min(after_average[0]) > 0
    assert after_average[0] == after_average[1]
    assert between[0] != between[1]


@pytest.mark.parametrize("kind", ZERO)
def test_zero_resumes_bit_for_bit(two_processes, kind):
    """ZeRO-1: each rank steps some of the parameters; one may hold nothing that is constrained."""
    for left in two_processes:
        for uninterrupted, resumed, fixed in left[kind].values():
            assert_equal(uninterrupted, resumed)
            ended = [p.norm().item() for p in resumed if p.ndim > 1]
            assert ended == pytest.approx(fixed, rel=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
@every_kind
def test_lightning(tmp_path, make_optimizer):
    """Two epochs, the second from the checkpoint of the first, equal the plain loop."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> dict[str, object]:
            optimizer, self.lawn = make_optimizer(self)
            schedule = LinearWarmupDecay(optimizer, warmup_steps=2, total_steps=2 * STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    loader = torch.utils.data.DataLoader(make_batches(), batch_size=None)

    def fit(epochs: int, checkpoint: Path | None) -> tuple[Module, lightning.Trainer]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    _, trainer = fit(1, None)
    assert trainer.global_step == STEPS
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module, trainer = fit(2, tmp_path / "first.ckpt")
    assert module.lawn.constrained
    assert trainer.global_step == 2 * STEPS

    model = make_model()
    optimizer, _ = make_optimizer(model)
    schedule = LinearWarmupDecay(optimizer, warmup_steps=2, total_steps=2 * STEPS)
    for batch in 2 * make_batches():
        train(model, optimizer, [batch])
        schedule.step()
    assert_close(weights_of(module), weights_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("base", [None, "lion"])
def test_timms_loop(base):
    """What its training script does for a batch: autocast, loss scaler with clipping, accumulation, schedule, EMA."""
    timm = pytest.importorskip("timm")
    from timm.models import model_parameters
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler

    torch.manual_seed(0)
    epochs, updates, accumulate = 2, 4, 2
    model = timm.create_model("test_resnet", num_classes=4)
    if base is None:
        optimizer = lawn = AdamLAWN(model.parameters(), lr=5e-3, free_steps=FREE_STEPS)
    else:
        optimizer = create_optimizer_v2(model, base, lr=5e-4, weight_decay=0.0)
        lawn = LAWN(optimizer, free_steps=FREE_STEPS)
    scaler = NativeScaler(device="cpu")
    ema = ModelEmaV3(model, decay=0.9)
    schedule = CosineLRScheduler(
        optimizer, t_initial=epochs * updates, warmup_t=2, warmup_lr_init=1e-5, t_in_epochs=False
    )
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses, phases, rates, norms = [], [], [], []
    for epoch in range(epochs):
        optimizer.zero_grad()
        for i in range(updates * accumulate):
            last = (i + 1) % accumulate == 0
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(images), labels) / accumulate
            parameters = model_parameters(model, exclude_head=False)
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=parameters, need_update=last)
            losses.append(loss.item())
            if not last:
                continue
            number = (epoch * updates * accumulate + i + 1) // accumulate
            ema.update(model, step=number)
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step_update(num_updates=number)
            phases.append(lawn.constrained)
            norms.append(torch.stack([p.detach().norm() for p in model.parameters() if p.ndim > 1]))
        schedule.step(epoch + 1)
    assert phases == [t >= FREE_STEPS for t in range(epochs * updates)]
    assert rates[0] < rates[2] > rates[-1]
    torch.testing.assert_close(norms[-1], norms[FREE_STEPS - 1], rtol=1e-5, atol=0)
    assert losses[-1] < losses[0]


def test_timm_registry_and_the_launcher_of_the_docs():
    """What docs/integrations.md puts beside timm's train.py: both ways to have its factory make LAWN optimizers."""
    import timm
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    def adamlawn(params, weight_decay=0.0, **options):
        return AdamLAWN(params, **options)

    model = timm.create_model("test_resnet", num_classes=4)
    default_registry.register(OptimInfo("adamlawn", adamlawn, has_betas=True))
    optimizer = create_optimizer_v2(model, "adamlawn", lr=5e-3, weight_decay=0.0, free_steps=7)
    assert isinstance(optimizer, AdamLAWN)
    assert optimizer.param_groups[0]["free_steps"] == 7

    def create(*model, free_steps, **options):
        return LAWN(create_optimizer_v2(*model, **options), free_steps).optimizer

    optimizer = create(model, opt="lamb", lr=5e-3, weight_decay=0.0, free_steps=7, always_adapt=True)
    assert optimizer.param_groups[0]["free_steps"] == 7
    with pytest.raises(ValueError, match="weight_decay"):
        create(model, opt="lamb", lr=5e-3, weight_decay=2e-5, free_steps=7)
    with pytest.raises(TypeError, match="Lookahead is no torch optimizer"):
        create(model, opt="lookahead_adamw", lr=5e-3, weight_decay=0.0, free_steps=7)
