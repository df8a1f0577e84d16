"""Vectorized training: runs that differ in numbers alone, trained in one process as one batched model.

Each run keeps its own optimizer, schedule, phase and record. The weights of all runs are slices of tensors with a
leading run axis, as are gradients and moments, so the runs share the passes over memory.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.func import functional_call

from lawn.config import Config
from lawn.errors import RunError
from lawn.identity import identity, run_name
from lawn.optim import NonFiniteError
from lawn.task import Task
from lawn.train.cuda_graph import GraphedFunction
from lawn.train.distributed import launched_by_torchrun
from lawn.train.epoch_state import last_finite
from lawn.train.throughput import flops_per_sample, synchronize, to_meta
from lawn.train.trainer import Trainer
from lawn.train.vectorized_step import VectorizedStep

MODELS = ("mlp", "ncf_mlp")  # small, so that one run leaves a device idle, and without batch norm
CPU_ROWS = 160_000  # of the batches of all runs: one run with more keeps a CPU busy, and its caches full
CPU_WEIGHTS = 1_000_000  # bytes of a model: several runs of a larger one gain nothing on a CPU
SAMPLE_BYTES = 40  # for each sample of a recommender's epoch: runs of different seeds hold their own
OWN_WEIGHTS = ("adam_hoffer",)  # optimizers that replace the model's weights


def vectorization_key(config: Config) -> str | None:
    """Runs with the same key can be vectorized; None for a run that cannot."""
    train = config.train
    alone = (
        config.model.name not in MODELS,
        config.optim.name in OWN_WEIGHTS,
        train.micro_batch_size is not None,
        (train.devices or 1) > 1 or launched_by_torchrun(),
        train.compile not in (None, "off"),
        train.precision == "bf16",
        # These read each update of one run.
        config.optim.free_epochs == "auto",
        config.diagnostics.name == "on",
    )
    if any(alone):
        return None
    shared = identity(config)
    del shared["seed"], shared["optim"], shared["schedule"]
    shared["train"].pop("logit_scale", None)
    return json.dumps([shared, train.deterministic, config.device, config.data_dir], sort_keys=True)


def max_vectorized_runs(task: Task, batch: tuple[Tensor, ...]) -> int:
    """The number of runs like this one to vectorize.

    They use at most a quarter of the free memory for weights, gradients, two moments, the samples of an epoch, a batch
    and the tensors saved for the backward pass (counted without computing anything), and on a CPU no more rows, and no
    larger models, than are faster than runs one after the other.
    """
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        task.loss_and_margins(to_meta(task.model), tuple(t.to("meta") for t in batch))
    weights = sum(p.nbytes for p in task.model.parameters())
    each = 4 * weights + 2 * saved + sum(t.nbytes for t in batch)  # the backward pass allocates as much again
    each += SAMPLE_BYTES * task.dataset.num_train
    fit = int(0.25 * _free_bytes(batch[0].device) / each)
    if batch[0].device.type == "cpu":
        fit = min(fit, CPU_ROWS // len(batch[0])) if weights <= CPU_WEIGHTS else 1
    return max(1, fit)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells only how many
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


class VectorizedTrainer:
    """Trains runs of one `vectorization_key`. Their model has no buffers."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = list(trainers)
        self._stacked: list[Trainer] = []

    def train_epoch(self) -> list[Trainer]:
        """Train the next epoch of the runs that are furthest behind; returns them, none when all have ended."""
        running = [trainer for trainer in self.trainers if trainer.status == "running"]
        trainers = [trainer for trainer in running if trainer.epoch == min(trainer.epoch for trainer in running)]
        if not trainers:
            return []
        if trainers != self._stacked:
            self._stack(trainers)
        seeds = [trainer.begin_epoch() for trainer in trainers]
        start = time.perf_counter()
        means, margins = self._train(seeds)
        synchronize(trainers[0].device)
        share = (time.perf_counter() - start) / len(trainers)
        for trainer, mean, margin in zip(trainers, means, margins, strict=True):
            trainer.seconds["train"] += share
            trainer.end_epoch(mean, margin)
        return trainers

    def _stack(self, trainers: list[Trainer]) -> None:
        """Make the weights of these runs slices of stacked tensors."""
        self._stacked = trainers
        each = [dict(trainer.model.named_parameters()) for trainer in trainers]
        self._stacks = {name: torch.stack([own[name].data for own in each]) for name in each[0]}
        self._slices = {name: [own[name] for own in each] for name in each[0]}
        for name, stack in self._stacks.items():
            for weight, row in zip(self._slices[name], stack, strict=True):
                weight.data = row
            stack.requires_grad_()
        self._groups = []
        for _, group in groupby(range(len(trainers)), key=lambda k: type(trainers[k].optimizer)):
            members = list(group)
            part = slice(members[0], members[-1] + 1)
            optimizers = [trainer.optimizer for trainer in trainers[part]]
            step = None
            if VectorizedStep.is_supported(optimizers):
                stacks = [stack.detach()[part] for stack in self._stacks.values()]
                step = VectorizedStep(optimizers, stacks, [own[part] for own in self._slices.values()])
            self._groups.append((part, step))

        steps = [step for _, step in self._groups]
        enabled = trainers[0].device.type == "cuda" and None not in steps and not trainers[0].execution.deterministic
        self._computation = GraphedFunction(self._compute, enabled)

    def _prepare(self, failed: dict[int, int], updates: int) -> None:
        """Prepare the update of the runs that have not failed.

        Adds to `failed` the index of a run that diverges before its switch, with the number of `updates` in the epoch.
        """
        for k, trainer in enumerate(self._stacked):
            if k not in failed:
                trainer.before_update()
        for part, step in self._groups:
            if step is None:
                continue
            members = range(*part.indices(len(self._stacked)))
            try:
                diverged, switched = step.prepare()
            except ValueError as error:  # a weight whose norm is zero
                first = run_name(self._stacked[members[0]].config)
                raise RunError(f"{first} or another run vectorized with it: {error}") from error
            for k in diverged:
                failed.setdefault(members[k], updates)
            if switched:
                self._computation.reset()

    def _compute(self, *batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of a batch [K, B, ...], and take the vectorized steps.

        Returns:
            The loss [K] of each run, the margins [K, B] and the norm of each weight's gradient [K, weights].
        """
        task = self._stacked[0].task
        for stack in self._stacks.values():
            stack.grad = None
        *inputs, labels = batch
        logits = self._logits(*inputs)
        loss = torch.vmap(task.loss)(logits, labels)
        loss.sum().backward()
        norms = self._gradient_norms()
        for part, step in self._groups:
            if step is not None:
                step.apply([_gradient(stack)[part] for stack in self._stacks.values()])
        return loss.detach(), torch.vmap(task.margins)(logits.detach(), labels), norms

    def _finish(self, failed: dict[int, int], updates: int) -> None:
        """Take the steps of the optimizers that take their own; adds to `failed` as `_prepare` does."""
        for part, step in self._groups:
            members = range(*part.indices(len(self._stacked)))
            if step is not None:
                for k in members:
                    if k not in failed:
                        self._stacked[k].after_update()
                continue
            for name, stack in self._stacks.items():
                for weight, gradient in zip(self._slices[name][part], _gradient(stack)[part], strict=True):
                    weight.grad = gradient
            for k in members:
                try:
                    if k not in failed:
                        self._stacked[k].update()
                except NonFiniteError:
                    failed[k] = updates
                except ValueError as error:
                    raise RunError(f"{run_name(self._stacked[k].config)}: {error}") from error

    def _train(self, seeds: list[int]) -> tuple[list[float], list[float]]:
        """Mean loss and median margin of each run; NaN for a run that has diverged before its switch."""
        trainers, task, device = self._stacked, self._stacked[0].task, self._stacked[0].device
        different = list(dict.fromkeys(seeds))  # runs of the same seed have the same batches
        which = torch.tensor([different.index(seed) for seed in seeds], device=device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in different]
        epochs = [task.dataset.train_batches(trainers[0].batching, generator) for generator in generators]
        before = [trainer.gradients for trainer in trainers if trainer.gradients is not None]
        gradients = torch.stack(before) if len(before) == len(trainers) else None
        failed: dict[int, int] = {}
        # A new tensor to keep for each batch would lie between the blocks that the next batches could use again.
        samples = task.dataset.num_train
        losses = torch.empty(trainers[0].batching.updates(samples), len(trainers), dtype=torch.double, device=device)
        margins = torch.empty(len(trainers), samples, device=device)
        for update, batches in enumerate(zip(*epochs, strict=True)):
            batch = [torch.stack(columns)[which] for columns in zip(*(drawn for _, drawn in batches), strict=True)]
            if trainers[0].flops is None:
                flops = flops_per_sample(task, task.model, batches[0][1])
                for trainer in trainers:
                    trainer.flops = flops
            self._prepare(failed, update + 1)
            losses[update], margin, norms = self._computation(*batch)
            gradients = last_finite(gradients, norms)
            rows = batches[0][0]
            margins[:, rows.start : rows.stop] = margin
            self._finish(failed, update + 1)
        # One by one: the median along a dimension has no deterministic form on GPUs.
        medians = torch.stack([own.median() for own in margins]).tolist()
        each = losses.cpu()
        assert gradients is not None
        for k, trainer in enumerate(trainers):
            assert trainer.epoch_state is not None
            trainer.epoch_state.total_losses, trainer.epoch_state.gradients = each[: failed.get(k), k], gradients[k]
        means = [math.nan if k in failed else trainer.mean_loss() for k, trainer in enumerate(trainers)]
        return means, [math.nan if k in failed else median for k, median in enumerate(medians)]

    def _gradient_norms(self) -> Tensor:
        """The gradient norm of each run and weight [K, weights]."""
        norms = [torch.linalg.vector_norm(_gradient(stack).flatten(1), dim=1) for stack in self._stacks.values()]
        return torch.stack(norms, dim=1)

    def _logits(self, *inputs: Tensor) -> Tensor:
        """The logits of K runs [K, B, ...], each for its own inputs [K, B, ...]."""
        model = self._stacked[0].model
        forward_vectorized = getattr(model, "forward_vectorized", None)
        if forward_vectorized is not None:
            return forward_vectorized(self._stacks, *inputs)
        return torch.vmap(lambda weights, *x: functional_call(model, weights, x))(self._stacks, *inputs)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
