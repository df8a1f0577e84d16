"""Time NCF's training against a plain loop: python -m scripts.bench_ncf --data-dir D [--rounds 15]

The plain loop is what one writes first, in the manner of github.com/guoyang9/NCF: a Dataset that draws negatives and
returns samples one by one, a DataLoader, embeddings that are looked up and concatenated, torch's Adam. Both train the
same network (16 factors) at batch 10,000, in turns: an epoch of ours, some batches of the plain loop, a matrix product.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import dok_matrix
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from experiments.study import compose_all
from lawn.data.batching import Batching
from lawn.data.interactions import Interactions
from lawn.task import build
from lawn.train.loop import Run
from lawn.train.ranks import Ranks
from lawn.train.throughput import flops_per_sample, peak_flops, synchronize
from scripts import bench

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("movielens100k", "movielens1m")
BATCH_SIZE, FACTORS = 10_000, 16
PLAIN_BATCHES = 10


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

    def __init__(self, data: Interactions, device: torch.device) -> None:
        self.device = device
        self.positives = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
        self.seen = dok_matrix((data.num_users, data.num_items), dtype=np.float32)
        for pair in self.positives:
            self.seen[pair] = 1.0
        self.model = PlainNCF(data.num_users, data.num_items).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def rate(self) -> float:
        """Samples a second in an epoch on as many positives as make PLAIN_BATCHES batches."""
        chosen = random.choices(self.positives, k=PLAIN_BATCHES * BATCH_SIZE // 5)
        start = time.perf_counter()
        for batch in DataLoader(Samples(chosen, self.seen), BATCH_SIZE, shuffle=True):
            users, items, labels = (column.to(self.device) for column in batch)
            self.optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(self.model(users, items), labels.float()).backward()
            self.optimizer.step()
        synchronize(self.device)
        return PLAIN_BATCHES * BATCH_SIZE / (time.perf_counter() - start)

    def flops(self) -> float:
        """Per sample, forward and backward."""
        zeros = torch.zeros(100, dtype=torch.long, device=self.device)
        with FlopCounterMode(display=False) as counter:
            self.model(zeros, zeros).sum().backward()
        return counter.get_total_flops() / len(zeros)


def measure(name: str, rounds: int, data_dir: Path, device: torch.device) -> dict[str, Any]:
    overrides = (f"dataset={name}", f"data_dir={data_dir}", f"train.epochs={rounds + 1}", "eval.every=1000")
    (config,) = compose_all([(*overrides, f"train.batch_size={BATCH_SIZE}", f"model.factors={FACTORS}")])
    task = build(config)(device)
    assert isinstance(task.dataset, Interactions)
    plain = Plain(task.dataset, device)
    run = Run(config, task, Ranks(device))
    ours, theirs, peaks = [], [], []
    for count in range(rounds + 1):
        before = run.seconds["train"]
        run.next_epoch()
        rate = task.dataset.num_train / (run.seconds["train"] - before)
        plain_rate, peak = plain.rate(), peak_flops.__wrapped__(device)
        if count:  # the first round warms up
            ours.append(rate)
            theirs.append(plain_rate)
            peaks.append(peak)
    _, batch = next(task.dataset.train_batches(Batching(BATCH_SIZE), torch.Generator(device)))
    flops = {"of the network": plain.flops(), "computed": flops_per_sample(task, batch)}
    return {
        "samples_per_second": round(statistics.median(ours)),
        "plain_samples_per_second": round(statistics.median(theirs)),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "flops_per_sample": {what: round(value) for what, value in flops.items()},
        "peak_share": {
            what: round(statistics.median(rate * value / peak for rate, peak in zip(ours, peaks, strict=True)), 3)
            for what, value in flops.items()
        },
        "peak_memory_gb": round(peak_memory(name, data_dir), 2),
    }


def peak_memory(name: str, data_dir: Path) -> float:
    """Largest resident memory, GB, of `run.py` for an epoch and its evaluation, as Linux counts it."""
    code = "import run; code = run.main(); print(open('/proc/self/status').read()); raise SystemExit(code)"
    with tempfile.TemporaryDirectory() as runs:
        overrides = [f"dataset={name}", f"data_dir={data_dir.resolve()}", "train.epochs=1", f"runs_dir={runs}"]
        command = [sys.executable, "-c", code, *overrides]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "samples/s": lambda row: f"{row['samples_per_second']:,}",
    "plain loop": lambda row: f"{row['plain_samples_per_second']:,}",
    "ratio": lambda row: f"{row['ratio']:.1f}",
    "share of the matmul rate, network's FLOPs": lambda row: f"{100 * row['peak_share']['of the network']:.0f} %",
    "FLOPs computed": lambda row: f"{100 * row['peak_share']['computed']:.0f} %",
    "matmul GFLOP/s": lambda row: f"{row['peak_gflops']:.0f}",
    "peak memory, GB": lambda row: f"{row['peak_memory_gb']:.2f}",
}
REMARKS = """An epoch of `run.py`, negatives and order included, against single samples in a DataLoader.
The first layer is computed for each user and item instead of each sample where that is less work, so fewer
FLOPs are computed than the network has. Memory: the whole process, from start to evaluation."""


def main() -> int:
    parser = bench.parser(__doc__, rounds=15)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = {name: measure(name, given.rounds, given.data_dir, device) for name in DATASETS}
    title = f"Training NCF, {FACTORS} factors, batch {BATCH_SIZE:,}: medians of {given.rounds} rounds"
    lines = [[name, *(show(row) for show in COLUMNS.values())] for name, row in rows.items()]
    bench.write("ncf", given, title, f"{bench.table(['dataset', *COLUMNS], lines)}\n\n{REMARKS}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
