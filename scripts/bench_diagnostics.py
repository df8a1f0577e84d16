"""Time training with diagnostics=on against training without: python -m scripts.bench_diagnostics --data-dir D
[--rounds 9]

In turns an epoch of two runs that differ in nothing else, and the figure that is drawn once at the end. Prints medians
of the ratios within a turn; writes the same with hardware and versions to results/bench/diagnostics-DEVICE.json and
.md.
"""

import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from lawn.compose import compose
from lawn.task import task_builder
from lawn.train.distributed import World
from lawn.train.trainer import Trainer
from scripts import bench

SECONDS = 2.0  # of each run in a round: as many epochs, in turns, as that takes
MOVIELENS = ("dataset=movielens100k", "optim=adam_lawn", "optim.free_epochs=0.5")
KINDS = {
    "NCF on MovieLens-100k, batch 1,000": (*MOVIELENS, "train.batch_size=1000"),
    "NCF on MovieLens-100k, batch 10,000": (*MOVIELENS, "train.batch_size=10000"),
    "NCF on MovieLens-100k, batch 100,000": (*MOVIELENS, "train.batch_size=100000"),
    "MLP on digits, batch 128": ("dataset=digits", "optim=adam_lawn", "optim.free_epochs=0.5"),
    "VGG-19 on 640 CIFAR-10 images, batch 64": (
        *("dataset=cifar10", "optim=adam_lawn", "optim.free_epochs=0.5", "dataset.limit=640", "train.batch_size=64"),
    ),
}

FIGURE = """
import sys, time
from pathlib import Path
import lawn.train.launch
start = time.perf_counter()
from lawn.diagnostics import figure
run = Path(sys.argv[1])
figure.save({run.name: figure.read(run)}, run / "diagnostics.png")
print(time.perf_counter() - start)
"""


def measure(given: Namespace, *keys: str) -> bench.Row:
    device = torch.device(given.device)
    common = (*keys, f"data_dir={given.data_dir.resolve()}", "train.epochs=100000", "eval.every=100000")
    without, on = compose(*common), compose(*common, "diagnostics=on")
    dataset = task_builder(without)(device).dataset
    runs = {
        name: Trainer(config, task_builder(config)(device, dataset), World(device))
        for name, config in (("without", without), ("with", on))
    }
    epochs = {name: partial(bench.seconds, run.train_epoch, device) for name, run in runs.items()}
    count = max(1, round(SECONDS / bench.interleave(epochs, 1)["without"][0]))
    found = bench.interleave(epochs, given.rounds * count)
    found["figure"] = [figure_seconds(runs["with"])]
    return {
        "seconds": {what: round(statistics.median(values), 3) for what, values in found.items()},
        "times": round(bench.median_ratio(found["with"], found["without"]), 4),
        "config": {"overrides": list(keys), "execution": asdict(runs["with"].execution)},
    }


def figure_seconds(run: Trainer) -> float:
    """Of drawing in a process of its own, since a run's process imports matplotlib for it."""
    with TemporaryDirectory() as folder:
        pd.DataFrame(run.rows).to_csv(Path(folder) / "metrics.csv", index=False)
        command = [sys.executable, "-c", FIGURE, folder]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


COLUMNS: bench.Columns = {
    "an epoch without, s": lambda row: f"{row['seconds']['without']:.3g}",
    "with diagnostics, s": lambda row: f"{row['seconds']['with']:.3g}",
    "cost": lambda row: f"{100 * (row['times'] - 1):+.1f} %",
    "the figure at the end, s": lambda row: f"{row['seconds']['figure']:.2g}",
}
REMARKS = """Training alone: margins' quantiles, and norms, gradients and angles of every weight at about 4 updates
of an epoch, no more than one in ten or so. The figure is drawn once a run, of as many epochs as were timed. What
diagnostics.samples adds is not counted: it is computed at evaluations only."""


def main() -> int:
    parser = bench.parser(__doc__, rounds=9)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args()
    return bench.main(
        *("diagnostics", given, f"What diagnostics=on costs, medians of {given.rounds} rounds"),
        lambda: {name: measure(given, *keys) for name, keys in KINDS.items()},
        lambda rows: f"{bench.table('diagnostics', COLUMNS, rows)}\n\n{REMARKS}",
    )


if __name__ == "__main__":
    sys.exit(main())
