"""What the runner starts, in which order, and how often; options that choose an executor; the table of the status."""

import argparse
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.definitions.spec import Cell, Experiment
from experiments.execution import overview, runner
from experiments.execution.agenda import Agenda
from experiments.execution.executor import Executor, JobResult
from experiments.execution.options import add_options, make_executor
from experiments.execution.overview import plan_rows, state, status_rows
from experiments.execution.pool import Pool
from experiments.execution.runner import RETRIES, run
from experiments.planning.estimate import RuntimeEstimate, kind_of
from experiments.planning.grid import Job
from experiments.planning.study import Study, Tuning, studies
from experiments.record import Record
from experiments.records import Store
from lawn.config import Config
from lawn.errors import ConfigError
from lawn.files import locked
from lawn.train import train
from tests.experiments.helpers import ACCURACY, SHORT, TUNED, SerialPool, run_experiment

MANY = Experiment("many", "Many short runs", (Cell("Adam", (*SHORT, "optim=adam")),), (ACCURACY,))


def agenda_of(folder: Path, experiment: Experiment, seeds: int) -> Agenda:
    store = Store(folder / "results")
    return Agenda(studies(experiment, extra=(f"runs_dir={folder}/runs",), seeds=seeds), store, RuntimeEstimate(store))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
def test_vectorizable_jobs_are_shared_equally_among_free_places(tmp_path_factory, seeds, places, vectorize):
    agenda = agenda_of(tmp_path_factory.mktemp("agenda"), MANY, seeds)
    taken: list[list[str]] = []
    while jobs := agenda.take(lambda _: places - len(taken), vectorize):
        taken.append([job.name for job in jobs])
    names = [name for group in taken for name in group]
    assert len(names) == len(set(names)) == min(seeds, places * vectorize)
    sizes = list(map(len, taken))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= vectorize
    assert agenda.remaining == seeds


def test_the_longest_job_is_first_and_an_unknown_one_before_it(tmp_path):
    run_experiment(MANY, tmp_path, 1)  # so that the pace of such runs is known
    epochs = {"short": 4, "long": 300, "middle": 30}
    cells = [Cell(name, (*SHORT, "optim=sgd", f"train.epochs={count}")) for name, count in epochs.items()]
    cells.append(Cell("unknown", ("dataset=movielens100k", "train.epochs=1")))
    agenda = agenda_of(tmp_path, replace(MANY, cells=tuple(cells)), 1)
    assert agenda.seconds_left is None
    order = []
    while jobs := agenda.take(lambda _: 1, 1):
        order += [job.config.train.epochs for job in jobs]
    assert order == [1, 300, 30, 4]
    assert agenda.remaining == 4


@pytest.mark.parametrize("refused_first", [True, False])
def test_a_job_that_is_refused_is_vectorized_with_no_other(tmp_path, refused_first):
    """It would fail them."""
    good, bad = MANY.cells[0], Cell("not its key", (*SHORT, "optim=adam", "optim.momentum=0.9"))
    cells = (bad, good) if refused_first else (good, bad)
    agenda = agenda_of(tmp_path, replace(MANY, cells=cells), 2)
    groups = []
    while jobs := agenda.take(lambda _: 1, 16):
        groups.append([job.config.optim.momentum for job in jobs])
    assert sorted(groups, key=len) == [[0.9], [0.9], [None, None]]


def test_the_number_of_seeds_is_that_of_the_command_or_of_the_cell_or_of_the_table():
    cells = (MANY.cells[0], replace(MANY.cells[0], row="Other", seeds=5))
    experiment = replace(MANY, cells=cells, seeds=3)
    assert [study.seeds for study in studies(experiment)] == [3, 5]
    assert [study.seeds for study in studies(experiment, seeds=2)] == [2, 2]


def test_studies_are_asked_again_only_when_their_jobs_are_done(tmp_path, monkeypatch):
    """So that the work for a job does not grow with their number."""
    asked = Counter[int]()
    missing = Study.missing

    def count(study: Study, store: Store) -> tuple[list[Job], int]:
        asked[id(study)] += 1
        return missing(study, store)

    monkeypatch.setattr(Study, "missing", count)
    assert run_experiment(MANY, tmp_path, 12) == []
    assert list(asked.values()) == [2]
    asked.clear()
    assert run_experiment(TUNED, tmp_path, 2) == []
    assert list(asked.values()) == [1 + 2 + 1 + 1]  # grid, beyond its ends, more seeds, test runs, none


