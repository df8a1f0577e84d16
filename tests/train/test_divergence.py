"""A run whose loss is no longer finite: it ends, and says where."""

import json

import pytest
import torch

from lawn.data.batching import Batching
from lawn.task import Task, task_builder
from lawn.train import train, train_vectorized
from lawn.train.distributed import World
from lawn.train.run_directory import RunDirectory
from lawn.train.trainer import Trainer, epoch_seed
from tests.helpers import compose

CPU = torch.device("cpu")
EXPLODES = ("optim=sgd", "optim.momentum=0", "optim.lr=1e30", "train.batch_size=16")  # 13 updates an epoch


def gradients_at_the_start(config) -> dict[str, float]:
    """Norms, of the first update, by torch alone."""
    task = task_builder(config)(CPU)
    generator = torch.Generator().manual_seed(epoch_seed(config.seed, 1))
    _, (images, labels) = next(task.dataset.train_batches(Batching(config.train.batch_size), generator))
    torch.nn.functional.cross_entropy(task.model(images), labels).backward()
    return {name: p.grad.norm().item() for name, p in task.model.named_parameters() if p.grad is not None}


def divergence(config) -> dict:
    return json.loads((RunDirectory(config).path / "result.json").read_text())["divergence"]


def test_the_update_and_the_largest_gradient_before_it(tiny, capsys):
    """The first update throws the weights far off; the loss of the second is not finite."""
    config = tiny(*EXPLODES)
    result = train(config)
    norms = gradients_at_the_start(config)
    layer = max(norms, key=lambda name: norms[name])
    found = divergence(config)
    assert found == result["divergence"]
    assert found == {
        "epoch": 1,
        "step": 2,
        "largest_gradient": {"layer": layer, "norm": pytest.approx(norms[layer], rel=1e-5)},
        "last_finite": None,
    }
    line = f"diverged at update 2, in epoch 1; largest gradient before in {layer}, norm {norms[layer]:.2g}; "
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("update", [1, 14, 20, 26, 52])
def test_a_loss_that_is_not_finite_once(tiny, monkeypatch, update):
    """The last finite row is that of the epoch before."""
    compute, calls = Task.loss_and_margins, 0

    def poisoned(self, network, batch):
        nonlocal calls
        calls += batch[0].device == CPU  # and not where only FLOPs are counted
        loss, margins = compute(self, network, batch)
        return (loss * torch.inf if calls == update else loss), margins

    config = tiny("train.batch_size=16", "optim=sgd", "optim.lr=0.1")
    sane = Trainer(config, task_builder(config)(CPU), World(CPU))
    rows = [sane.train_epoch() for _ in range((update - 1) // 13)]
    monkeypatch.setattr(Task, "loss_and_margins", poisoned)
    result = train(config)
    epoch = (update - 1) // 13 + 1
    assert (result["status"], result["last"]["epoch"]) == ("diverged", epoch)
    found = divergence(config)
    assert (found["epoch"], found["step"], found["last_finite"]) == (epoch, update, rows[-1] if rows else None)
    assert (found["largest_gradient"] is None) == (update == 1)


def test_weights_that_are_not_finite_before_the_switch(tiny, capsys):
    """E_free of half an epoch: the switch comes before a loss could show it."""
    config = tiny("optim=sgd_lawn", "optim.lr=1e38", "train.batch_size=16", "optim.free_epochs=0.05")
    assert train(config)["status"] == "diverged"
    found = divergence(config)
    assert (found["epoch"], found["step"]) == (1, 2)
    assert found["largest_gradient"]["norm"] > 0


def test_divergence_is_the_same_alone_and_vectorized(tiny, tmp_path):
    exploding = ("optim=adamw", "optim.lr=1e30", "optim.weight_decay=0", "train.batch_size=16")
    keys = [exploding, ("seed=1", *EXPLODES), ("train.batch_size=16",)]
    together = [tiny(*more, f"runs_dir={tmp_path}/together") for more in keys]
    train_vectorized(together)
    assert divergence(together[2]) is None
    for config, more in zip(together[:2], keys, strict=False):
        alone = tiny(*more)
        train(alone)
        expected = divergence(alone)
        expected["largest_gradient"]["norm"] = pytest.approx(expected["largest_gradient"]["norm"], rel=1e-4)
        assert divergence(config) == expected


@pytest.mark.slow
def test_the_same_alone_and_in_ranks(tiny, tmp_path):
    alone, ranks = (tiny(*EXPLODES, *more) for more in ((), ("train.devices=2", f"runs_dir={tmp_path}/ranks")))
    for config in (alone, ranks):
        train(config)
    expected = divergence(alone)
    expected["largest_gradient"]["norm"] = pytest.approx(expected["largest_gradient"]["norm"], rel=1e-4)
    assert divergence(ranks) == expected


def test_none_of_a_run_that_is_done(tiny):
    config = tiny("train.epochs=1")
    assert train(config)["divergence"] is None
    assert divergence(config) is None


def test_of_images_in_parts(tiny_data):
    """Micro-batches: what is looked at is the gradient of the update."""
    keys = ("dataset=cifar10", "dataset.limit=12", "train.batch_size=4", "train.micro_batch_size=2", "train.epochs=2")
    config = compose(*keys, "optim=sgd", "optim.lr=1e20", f"data_dir={tiny_data}", "device=cpu")
    run = Trainer(config, task_builder(config)(CPU), World(CPU))
    run.train_epoch()
    assert run.status == "diverged"
    assert run.divergence is not None
    assert run.divergence["step"] in (2, 3)
    assert run.divergence["largest_gradient"]["layer"] in dict(run.model.named_parameters())
