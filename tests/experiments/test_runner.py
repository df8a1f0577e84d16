"""Running experiments: whole miniatures, killed and started again, failures, the pool and the estimate of run times."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from experiments.definitions.spec import Cell, Experiment
from experiments.execution import executor
from experiments.execution.executor import JobResult, failure, job_results
from experiments.execution.pool import Pool, visible_gpus
from experiments.execution.runner import run
from experiments.execution.worker import work
from experiments.planning.estimate import RuntimeEstimate, duration
from experiments.planning.grid import Job
from experiments.planning.study import Study, studies
from experiments.record import Record
from experiments.records import Store
from experiments.reporting import report
from experiments.selection import EXPERIMENTS
from lawn.compose import compose
from lawn.identity import config_hash
from lawn.train import Stopped, train
from lawn.train.run_directory import RunDirectory
from tests.experiments.helpers import ACCURACY, MINI, SHORT, TUNED, SerialPool, miniature, records_of, run_experiment
from tests.helpers import FIXTURES, ROOT

TABLES = [e for e in EXPERIMENTS.values() if e.name not in ("demo", "figure2", "tuning_curves")]  # others' cells
# Whose kinds of runs the other tables have too, or other tests.
SLOW = ("table1", "table2", "table3", "table5", "automatic", "flattening_digits", "flattening_movielens100k")


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] * (e.name in SLOW)) for e in TABLES],
)
def test_a_miniature_of_each_table(experiment, tmp_path, tiny_data):
    tuned = experiment.name == "table4"
    small = miniature(experiment, tuned)
    assert run_experiment(small, tmp_path, 1, -1, (f"data_dir={tiny_data}",)) == []
    page = report.experiment_page(small, Store(tmp_path / "results"))
    for result in page.cell_results:
        assert result.records, result.cell.name
        assert result.epochs == 1
        assert result.failed or len(result.values(experiment.measures[0])) == 1
    parts = page.cell_results[0].tuning
    assert (len(parts.short), len(parts.full) > 6, len(parts.confirming)) == ((0, True, 6) if tuned else (0, False, 0))
    assert bool(page.cell_results[0].setting) == tuned
    report.write(page, tmp_path / "results")
    report.write_index([page], tmp_path / "results")
    text = (tmp_path / "results" / f"{experiment.name}.md").read_text()
    assert all(f'(runs/{experiment.name}.jsonl "{record.name}")' in text for record in records_of(page))


def test_diverged_runs_are_results(tmp_path, capsys):
    assert run_experiment(replace(MINI, cells=MINI.cells[:2]), tmp_path, executor=Pool(["cpu"])) == []
    out = capsys.readouterr().out
    assert out.count("diverged") == 2
    assert "4 of 4 done, 0 running, 0 failed, 0:00:00 left" in out


@pytest.mark.parametrize(("keys", "epochs"), [((), [1, 4, 7, 8]), (("eval.every=2",), [1, 2, 3, 4, 5, 6, 7, 8])])
def test_the_record_of_a_long_run_is_thinned(tmp_path, monkeypatch, keys, epochs):
    """Unless some epochs measure what others do not."""
    monkeypatch.setattr("experiments.records.EPOCHS", 3)
    overrides = (*SHORT, "train.epochs=8", *keys, f"runs_dir={tmp_path}")
    config = compose(*overrides)
    train(config)
    history = Store(tmp_path / "results").write(config, overrides, "long").history
    assert history["epoch"].tolist() == epochs
    table = pd.read_csv(RunDirectory(config).path / "metrics.csv").set_index("epoch")
    for column in ("train_loss", "test_accuracy"):
        assert history[column].to_numpy() == pytest.approx(table[column][epochs].to_numpy(), rel=1e-5, nan_ok=True)


def test_a_run_on_imagenet_takes_all_devices(tmp_path, tiny_data):
    places = (f"runs_dir={tmp_path}/runs", f"data_dir={tiny_data}")
    small = Cell("One", (*SHORT, "train.epochs=300"))
    large = Cell("All", ("dataset=imagenet", *FIXTURES["imagenet"], "model=mlp", "model.widths=[8]", "train.epochs=1"))
    (one,), (all_of_them,) = (
        study.outstanding(Store(tmp_path))
        for study in studies(Experiment("x", "X", (small, large), (), seeds=1), extra=places)
    )
    with Pool(["cpu", "cpu"]) as pool:
        pool.start([one])
        assert pool.places(one)
        assert not pool.places(all_of_them)
        assert [ended.failure for ended in pool.wait(60)] == [None]
        pool.start([all_of_them])
        assert not pool.places(one)
        assert [ended.failure for ended in pool.wait(60)] == [None]
        assert pool.places(all_of_them)


@pytest.mark.parametrize(("present", "visible"), [(None, "0,2"), ("7", "0,2"), ("4,5,6,7", "4,6")])
def test_ranks_see_the_gpus_of_their_job(present, visible):
    assert visible_gpus(["cuda:0", "cuda:2"], present) == visible


def test_the_best_setting_on_validation_fills_the_cell(tuned):
    store = Store(tuned / "results")
    (study,) = studies(TUNED)
    tuning = study.tuning(store)
    values: dict[float, list[float]] = {}
    for job in (*tuning.full, *tuning.confirming):
        record = store.read(job.name)
        values.setdefault(record.config["optim"]["lr"], []).append(record.result["last"]["val_accuracy"])
    confirmed = {rate: sum(found) / 3 for rate, found in values.items() if len(found) == 3}
    assert len(confirmed) == 3
    assert min(values[rate][0] for rate in confirmed) >= max(values[r][0] for r in values if r not in confirmed)
    records = study.results(store)
    assert [record.config["seed"] for record in records] == [0, 1]
    assert {record.config["optim"]["lr"] for record in records} <= {
        rate for rate in confirmed if confirmed[rate] == max(confirmed.values())
    }
    assert all(record.result["split"] == "test" for record in records)
    assert all(record.path.parent.name == "runs" for record in records)
    for job in tuning.jobs:
        record = store.read(job.name)
        assert record.path == tuned / "results" / "tuning" / "tuned.jsonl"
        assert record.outcomes is None
        assert command_of(record) == record.hash == job.name[-12:]
    for record in records:
        assert command_of(record) == record.hash
        assert record.scores.mean() == pytest.approx(record.value("headline"))
        last = json.loads((tuned / "runs" / record.name / "result.json").read_text())["last"]
        assert record.result["last"] == {key: float(f"{value:.9g}") for key, value in last.items()}


def command_of(record: Record) -> str:
    """The hash of the run that the command on a record starts."""
    lines = record.path.read_text().splitlines() if record.path.suffix == ".jsonl" else [record.path.read_text()]
    (content,) = [content for content in map(json.loads, lines) if content["hash"] == record.hash]
    python, script, *overrides = shlex.split(content["command"])
    assert (python, script) == ("python", "run.py")
    return config_hash(compose(*overrides))


def test_the_command_of_figure_1_is_quoted(tmp_path, tiny_data):
    figure = miniature(EXPERIMENTS["figure1"])
    assert run_experiment(figure, tmp_path, 1, -1, (f"data_dir={tiny_data}",)) == []
    for record in Store(tmp_path / "results").all():
        assert command_of(record) == record.hash


def test_what_a_killed_writer_leaves_is_no_record(tmp_path):
    run_experiment(replace(MINI, cells=MINI.cells[:1]), tmp_path, 1)
    store = Store(tmp_path / "results")
    (record,) = store.all()
    (store.runs / ".mini.jsonl.abc.jsonl").write_text('{"hash"')
    store.tuning.mkdir()
    (store.tuning / ".mini.jsonl.abc.jsonl").write_text('{"hash"')
    assert [other.name for other in store.all()] == [record.name]


def test_selection_on_test_is_another_study_and_says_so(tmp_path):
    store = Store(tmp_path / "results")
    assert run_experiment(TUNED, tmp_path, 1, selection="test") == []
    page = report.experiment_page(TUNED, store, "test")
    assert page.name == "tuned-selected-on-test"
    assert "chosen on the TEST split" in page.measured
    assert all(record.result["split"] == "test" for _, record in page.cell_results[0].tried)
    assert report.experiment_page(TUNED, store).cell_results[0].records == []
    assert "validation" in report.experiment_page(TUNED, store).measured


def test_a_job_that_dies_or_is_refused_does_not_keep_the_others(tmp_path, monkeypatch):
    """One cell has no data; another's process is killed from outside while it runs."""
    long = Cell("long", ("dataset=digits", "train.epochs=100000", "optim=adam"))
    absent = Cell("absent", ("dataset=imagenet", "optim=adam_lawn"))
    experiment = Experiment("three", "Three", (long, absent, MINI.cells[0]), (ACCURACY,))
    extra = (f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/nowhere")
    killer = subprocess.Popen([sys.executable, "-c", KILL, str(tmp_path / "runs"), "digits-mlp-adam-", "1"])
    store = Store(tmp_path / "results")
    failed = run(studies(experiment, extra=extra, seeds=1), store, Pool(["cpu", "cpu"]))
    assert killer.wait(10) == 0
    reasons = {ended.job.config.dataset.name: ended.failure for ended in failed}
    assert reasons["digits"] == "killed by SIGKILL"
    assert "put its images into" in reasons["imagenet"]
    assert len(failed) == 2
    (record,) = store.all()
    assert record.config["train"]["epochs"] == 3


def test_an_error_of_ours_is_the_reason_after_its_traceback(tmp_path, monkeypatch, capsys):
    (study,) = studies(replace(MINI, cells=MINI.cells[:1]), extra=(f"runs_dir={tmp_path}/runs",), seeds=1)
    (job,) = study.outstanding(Store(tmp_path))

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr("experiments.execution.worker.train", fail)
    assert work([job.config], tmp_path / "output.log") == 1
    out, err = capsys.readouterr()  # in place of the log
    assert err.startswith("Traceback (most recent call last):")
    assert out == "error: RuntimeError: CUDA error: an illegal memory access was encountered\n"


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Stopped("stopped in epoch 3"), 75, "stopped in epoch 3")],
)
def test_a_signal_is_a_line_in_the_log(tmp_path, monkeypatch, capsys, stop, code, said):
    """The first stops a run with a checkpoint, from which it may be started again; a second one stops it at once."""
    (study,) = studies(replace(MINI, cells=MINI.cells[:1]), extra=(f"runs_dir={tmp_path}/runs",), seeds=1)
    (job,) = study.outstanding(Store(tmp_path))

    def interrupt(*_):
        raise stop

    monkeypatch.setattr("experiments.execution.worker.train", interrupt)
    assert work([job.config], tmp_path / "output.log") == code
    assert capsys.readouterr() == (f"{said}\n", "")  # in place of the log