def test_what_another_command_records_while_a_study_is_asked(tmp_path, finished_tuned, monkeypatch):
    """The study goes on, although none of the runs is missing on which its next ones depend."""
    tuning = Study.tuning

    def record_after(study: Study, store: Store) -> Tuning:
        found = tuning(study, store)
        shutil.copytree(finished_tuned / "results" / "tuning", tmp_path / "results" / "tuning", dirs_exist_ok=True)
        return found

    monkeypatch.setattr(Study, "tuning", record_after)
    agenda = agenda_of(tmp_path, TUNED, 2)
    assert [job.tunes for job in agenda.take(lambda _: 1, 16)] == [False, False]


def test_runs_are_counted_although_their_number_is_an_estimate(tmp_path, capsys):
    assert run_experiment(TUNED, tmp_path, 2) == []
    counts = re.findall(r"(\d+) of (\d+) done", capsys.readouterr().out)
    assert [int(done) for done, _ in counts] == list(range(1, len(counts) + 1))
    assert counts[-1][0] == counts[-1][1]


def test_the_time_is_not_up_if_all_is_done(tmp_path, capsys):
    assert run_experiment(MANY, tmp_path, 1) == []
    store = Store(tmp_path / "results")
    assert run(studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=1), store, Losing(0), budget=0) == []
    assert "the time is up" not in capsys.readouterr().out


def test_no_job_starts_after_the_time_is_up(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Waiting(Losing):
        def wait(self, timeout: float) -> list[JobResult]:
            clock[0] += timeout
            return super().wait(timeout)

    executor, store = Waiting(0), Store(tmp_path / "results")
    chosen = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    assert run(chosen, store, executor, budget=1, vectorize=1) == []
    assert sum(executor.starts.values()) == len(list(store.all())) == 1
    assert "the time is up" in capsys.readouterr().out


def test_a_run_that_a_grid_names_twice_is_run_once(tmp_path):
    cell = Cell("Adam", (*SHORT, "optim=adam", "hydra.sweeper.params={optim.lr: '0.01,1e-2,0.02'}"), sweep="peak_lr")
    executor = Losing(0)
    assert run_experiment(replace(MANY, cells=(replace(cell, grid_only=True),)), tmp_path, executor=executor) == []
    assert sorted(executor.starts.values()) == [1, 1]


class Losing(SerialPool):
    """Loses each of its jobs some times."""

    def __init__(self, times: int) -> None:
        super().__init__(["cpu"])
        self.times = times
        self.starts = Counter[str]()

    def start(self, jobs: list[Job]) -> None:
        self.starts.update(job.name for job in jobs)
        if self.starts[jobs[0].name] > self.times:
            super().start(jobs)
        else:
            self._ended = [JobResult(job, 0.0, "lost with its process", len(jobs), lost=True) for job in jobs]


@pytest.mark.parametrize(("times", "started"), [(1, 2), (RETRIES, RETRIES + 1), (RETRIES + 1, RETRIES + 2)])
def test_lost_jobs_are_started_again(tmp_path, times, started):
    """A few times together, then once more alone."""
    executor = Losing(times)
    assert run_experiment(MANY, tmp_path, 3, executor=executor) == []
    assert set(executor.starts.values()) == {started}


def test_jobs_that_are_lost_again_and_again_fail(tmp_path):
    executor = Losing(100)
    failed = run_experiment(MANY, tmp_path, 3, executor=executor)
    assert [ended.failure for ended in failed] == ["lost with its process"] * 3
    assert set(executor.starts.values()) == {RETRIES + 2}


def test_runs_that_are_finished_are_recorded_without_a_process(tmp_path):
    """As those that ended while no command was at work."""
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=3)
    store = Store(tmp_path / "results")
    first, second, third = study.outstanding(store)
    train(replace(first.config, device="cpu"))
    executor = Losing(0)
    assert run([study], store, executor) == []
    assert set(executor.starts) == {second.name, third.name}
    assert len(study.results(store)) == 3


def test_a_record_of_another_runner_is_not_run_again(tmp_path):
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    ours, theirs = Store(tmp_path / "results"), Store(tmp_path / "results")
    first, second = study.outstanding(ours)

    class WithAnother(Losing):
        def start(self, jobs: list[Job]) -> None:
            if not self.starts:  # meanwhile the other one finishes the second job
                train(replace(second.config, device="cpu"))
                theirs.write(second.config, second.overrides, second.experiment)
            super().start(jobs)

    executor = WithAnother(0)
    assert run([study], ours, executor, vectorize=1) == []
    assert set(executor.starts) == {first.name}


