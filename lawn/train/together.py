"""Runs that differ in numbers alone, trained in one process as one batched model.

Every member stays a run of its own, with its optimizer, schedule, phase and record. What they share are the passes
over memory: their weights are slices of tensors with a leading run axis, and so are gradients and moments.
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

from lawn.config import Config, identity
from lawn.optim import NonFiniteError
from lawn.optim.joint import JointStep
from lawn.task import Task
from lawn.train.left import Left
from lawn.train.loop import Run
from lawn.train.ranks import started_by_torchrun
from lawn.train.throughput import flops_per_sample, on_meta, synchronize

MODELS = ("mlp", "ncf_mlp")  # small ones, that leave a device idle, and without batch norm
CPU_ROWS = 160_000  # in a joint batch: larger ones keep a CPU busy, and its caches full, by themselves
OWN_WEIGHTS = ("adam_hoffer",)  # optimizers that put other weights in the place of the model's


def kin(config: Config) -> str | None:
    """What the runs have in common that can be trained together; None for a run that cannot."""
    train = config.train
    alone = train.micro_batch_size or (train.devices or 1) > 1 or train.compile not in (None, "off")
    alone = alone or train.precision == "bf16" or started_by_torchrun()
    alone = alone or config.optim.free_epochs == "auto" or config.diagnostics.name == "on"  # they watch each update
    if config.model.name not in MODELS or config.optim.name in OWN_WEIGHTS or alone:
        return None
    shared = identity(config)
    del shared["seed"], shared["optim"], shared["schedule"]
    shared["train"].pop("logit_scale", None)
    return json.dumps([shared, train.deterministic, config.device, config.data_dir], sort_keys=True)


def room(task: Task, batch: tuple[Tensor, ...]) -> int:
    """How many runs like this one can be trained together: as many as a quarter of the free memory has room for, with
    weights, gradients and two moments of each, a batch, and what the backward pass needs, counted without computing
    anything; on a CPU no more than are faster than one after the other."""
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    shadow = on_meta(task)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        shadow.loss_and_margins(tuple(t.to("meta") for t in batch))
    weights = sum(p.nbytes for p in task.model.parameters())
    each = 4 * weights + 2 * saved + sum(t.nbytes for t in batch)  # the backward pass makes as much again
    fit = int(0.25 * _free_bytes(batch[0].device) / each)
    if batch[0].device.type == "cpu":
        fit = min(fit, CPU_ROWS // len(batch[0]))
    return max(1, fit)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells only how many
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


class Together:
    """Runs of one model, dataset, loss and batch size, for as many epochs. The model has no buffers."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self._joined: list[Run] = []

    def next_epoch(self) -> list[Run]:
        """Take those furthest behind one epoch further, and return them; none when all have ended."""
        running = [run for run in self.runs if run.status == "running"]
        runs = [run for run in running if run.epoch == min(run.epoch for run in running)]
        if not runs:
            return []
        if runs != self._joined:
            self._join(runs)
        seeds = [run.begin_epoch() for run in runs]
        start = time.perf_counter()
        means, margins = self._train(seeds)
        synchronize(runs[0].device)
        share = (time.perf_counter() - start) / len(runs)
        for run, mean, margin in zip(runs, means, margins, strict=True):
            run.seconds["train"] += share
            run.end_epoch(mean, margin)
        return runs

    def _join(self, runs: list[Run]) -> None:
        """Make the weights of these runs slices of one tensor each."""
        self._joined = runs
        each = [dict(run.task.model.named_parameters()) for run in runs]
        self._stacks = {name: torch.stack([own[name].data for own in each]) for name in each[0]}
        self._slices = {name: [own[name] for own in each] for name in each[0]}
        for name, stack in self._stacks.items():
            for weight, row in zip(self._slices[name], stack, strict=True):
                weight.data = row
            stack.requires_grad_()
        self._groups = []
        for _, group in groupby(range(len(runs)), key=lambda k: type(runs[k].optimizer)):
            members = list(group)
            part = slice(members[0], members[-1] + 1)
            optimizers = [run.optimizer for run in runs[part]]
            step = None
            if JointStep.possible(optimizers):
                stacks = [stack.detach()[part] for stack in self._stacks.values()]
                step = JointStep(optimizers, stacks, [own[part] for own in self._slices.values()])
            self._groups.append((part, step))

    def _update(self, failed: dict[int, int], updates: int) -> None:
        """Take the step of the runs; adds to the failed ones those that diverge before their switch, after so many
        updates of the epoch."""
        for part, step in self._groups:
            members = range(*part.indices(len(self._joined)))
            if step is not None:
                for k in step.step([_gradient(stack)[part] for stack in self._stacks.values()]):
                    failed.setdefault(members[k], updates)
                for k in members:
                    if k not in failed:
                        self._joined[k].after_update()
                continue
            for name, stack in self._stacks.items():
                for weight, gradient in zip(self._slices[name][part], _gradient(stack)[part], strict=True):
                    weight.grad = gradient
            for k in members:
                try:
                    if k not in failed:
                        self._joined[k].update()
                except NonFiniteError:
                    failed[k] = updates

    def _train(self, seeds: list[int]) -> tuple[list[float], list[float]]:
        """Mean loss and median margin of each run; NaN where it has diverged before its switch."""
        runs, task, device = self._joined, self._joined[0].task, self._joined[0].device
        different = list(dict.fromkeys(seeds))  # runs of the same seed have the same batches
        which = torch.tensor([different.index(seed) for seed in seeds], device=device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in different]
        epochs = [task.dataset.train_batches(runs[0].batching, generator) for generator in generators]
        before = [run.gradients for run in runs if run.gradients is not None]
        all_runs = Left(math.nan, gradients=torch.stack(before) if len(before) == len(runs) else None)
        failed: dict[int, int] = {}
        for batches in zip(*epochs, strict=True):
            batch = [torch.stack(columns)[which] for columns in zip(*(drawn for _, drawn in batches), strict=True)]
            if not runs[0].flops:
                flops = flops_per_sample(task, batches[0][1])
                for run in runs:
                    run.flops = flops
            for k, run in enumerate(runs):
                if k not in failed:
                    run.before_update()
            for stack in self._stacks.values():
                stack.grad = None
            *inputs, labels = batch
            logits = self._logits(*inputs)
            losses = torch.vmap(task.loss)(logits, labels)
            losses.sum().backward()
            all_runs.follow(losses.detach().double(), self._gradient_norms())
            all_runs.margins.append(torch.vmap(task.margins)(logits.detach(), labels))
            self._update(failed, all_runs.updates)
        # One by one: the median along a dimension has no deterministic form on GPUs.
        medians = torch.stack([margins.median() for margins in torch.cat(all_runs.margins, dim=1)]).tolist()
        each = torch.cat(all_runs.losses).cpu()  # [updates, K]
        for k, run in enumerate(runs):
            assert run.left is not None
            assert all_runs.gradients is not None
            run.left.losses, run.left.gradients = [each[: failed.get(k), k]], all_runs.gradients[k]
        means = [math.nan if k in failed else run.mean_loss() for k, run in enumerate(runs)]
        return means, [math.nan if k in failed else median for k, median in enumerate(medians)]

    def _gradient_norms(self) -> Tensor:
        """Of each run and weight [K, weights]."""
        norms = [torch.linalg.vector_norm(_gradient(stack).flatten(1), dim=1) for stack in self._stacks.values()]
        return torch.stack(norms, dim=1)

    def _logits(self, *inputs: Tensor) -> Tensor:
        """Of every run [K, B, ...] for its own inputs [K, B, ...]."""
        model = self._joined[0].task.model
        forward_many = getattr(model, "forward_many", None)
        if forward_many is not None:
            return forward_many(self._stacks, *inputs)
        return torch.vmap(lambda weights, *x: functional_call(model, weights, x))(self._stacks, *inputs)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