def group(folder):
    """Three runs that can be vectorized, and their directories."""
    configs = [compose(*SHORT, f"seed={seed}", f"runs_dir={folder}/runs") for seed in (0, 1, 2)]
    return configs, [RunDirectory(config) for config in configs]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_run_in_use_does_not_keep_the_others_of_its_group(tmp_path, monkeypatch, capsys, seconds):
    """They wait for it a while; then it fails alone."""
    configs, (used, *others) = group(tmp_path)
    monkeypatch.setattr("experiments.execution.worker.IN_USE_SECONDS", seconds)
    with ExitStack() as lock:
        lock.enter_context(used.lock())
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: lock.close())
        monkeypatch.setattr("experiments.execution.worker.time", clock)
        assert work(configs, tmp_path / "output.log") == (0 if seconds else 1)
    assert used.done == (seconds > 0)
    assert all(other.done for other in others)
    assert ("another process uses this run directory" in capsys.readouterr().out) == (seconds == 0)


def test_a_run_that_another_runner_takes_meanwhile_is_waited_for(tmp_path, monkeypatch):
    configs, (used, *others) = group(tmp_path)
    asked = []

    def in_use(config):
        asked.append(config)
        if len(asked) > len(configs):
            lock.close()
        return False

    monkeypatch.setattr("experiments.execution.worker._in_use", in_use)
    with ExitStack() as lock:
        lock.enter_context(used.lock())
        assert work(configs, tmp_path / "output.log") == 0
    assert len(asked) == 2 * len(configs)
    assert all(each.done for each in (used, *others))


