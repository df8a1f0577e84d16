"""Time runs that are trained as one batched model against the same runs one after the other:
python -m scripts.bench_sweep --data-dir D [--rounds 9]

NCF on MovieLens, a sweep over learning rates: in turns an epoch of all runs together and an epoch of one alone.
Prints medians of the ratios within a round; writes the same with hardware and versions to
results/bench/sweep-DEVICE.json and .md.
"""

import statistics
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from lawn.compose import compose
from lawn.task import task_builder
from lawn.train.distributed import World
from lawn.train.trainer import Trainer
from lawn.train.vectorized import VectorizedTrainer
from scripts import bench

SWEEPS = {  # by device: dataset, runs, batch size, factors, optimizer, whether each run has a seed of its own
    "cpu": (
        ("movielens100k", 16, 1000, 8, "adam_lawn", False),
        ("movielens100k", 16, 1000, 8, "adamw", True),
        ("movielens100k", 16, 1000, 16, "adam_lawn", False),
        ("movielens100k", 16, 10_000, 8, "adam_lawn", False),
        ("movielens1m", 2, 10_000, 16, "adamw", False),  # a larger model than a CPU trains together otherwise
    ),
    "cuda": (
        ("movielens100k", 64, 10_000, 8, "adam_lawn", False),
        ("movielens100k", 64, 10_000, 16, "adam_lawn", False),
        ("movielens100k", 64, 10_000, 16, "adamw", True),
        ("movielens100k", 64, 1000, 16, "adam_lawn", False),
        ("movielens1m", 16, 10_000, 16, "adam_lawn", False),
        ("movielens1m", 48, 10_000, 16, "adam_lawn", False),
    ),
}
TITLES = {"movielens100k": "MovieLens-100k", "movielens1m": "MovieLens-1M"}


def measure(
    given: Namespace, dataset_name: str, count: int, batch_size: int, factors: int, optim: str, seeds: bool
) -> bench.Row:
    device = torch.device(given.device)
    common = [
        *(f"dataset={dataset_name}", f"data_dir={given.data_dir.resolve()}", f"optim={optim}"),
        *(f"train.batch_size={batch_size}", f"model.factors={factors}"),
        # As many epochs as make the choices of a long run, none of them evaluated; LAWN switches in the first.
        *("train.epochs=1000", "eval.every=1000", *(["optim.free_epochs=0.5"] if "lawn" in optim else [])),
    ]
    configs = [compose(*common, f"optim.lr={1e-4 * (k + 1):g}", f"seed={k if seeds else 0}") for k in range(count)]
    dataset = task_builder(configs[0])(device).dataset
    alone, *runs = (
        Trainer(config, task_builder(config)(device, dataset), World(device)) for config in (configs[0], *configs)
    )
    vectorized = VectorizedTrainer(runs)

    def epoch_together() -> float:
        before = sum(run.seconds["train"] for run in runs)
        vectorized.train_epoch()
        return sum(run.seconds["train"] for run in runs) - before

    def epoch_alone() -> float:
        return dataset.num_train / bench.training_rate(alone)

    found = bench.interleave({"together": epoch_together, "alone": epoch_alone}, given.rounds)
    times = bench.median_ratio(found["together"], found["alone"])
    return {
        "seconds": {what: round(statistics.median(values), 3) for what, values in found.items()},
        "times_one": round(times, 2),
        "speedup": round(count / times, 2),
        "config": {
            "dataset": dataset_name,
            "runs": count,
            "batch_size": batch_size,
            "factors": factors,
            "optim": optim,
            "seeds": seeds,
            "execution": asdict(alone.execution),
        },
    }


def name(dataset_name: str, count: int, batch_size: int, factors: int, optim: str, seeds: bool) -> str:
    sweep = f"{count} runs of {optim}, {factors} factors, batch {batch_size:,}{', a seed each' if seeds else ''}"
    return f"{TITLES[dataset_name]}, {sweep}"


COLUMNS: bench.Columns = {
    "1 run, s/epoch": lambda row: f"{row['seconds']['alone']:.3g}",
    "N runs batched, s/epoch": lambda row: f"{row['seconds']['together']:.3g}",
    "batched / 1 run": lambda row: f"{row['times_one']:.1f}",
    "speedup over sequential": lambda row: f"{row['speedup']:.2f} x",
}
REMARKS = """Training alone, evaluation not counted. Runs of one seed see the same batches; with a seed each, every run
draws its own."""


def main() -> int:
    parser = bench.parser(__doc__, rounds=9)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args()
    title = f"A sweep in one process: NCF on MovieLens, medians of {given.rounds} rounds"
    return bench.main(
        *("sweep", given, title),
        lambda: {name(*sweep): measure(given, *sweep) for sweep in SWEEPS[torch.device(given.device).type]},
        lambda rows: f"{bench.table('sweep', COLUMNS, rows)}\n\n{REMARKS}",
    )


if __name__ == "__main__":
    sys.exit(main())
