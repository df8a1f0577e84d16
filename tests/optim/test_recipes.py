"""Sharded training in other people's frameworks, saved and resumed on another number of ranks.

A CPU keeps Accelerate from FSDP2, so its test sets the two attributes that would choose it on a GPU.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lawn import LAWN, AdamLAWN
from tests.optim.helpers import fixed_norms
from tests.optim.test_sharding import FREE_STEPS, KINDS, SAVED, STEPS, Job, Model, batches, error, fsdp, spawn, train

pytestmark = pytest.mark.slow
FRAMEWORKS = ("accelerate", "torchtitan", "lightning")
TESTED = ("AdamLAWN", "LAWN(AdamW)")
Trained = tuple[nn.Module, Optimizer, list[float]]  # with the norms right after loading, if something was loaded


def share(step: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a batch; the parts are of equal size."""
    x, y = batches()[step]
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


def as_torchrun_does() -> None:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}


def in_accelerate(kind: str, start: int, stop: int, load: Path | None, save: Path | None) -> Trained:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = Model()
    wrapped = KINDS[kind](model.parameters())
    model, optimizer = accelerator.prepare(model, wrapped)
    if load:
        accelerator.load_state(load)
    loaded = fixed_norms(wrapped)
    for step in range(start, stop):
        optimizer.zero_grad()
        x, y = share(step)
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
    if save:
        accelerator.save_state(save)
    return model, wrapped, loaded


def in_torchtitan(kind: str, start: int, stop: int, load: Path | None, save: Path | None) -> Trained:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    class Optimizers(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
            return AdamLAWN if name == "AdamLAWN" else OptimizersContainer._resolve_optimizer_factory(name)

    model = fsdp(Model())
    if kind == "AdamLAWN":
        name, options = "AdamLAWN", {"lr": 0.01, "free_steps": FREE_STEPS}
    else:
        name, options = "AdamW", {"lr": 0.01, "weight_decay": 0.0}
    groups = [ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=options)]
    optimizers = Optimizers(OptimizersContainer.Config(param_groups=groups), model_parts=[model])
    if kind != "AdamLAWN":
        for optimizer in optimizers:
            LAWN(optimizer, free_steps=FREE_STEPS)
    if load:
        states = {"model": get_model_state_dict(model), "optimizer": optimizers}
        dcp.load(states, checkpoint_id=load)
    loaded = fixed_norms(optimizers.optimizers[0])
    for step in range(start, stop):
        train(model, optimizers, [share(step)])
    if save:
        dcp.save({"model": get_model_state_dict(model), "optimizer": optimizers}, checkpoint_id=save)
    return model, optimizers.optimizers[0], loaded


def in_lightning(kind: str, start: int, stop: int, load: Path | None, save: Path | None) -> Trained:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    loaded: list[float] = []

    class Module(lightning.LightningModule):
        def configure_model(self) -> None:
            self.model = Model()
            data_parallel = self.device_mesh["data_parallel"]
            for layer in (self.model[0], self.model[2]):
                fully_shard(layer, mesh=data_parallel)
            fully_shard(self.model, mesh=data_parallel)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = share(self.trainer.global_step)
            return cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Optimizer:
            return KINDS[kind](self.model.parameters())

        def on_train_start(self) -> None:
            loaded.extend(fixed_norms(self.trainer.optimizers[0]))

    module = Module()
    world = dist.get_world_size()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        max_steps=stop,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.zeros(STEPS), batch_size=None)
    trainer.fit(module, loader, ckpt_path=load)
    if save:
        trainer.save_checkpoint(save)
    return module.model, trainer.optimizers[0], loaded


def run_in(framework: str, kind: str, start: int, stop: int, load: Path | None, save: Path | None) -> Trained:
    as_torchrun_does()
    inside = {"accelerate": in_accelerate, "torchtitan": in_torchtitan, "lightning": in_lightning}[framework]
    model, optimizer, loaded = inside(kind, start, stop, load, save)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in params}
    assert all(hasattr(p, "full_tensor") for p in params)
    return model, optimizer, loaded


def local_shards(model: nn.Module) -> list[Tensor]:
    return [p.detach().to_local().clone() for p in model.parameters()]


