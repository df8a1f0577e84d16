"""Tasks bind dataset, model, loss and metrics, so that one training loop serves them all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lawn import metrics
from lawn.arguments import arguments
from lawn.config import Config
from lawn.data.batching import Batching, MicroBatch
from lawn.data.cifar import cifar10, cifar100
from lawn.data.digits import digits
from lawn.data.fingerprint import Fingerprint
from lawn.data.imagenet import imagenet
from lawn.data.movielens import movielens, movielens1m, movielens100k
from lawn.data.pinterest import pinterest
from lawn.diagnostics import binary_margin, multiclass_margin
from lawn.errors import ConfigError
from lawn.losses import (
    Loss,
    bce,
    binary_flooding,
    binary_focal,
    binary_label_smoothing,
    cross_entropy,
    flooding,
    focal,
    label_smoothing,
)
from lawn.models.mf import MF
from lawn.models.mlp import mlp
from lawn.models.ncf import NCFMLP
from lawn.models.resnet import resnet50
from lawn.models.vgg import VGG19

Batch = tuple[Tensor, ...]


class Dataset(Protocol):
    """The interface of a dataset: it yields batches of tensors that are on the device already."""

    warnings: list[str]

    @property
    def num_train(self) -> int: ...
    @property
    def fingerprint(self) -> Fingerprint: ...
    def train_batches(self, batching: Batching, generator: torch.Generator) -> Iterator[tuple[MicroBatch, Batch]]: ...
    def eval_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]: ...


class Task(ABC):
    """A dataset, a model and a loss that fit together, and the metrics of the model.

    `headline` is the metric that the paper's tables print, in percent.
    """

    headline: ClassVar[str]
    datasets: ClassVar[Mapping[str, Callable[..., Any]]]
    models: ClassVar[Mapping[str, Callable[..., nn.Module]]]
    losses: ClassVar[Mapping[str, Callable[..., Loss]]]

    def __init__(self, dataset: Dataset, model: nn.Module, loss: Loss) -> None:
        self.dataset = dataset
        self.model = model
        self.loss = loss

    @property
    def warnings(self) -> list[str]:
        """Warnings about the data, and about metrics on them."""
        return self.dataset.warnings

    @staticmethod
    @abstractmethod
    def size(dataset: Any) -> tuple[Any, ...]:
        """The positional arguments of the task's model builders."""

    @staticmethod
    @abstractmethod
    def margins(logits: Tensor, labels: Tensor, /) -> Tensor:
        """The margin of each sample: the score of its target class minus the best of the others."""

    def loss_and_margins(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss of a training batch, with its graph, and the margins of the samples, detached."""
        *inputs, labels = batch
        logits = network(*inputs)
        return self.loss.mean(logits, labels), self.margins(logits.detach(), labels)

    @abstractmethod
    def rows(self, network: nn.Module, batch: Batch) -> Tensor:
        """A row of numbers for each sample of an evaluation batch, from which `metrics` are computed."""

    @staticmethod
    @abstractmethod
    def metrics(rows: Tensor, /) -> dict[str, float]:
        """The metrics of the evaluation split, from the rows of all its samples."""

    @staticmethod
    @abstractmethod
    def outcomes(rows: Tensor, /) -> Tensor:
        """An integer for each sample, by which runs are compared sample by sample."""


class Classification(Task):
    headline = "accuracy"
    datasets = {"digits": digits, "cifar10": cifar10, "cifar100": cifar100, "imagenet": imagenet}
    models = {"mlp": mlp, "vgg19": VGG19, "resnet50": resnet50}
    losses = {
        "cross_entropy": cross_entropy,
        "label_smoothing": label_smoothing,
        "focal": focal,
        "flooding": flooding,
    }

    @staticmethod
    def size(dataset: Any) -> tuple[Any, ...]:
        return dataset.shape, dataset.num_classes

    def rows(self, network: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return metrics.classification_rows(network(images), labels)

    margins = staticmethod(multiclass_margin)
    metrics = staticmethod(metrics.classification_metrics)

    @staticmethod
    def outcomes(rows: Tensor, /) -> Tensor:
        """Whether the answer is right, 0 or 1."""
        return rows[:, 1]


class Recommendation(Task):
    headline = "hr10"
    max_pairs: ClassVar[int] = 2**18  # of a user and an item that are scored at a time
    datasets = {
        "movielens100k": movielens100k,
        "movielens1m": movielens1m,
        "movielens": movielens,
        "pinterest": pinterest,
    }
    models = {"ncf_mlp": NCFMLP, "mf": MF}
    losses = {
        "bce": bce,
        "label_smoothing": binary_label_smoothing,
        "focal": binary_focal,
        "flooding": binary_flooding,
    }

    @property
    def warnings(self) -> list[str]:
        """Those of the dataset, and one on hit ratios that hardly depend on the model."""
        dataset: Any = self.dataset
        candidates = dataset.candidates.shape[1] - 1
        idle = " and ".join(f"HR@{k}" for k in metrics.TOP_KS if k >= candidates)
        note = (
            f"dataset.candidates={candidates}: for {idle} all ranks, or all but the last, are hits; "
            f"take more than {max(metrics.TOP_KS)} candidates"
        )
        return [*super().warnings, *([note] if idle else [])]

    @staticmethod
    def size(dataset: Any) -> tuple[Any, ...]:
        return dataset.num_users, dataset.num_items

    def loss_and_margins(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's regularization, if it has any, is part of the loss."""
        if not getattr(self.model, "regularization", 0):
            return super().loss_and_margins(network, batch)
        users, items, labels = batch
        logits, penalty = network(users, items, with_penalty=True)
        return self.loss.mean(logits, labels) + penalty, self.margins(logits.detach(), labels)

    def rows(self, network: nn.Module, batch: Batch) -> Tensor:
        users, items = batch
        scores = network(users[:, None].expand_as(items).reshape(-1), items.reshape(-1))
        return metrics.ranks(scores.view_as(items), items)

    def all_items_ranks(self, model: Any, batch: Batch) -> Tensor:
        """The rank [B] of each held-out item among all items that its user is not trained on."""
        dataset: Any = self.dataset
        users, held = batch[0], batch[1][:, 0]
        size = max(1, self.max_pairs // dataset.num_items)
        return torch.cat(
            [
                metrics.ranks_among_all(model.all_scores(some), items, dataset.is_trained_on(some))
                for some, items in zip(users.split(size), held.split(size), strict=True)
            ]
        )

    margins = staticmethod(binary_margin)
    metrics = staticmethod(metrics.ranking_metrics)

    @staticmethod
    def outcomes(rows: Tensor, /) -> Tensor:
        """The rank of the held-out item, from 0."""
        return rows


TASKS: tuple[type[Task], ...] = (Classification, Recommendation)


def _kind(config: Config) -> type[Task]:
    for task in TASKS:
        if config.dataset.name in task.datasets:
            return task
    known = ", ".join(name for task in TASKS for name in task.datasets)
    raise ConfigError(f"dataset={config.dataset.name}: no such dataset; choose from {known}")


def dataset_reader(config: Config) -> Callable[[], Any]:
    """A function that reads the dataset onto the CPU. Raises ConfigError at once for a key that it does not take."""
    load = _kind(config).datasets[config.dataset.name]
    return partial(load, Path(config.data_dir), config.eval.split, **arguments("dataset", config.dataset, load))


def task_builder(config: Config) -> Callable[..., Task]:
    """Check that dataset, model and loss fit together, before any data is read.

    The result is a function from a device, and optionally a loaded dataset, to the task.

    The model is initialized on the CPU from `config.seed`, so that every device starts from the same weights.
    """
    kind = _kind(config)
    for group, name, members in (
        ("model", config.model.name, kind.models),
        ("loss", config.loss.name, kind.losses),
    ):
        if name not in members:
            choices = ", ".join(members)
            raise ConfigError(f"{group}={name}: does not fit dataset={config.dataset.name}; choose from {choices}")
    if config.eval.candidates and kind is not Recommendation:
        raise ConfigError(
            f"eval.candidates={config.eval.candidates}: is for recommenders, not dataset={config.dataset.name}"
        )
    model, loss = kind.models[config.model.name], kind.losses[config.loss.name]
    load = dataset_reader(config)
    model_arguments = arguments("model", config.model, model)
    loss_arguments = arguments("loss", config.loss, loss)

    def on(device: torch.device, dataset: Any = None) -> Task:
        if dataset is None:
            dataset = load().to(device)
        torch.manual_seed(config.seed)
        network = model(*kind.size(dataset), **model_arguments)
        return kind(dataset, network.to(device), loss(**loss_arguments))

    return on
