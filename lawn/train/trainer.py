"""The training loop of one run."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.diagnostics import FlatteningOnset, weight_norm
from lawn.errors import ConfigError, RunError
from lawn.identity import run_name
from lawn.optim import LAWNOptimizer, NonFiniteError, attenuate_logits, sums
from lawn.optim.keys import is_constrained
from lawn.optimizers import IN_STEPS, OPTIMIZERS, SCHEDULES, optimizer_arguments
from lawn.task import Batch, Recommendation, Task
from lawn.train.batchnorm import refuse_single_values
from lawn.train.diagnostics import RunDiagnostics
from lawn.train.distributed import World, sync_gradients
from lawn.train.epoch_state import EpochState, load_epoch_state
from lawn.train.execution import Execution
from lawn.train.run_directory import Row
from lawn.train.throughput import flops_per_sample, synchronize


class Trainer:
    """The state of a run, and the next epoch of it.

    `model` has the weights; `network`, which training calls, is the model compiled and wrapped in DDP.
    """

    def __init__(self, config: Config, task: Task, world: World) -> None:
        self.config = config
        self.task = task
        self.world = world
        self.device = world.device
        size, micro = config.train.batch_size, config.train.micro_batch_size
        self.batching = Batching(size, micro, world.rank, world.size)
        self._updates = self.batching.updates(task.dataset.num_train)
        total = self._updates * config.train.epochs
        sync = config.train.sync_batchnorm
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model) if sync else task.model
        self.execution = Execution.choose(config.train, self.model, self.device, total)
        self.execution.prepare(self.model, self.device)
        arguments = optimizer_arguments(config)
        for key in IN_STEPS.values():
            if key in arguments:
                epochs = arguments[key]
                arguments[key] = None if epochs == "auto" else updates_in(epochs, self._updates, total)
        self.optimizer = OPTIMIZERS[config.optim.name](self.model, **arguments)
        self.onset = FlatteningOnset(self._updates) if config.optim.free_epochs == "auto" else None
        if self.onset and not isinstance(self.optimizer, LAWNOptimizer):
            raise ConfigError(f"optim.free_epochs=auto: optim={config.optim.name} has no method `constrain`")
        self.diagnostics = None
        if config.diagnostics.name == "on":
            self.diagnostics = RunDiagnostics(config, task, self.model, self.optimizer, self._updates)
        self.network = world.wrap_ddp(self.execution.compiled(self.model))
        self._weights = dict(self.model.named_parameters())
        warmup = updates_in(config.schedule.warmup_epochs, self._updates, total)
        self.scheduler = SCHEDULES[config.schedule.name](self.optimizer, warmup, total)
        self.logit_scale = config.train.logit_scale
        if self.logit_scale is not None:
            _refuse_if_logits_cannot_be_scaled(self.model, self.logit_scale)
        self.epoch = 0
        self.step = 0
        self.rows: list[Row] = []
        self.seconds = {"train": 0.0, "eval": 0.0, "log": 0.0}
        self.warnings: list[str] = []  # of this run, beside those of its task
        self._clocks: list[tuple[str, float, float]] = []  # those that run: `_seconds_until_now`
        self.flops: float | None = None  # per sample; None until the first batch
        self.epoch_state: EpochState | None = None  # None between two epochs
        self.gradients: Tensor | None = None  # `EpochState.gradients` at the end of the last epoch
        self.divergence: dict[str, Any] | None = None
        self.outcomes: Tensor | None = None  # of each evaluation sample, at the end of the run

    @property
    def status(self) -> str:
        """Either "running", "done" or "diverged"."""
        if self.rows and None in (self.rows[-1]["train_loss"], self.rows[-1]["weight_norm"]):
            return "diverged"
        return "done" if self.epoch == self.config.train.epochs and self.between_epochs else "running"

    @property
    def between_epochs(self) -> bool:
        return self.epoch_state is None

    def train_epoch(self, pause: Callable[[], bool] = lambda: False) -> Row | None:
        """Train one epoch, evaluate if it is time, append the row of the epoch to `rows` and return it.

        `pause` is called between two updates, when the state can be saved. If it returns True, the epoch stops there
        and the result is None; the next call continues it.

        In the row, train_loss is the mean over the samples of the epoch and margin_p50 the median margin, both with
        the weights at the time of each update; lr is that of the first update; weight_norm and the metrics are those
        at the end of the epoch.
        """
        seed = self.begin_epoch()
        with self.clock("train"):
            trained = self._train(seed, pause)
        return None if trained is None else self.end_epoch(*trained)

    def begin_epoch(self) -> int:
        """Prepare the next epoch, or the rest of a paused one; returns the epoch's seed."""
        if self.epoch_state is None:
            self.epoch += 1
            lr = float(self.optimizer.param_groups[0]["lr"])
            self.epoch_state = EpochState.begin(lr, self.device, self.gradients)
        self.model.train()
        self._switch_weights("train")
        # A seed for each epoch instead of a stream: the epoch's draws do not depend on what came before.
        return epoch_seed(self.config.seed, self.epoch)

    def end_epoch(self, loss: float, margin: float) -> Row:
        """Evaluate if it is time; returns the row of the epoch with this mean loss and median margin."""
        assert self.epoch_state is not None  # between `begin_epoch` and here
        ended, self.epoch_state = self.epoch_state, None
        self.gradients = ended.gradients
        self.world.average_buffers(self.model)
        self._switch_weights("eval")
        row: Row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": ended.lr,
            "constrained": int(is_constrained(self.optimizer.param_groups)),
            "train_loss": _finite(loss),
            "margin_p50": _finite(margin),
            "weight_norm": _finite(weight_norm(self.model).item()),
        }
        if self.onset:
            row["free_epochs"] = (self.onset.updates - int(row["constrained"] or 0)) / self._updates
        if self.diagnostics:
            row |= {name: _finite(value) for name, value in self.diagnostics.row().items()}
        last = self.epoch == self.config.train.epochs
        if None in (row["train_loss"], row["weight_norm"]):
            before = (self.epoch - 1) * self._updates
            self.divergence = {"epoch": self.epoch, **ended.divergence(before, list(self._weights))}
            self.divergence["last_finite"] = self.rows[-1] if self.rows else None
        elif last or self.epoch % self.config.eval.every == 0:
            with self.clock("eval"):
                self.model.eval()
                with torch.no_grad(), self.execution.autocast(self.device):
                    metrics = self._evaluate()
                if self.diagnostics:
                    row |= {name: _finite(value) for name, value in self.diagnostics.surface(self.device).items()}
            row |= {f"{self.config.eval.split}_{name}": _finite(value) for name, value in metrics.items()}
        self.rows.append(row)
        return row

    def before_update(self) -> None:
        """Called before the first forward pass of an update."""
        if self.logit_scale is not None and self.step == self.optimizer.param_groups[0]["free_steps"]:
            attenuate_logits(self.model, self.logit_scale)

    def update(self) -> None:
        """Take the optimizer's step. Raises NonFiniteError where the free phase has diverged before the switch."""
        self.optimizer.step()
        self.after_update()

    def after_update(self) -> None:
        """Called after the optimizer's step."""
        self.scheduler.step()
        self.step += 1

    def _train(self, seed: int, pause: Callable[[], bool]) -> tuple[float, float] | None:
        """Mean loss and median margin of the epoch; None if it is paused."""
        task, state = self.task, self.epoch_state
        assert state is not None  # since `begin_epoch`
        torch.manual_seed(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        state.restore_generators(self.device)
        state.reserve(self._updates, task.dataset.num_train)
        batching = replace(self.batching, skip=state.updates)
        for micro_batch, batch in task.dataset.train_batches(batching, generator):
            batch = self.execution.to_memory_format(batch)
            if self.flops is None:
                refuse_single_values(task, self.model, batch, self.batching)
                self.flops = flops_per_sample(task, self.model, batch)
            if micro_batch.first:
                self.before_update()
                self.optimizer.zero_grad()
                before = len(state.margins)
                mean = torch.zeros((), dtype=torch.float64, device=self.device)
            with sync_gradients(self.network, micro_batch.last):
                with self.execution.autocast(self.device):
                    loss, margin = task.loss_and_margins(self.network, batch)
                (loss * (micro_batch.share * self.world.size)).backward()  # DDP averages over the ranks
            mean += loss.detach().double() * micro_batch.share
            if micro_batch.share:
                state.margins.add(margin)
            if not micro_batch.last:
                continue
            if task.loss.outer is not None:
                mean = self._apply_outer(task.loss.outer, mean)
            state.add_update(mean, self._gradient_norms())
            try:
                self._switch_at_onset(state.margins.values[before:])
                self.update()
            except NonFiniteError:
                state.total_losses = self.world.all_reduce_sum(state.losses.values).cpu()
                return math.nan, math.nan
            except ValueError as error:  # a weight whose norm is zero
                raise RunError(f"{run_name(self.config)}: {error}") from error
            if micro_batch.update.stop < task.dataset.num_train and pause():
                return None
        margins = self.world.all_gather_rows(state.margins.values)
        # The host waits for the device only here, at the end of the epoch (and in `_switch_at_onset`).
        state.total_losses = self.world.all_reduce_sum(state.losses.values).cpu()
        if self.diagnostics:
            self.diagnostics.add_margins(margins)
        return self.mean_loss(), margins.median().item()

    def mean_loss(self) -> float:
        """The mean over the samples of the epoch that has just been trained, from the losses of its updates."""
        assert self.epoch_state is not None
        losses = self.epoch_state.total_losses
        assert losses is not None
        samples, size = self.task.dataset.num_train, self.batching.batch_size
        sizes = torch.full_like(losses, size)
        sizes[-1] = samples - size * (len(losses) - 1)
        return (losses @ sizes).item() / samples

    def _gradient_norms(self) -> Tensor:
        """The norm of each weight's gradient [weights]; 0 for a weight without gradient."""
        gradients = [p.new_zeros(1) if p.grad is None else p.grad for p in self._weights.values()]
        return torch.stack(list(sums.norms(gradients)))

    def _switch_at_onset(self, margins: Tensor) -> None:
        """With automatic E_free, constrain at the onset of loss flattening; `margins` are those of an update.

        Until the switch, several ranks gather the margins at every update. Raises NonFiniteError.
        """
        optimizer = self.optimizer
        if self.onset is None or not isinstance(optimizer, LAWNOptimizer) or optimizer.constrained:
            return
        if self.onset.follow(self.world.all_gather_rows(margins)):
            optimizer.constrain()

    def _apply_outer(self, outer: Callable[[Tensor], Tensor], mean: Tensor) -> Tensor:
        """Apply `outer` to the update's mean loss, by the chain rule; returns this rank's share of the value."""
        mean = self.world.all_reduce_sum(mean).requires_grad_()
        value = outer(mean)
        (slope,) = torch.autograd.grad(value, mean)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, slope.to(gradients[0].dtype))
        return value.detach() / self.world.size

    def _evaluate(self) -> dict[str, float]:
        rows = self._evaluation_rows(self.task.rows)
        metrics = self.task.metrics(rows)
        if self.epoch == self.config.train.epochs:
            self.outcomes = self.task.outcomes(rows).long().cpu()
            if self.config.eval.candidates == "all":
                assert isinstance(self.task, Recommendation)  # lawn.task
                among_all = self.task.metrics(self._evaluation_rows(self.task.all_items_ranks))
                metrics |= {f"{name}_all": value for name, value in among_all.items()}
        return metrics

    def _evaluation_rows(self, rows_of: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
        """The rows of all evaluation samples; each rank computes those of its shard."""
        batches = self.task.dataset.eval_batches(self.world.rank, self.world.size)
        rows = [rows_of(self.model, self.execution.to_memory_format(batch)) for batch in batches]
        if not rows:
            raise RunError(f"rank {self.world.rank}: nothing to evaluate; there are more ranks than evaluation samples")
        found = torch.cat(rows)
        places = getattr(self.task.dataset, "eval_places", None)
        if places is not None:  # so that outcomes do not depend on the number of workers and ranks
            order = places(self.world.rank, self.world.size).to(found.device)
            found = torch.empty_like(found).index_copy_(0, order, found)
        return self.world.all_gather_rows(found)

    def _switch_weights(self, mode: str) -> None:
        """A schedule-free optimizer uses other weights in training than in evaluation."""
        getattr(self.optimizer, mode, lambda: None)()

    @contextmanager
    def clock(self, account: str) -> Iterator[None]:
        """Add the seconds of the body to an account, without those that the body adds to other accounts."""
        self._clocks.append((account, time.perf_counter(), sum(self.seconds.values())))
        try:
            yield
            synchronize(self.device)
            self.seconds = self._seconds_until_now(self._clocks[-1:])
        finally:
            self._clocks.pop()

    def _seconds_until_now(self, clocks: Sequence[tuple[str, float, float]]) -> dict[str, float]:
        """The seconds of each account, with those of these open clocks: account, start, and the sum of all before."""
        seconds = dict(self.seconds)
        for account, start, before in reversed(clocks):
            elsewhere = sum(seconds.values()) - before
            seconds[account] += time.perf_counter() - start - elsewhere
        return seconds

    @property
    def order(self) -> list[Any]:
        """What the order of an epoch depends on, besides its seed."""
        known: Any = getattr(self.task.dataset, "order_depends_on", None)
        return known(self.world.size) if known else [self.device.type]

    def state_dict(self) -> dict[str, Any]:
        """The state of the run. Within an epoch, all ranks have to call this at the same update."""
        state = self.epoch_state
        return {
            "data": self.task.dataset.fingerprint,
            "order": self.order,
            "epoch": self.epoch,
            "left": state and self.world.all_gather_object(state.state_dict(self.model, self.device)),
            "divergence": self.divergence,
            "outcomes": self.outcomes,
            "step": self.step,
            "gradients": self.gradients,
            "onset": self.onset and self.onset.state_dict(),
            "observer": self.diagnostics and self.diagnostics.state_dict(),
            "rows": self.rows,
            "seconds": self._seconds_until_now(self._clocks),
            "warnings": self.warnings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.gradients = None if state["gradients"] is None else state["gradients"].to(self.device)
        self.rows, self.seconds, self.divergence = state["rows"], state["seconds"], state["divergence"]
        self.outcomes, self.warnings = state["outcomes"], state["warnings"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(self._as_now(state["optimizer"]))
        for p, moments in self.optimizer.state.items():  # fused steps rely on the memory layout of the weights
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.onset:
            self.onset.load_state_dict(state["onset"])
        if self.diagnostics:
            self.diagnostics.load_state_dict(state["observer"])
        if state["left"] is not None:
            self.epoch_state = load_epoch_state(state["left"], self.model, self.world)

    def _as_now(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the optimizer with `fused` as the command has it, which no result depends on."""
        pairs = zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        groups = [{**old, "fused": now["fused"]} if "fused" in now else old for old, now in pairs]
        return {**saved, "param_groups": groups}


def _refuse_if_logits_cannot_be_scaled(model: nn.Module, factor: float) -> None:
    try:
        attenuate_logits(model, 1.0)  # changes nothing, but refuses what the later call would
    except ValueError as error:
        raise ConfigError(f"train.logit_scale={factor:g}: {error}") from error


def updates_in(epochs: float, updates_per_epoch: int, total: int) -> int:
    """The updates in so many epochs: at most all but one; where that allows it, at least 1 unless `epochs` is 0."""
    return min(max(round(epochs * updates_per_epoch), int(epochs > 0)), total - 1)


def epoch_seed(seed: int, epoch: int) -> int:
    """A 63-bit seed for the order, augmentation and negatives of an epoch."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _finite(value: float) -> float | None:
    """JSON and CSV have no NaN and no infinity."""
    return value if math.isfinite(value) else None
