"""The training loop: the state of a run, and how to take the next epoch."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.diagnostics import FlatteningOnset, weight_norm
from lawn.errors import RunError
from lawn.optim import LAWNOptimizer, LinearWarmup, LinearWarmupDecay, NonFiniteError, attenuate_logits
from lawn.optimizers import IN_STEPS, OPTIMIZERS, optimizer_arguments
from lawn.task import Task
from lawn.train.batchnorm import refuse_single_values
from lawn.train.execution import Execution
from lawn.train.left import Left, resumed
from lawn.train.observer import Observer
from lawn.train.ranks import Ranks, accumulating
from lawn.train.record import Row
from lawn.train.throughput import flops_per_sample, synchronize


class Run:
    """The state of a run between two epochs, and how to take the next one."""

    def __init__(self, config: Config, task: Task, ranks: Ranks) -> None:
        self.config = config
        self.task = task
        self.ranks = ranks
        self.device = ranks.device
        size, micro = config.train.batch_size, config.train.micro_batch_size
        self.batching = Batching(size, micro, ranks.rank, ranks.world)
        self._updates = self.batching.updates(task.dataset.num_train)
        total = self._updates * config.train.epochs
        if config.train.sync_batchnorm:
            task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
        self.execution = Execution.choose(config.train, task.model, self.device, total)
        self.execution.prepare(task.model, self.device)
        chosen = optimizer_arguments(config)
        for key in IN_STEPS.values():
            if key in chosen:
                epochs = chosen[key]
                chosen[key] = None if epochs == "auto" else _steps(epochs, self._updates, total)
        warmup = _steps(config.schedule.warmup_epochs, self._updates, total)
        self.optimizer = OPTIMIZERS[config.optim.name](task.model, **chosen)
        self.onset = FlatteningOnset(self._updates) if config.optim.free_epochs == "auto" else None
        observed = config.diagnostics.name == "on"
        self.observer = Observer(config, task, self.optimizer, self._updates) if observed else None
        task.network = ranks.parallel(self.execution.compiled(task.model))
        self._weights = dict(task.model.named_parameters())
        self.scheduler = (
            LinearWarmup(self.optimizer, warmup)
            if config.schedule.name == "constant"
            else LinearWarmupDecay(self.optimizer, warmup, total)
        )
        self.logit_scale = config.train.logit_scale
        self.epoch = 0
        self.step = 0
        self.rows: list[Row] = []
        self.seconds = {"train": 0.0, "eval": 0.0, "log": 0.0}
        self.flops = 0.0  # per sample
        self.left: Left | None = None  # of the epoch that it is in the middle of
        self.gradients: Tensor | None = None  # `Left.gradients`, at the end of the epoch before
        self.divergence: dict[str, Any] | None = None
        self.outcomes: Tensor | None = None  # of each evaluation sample, at the end of the run

    @property
    def status(self) -> str:
        """running, done or diverged."""
        if self.rows and None in (self.rows[-1]["train_loss"], self.rows[-1]["weight_norm"]):
            return "diverged"
        return "done" if self.epoch == self.config.train.epochs and self.between_epochs else "running"

    @property
    def between_epochs(self) -> bool:
        return self.left is None

    def next_epoch(self, pause: Callable[[], bool] = lambda: False) -> Row | None:
        """Train one epoch, evaluate if it is time, append the row to `rows` and return it. `pause` is asked between two
        updates of the epoch, with the run in a state that can be saved; where it is true, the epoch is left there, to
        be gone on with by the next call, and the result is None.

        train_loss is the mean over the samples of the epoch, margin_p50 the median margin, both of the weights of
        the moment; lr is that of the first update; weight_norm and the metrics are those at the end of the epoch.
        """
        seed = self.begin_epoch()
        with self.clock("train"):
            found = self._train(seed, pause)
        return None if found is None else self.end_epoch(*found)

    def begin_epoch(self) -> int:
        """Make ready for the next epoch; returns its seed."""
        if self.left is None:
            self.epoch += 1
            self.left = Left(float(self.optimizer.param_groups[0]["lr"]), gradients=self.gradients)
        self.task.model.train()
        self._switch_weights("train")
        # A seed for each epoch, not a stream: whatever came before, this epoch draws the same.
        return epoch_seed(self.config.seed, self.epoch)

    def end_epoch(self, loss: float, margin: float) -> Row:
        """Evaluate if it is time; the row of the epoch, of this mean loss and median margin."""
        assert self.left is not None  # between `begin_epoch` and here
        ended, self.left = self.left, None
        self.gradients = ended.gradients
        self.ranks.average(self.task.model)
        self._switch_weights("eval")
        row: Row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": ended.lr,
            "constrained": int(isinstance(self.optimizer, LAWNOptimizer) and self.optimizer.constrained),
            "train_loss": _finite(loss),
            "margin_p50": _finite(margin),
            "weight_norm": _finite(weight_norm(self.task.model).item()),
        }
        if self.onset:
            row["free_epochs"] = (self.onset.updates - int(row["constrained"] or 0)) / self._updates
        if self.observer:
            row |= {name: _finite(value) for name, value in self.observer.row().items()}
        last = self.epoch == self.config.train.epochs
        if None in (row["train_loss"], row["weight_norm"]):
            before = (self.epoch - 1) * self._updates
            self.divergence = {"epoch": self.epoch, **ended.divergence(before, list(self._weights))}
            self.divergence["last_finite"] = self.rows[-1] if self.rows else None
        elif last or self.epoch % self.config.eval.every == 0:
            with self.clock("eval"):
                self.task.model.eval()
                with torch.no_grad(), self.execution.autocast(self.device):
                    metrics = self._evaluate()
                if self.observer:
                    row |= {name: _finite(value) for name, value in self.observer.surface(self.device).items()}
            row |= {f"{self.config.eval.split}_{name}": _finite(value) for name, value in metrics.items()}
        self.rows.append(row)
        return row

    def before_update(self) -> None:
        """What comes before an update's first pass."""
        if self.logit_scale is not None and self.step == self.optimizer.param_groups[0]["free_steps"]:
            attenuate_logits(self.task.model, self.logit_scale)

    def update(self) -> None:
        """Take the step. Raises NonFiniteError where the free phase has diverged before the switch."""
        self.optimizer.step()
        self.after_update()

    def after_update(self) -> None:
        """What follows an optimizer's step."""
        self.scheduler.step()
        self.step += 1

    def _train(self, seed: int, pause: Callable[[], bool]) -> tuple[float, float] | None:
        """Mean loss and median margin of the epoch; None if it is left."""
        task, left = self.task, self.left
        assert left is not None  # since `begin_epoch`
        torch.manual_seed(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        left.restore_generators(self.device)
        batching = replace(self.batching, skip=left.updates)
        for part, batch in task.dataset.train_batches(batching, generator):
            batch = self.execution.lay_out(batch)
            if not self.flops:
                refuse_single_values(task, batch, self.batching)
                self.flops = flops_per_sample(task, batch)
            if part.first:
                self.before_update()
                self.optimizer.zero_grad()
                before = len(left.margins)
                mean = torch.zeros((), dtype=torch.float64, device=self.device)
            with accumulating(task.network, part.last):
                with self.execution.autocast(self.device):
                    loss, margin = task.loss_and_margins(batch)
                (loss * (part.share * self.ranks.world)).backward()  # the ranks' gradients are averaged
            mean += loss.detach().double() * part.share
            left.margins.append(margin if part.share else margin[:0])
            if not part.last:
                continue
            if task.loss.outer is not None:
                mean = self._through(task.loss.outer, mean)
            left.follow(mean, self._gradients())
            try:
                self._watch(left.margins[before:])
                self.update()
            except NonFiniteError:
                left.losses = [self.ranks.total(torch.cat(left.losses)).cpu()]
                return math.nan, math.nan
            if part.update.stop < task.dataset.num_train and pause():
                return None
        margins = self.ranks.joined(torch.cat(left.margins))
        # Only here, at the end of the epoch, does the host wait for the device (and where `_watch` does).
        left.losses = [self.ranks.total(torch.cat(left.losses)).cpu()]
        if self.observer:
            self.observer.margins(margins)
        return self.mean_loss(), margins.median().item()

    def mean_loss(self) -> float:
        """Over the samples of the epoch that is at its end, of its updates' losses."""
        assert self.left is not None
        (losses,) = self.left.losses
        sizes = torch.full_like(losses, self.batching.batch_size)
        sizes[-1] -= sizes.sum() - self.task.dataset.num_train
        return (losses @ sizes).item() / self.task.dataset.num_train

    def _gradients(self) -> Tensor:
        """The norm of each weight's gradient [weights]; 0 where there is none."""
        gradients = [p.new_zeros(1) if p.grad is None else p.grad for p in self._weights.values()]
        return torch.stack(torch._foreach_norm(gradients))

    def _watch(self, margins: list[Tensor]) -> None:
        """Switch at the onset of loss flattening, where E_free is automatic; `margins` are an update's, of its parts.
        Until then several ranks join them at every update. Raises NonFiniteError."""
        optimizer = self.optimizer
        if self.onset is None or not isinstance(optimizer, LAWNOptimizer) or optimizer.constrained:
            return
        if self.onset.follow(self.ranks.joined(torch.cat(margins))):
            optimizer.constrain()

    def _through(self, outer: Callable[[Tensor], Tensor], mean: Tensor) -> Tensor:
        """Carry the gradients of the update's mean loss on to a function of it; returns this rank's share of that."""
        mean = self.ranks.total(mean).requires_grad_()
        value = outer(mean)
        (slope,) = torch.autograd.grad(value, mean)
        gradients = [p.grad for p in self.task.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, slope.to(gradients[0].dtype))
        return value.detach() / self.ranks.world

    def _evaluate(self) -> dict[str, float]:
        """Each rank evaluates its share; the metrics are those of all rows."""
        batches = self.task.dataset.eval_batches(self.ranks.rank, self.ranks.world)
        rows = [self.task.rows(self.execution.lay_out(batch)) for batch in batches]
        if not rows:
            raise RunError(f"rank {self.ranks.rank}: nothing to evaluate; there are more ranks than evaluation samples")
        joined = self.ranks.joined(torch.cat(rows))
        if self.epoch == self.config.train.epochs:
            self.outcomes = self.task.outcomes(joined).long().cpu()
        return self.task.metrics(joined)

    def _switch_weights(self, mode: str) -> None:
        """A schedule-free optimizer has other weights for training than for evaluation."""
        getattr(self.optimizer, mode, lambda: None)()

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Add the seconds inside to the account `what`, but for those that go to another account."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        synchronize(self.device)
        elsewhere = sum(self.seconds.values()) - before
        self.seconds[what] += time.perf_counter() - start - elsewhere

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run goes on from. In the middle of an epoch all ranks have to ask for it."""
        return {
            "data": self.task.dataset.fingerprint,
            "epoch": self.epoch,
            "left": None if self.left is None else self.ranks.everyone(self.left.state(self.task.model, self.device)),
            "divergence": self.divergence,
            "outcomes": self.outcomes,
            "step": self.step,
            "gradients": self.gradients,
            "onset": self.onset and self.onset.state_dict(),
            "observer": self.observer and self.observer.state_dict(),
            "rows": self.rows,
            "seconds": self.seconds,
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.gradients = None if state["gradients"] is None else state["gradients"].to(self.device)
        self.rows, self.seconds, self.divergence = state["rows"], state["seconds"], state["divergence"]
        self.outcomes = state["outcomes"]
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():  # as the weights lie in memory now: fused steps rely on it
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.onset:
            self.onset.load_state_dict(state["onset"])
        if self.observer:
            self.observer.load_state_dict(state["observer"])
        if state["left"] is not None:
            self.left = resumed(state["left"], self.task.model, self.ranks)


def _steps(epochs: float, steps_per_epoch: int, total: int) -> int:
    """Updates in a share of the run: at least one unless it is 0, and at least one is left for the rest."""
    return min(max(round(epochs * steps_per_epoch), int(epochs > 0)), total - 1)


def epoch_seed(seed: int, epoch: int) -> int:
    """A 63-bit seed for an epoch's order, augmentation and negatives."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _finite(value: float) -> float | None:
    """JSON and CSV have no NaN and no infinity."""
    return value if math.isfinite(value) else None
