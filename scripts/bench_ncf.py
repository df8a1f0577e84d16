"""Time NCF's training against a plain loop: python -m scripts.bench_ncf --data-dir D [--rounds 15]

The plain loop is a straightforward baseline, in the manner of github.com/guoyang9/NCF: a Dataset that draws negatives
and returns samples one by one, a DataLoader, embeddings that are looked up and concatenated, torch's Adam. Both train
the same network (16 factors) in turns: an epoch of ours, some batches of the plain loop, a matrix product. On a CPU
there are epochs of ours with one thread, with a fixed number of threads, and beside another process that uses a core.
Prints medians of the ratios within a round, the share of the matrix product's rate that is spent on the network's
FLOPs, and the peak memory of a run from start to end; writes the same with hardware and versions to
results/bench/ncf-DEVICE.json and .md.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import dok_matrix
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lawn.compose import compose
from lawn.data.batching import Batching
from lawn.data.interactions import Interactions
from lawn.task import task_builder
from lawn.train.distributed import World
from lawn.train.threads import INTERVAL_SECONDS, FreeCores
from lawn.train.throughput import flops_per_sample, peak_flops
from lawn.train.trainer import Trainer
from scripts import bench

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("movielens100k", "movielens1m")
BATCH_SIZES, FACTORS = (10_000, 100_000), 16
PLAIN_SAMPLES = 200_000


class Samples(Dataset):
    """Positives and four negatives for each, drawn and returned one by one."""

    def __init__(self, positives: list[tuple[int, int]], seen: dok_matrix) -> None:
        self.pairs = list(positives)
        self.labels = [1.0] * len(positives) + [0.0] * (4 * len(positives))
        for user, _ in positives:
            for _ in range(4):
                while True:
                    item = np.random.randint(seen.shape[1])  # noqa: NPY002 - the plain loop is timed as it is written
                    if (user, item) not in seen:
                        break
                self.pairs.append((user, item))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int, float]:
        user, item = self.pairs[index]
        return user, item, self.labels[index]


class PlainNCF(nn.Module):
    def __init__(self, num_users: int, num_items: int) -> None:
        super().__init__()
        self.user = nn.Embedding(num_users, 4 * FACTORS)
        self.item = nn.Embedding(num_items, 4 * FACTORS)
        layers: list[nn.Module] = []
        for width in (8 * FACTORS, 4 * FACTORS, 2 * FACTORS):
            layers += [nn.Linear(width, width // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(FACTORS, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.layers(torch.cat([self.user(users), self.item(items)], dim=1)).squeeze(1)


class Plain:
    """The plain loop on some of the data at a time."""

    def __init__(self, data: Interactions, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.positives = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
        self.seen = dok_matrix((data.num_users, data.num_items), dtype=np.float32)
        for pair in self.positives:
            self.seen[pair] = 1.0
        self.model = PlainNCF(data.num_users, data.num_items).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def rate(self) -> float:
        """Samples a second in an epoch on as many positives as make PLAIN_SAMPLES."""
        with bench.torch_defaults():
            return PLAIN_SAMPLES / bench.seconds(self.epoch, self.device)

    def epoch(self) -> None:
        chosen = random.choices(self.positives, k=PLAIN_SAMPLES // 5)
        for batch in DataLoader(Samples(chosen, self.seen), self.batch_size, shuffle=True):
            users, items, labels = (column.to(self.device) for column in batch)
            self.optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(self.model(users, items), labels.float()).backward()
            self.optimizer.step()

    def flops(self) -> float:
        """Per sample, forward and backward."""
        zeros = torch.zeros(100, dtype=torch.long, device=self.device)
        with FlopCounterMode(display=False) as counter:
            self.model(zeros, zeros).sum().backward()
        return counter.get_total_flops() / len(zeros)


def measure(name: str, batch_size: int, rounds: int, data_dir: Path, device: torch.device) -> bench.Row:
    overrides = (f"dataset={name}", f"data_dir={data_dir.resolve()}", f"train.batch_size={batch_size}")
    # As many epochs as make the choices of a long run, none of them evaluated.
    config = compose(*overrides, "train.epochs=1000", "eval.every=1000", f"model.factors={FACTORS}")
    task = task_builder(config)(device)
    assert isinstance(task.dataset, Interactions)
    plain = Plain(task.dataset, batch_size, device)
    run = Trainer(config, task, World(device))
    measures = {
        "ours": lambda: rate(run),
        "plain": plain.rate,
        "peak": lambda: peak_flops.__wrapped__(device, run.execution.precision),
    }
    if device.type == "cpu":
        measures |= {
            "one thread": lambda: rate(run, threads=1),
            "fixed threads": lambda: rate(run, adaptive=False),
            "busy": lambda: rate(run, busy=True),
            "busy, fixed threads": lambda: rate(run, adaptive=False, busy=True),
        }
    found = bench.interleave(measures, rounds)
    _, batch = next(task.dataset.train_batches(Batching(batch_size), torch.Generator(device)))
    flops = {"of the network": plain.flops(), "computed": flops_per_sample(task, task.model, batch)}
    share = bench.median_ratio(found["ours"], found["peak"])
    return {
        "samples_per_second": round(statistics.median(found["ours"])),
        "plain_samples_per_second": round(statistics.median(found["plain"])),
        "ratio": round(bench.median_ratio(found["ours"], found["plain"]), 2),
        "peak_gflops": round(statistics.median(found["peak"]) / 1e9, 1),
        "flops_per_sample": {what: round(value) for what, value in flops.items()},
        "peak_share": {what: round(share * value, 3) for what, value in flops.items()},
        "peak_memory_gb": round(peak_memory(overrides), 2),
        "threads": {
            f"{name} / {base}": round(bench.median_ratio(found[name], found[base]), 2)
            for name, base in (
                ("ours", "fixed threads"),
                ("ours", "one thread"),
                ("busy", "one thread"),
                ("busy, fixed threads", "one thread"),
            )
            if base in found
        },
        "config": {
            "batch_size": batch_size,
            "updates": run.batching.updates(task.dataset.num_train),
            "optim": config.optim.name,
            "execution": asdict(run.execution),
        },
    }


def rate(run: Trainer, threads: int | None = None, adaptive: bool = True, busy: bool = False) -> float:
    """Samples a second in the run's next epoch, optionally beside a process that keeps a core busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with FreeCores() as cores:
            if busy:
                time.sleep(INTERVAL_SECONDS)  # a run measures the load while it reads the data

            def pause() -> bool:
                if adaptive:
                    cores.adapt()
                return False

            return bench.training_rate(run, pause)
    finally:
        if hog:
            hog.kill()
            hog.wait()
        torch.set_num_threads(before)


