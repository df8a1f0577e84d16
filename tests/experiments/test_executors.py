"""The same experiment through every executor, and drivers, jobs and nodes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from experiments.definitions.spec import Cell, Experiment
from experiments.execution.executor import Executor, Resources
from experiments.execution.pool import Pool
from experiments.planning.study import studies
from experiments.records import Store
from lawn.errors import ConfigError
from tests.experiments.helpers import ACCURACY, TUNED, run_experiment
from tests.experiments.slurm_stand_in import install
from tests.experiments.test_runner import DRIVER
from tests.helpers import FIXTURES, ROOT

pytestmark = pytest.mark.slow

CPU = Resources(gpus=0)
SMALL = ("dataset=digits", "model.widths=[8]", "dataset.limit=100", "optim=adam", "train.checkpoint_seconds=0.3")
LONG = Experiment(
    "long",
    "Three runs of some seconds",
    tuple(Cell(f"{rate}", (*SMALL, "train.epochs=800", f"optim.lr={rate}")) for rate in (0.01, 0.02, 0.03)),
    (ACCURACY,),
    seeds=1,
)
RANKS = Experiment(
    "ranks",
    "A run of two ranks",
    (Cell("MLP", ("dataset=imagenet", *FIXTURES["imagenet"], "model=mlp", "model.widths=[8]", "train.epochs=2")),),
    (ACCURACY,),
    seeds=1,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[object]:
    """A Ray cluster of a head without CPUs and two nodes of one core, started in another folder."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with chdir(tmp_path_factory.mktemp("ray")):
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Stand-ins for Slurm's commands; the folder with the states of jobs."""
    for name, value in install(tmp_path / "commands", tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("experiments.execution.slurm_queue.QUEUE_SECONDS", 1.0)
    monkeypatch.setattr("experiments.execution.slurm.DISK_SECONDS", 5.0)
    return tmp_path / "slurm"


@pytest.fixture(params=["slurm", "submitit_local", "ray"])
def make(request) -> Callable[..., Executor]:
    """Makes an executor of each kind, for runs below a folder."""
    if request.param == "ray":
        address = request.getfixturevalue("cluster").address
        from experiments.execution.ray_cluster import RayExecutor

        return lambda folder, resources=CPU: RayExecutor(address, resources)
    pytest.importorskip("submitit")
    from experiments.execution.slurm import SubmititExecutor

    if request.param == "slurm":
        request.getfixturevalue("slurm")
    name = {"slurm": "slurm", "submitit_local": "local"}[request.param]
    return lambda folder, resources=CPU: SubmititExecutor(folder / "runs", resources, 2, name, {"timeout_min": 5})


@pytest.fixture
def options(make, request) -> tuple[str, ...]:
    """The options of `experiments run` for the same executor."""
    kind = request.node.callspec.params["make"]
    if kind == "ray":
        return ("--executor", "ray", "--gpus", "0", "--address", request.getfixturevalue("cluster").address)
    return ("--executor", kind, "--gpus", "0", "--jobs", "2", "--time", "5m")


def cell_results(results: Path) -> dict[str, object]:
    """What every record says about the run itself. Vectorized runs differ by rounding."""
    return {record.name: pytest.approx(record.result["last"], rel=1e-4) for record in Store(results).all()}


def wait_until(find: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_the_records_are_those_of_the_local_pool(make, finished_tuned, tmp_path):
    assert run_experiment(TUNED, tmp_path, executor=make(tmp_path)) == []
    found = {record.name: record.result["last"] for record in Store(tmp_path / "results").all()}
    assert found == cell_results(finished_tuned / "results")
    lines = [(folder / "results" / "tuning" / "tuned.jsonl").read_text() for folder in (tmp_path, finished_tuned)]
    names = [[json.loads(line)["name"] for line in text.splitlines()] for text in lines]
    assert names[0] == names[1]


def test_a_run_of_several_ranks(make, tmp_path, tiny_data):
    extra = (f"data_dir={tiny_data}",)
    executor = make(tmp_path, Resources(gpus=0, ranks_per_node=2))
    assert run_experiment(RANKS, tmp_path, 1, extra=extra, executor=executor) == []
    (record,) = Store(tmp_path / "results").all()
    assert record.environment["ranks"] == 2
    assert run_experiment(RANKS, tmp_path / "alone", 1, extra=extra, executor=Pool(["cpu"])) == []
    (alone,) = Store(tmp_path / "alone" / "results").all()
    assert record.result["last"]["train_loss"] == pytest.approx(alone.result["last"]["train_loss"], rel=1e-3)


def processes_of(folder: Path) -> list[int]:
    """The processes that write to output.log of an unfinished run that has a checkpoint."""
    logs = [
        path.parent / "output.log" for path in folder.glob("*/checkpoint.pt") if not (path.parent / "DONE").exists()
    ]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            written = (process / "fd" / "1").readlink()
        except OSError:
            continue
        if written in logs:
            found.append(int(process.name))
    return found


KILL = """
import os, signal
from pathlib import Path
from tests.experiments.test_executors import processes_of, wait_until

def kill(folder):
    os.kill(wait_until(lambda: processes_of(Path(folder)))[0], signal.SIGKILL)

"""


def times_resumed(results: Path) -> list[int]:
    return sorted(len(record.environment.get("resumed", [])) for record in Store(results).all())


def test_a_job_that_is_killed_goes_on_from_its_checkpoint(make, tmp_path, capsys):
    with subprocess.Popen([sys.executable, "-c", f"{KILL}kill({str(tmp_path / 'runs')!r})"], cwd=ROOT) as killer:
        assert run_experiment(LONG, tmp_path, 1, executor=make(tmp_path), vectorize=1) == []
    assert killer.returncode == 0
    out = capsys.readouterr().out
    assert out.count("lost with its process") == 1
    assert "3 of 3 done" in out
    assert times_resumed(tmp_path / "results") == [0, 0, 1]


@pytest.mark.parametrize("which", [0, -1])
def test_a_rank_that_is_killed(make, tmp_path, tiny_data, capsys, which):
    """The other ends too, and the run goes on from its checkpoint."""
    (cell,) = RANKS.cells
    slow = (*cell.overrides[:-1], "train.epochs=100", "train.checkpoint_seconds=0.3")
    experiment = replace(RANKS, cells=(replace(cell, overrides=slow),))
    executor = make(tmp_path, Resources(gpus=0, ranks_per_node=2))
    with ThreadPoolExecutor(1) as thread:

        def kill() -> None:
            wait_until(lambda: len(processes_of(tmp_path / "runs")) == 2)
            os.kill(sorted(processes_of(tmp_path / "runs"))[which], signal.SIGKILL)

        killed = thread.submit(kill)
        assert run_experiment(experiment, tmp_path, 1, extra=(f"data_dir={tiny_data}",), executor=executor) == []
        killed.result()
    assert "once more" in capsys.readouterr().out
    assert times_resumed(tmp_path / "results") == [1]


def test_a_driver_that_is_killed_repeats_nothing(options, tmp_path):
    """The jobs of submitit go on without it, those of Ray from their checkpoints."""
    with driver(tmp_path, *options) as first:
        wait_until(lambda: len(processes_of(tmp_path / "runs")) == 2)
        first.kill()
    by_ray = "ray" in options
    running = [] if by_ray else processes_of(tmp_path / "runs")
    for process in running:
        os.kill(process, signal.SIGSTOP)  # so that the second command finds them at work
    second = driver(tmp_path, *options)
    assert second.stdout is not None
    assert "3 runs to do" in second.stdout.readline()
    for _ in running:
        assert "of an earlier call" in second.stdout.readline()
    for process in running:
        os.kill(process, signal.SIGCONT)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, out + err
    assert "3 of 3 done" in out
    assert times_resumed(tmp_path / "results") == ([0, 1, 1] if by_ray else [0, 0, 0])
    assert " done, " not in driver(tmp_path, *options).communicate(timeout=100)[0]


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_interrupted_from_a_terminal_or_terminated(options, tmp_path, number, send):
    """Those of submitit go on, those of Ray have stopped with a checkpoint."""
    command = driver(tmp_path, *options)
    wait_until(lambda: len(processes_of(tmp_path / "runs")) == 2)
    send(command.pid, number)
    out, err = command.communicate(timeout=100)
    assert command.returncode == 75
    if "ray" in options:
        logs = [path.read_text() for path in (tmp_path / "runs").glob("*/output.log")]
        assert [("SIGINT: " in log, "has stopped in epoch" in log) for log in logs] == [(True, True)] * 2
    else:
        assert "the jobs go on, and the same command finds them" in out, err
        wait_until(lambda: len(list((tmp_path / "runs").glob("*/DONE"))) == 2)
    assert "3 of 3 done" in driver(tmp_path, *options).communicate(timeout=200)[0]
    assert len(list(Store(tmp_path / "results").all())) == 3


def driver(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`experiments run` of LONG, in a process group of its own."""
    text = DRIVER.replace("test_runner", "test_executors")
    (folder / "driver.py").write_text(text)
    command = [sys.executable, str(folder / "driver.py"), "LONG", "--results", str(folder / "results"), *options]
    command += ["--vectorize", "1", "--set", f"runs_dir={folder}/runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)


def test_relative_folders(cluster, tmp_path):
    """They are those of the command, in every process."""
    from experiments.execution.ray_cluster import RayExecutor

    folder = Path(os.path.relpath(tmp_path))
    assert run_experiment(TUNED, folder, 1, executor=RayExecutor(cluster.address, CPU)) == []
    assert list((tmp_path / "runs").glob("*/DONE"))


@pytest.mark.parametrize(
    ("experiment", "resources", "message"),
    [
        (TUNED, Resources(gpus=0, cpus=2), "no room for a job of 0 GPUs and 2 CPUs"),
        (TUNED, Resources(gpus=0.5), "no room for a job of 0.5 GPUs and 1 CPUs"),
        (RANKS, Resources(gpus=0, ranks_per_node=3), "no room for a run of 3 ranks, each of 0 GPUs and 1 CPUs"),
    ],
)
def test_a_cluster_without_room(cluster, tmp_path, tiny_data, experiment, resources, message):
    """On none of its nodes, although together they may have it."""
    from experiments.execution.ray_cluster import RayExecutor

    with pytest.raises(ConfigError, match=message):
        run_experiment(
            experiment, tmp_path, 1, extra=(f"data_dir={tiny_data}",), executor=RayExecutor(cluster.address, resources)
        )


def test_all_jobs_are_stopped_with_a_checkpoint(cluster, tmp_path):
    """Those too that take longer for it than others."""
    from experiments.execution.ray_cluster import RayExecutor

    (study,) = studies(replace(LONG, cells=LONG.cells[:1]), extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    with RayExecutor(cluster.address, CPU) as executor:
        for job in study.outstanding(Store(tmp_path / "results")):
            executor.start([job])
        at_work = wait_until(lambda: len(found := processes_of(tmp_path / "runs")) == 2 and found)
        os.kill(at_work[0], signal.SIGSTOP)
        Timer(5, os.kill, (at_work[0], signal.SIGCONT)).start()
    logs = [path.read_text() for path in (tmp_path / "runs").glob("*/output.log")]
    assert ["has stopped in epoch" in log for log in logs] == [True, True]


def test_a_node_that_is_lost(cluster, tmp_path, capsys):
    from experiments.execution.ray_cluster import RayExecutor

    node = cluster.add_node(num_cpus=1)
    executor = RayExecutor(cluster.address, CPU)
    with ThreadPoolExecutor(1) as thread:

        def remove() -> None:
            wait_until(lambda: len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) == 3)
            cluster.remove_node(node, allow_graceful=False)

        removed = thread.submit(remove)
        assert run_experiment(LONG, tmp_path, 1, executor=executor, vectorize=1) == []
        removed.result()
    out = capsys.readouterr().out
    assert "lost with its process: " in out
    assert "3 of 3 done" in out
    assert times_resumed(tmp_path / "results") == [0, 0, 1]


def test_two_calls_see_the_end_of_a_job(slurm, tmp_path, monkeypatch):
    """The first deletes its result."""
    from experiments.execution.slurm import SubmititExecutor

    monkeypatch.setattr("experiments.execution.slurm.DISK_SECONDS", 1e9)
    (study,) = studies(replace(LONG, cells=LONG.cells[:1]), extra=(f"runs_dir={tmp_path / 'runs'}",), seeds=1)
    jobs = study.outstanding(Store(tmp_path / "results"))
    first, second = (SubmititExecutor(tmp_path / "runs", CPU, 2, "slurm", {"timeout_min": 5}) for _ in range(2))
    for executor in (first, second):
        executor.start(jobs)
        executor.wait(0)
    for executor in (first, second):
        (ended,) = wait_until(partial(executor.wait, 1))
        assert ended.failure is None
    assert len(list((tmp_path / "runs" / ".submitit").glob("*_result.pkl"))) == 0


@pytest.mark.parametrize("allowed", [True, False])
def test_a_preempted_slurm_job_is_requeued(slurm, tmp_path, capsys, allowed):
    """With a checkpoint, by submitit, without this process. If Slurm does not allow it, the job is started again."""
    from experiments.execution.slurm import SubmititExecutor

    if not allowed:
        (tmp_path / "commands" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    with ThreadPoolExecutor(1) as thread:

        def preempt() -> None:
            os.kill(wait_until(lambda: processes_of(tmp_path / "runs"))[0], signal.SIGUSR2)

        preempted = thread.submit(preempt)
        executor = SubmititExecutor(tmp_path / "runs", CPU, 2, "slurm", {"timeout_min": 5})
        assert run_experiment(LONG, tmp_path, 1, executor=executor, vectorize=1) == []
        preempted.result()
    out = capsys.readouterr().out
    assert ("; once more" in out) == (not allowed)
    assert "lost" not in out
    assert times_resumed(tmp_path / "results") == [0, 0, 1]
    logs = [path.read_text() for path in (tmp_path / "runs").glob("*/output.log")]
    assert sum("SIGUSR1: " in log and "has stopped in epoch" in log for log in logs) == 1
    assert list((tmp_path / "runs" / ".submitit").glob("*_submitted.pkl")) == []