def save_in(framework: str, kind: str, after: int, folder: Path) -> dict[str, Any]:
    """The norms in a checkpoint, and the weights of an uninterrupted run."""
    _, optimizer, _ = run_in(framework, kind, 0, after, None, folder)
    model, whole, _ = run_in(framework, kind, 0, STEPS, None, None)
    plain = Model()
    single = KINDS[kind](plain.parameters())
    train(plain, single, batches())
    norms = zip(fixed_norms(whole), fixed_norms(single), strict=True)
    return {
        "saved": fixed_norms(optimizer),
        "error": error(model, plain),
        "norms": max(abs(ours - theirs) / (theirs or 1) for ours, theirs in norms),
        "shards": local_shards(model),
    }


def resume_in(framework: str, kind: str, after: int, folder: Path) -> dict[str, Any]:
    model, optimizer, loaded = run_in(framework, kind, after, STEPS, folder, None)
    plain = Model()
    train(plain, KINDS[kind](plain.parameters()), batches())
    return {
        "loaded": loaded,
        "end": fixed_norms(optimizer),
        "error": error(model, plain),
        "shards": local_shards(model),
    }


@pytest.fixture(scope="module", params=FRAMEWORKS)
def runs(request, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What is saved on 2 ranks and resumed on 2, 1 and 3, by the name of the job and for each rank."""
    framework = request.param
    pytest.importorskip(framework)
    folder = tmp_path_factory.mktemp(framework)
    keys = [(kind, phase) for kind in TESTED for phase in SAVED]
    places = {key: (framework, key[0], SAVED[key[1]], folder / " ".join(key)) for key in keys}
    jobs: list[Job] = [(f"{kind}, {phase}", save_in, places[kind, phase]) for kind, phase in keys]
    results = {"save": spawn(tmp_path_factory.mktemp("save"), 2, jobs)}
    jobs = [(f"{kind}, {phase}", resume_in, places[kind, phase]) for kind, phase in keys]
    for world in (2, 1, 3):
        results[f"resume on {world}"] = spawn(tmp_path_factory.mktemp(f"resume{world}"), world, jobs)
    return results


@pytest.mark.filterwarnings("default")  # those of the frameworks are theirs
@pytest.mark.parametrize("phase", SAVED)
@pytest.mark.parametrize("kind", TESTED)
def test_saved_and_resumed(runs, kind, phase):
    job = f"{kind}, {phase}"
    for saved in runs["save"]:
        assert saved[job]["error"] < 1e-12
        assert saved[job]["norms"] < 1e-12
        assert any(saved[job]["saved"]) == (phase == "constrained")
    for name in ("resume on 2", "resume on 1", "resume on 3"):
        for resumed in runs[name]:
            assert resumed[job]["loaded"] == runs["save"][0][job]["saved"]
            assert resumed[job]["error"] < 1e-12
            assert any(resumed[job]["end"])
    for saved, resumed in zip(runs["save"], runs["resume on 2"], strict=True):
        for ours, theirs in zip(resumed[job]["shards"], saved[job]["shards"], strict=True):
            assert torch.equal(ours, theirs)


def lawn_on_adamw() -> Callable[..., Optimizer]:
    """A factory, as the Trainer calls it."""

    def make(model: nn.Module, free_steps: int, **options: Any) -> Optimizer:
        return LAWN(torch.optim.AdamW(model.parameters(), weight_decay=0.0, **options), free_steps).optimizer

    return make


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("cls", [AdamLAWN, lawn_on_adamw])
def test_the_trainer_makes_the_optimizer(tmp_path, cls):
    """Its two param groups, a tied weight, dropout, and a checkpoint before, at and after the switch."""
    transformers = pytest.importorskip("transformers")
    data = [torch.randint(32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(56)]

    def train_on(weight_decay: float = 0.0, resume: str | None = None) -> Any:
        transformers.set_seed(0)
        config = transformers.GPT2Config(
            n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=14,
            save_steps=1,
            weight_decay=weight_decay,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            transformers.GPT2LMHeadModel(config),
            arguments,
            train_dataset=[{"input_ids": x, "labels": x} for x in data],
            optimizer_cls_and_kwargs=(cls, {"lr": 0.01, "free_steps": 4}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train_on()
    norms = fixed_norms(whole.optimizer)
    assert sum(c > 0 for c in norms) == sum(p.ndim > 1 for p in whole.model.parameters())
    for after in (3, 4, 5, 9):
        resumed = train_on(resume=str(tmp_path / f"checkpoint-{after}"))
        assert fixed_norms(resumed.optimizer) == norms
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    if cls is AdamLAWN:
        with pytest.raises(ValueError, match=r"weight_decay=0\.1, but LAWN replaces weight decay"):
            train_on(weight_decay=0.1)