def test_the_state_of_runs(tmp_path):
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=6)
    store = Store(tmp_path / "results")
    done, recorded, running, failed, damaged, _ = study.outstanding(store)
    for job in (done, recorded):
        train(replace(job.config, device="cpu"))
    store.write(recorded.config, recorded.overrides, recorded.experiment)
    folders = {job.name: tmp_path / "runs" / job.name for job in (running, failed, damaged)}
    for folder in folders.values():
        folder.mkdir()
    (folders[failed.name] / "output.log").write_text("epoch 1\nerror: the disk is full\n")
    (folders[damaged.name] / "config.yaml").write_text("hash: [")
    (folders[running.name] / "output.log").write_text("error: of an earlier process\n")
    with locked(folders[running.name] / ".lock"):
        (row,) = status_rows([study], store, RuntimeEstimate(store))
    assert row["done"] == "2/6"
    assert (row["queued"], row["running"], row["failed"]) == (0, 1, 2)
    assert row["time left"].startswith("0:00:0")


def test_a_run_is_queued_until_it_has_begun(tmp_path):
    """Whatever an earlier process has written."""
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    job, other = study.outstanding(Store(tmp_path / "results"))
    folder = tmp_path / "runs" / job.name
    folder.mkdir(parents=True)
    (folder / "output.log").write_text("error: the disk is full\n")
    assert [state(each, {job.name}) for each in (job, other)] == ["queued", "waiting"]
    assert state(job, {other.name}) == "failed"
    with locked(folder / ".lock"):
        assert state(job, {job.name}) == "running"


def test_the_time_left_is_without_the_epochs_that_are_done(tmp_path, monkeypatch):
    """A run of three epochs, of which one is done, and one that has not begun."""
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n")

    def directory(config: Config) -> SimpleNamespace:
        return SimpleNamespace(path=tmp_path / str(config.seed), done=False, in_use=False)

    monkeypatch.setattr(overview, "RunDirectory", directory)
    (row,) = status_rows([study], Store(tmp_path / "results"), estimate_of(("digits", "mlp", 128, 100.0)))
    assert row["time left"] == "0:08:20"


def test_a_run_of_two_cells_is_planned_once(tmp_path):
    cells = (*MANY.cells, replace(MANY.cells[0], row="The same"))
    estimate = estimate_of(("digits", "mlp", 128, 100.0))
    store = Store(tmp_path / "results")
    rows, total, seconds = plan_rows(studies(replace(MANY, cells=cells), seeds=2), store, estimate)
    assert [(row["seeds"], row["time"]) for row in rows] == [("0/2", "0:10:00")] * 2
    assert (total, seconds) == (2, [300.0, 300.0])


def test_the_time_left_is_that_of_all_epochs_of_the_runs_without_a_record(tmp_path):
    estimate = estimate_of(("digits", "mlp", 128, 100.0))
    agenda = Agenda(studies(MANY, seeds=2), Store(tmp_path / "results"), estimate)
    (job,) = agenda.take(lambda _: 1, 1)
    assert agenda.seconds_left == 600
    agenda.recorded(job)
    assert agenda.seconds_left == 300


def test_the_time_left_is_shared_by_as_many_processes_as_have_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Agenda, "seconds_left", 90.0)
    session = runner._Session(studies(MANY, seeds=3), Store(tmp_path / "results"))
    assert [session.time_left(processes) for processes in (1, 2, 8)] == ["0:01:30", "0:00:45", "0:00:30"]


def test_an_address_where_nothing_listens(tmp_path):
    """Ray itself tries for minutes and cannot be interrupted."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    executor = executor_of(tmp_path, "--executor", "ray", "--address", address)
    with pytest.raises(ConfigError, match=f"--address {address}: no cluster can be reached there"):
        executor.__enter__()


def executor_of(folder: Path, *options: str) -> Executor:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return make_executor(parser.parse_args(options), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "1"), "--gpus: only with --executor slurm, submitit_local, ray"),
        (("--executor", "ray", "--devices", "cpu"), "--devices: only with --executor local"),
        (("--executor", "ray", "--partition", "gpu"), "--partition: only with --executor slurm"),
        (("--executor", "slurm", "--address", "auto"), "--address: only with --executor ray"),
        (("--executor", "slurm"), '--executor: Could not detect "srun", are you indeed on a slurm cluster?'),
        (("--executor", "submitit_local", "--nodes", "2"), "--nodes: only with --executor slurm, ray"),
        (("--devices", "warp"), "--devices warp: not on this machine, which has cpu"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ConfigError) as raised:
        executor_of(tmp_path, *options)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("name", ["slurm", "submitit_local", "ray"])
def test_a_package_that_is_missing(tmp_path, name, monkeypatch):
    monkeypatch.setattr("lawn.packages.find_spec", lambda _: None)
    extra = "ray" if name == "ray" else "slurm"
    with pytest.raises(ConfigError, match=rf"is not installed; pip install '.\[{extra}\]'"):
        executor_of(tmp_path, "--executor", name)


def test_the_default_is_the_pool_of_this_machine(tmp_path):
    pool = executor_of(tmp_path, "--devices", "cpu", "--jobs", "3")
    assert isinstance(pool, Pool)
    assert pool.size == 3


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ((), ["cuda:0", "cuda:1"]),
        (("--jobs", "3"), ["cuda:0", "cuda:1", "cuda:0"]),
        (("--devices", "cuda:1", "--jobs", "2"), ["cuda:1", "cuda:1"]),
        (("--devices", "cpu"), ["cpu"]),
    ],
)
def test_the_slots_of_a_machine_with_gpus(tmp_path, monkeypatch, options, slots):
    """A process that has used a GPU must not be forked."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pool = executor_of(tmp_path, *options)
    assert pool._slots == slots
    assert pool._context.get_start_method() == ("forkserver" if slots == ["cpu"] else "spawn")


