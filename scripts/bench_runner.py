"""Time what `experiments run` does itself:
python -m scripts.bench_runner [--jobs 10 100 1000 10000] [--executor-jobs 50]

The CPU time of its process for each job, and its memory: with jobs that do nothing, whose run directories are written
outside the measurement, and with a few very short runs through every executor of this machine. Prints a table and
writes the same with hardware and versions to results/bench/runner-cpu.json and .md.
"""

import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import psutil

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.execution.executor import Executor, JobResult, Resources
from experiments.execution.pool import Pool
from experiments.execution.runner import run
from experiments.planning.grid import Job
from experiments.planning.study import studies
from experiments.records import Store
from lawn.packages import is_installed
from lawn.train import train
from lawn.train.run_directory import RunDirectory, read_environment, read_result
from scripts import bench

OVERRIDES = ("dataset=digits", "model.widths=[8]", "dataset.limit=100", "train.epochs=3", "optim=adam")
MANY = Experiment("many", "Many runs", (Cell("Adam", OVERRIDES),), (Measure("headline", "test accuracy, %"),))


class Nothing:
    """An executor whose jobs have ended at once, each with the result of the same run."""

    size = 16

    def __init__(self, template: RunDirectory, _: Path) -> None:
        self._environment, self._result = read_environment(template.path), read_result(template.path)
        self._metrics = (template.path / "metrics.csv").read_text()
        self._ended: list[Job] = []
        self.seconds = 0.0  # of CPU time in this class

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None: ...

    def places(self, job: Job) -> int:
        return self.size - len(self._ended)

    @property
    def running(self) -> int:
        return len(self._ended)

    def start(self, jobs: list[Job]) -> None:
        begin = time.process_time()
        for job in jobs:
            directory = RunDirectory(job.config)
            directory.begin(self._environment)
            (directory.path / "metrics.csv").write_text(self._metrics)
            directory.finish(self._result)
        self._ended += jobs
        self.seconds += time.process_time() - begin

    def wait(self, timeout: float) -> list[JobResult]:
        ended, self._ended = self._ended, []
        return [JobResult(job, 0.0, None, 1) for job in ended]


def measure(folder: Path, count: int, make: Callable[[Path], Executor], tunes: bool = False) -> bench.Row:
    """Run a table of `count` jobs; `tunes`: their records are lines of one tuning file."""
    experiment = MANY
    if tunes:
        sweep = f"hydra.sweeper.params={{optim.lr: '{','.join(f'{1e-6 * (k + 1):.6g}' for k in range(count))}'}}"
        experiment = replace(MANY, cells=(Cell("Adam", (*OVERRIDES, sweep), sweep="peak_lr", grid_only=True),))
    process = psutil.Process()
    executor = make(folder / "runs")
    before, memory, start = time.process_time(), process.memory_info().rss, time.monotonic()
    with redirect_stdout(StringIO()):
        unsuccessful = run(
            studies(experiment, extra=(f"runs_dir={folder}/runs",), seeds=count),
            Store(folder / "results"),
            executor,
            vectorize=1,
        )
    assert not unsuccessful
    seconds = time.process_time() - before - getattr(executor, "seconds", 0.0)
    return {
        "jobs": count,
        "cpu_ms_per_job": round(1000 * seconds / count, 2),
        "wall_seconds": round(time.monotonic() - start, 1),
        "kb_per_job": round((process.memory_info().rss - memory) / 1024 / count, 1),
    }


@contextmanager
def executors() -> Iterator[dict[str, Callable[[Path], Executor]]]:
    """Those that this machine has, for two runs at the same time."""
    found: dict[str, Callable[[Path], Executor]] = {"pool of this machine": lambda _: Pool(["cpu", "cpu"])}
    cpu = Resources(gpus=0)
    with ExitStack() as stack:
        if is_installed("submitit"):
            from experiments.execution.slurm import SubmititExecutor

            found["submitit, processes of this machine"] = lambda runs: SubmititExecutor(runs, cpu, 2, "local")
        if is_installed("ray"):
            from ray.cluster_utils import Cluster

            from experiments.execution.ray_cluster import RayExecutor

            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
            stack.callback(cluster.shutdown)
            found["Ray, a cluster on this machine"] = lambda _: RayExecutor(cluster.address, cpu)
        yield found


def measure_all(given: Namespace) -> dict[str, bench.Row]:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (job,) = studies(MANY, extra=(f"runs_dir={folder}/template",), seeds=1)[0].outstanding(Store(folder / "none"))
        templates = {}
        for kind, split in (("test", "test"), ("tuning", "val")):
            config = replace(job.config, device="cpu", eval=replace(job.config.eval, split=split))
            train(config)
            templates[kind] = RunDirectory(config)
        for count in given.jobs:
            for kind, template in templates.items():
                place = folder / f"{kind}-{count}"
                title = f"{count:,} {kind} runs that do nothing"
                rows[title] = measure(place, count, partial(Nothing, template), kind == "tuning")
                print(title, json.dumps(rows[title]), flush=True)
        with executors() as found:
            for number, (title, make) in enumerate(found.items()):
                rows[title] = measure(folder / f"executor-{number}", given.executor_jobs, make)
                print(title, json.dumps(rows[title]), flush=True)
    return rows


COLUMNS: bench.Columns = {
    "jobs": lambda row: f"{row['jobs']:,}",
    "CPU time of the runner, ms a job": lambda row: f"{row['cpu_ms_per_job']:.1f}",
    "memory, KB a job": lambda row: f"{row['kb_per_job']:.1f}",
    "wall time, s": lambda row: f"{row['wall_seconds']:.1f}",
}
REMARKS = """The CPU time includes composing and checking the configs of all runs and writing their records."""


def main() -> int:
    parser = bench.parser(__doc__, rounds=1)
    parser.add_argument("--jobs", type=int, nargs="+", default=[10, 100, 1000, 10_000], metavar="N")
    parser.add_argument("--executor-jobs", type=int, default=50, metavar="N")
    given = parser.parse_args()
    return bench.main(
        *("runner", given, "The work of `experiments run` itself"),
        lambda: measure_all(given),
        lambda rows: f"{bench.table('what', COLUMNS, rows)}\n\n{REMARKS}",
    )


if __name__ == "__main__":
    sys.exit(main())