def test_a_damaged_run_does_not_keep_the_others_of_its_group(tmp_path, capsys):
    configs, (damaged, *others) = group(tmp_path)
    damaged.path.mkdir(parents=True)
    (damaged.path / "config.yaml").write_text("hash: [")
    assert work(configs, tmp_path / "output.log") == 1
    assert "config.yaml: cannot be read" in capsys.readouterr().out
    assert all(other.done for other in others)


def test_a_damaged_run_directory_is_that_runs_failure_alone(tmp_path):
    experiment = replace(MINI, cells=(MINI.cells[0], MINI.cells[2]))
    (study, _) = studies(experiment, extra=(f"runs_dir={tmp_path}/runs",))
    folder = tmp_path / "runs" / study.outstanding(Store(tmp_path))[0].name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("hash: [")
    (failed,) = run_experiment(experiment, tmp_path, 1, executor=Pool(["cpu"]))
    assert "config.yaml: cannot be read" in str(failed.failure)
    assert len(list(Store(tmp_path / "results").all())) == 1


@pytest.mark.parametrize("problem", ["File exists", "Is a directory"])
def test_a_run_directory_that_cannot_be_written_is_that_runs_failure_alone(tmp_path, problem):
    experiment = replace(MINI, cells=(MINI.cells[0], MINI.cells[2]))
    (study, _) = studies(experiment, extra=(f"runs_dir={tmp_path}/runs",))
    folder = tmp_path / "runs" / study.outstanding(Store(tmp_path))[0].name
    if problem == "File exists":
        folder.parent.mkdir()
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / "output.log").mkdir(parents=True)
    (failed,) = run_experiment(experiment, tmp_path, 1, executor=Pool(["cpu"]))
    assert problem in str(failed.failure)
    assert len(list(Store(tmp_path / "results").all())) == 1