def test_each_job_has_the_device_of_its_slot(tmp_path, monkeypatch):
    """One that uses all devices has a rank on each."""
    large = Cell("All", ("dataset=imagenet", "train.epochs=1"))
    chosen = studies(replace(MANY, cells=(*MANY.cells, large)), extra=(f"runs_dir={tmp_path}/runs",), seeds=2)
    one, other, whole, _ = (job for study in chosen for job in study.outstanding(Store(tmp_path / "results")))
    started = []

    def process(target: Callable[..., None], args: tuple[Any, ...]) -> SimpleNamespace:
        ((config,), devices, *_) = args
        started.append((config.device, config.train.devices, devices))
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for jobs in ((one, other), (whole,)):
        pool = executor_of(tmp_path)
        pool._context = SimpleNamespace(get_start_method=lambda: "spawn", Process=process)
        for job in jobs:
            assert pool.places(job)
            pool.start([job])
        assert not pool.places(one)
    assert started == [
        ("cuda:0", None, ["cuda:0"]),
        ("cuda:1", None, ["cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
    ]


def estimate_of(*paces: tuple[str, str, int, float]) -> RuntimeEstimate:
    """From a record for each dataset, model, batch size and seconds per epoch."""
    estimate = RuntimeEstimate(SimpleNamespace(all=list))
    for dataset, model, size, seconds in paces:
        estimate.add(
            Record(
                path=Path("none.json"),
                name="",
                hash="",
                config={"dataset": {"name": dataset}, "model": {"name": model}, "train": {"batch_size": size}},
                environment={"device": "cpu", "cpu": "a CPU"},
                result={"seconds": {"train": 2 * seconds}, "last": {"epoch": 2}},
                columns={},
            )
        )
    return estimate


def test_the_nearest_batch_size_is_the_one_of_the_smallest_ratio():
    """Of the same dataset and model: 400 is 4 times 100, and 1,000 is 2.5 times 400."""
    mlps = ("digits", "mlp", 100, 1.0), ("digits", "mlp", 1000, 2.0)
    estimate = estimate_of(*mlps, ("digits", "vgg19", 400, 9.0), ("cifar10", "mlp", 400, 9.0))
    assert estimate.seconds_per_epoch(("digits", "mlp", 400)) == 2.0
    assert estimate.seconds_per_epoch(("digits", "mlp", 100)) == 1.0
    assert estimate.seconds_per_epoch(("cifar10", "vgg19", 400)) is None


@pytest.mark.parametrize("gpu", [False, True])
def test_times_are_those_of_this_kind_of_device(tmp_path, monkeypatch, gpu):
    """If there are any; `hardware` chooses by name."""
    (study,) = studies(MANY, extra=(f"runs_dir={tmp_path}/runs",), seeds=1)
    (job,) = study.outstanding(Store(tmp_path / "results"))
    train(replace(job.config, device="cpu"))
    on_cpu = Store(tmp_path / "results").write(job.config, job.overrides, job.experiment)
    paces = {"cpu": on_cpu.seconds_per_epoch, "NVIDIA H100": on_cpu.seconds_per_epoch / 8}
    seconds = {name: pace * on_cpu.result["last"]["epoch"] for name, pace in paces.items()}
    on_gpu = replace(
        on_cpu,
        environment={**on_cpu.environment, "device": "NVIDIA H100"},
        result={**on_cpu.result, "seconds": {"train": seconds["NVIDIA H100"]}},
    )
    kind = kind_of(job.config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    store = Store(tmp_path / "results")
    assert RuntimeEstimate(store).seconds_per_epoch(kind) == paces["cpu"]  # all that there is
    for hardware, expected in (("", "NVIDIA H100" if gpu else "cpu"), ("H100", "NVIDIA H100")):
        estimate = RuntimeEstimate(store, hardware)
        estimate.add(on_gpu)
        assert estimate.seconds_per_epoch(kind) == pytest.approx(paces[expected])