def peak_memory(overrides: tuple[str, ...]) -> float:
    """Largest resident memory, GB, of `run.py` for an epoch and its evaluation, as Linux counts it."""
    code = "import run; code = run.main(); print(open('/proc/self/status').read()); raise SystemExit(code)"
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-c", code, *overrides, "train.epochs=1", f"runs_dir={runs}"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


COLUMNS: bench.Columns = {
    "samples/s": lambda row: f"{row['samples_per_second']:,}",
    "plain loop": lambda row: f"{row['plain_samples_per_second']:,}",
    "ratio": lambda row: f"{row['ratio']:.1f}",
    "share of the matmul rate, network's FLOPs": lambda row: bench.percent(row["peak_share"]["of the network"]),
    "FLOPs computed": lambda row: bench.percent(row["peak_share"]["computed"]),
    "matmul GFLOP/s": lambda row: f"{row['peak_gflops']:.0f}",
    "peak memory, GB": lambda row: f"{row['peak_memory_gb']:.2f}",
}
THREADS: bench.Columns = {
    "adaptive / fixed": lambda row: f"{row['threads']['ours / fixed threads']:.2f}",
    "adaptive / one thread": lambda row: f"{row['threads']['ours / one thread']:.2f}",
    "adaptive, beside a busy process / one thread": lambda row: f"{row['threads']['busy / one thread']:.2f}",
    "fixed, beside a busy process / one thread": lambda row: (
        f"{row['threads']['busy, fixed threads / one thread']:.2f}"
    ),
}
REMARKS = """An epoch of `run.py`, negatives and order included, against single samples in a DataLoader.
The first layer is computed for each user and item instead of each sample where that is less work, so fewer
FLOPs are computed than the network has. Memory: the whole process, from start to evaluation."""
THREADS_REMARKS = """Rates of an epoch with all threads: adapted to the load, as a run does, or fixed; alone, or beside
a process that keeps a core busy. One thread: alone."""


def main() -> int:
    parser = bench.parser(__doc__, rounds=15)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args()
    device = torch.device(given.device)
    title = f"Training NCF, {FACTORS} factors: medians of {given.rounds} rounds"
    return bench.main(
        *("ncf", given, title),
        lambda: {
            f"{name}, batch {size:,}": measure(name, size, given.rounds, given.data_dir, device)
            for name, size in product(DATASETS, BATCH_SIZES)
        },
        lambda rows: "\n\n".join(
            [bench.table("dataset", COLUMNS, rows), REMARKS]
            + ([bench.table("threads", THREADS, rows), THREADS_REMARKS] if device.type == "cpu" else [])
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
