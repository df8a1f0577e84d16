"""The training loop: the state of a run, and how to take the next epoch."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.diagnostics import weight_norm
from lawn.errors import RunError
from lawn.optim import LAWNOptimizer, LinearWarmup, LinearWarmupDecay, NonFiniteError, attenuate_logits
from lawn.optimizers import OPTIMIZERS, optimizer_arguments
from lawn.task import Task
from lawn.train.execution import Execution
from lawn.train.ranks import Ranks, accumulating
from lawn.train.record import Row
from lawn.train.throughput import flops_per_sample, peak_flops, synchronize


@dataclass
class Left:
    """What a rank has of an epoch that it is in the middle of."""

    lr: float  # of the epoch's first update
    updates: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # total of this rank's samples
    margins: list[Tensor] = field(default_factory=list)


class Run:
    """The state of a run between two epochs, and how to take the next one."""

    def __init__(self, config: Config, task: Task, ranks: Ranks) -> None:
        self.config = config
        self.task = task
        self.ranks = ranks
        self.device = ranks.device
        size, micro = config.train.batch_size, config.train.micro_batch_size
        self.batching = Batching(size, micro, ranks.rank, ranks.world)
        steps = self.batching.updates(task.dataset.num_train)
        total = steps * config.train.epochs
        if config.train.sync_batchnorm:
            task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
        self.execution = Execution.choose(config.train, task.model, self.device, total)
        self.execution.prepare(task.model, self.device)
        chosen = optimizer_arguments(config)
        if "free_steps" in chosen:
            chosen["free_steps"] = _steps(chosen["free_steps"], steps, total)
        warmup = _steps(config.schedule.warmup_epochs, steps, total)
        self.optimizer = OPTIMIZERS[config.optim.name](task.model, **chosen)
        task.network = ranks.parallel(self.execution.compiled(task.model))
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
        self._left: Left | None = None
        self._random: list[Tensor] = []  # states of torch's generators, where they have to be restored

    @property
    def status(self) -> str:
        """running, done or diverged."""
        if self.rows and None in (self.rows[-1]["train_loss"], self.rows[-1]["weight_norm"]):
            return "diverged"
        return "done" if self.epoch == self.config.train.epochs and self.between_epochs else "running"

    @property
    def between_epochs(self) -> bool:
        return self._left is None

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
        if self._left is None:
            self.epoch += 1
            self._left = Left(float(self.optimizer.param_groups[0]["lr"]))
        self.task.model.train()
        self._switch_weights("train")
        # A seed for each epoch, not a stream: whatever came before, this epoch draws the same.
        return epoch_seed(self.config.seed, self.epoch)

    def end_epoch(self, loss: float, margin: float) -> Row:
        """Evaluate if it is time; the row of the epoch, of this mean loss and median margin."""
        assert self._left is not None  # between `begin_epoch` and here
        lr, self._left = self._left.lr, None
        self.ranks.average(self.task.model)
        self._switch_weights("eval")
        row: Row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": lr,
            "constrained": int(isinstance(self.optimizer, LAWNOptimizer) and self.optimizer.constrained),
            "train_loss": _finite(loss),
            "margin_p50": _finite(margin),
            "weight_norm": _finite(weight_norm(self.task.model).item()),
        }
        last = self.epoch == self.config.train.epochs
        if None not in (row["train_loss"], row["weight_norm"]) and (last or self.epoch % self.config.eval.every == 0):
            with self.clock("eval"):
                self.task.model.eval()
                with torch.no_grad(), self.execution.autocast(self.device):
                    metrics = self._evaluate()
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
        task, left = self.task, self._left
        assert left is not None  # since `begin_epoch`
        torch.manual_seed(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        left.loss = left.loss.to(self.device)
        self._restore_generators()
        batching = replace(self.batching, skip=left.updates)
        for part, batch in task.dataset.train_batches(batching, generator):
            batch = self.execution.lay_out(batch)
            if not self.flops:
                self.flops = flops_per_sample(task, batch)
            if part.first:
                self.before_update()
                self.optimizer.zero_grad()
                mean = torch.zeros_like(left.loss)
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
            left.loss = left.loss + mean * (part.update.stop - part.update.start)
            try:
                self.update()
            except NonFiniteError:
                return math.nan, math.nan
            left.updates += 1
            if part.update.stop < task.dataset.num_train and pause():
                return None
        median = self.ranks.joined(torch.cat(left.margins)).median()
        # Only here, at the end of the epoch, does the host wait for the device.
        return self.ranks.total(left.loss).item() / task.dataset.num_train, median.item()

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
        return self.task.metrics(self.ranks.joined(torch.cat(rows)))

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
            "epoch": self.epoch,
            "left": None if self._left is None else self.ranks.everyone(self._left_state(self._left)),
            "step": self.step,
            "rows": self.rows,
            "seconds": self.seconds,
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.rows, self.seconds = state["rows"], state["seconds"]
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for p, moments in self.optimizer.state.items():  # as the weights lie in memory now: fused steps rely on it
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self.scheduler.load_state_dict(state["scheduler"])
        if state["left"] is not None:
            self._load_left(state["left"])

    def _left_state(self, left: Left) -> dict[str, Any]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            "lr": left.lr,
            "updates": left.updates,
            "loss": left.loss.cpu(),
            "margins": torch.cat(left.margins).cpu(),
            "buffers": {name: buffer.cpu() for name, buffer in self.task.model.named_buffers()},
            "random": [torch.get_rng_state(), *on_gpu],
        }

    def _load_left(self, states: list[dict[str, Any]]) -> None:
        """Each rank its own. Another number of ranks shares out what there was: sums and margins go to the first one,
        statistics of batch norm are averaged; random numbers of dropout start anew."""
        alike, own = len(states) == self.ranks.world, states[min(self.ranks.rank, len(states) - 1)]
        given = [own] if alike else states if self.ranks.main else []
        self._left = Left(own["lr"], own["updates"], sum((s["loss"] for s in given), torch.zeros(()).double()))
        self._left.margins = [s["margins"].to(self.device) for s in given]
        for name, buffer in self.task.model.named_buffers():
            values = torch.stack([state["buffers"][name] for state in ([own] if alike else states)])
            buffer.copy_(values.mean(0) if values.is_floating_point() else values[0])
        self._random = own["random"] if alike else []

    def _restore_generators(self) -> None:
        if self._random:
            torch.set_rng_state(self._random[0])
            if self.device.type == "cuda" and len(self._random) > 1:
                torch.cuda.set_rng_state(self._random[1], self.device)
        self._random = []

    def result(self) -> dict[str, Any]:
        """How the run ended. The headline is the last epoch's metric; `best` is over the epochs of the same split,
        so on the test split it is selected on test and no table prints it."""
        split, name = self.config.eval.split, self.task.headline
        key = f"{split}_{name}"
        evaluated = [row for row in self.rows if row.get(key) is not None]
        best = max(evaluated, key=lambda row: row[key] or 0.0, default=None)
        peak = peak_flops(self.device, self.execution.precision)
        rate = self.task.dataset.num_train * self.epoch / max(self.seconds["train"], 1e-9)
        return {
            "status": self.status,
            "split": split,
            "headline": name,
            "last": self.rows[-1],
            "best": best and {"epoch": best["epoch"], name: best[key]},
            "parameters": sum(p.numel() for p in self.task.model.parameters()),
            "samples_per_second": round(rate, 1),
            "peak_share": round(rate * self.flops / (self.ranks.world * peak), 4) if self.flops else None,
            "seconds": {what: round(value, 3) for what, value in self.seconds.items()},
            "warnings": self.task.dataset.warnings,
        }


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


def summary(result: dict[str, Any]) -> str:
    """The last line of a run."""
    last = result["last"]
    metrics = [f"{k} {v:.4g}" for k, v in last.items() if k.startswith(result["split"]) and v is not None]
    share = "" if result["peak_share"] is None else f" ({100 * result['peak_share']:.0f} % of the matmul peak)"
    spent = ", ".join(f"{what} {value:.1f} s" for what, value in result["seconds"].items())
    return (
        f"{result['status']} after epoch {last['epoch']}: {'  '.join(metrics) or 'no evaluation'}; "
        f"{result['samples_per_second']:,.0f} samples/s{share}; {spent}"
    )