@pytest.mark.parametrize(
    ("sweep", "overrides", "problem"),
    [
        ("nothing", (), "sweep=nothing: no such sweep"),
        ("peak_lr", ("optim.lr=abc",), "optim.lr: Value 'abc' of type 'str' could not be converted to Float"),
        ("peak_lr", ("hydra.sweeper.params={optim.lr: 'fast,slow'}",), "optim.lr: Value 'fast'"),
        ("peak_lr", ("hydra.sweeper.params={optim.foo: '1,2'}",), "hydra.sweeper.params.optim.foo: no such key"),
        ("peak_lr", ("hydra.sweeper.params={optim.lr: '[1'}",), ""),
    ],
)
def test_a_cell_that_cannot_be_composed_says_why(sweep, overrides, problem):
    study = Study(Cell("bad", (*SHORT, *overrides), sweep=sweep))
    assert study.problem is not None
    assert study.problem.startswith(problem)
    assert "\n" not in study.problem
    assert study.outstanding(Store(Path("nowhere"))) == []
    assert list(study.final_runs(Store(Path("nowhere")))) == []


@pytest.mark.slow
def test_vectorized_runs_that_failed_are_tried_alone(tmp_path, capsys):
    cells = tuple(Cell(f"{lr}", (*SHORT[:1], *SHORT[2:], "train.epochs=600", f"optim.lr={lr}")) for lr in (0.01, 0.02))
    experiment = Experiment("two", "Two", cells, (ACCURACY,))
    killer = subprocess.Popen([sys.executable, "-c", KILL, str(tmp_path / "runs"), "digits-mlp-adam_lawn-", "1"])
    assert run_experiment(experiment, tmp_path, 1, executor=Pool(["cpu"])) == []
    assert killer.wait(10) == 0
    out = capsys.readouterr().out
    assert out.count("killed by SIGKILL; once more, alone") == 2
    assert "2 of 2 done" in out


class CancelledPool(SerialPool):
    """All that it starts is cancelled."""

    def start(self, jobs: list[Job]) -> None:
        self._ended = [JobResult(job, 0.0, "cancelled: job 7", len(jobs), cancelled=True) for job in jobs]


def test_vectorized_runs_that_are_cancelled_are_not_started_again(tmp_path, capsys):
    cells = tuple(Cell(f"{lr}", (*SHORT, f"optim.lr={lr}")) for lr in (0.01, 0.02))
    experiment = Experiment("two", "Two", cells, (ACCURACY,))
    ended = run_experiment(experiment, tmp_path, 1, executor=CancelledPool(["cpu"]))
    assert [result.failure for result in ended] == 2 * ["cancelled: job 7"]
    assert "once more" not in capsys.readouterr().out


