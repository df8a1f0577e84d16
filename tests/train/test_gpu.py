"""What only a GPU can show: no synchronization within an epoch, and the fast ways of execution give the same."""

import warnings

import pytest
import torch

from lawn.task import task_builder
from lawn.train.distributed import World
from lawn.train.trainer import Trainer
from tests.helpers import FIXTURES, compose

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # those of torch, as it compiles
]
KINDS = {
    "images": ("dataset=cifar10", "dataset.limit=40", "train.batch_size=10"),
    "interactions": ("dataset=movielens100k", *FIXTURES["movielens100k"]),
}


def make(tiny_data, kind: str, *keys: str) -> Trainer:
    common = ("train.epochs=6", "optim=adam_lawn", "optim.free_epochs=1", "eval.every=6", f"data_dir={tiny_data}")
    config = compose(*KINDS[kind], *common, *keys)
    device = torch.device("cuda")
    return Trainer(config, task_builder(config)(device), World(device))


def synchronizations(run: Trainer) -> int:
    """Of one epoch of training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")  # warns that it is a prototype
            run.train_epoch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("kind", KINDS)
def test_more_updates_do_not_synchronize_more_often(tiny_data, kind):
    few, many = make(tiny_data, kind), make(tiny_data, kind, "train.batch_size=5")
    counts = []
    for run in (few, many):
        run.train_epoch()
        run.train_epoch()  # the first of the constrained phase may look at the norms
        counts.append(synchronizations(run))
    assert many.step > few.step
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["default", "reduce-overhead"])
def test_compiled_or_not_an_epoch_is_the_same(tiny_data, kind, how):
    keys = ("train.precision=fp32", "optim.lr=1e-3")
    plain, fast = make(tiny_data, kind, *keys), make(tiny_data, kind, *keys, f"train.compile={how}")
    for _ in range(3):
        one, other = plain.train_epoch(), fast.train_epoch()
    # Adam's first updates are signs of gradients, and batch norm divides by the spread of ten images: rounding grows.
    tolerance = 0.03 if kind == "images" else 1e-3
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=tolerance)
    assert other["weight_norm"] == pytest.approx(one["weight_norm"], rel=tolerance / 10)


def test_bf16_and_channels_last_are_what_images_get(tiny_data):
    run = make(tiny_data, "images")
    assert (run.execution.precision, run.execution.channels_last) == ("bf16", True)
    assert run.train_epoch()["train_loss"] is not None
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_runs_give_the_same_bits(tiny_data, kind):
    ends = []
    for _ in range(2):
        run = make(tiny_data, kind, "train.deterministic=true")
        for _ in range(3):
            run.train_epoch()
        ends.append([p.clone() for p in run.model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