class StoppedPool(SerialPool):
    """Is stopped by a signal when a process has finished the first of its runs."""

    def start(self, jobs: list[Job]) -> None:
        super().start(jobs[:1])
        raise Stopped


def test_a_stop_leaves_records_of_the_runs_that_have_finished(tmp_path, capsys):
    """Although the process of several runs has not ended."""
    cells = tuple(Cell(f"{lr}", (*SHORT, f"optim.lr={lr}")) for lr in (0.01, 0.02))
    experiment = Experiment("two", "Two", cells, (ACCURACY,))
    with pytest.raises(Stopped):
        run_experiment(experiment, tmp_path, 1, executor=StoppedPool(["cpu"]))
    (record,) = Store(tmp_path / "results").all()
    assert f"{record.name}: has finished, {record.headline:.2f}" in capsys.readouterr().out


# Kill the processes that write to output.log of run directories with this prefix, after the first line on an epoch.
KILL = """
import os, signal, sys, time
from pathlib import Path
folder, prefix, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
killed = set()
for _ in range(600):
    for log in folder.glob(prefix + "*/output.log"):
        if log in killed or "  epoch " not in log.read_text():
            continue
        for process in Path("/proc").glob("[0-9]*"):
            try:
                writes = os.path.samefile(process / "fd" / "1", log)
            except OSError:
                continue
            if writes:
                os.kill(int(process.name), signal.SIGKILL)
                killed.add(log)
                if len(killed) == number:
                    sys.exit(0)
    time.sleep(0.1)
sys.exit(1)
"""

DRIVER = """
import sys
from experiments import __main__ as command
from tests.experiments import test_runner
experiment = getattr(test_runner, sys.argv[1])
command.EXPERIMENTS[experiment.name] = experiment
if __name__ == "__main__":
    sys.exit(command.main(["run", experiment.name, *sys.argv[2:]]))
"""
KILLED = Experiment(
    "killed",
    "Killed in the middle",
    (
        Cell("Adam", (*SHORT, "optim=adam"), sweep="peak_lr"),
        Cell("Adam-LAWN", (*SHORT, "optim=adam_lawn")),
    ),
    (ACCURACY,),
    pairs=(("Adam", "Adam-LAWN"),),
    seeds=2,
)


ONE = Experiment("one", "One long run", (Cell("Adam", (*SHORT[:1], *SHORT[2:], "train.epochs=100000")),), (ACCURACY,))


def driver(experiment: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The real command with an experiment of this module, in a process group of its own."""
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(folder / "driver.py"), experiment, "--results", str(folder / "results"), *arguments]
    command += ["--devices", "cpu", "--set", f"runs_dir={folder}/runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, capsys):
    with driver("KILLED", tmp_path, "--seeds", "2") as first:
        assert first.stdout is not None
        assert any(" 3 of 16 done" in line for line in first.stdout)
        first.send_signal(signal.SIGKILL)
    recorded = [record.name for record in Store(tmp_path / "results").all()]
    assert len(recorded) >= 3
    _wait_until_nobody_writes(tmp_path / "runs")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/DONE")}
    assert run_experiment(KILLED, tmp_path, executor=Pool(["cpu"])) == []
    after = [record.name for record in Store(tmp_path / "results").all()]
    out = capsys.readouterr().out
    assert out.count(" done, ") + out.count(": has finished, ") == len(after) - len(recorded)
    assert set(recorded) < set(after)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/DONE")}.items()
    assert run_experiment(KILLED, tmp_path, executor=Pool(["cpu"])) == []
    assert " done, " not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_runner_and_its_runs_stops_them_with_checkpoints(tmp_path, number):
    """As a terminal sends it that is closed."""
    with driver("ONE", tmp_path, "--seeds", "1") as runner:
        for _ in range(1200):
            logs = list((tmp_path / "runs").glob("*/output.log"))
            if logs and "  epoch " in logs[0].read_text():
                break
            time.sleep(0.1)
        os.killpg(runner.pid, number)
        assert runner.wait(60) == 75
    (log,) = logs
    assert "has stopped in epoch" in log.read_text().splitlines()[-1]
    assert (log.parent / "checkpoint.pt").exists()


def test_a_job_whose_run_directory_has_gone_is_one_that_failed(tmp_path):
    job = next(iter(studies(MINI)[0].outstanding(Store(tmp_path / "results"))))
    job = replace(job, config=replace(job.config, runs_dir=str(tmp_path)))
    reason = failure(job, tmp_path / "gone" / "output.log")
    assert reason == f"{tmp_path}/gone: was deleted or moved while the run was at work in it"
    (tmp_path / "output.log").mkdir()
    reason = failure(job, tmp_path / "output.log")
    assert reason == f"{tmp_path}/output.log: cannot be read (Is a directory); move it away"


@pytest.mark.parametrize(
    ("ended", "lost", "cancelled"),
    [
        ([1], False, False),
        ([Stopped.exit_code], True, False),
        (["lost with its process: of its node"], True, False),
        ([1, Stopped.exit_code], True, False),
        ([1, "lost with its process: of its node"], True, False),
        (["cancelled: job 7"], False, True),
        ([1, "cancelled: job 7"], False, True),
        (["killed by SIGKILL"], False, False),
    ],
)
def test_what_the_end_of_any_rank_tells_of_a_job(tmp_path, ended, lost, cancelled):
    (study,) = studies(replace(MINI, cells=MINI.cells[:1]), extra=(f"runs_dir={tmp_path}",), seeds=2)
    jobs = study.outstanding(Store(tmp_path / "results"))
    (tmp_path / jobs[0].name).mkdir()
    (tmp_path / jobs[0].name / "output.log").write_text("epoch 1\nerror: the disk is full\n")
    (result,) = job_results(jobs[1:], jobs, ended, 6.0)  # it is asked for one of two
    assert (result.lost, result.cancelled, result.seconds, result.group_size) == (lost, cancelled, 3.0, 2)
    assert result.failure == next((how for how in ended if isinstance(how, str)), "the disk is full")


@pytest.mark.parametrize(("code", "asked"), [(0, 3), (1, 1)])
def test_the_result_of_a_job_that_succeeded_is_waited_for(tmp_path, monkeypatch, code, asked):
    """A remote disk shows it after a while."""
    seen = iter([False, False, True])
    monkeypatch.setattr(executor, "RunDirectory", lambda _: SimpleNamespace(done=next(seen)))
    monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: None))
    (study,) = studies(replace(MINI, cells=MINI.cells[:1]), extra=(f"runs_dir={tmp_path}",), seeds=1)
    jobs = study.outstanding(Store(tmp_path / "results"))
    (result,) = job_results(jobs, jobs, [code], 0.0)
    assert (result.failure is None) == (code == 0)
    assert len(list(seen)) == 3 - asked


def _wait_until_nobody_writes(folder: Path) -> None:
    """What a killed runner leaves behind ends by itself."""
    for _ in range(100):
        if not any(_writes_below(process, folder) for process in Path("/proc").glob("[0-9]*")):
            return
        time.sleep(0.1)
    raise AssertionError("a job outlived its runner")


def _writes_below(process: Path, folder: Path) -> bool:
    try:
        return (process / "fd" / "1").readlink().is_relative_to(folder)
    except OSError:
        return False


def test_the_budget_of_time(tmp_path, capsys):
    long = Experiment("long", "Long", (Cell("Adam", ("dataset=digits", "train.epochs=100000")),), (ACCURACY,))
    store = Store(tmp_path / "results")
    assert run(studies(long, extra=(f"runs_dir={tmp_path}/runs",), seeds=1), store, Pool(["cpu"]), budget=1) == []
    assert list(store.all()) == []
    assert "the time is up" in capsys.readouterr().out
    _wait_until_nobody_writes(tmp_path / "runs")


def number_missing(study: Study, store: Store) -> int:
    jobs, later = study.missing(store)
    return len(jobs) + later


def test_what_is_missing_and_how_long_it_takes(tuned, tmp_path):
    store = Store(tmp_path / "results")
    (study,), (more,) = studies(TUNED), studies(TUNED, seeds=3)
    assert number_missing(study, store) == 6 + 6 + 2
    assert number_missing(more, store) == 6 + 6 + 3
    assert RuntimeEstimate(store).seconds([study.grid.config]) is None
    assert duration(None) == "unknown"
    run_experiment(replace(MINI, cells=MINI.cells[:1]), tmp_path)
    estimate = RuntimeEstimate(store)
    records = list(store.all())
    each = sorted(sum(r.result["seconds"].values()) for r in records)
    expected = (each[0] + each[1]) / 2
    config = study.grid.config
    assert estimate.seconds([config]) == pytest.approx(expected)
    twice = replace(config, train=replace(config.train, epochs=6, batch_size=1000))
    assert estimate.seconds([config, twice]) == pytest.approx(3 * expected)
    shutil.copytree(tuned / "results", tmp_path / "results", dirs_exist_ok=True)
    assert number_missing(study, store) == 0
    assert number_missing(more, store) == 1
    assert duration(3661.4) == "1:01:01"


GOOD = tuple(
    Cell(f"{optim} {lr}", (*SHORT, f"optim={optim}", f"optim.lr={lr}"))
    for optim in ("adam", "adamw", "adam_lawn", "sgd", "lamb_lawn")
    for lr in (0.001, 0.002, 0.003, 0.01, 0.02, 0.03)
)
DIVERGE = tuple(
    Cell(f"diverges {momentum}", (*SHORT, "optim=sgd", "optim.lr=1e30", f"optim.momentum={momentum}"))
    for momentum in (0, 0.1, 0.2, 0.3, 0.4)
)
LONG = ("dataset=digits", "model.widths=[8]", "dataset.limit=100", "train.epochs=3000", "optim=adamp")
DIE = tuple(
    Cell(f"is killed {size}", (*LONG, f"train.batch_size={size}", "train.checkpoint_seconds=0.3"))
    for size in (97, 98, 99)
)
BAD = (
    Cell("no rate", (*SHORT, "optim=adam", "optim.lr=-1")),
    Cell("not its key", (*SHORT, "optim=sgd", "optim.betas=[0.9,0.99]")),
)
FORTY = Experiment("forty", "Forty jobs", (*BAD, *DIE, *DIVERGE, *GOOD), (ACCURACY,), seeds=1)


@pytest.mark.slow
def test_ten_of_forty_end_badly(tmp_path):
    """Five diverge, three are killed, two have bad configs: the others finish; a second call runs what is missing."""
    pytest.importorskip("adamp")
    store = Store(tmp_path / "results")
    with driver("FORTY", tmp_path, "--seeds", "1", "--jobs", "2") as command:
        kill = [sys.executable, "-c", KILL, str(tmp_path / "runs"), "digits-mlp-adamp-", str(len(DIE))]
        subprocess.run(kill, check=True)
        out, err = command.communicate(timeout=300)
    assert command.returncode == 1
    statuses = [record.result["status"] for record in store.all()]
    assert (statuses.count("done"), statuses.count("diverged")) == (30, 5)
    told = err.splitlines()
    assert len([line for line in told if line.startswith("diverged: digits-mlp-sgd-")]) == 5
    assert sum(": at update 1, largest gradient in " in line for line in told) == 5, err
    reasons = [line.rpartition("): ")[2] for line in told if line.startswith("failed: digits-mlp-adamp-")]
    assert reasons == 3 * ["killed by SIGKILL"]
    assert f"failed: {shlex.join(BAD[0].overrides)}: optim.lr=-1.0: must be a finite number above 0" in told
    assert any("optim.betas=[0.9, 0.99]: does not apply to optim=sgd" in line for line in told)
    assert len([line for line in told if line.startswith("failed: ")]) == 5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*") if path.name != "output.log"}
    with driver("FORTY", tmp_path, "--seeds", "1", "--jobs", "2") as command:
        out, err = command.communicate(timeout=300)
    assert command.returncode == 1
    assert out.count(" done, ") == 4  # three that were killed, and one that is refused again
    assert out.count("digits-mlp-adamp-") == 3
    assert len([line for line in err.splitlines() if line.startswith("failed: ")]) == 2
    assert len(list(store.all())) == 38
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} <= set(
        tmp_path.glob("runs/digits-mlp-adamp-*/*")
    )
