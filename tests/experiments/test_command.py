"""python -m experiments: what it prints, what it refuses."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from experiments import __main__ as command
from experiments.definitions.spec import Cell
from experiments.execution.options import seconds
from tests.experiments.helpers import MINI, TUNED
from tests.helpers import ROOT


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Exit code, standard output and standard error of a command line, with results in the test's folder."""
    monkeypatch.setitem(command.EXPERIMENTS, "mini", MINI)
    monkeypatch.setitem(command.EXPERIMENTS, "tuned", TUNED)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = command.main([*arguments, "--results", str(tmp_path / "results")])
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def test_plan_run_plan_report(call, tmp_path):
    code, out, _ = call("plan", "tuned", "--seeds", "2")
    assert code == 0
    assert "0/12" in out
    assert "0/2" in out
    assert out.endswith("0 done; the remaining runs take an unknown time if run sequentially (estimated from recorded "
                        "runs); 14 runs have no similar record\n")  # fmt: skip
    assert not (tmp_path / "results").exists()
    code, out, err = call("run", "tuned", "--seeds", "2", "--devices", "cpu", "--set", f"runs_dir={tmp_path}/runs")
    assert (code, err) == (0, "")
    assert " 0 running, 0 failed, 0:00:00 left" in out
    assert f"{tmp_path}/results/tuned.md" in out
    code, out, _ = call("plan", "tuned", "--seeds", "3")
    (tried, all_of_them), (filled, seeds) = (map(int, pair) for pair in re.findall(r"(\d+)/(\d+)", out))
    assert (tried, filled, seeds) == (all_of_them, 2, 3)
    assert f"1 cells, {tried + 3} runs, {tried + 2} done" in out
    assert "0:00:0" in out.splitlines()[-1]
    page = (tmp_path / "results" / "tuned.md").read_text()
    (tmp_path / "results" / "tuned.md").unlink()
    assert call("report", "tuned")[0] == 0
    assert (tmp_path / "results" / "tuned.md").read_text() == page


def test_status_and_node_hours(call, tmp_path):
    placed = ("--seeds", "2", "--set", f"runs_dir={tmp_path}/runs")
    assert status_of(call("status", "tuned", *placed)) == ("0/14", "0", "0", "unknown")
    assert call("run", "tuned", "--devices", "cpu", *placed)[0] == 0
    done, running, failed, left = status_of(call("status", "tuned", *placed))
    tuned, total = map(int, done.split("/"))
    assert tuned == total >= 14
    assert (running, failed, left) == ("0", "0", "0:00:00")
    code, out, _ = call("plan", "tuned", "--seeds", "1000", "--num-devices", "64", "--devices-per-node", "8")
    assert code == 0
    sequential, at_least = (to_seconds(text) for text in re.findall(r"\b(\d+:\d\d:\d\d)\b", out)[-2:])
    assert at_least == pytest.approx(sequential / 64, abs=1)
    devices, nodes = map(float, re.findall(r"([\d.]+) (?:device|node) hours", out))
    assert devices == pytest.approx(sequential / 3600, abs=0.06)
    assert nodes == pytest.approx(devices / 8, abs=0.06)
    _, out, _ = call("plan", "tuned", "--seeds", "1000", "--hardware", "h100", "--num-devices", "64")
    assert "take an unknown time if run sequentially (estimated from recorded runs on h100); 998 runs have no" in out
    assert "hours" not in out


def test_the_status_of_a_simulation(call):
    name = next(iter(command.SIMULATIONS))
    assert re.search(rf"{name} +0/1 +\d+:\d\d:\d\d\n", call("status", name)[1])


def to_seconds(text: str) -> int:
    hours, minutes, seconds = map(int, text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def status_of(called: tuple[int, str, str]) -> tuple[str, ...]:
    """What `status` has printed of its only cell: done, running, failed and the time left."""
    code, out, err = called
    assert (code, err) == (0, "")
    (row,) = re.findall(r"(\d+/\d+) +0 +(\d+) +(\d+) +(\S+)\n", out)
    return tuple(row)


def test_a_dataset_that_cannot_be_read_is_one_line(call, tmp_path, monkeypatch):
    """The runs of other datasets go on."""
    absent = Cell("NCF", ("dataset=movielens100k", "train.epochs=2"))
    monkeypatch.setitem(command.EXPERIMENTS, "absent", replace(MINI, cells=(MINI.cells[0], absent), seeds=1))
    (tmp_path / "file").write_text("")  # no folder can be made below a file
    placed = (f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/file/data")
    code, out, err = call("run", "absent", "--devices", "cpu", "--set", *placed)
    assert code == 1
    assert "1 of 1 done" in out
    (line,) = err.splitlines()
    assert line.startswith("failed: all runs of dataset=movielens100k: ")
    assert f"{tmp_path}/file" in line


def test_failed_runs_are_named_and_fail_the_command(call, tmp_path, monkeypatch):
    """Here their data go after they have been read once."""
    monkeypatch.setattr(command, "dataset_reader", lambda _: lambda: None)
    absent = Cell("NCF", ("dataset=movielens100k", "train.epochs=2"))
    monkeypatch.setitem(command.EXPERIMENTS, "absent", replace(MINI, cells=(absent,)))
    (tmp_path / "file").write_text("")  # no folder can be made below a file
    placed = (f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/file/data")
    code, _, err = call("run", "absent", "--devices", "cpu", "--seeds", "2", "--set", *placed)
    assert code == 1
    first, second = err.splitlines()
    assert re.match(r"failed: movielens100k-\S+-s0-\w{12} \(dataset=movielens100k train.epochs=2 seed=0\): ", first)
    assert "train.epochs=2 seed=1): " in second
    assert f"{tmp_path}/file" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "table9"], "table9: no such experiment; choose from table1, table2"),
        (["plan", "table4", "--only", "dataset=mnist"], "--only dataset=mnist: table4 has no such cell"),
        (["run", "mini", "--set", "train.epochs=1"], "train.epochs=1: only where and how to run can be set: logger,"),
        (["plan", "mini", "--set", "run_dir=x"], "run_dir=x: only where and how to run can be set: logger,"),
        (["run", "mini", "--set", "device=cpu"], "device=cpu: only where and how to run can be set"),
        (["run", "mini", "--set", "logger=wand"], "logger=wand: no such logger; choose from csv, wandb"),
        (["report", "table9"], "table9: no such experiment"),
        (["report", "mini"], "--results "),  # is not there
        (["plan", "mini", "--short"], "--short: mini has one budget of epochs; leave it out"),
        (["plan", "tuning_curves", "--seeds", "5"], "--seeds: tuning_curves runs every setting once; leave it out"),
        (["run", "smd_rayleigh", "--budget", "0s"], "--budget: smd_rayleigh is a simulation, without runs"),
        (["run", "smd_rayleigh", "--executor", "ray"], "--executor: smd_rayleigh is a simulation, without runs"),
        (["plan", "smd_rayleigh", "--hardware", "h100"], "--hardware: smd_rayleigh is a simulation, without runs"),
        (["plan", "mini", "smd_rayleigh", "--only", "optim=adam"], "--only: smd_rayleigh is a simulation"),
        (["serve", "smd_rayleigh", "--set", "data_dir=x"], "--set: smd_rayleigh is a simulation, without runs"),
        (["serve", "--seeds", "5"], "--only, --set, --short and --seeds choose runs whose state is shown"),
        (["run", "mini", "--devices", "warp"], "--devices warp: not on this machine, which has cpu"),
    ],
)
def test_bad_input_is_one_line(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_folder_with_a_page_alone_is_reported_on(tmp_path, capsys):
    """As `run` leaves it if its time is up before the first run."""
    (tmp_path / "demo.md").write_text("")
    assert command.main(["report", "demo", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "demo.md").read_text() != ""
    capsys.readouterr()


def test_a_folder_of_something_else_is_not_reported_on(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert command.main(["report", "--results", str(tmp_path)]) == 2
    assert f"--results {tmp_path}: holds other files, and none of runs, tuning," in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_with_run_directories_is_not_reported_on(tmp_path, capsys):
    """As the checkout, where `run.py` puts them."""
    (tmp_path / "runs" / "digits-mlp-adam").mkdir(parents=True)
    assert command.main(["report", "--results", str(tmp_path)]) == 2
    assert f"--results {tmp_path}: its runs has run directories, not files of records" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_place_that_is_none(call, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("run", "mini", "--set", f"runs_dir={tmp_path}/file/runs")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path}/file/runs" in err


@pytest.mark.parametrize("folder", ["results", "results/runs", "results/tuning"])
def test_results_that_cannot_be_written_are_found_before_the_runs(call, tmp_path, folder):
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).write_text("")
    code, out, err = call("run", "mini", "--set", f"runs_dir={tmp_path}/runs")
    assert (code, out, err) == (2, "", f"error: --results {tmp_path}/{folder}: cannot be written\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "mini", "--budget", "soon"],
        ["run", "mini", "--budget", "h"],
        ["run", "mini", "--budget", f"{'9' * 400}h"],
        ["run", "mini", "--jobs", "0"],
        ["run", "mini", "--jobs", "9999999999"],
        ["run", "mini", "--executor", "ray", "--gpus", "1e30"],
        ["run", "mini", "--seeds", "-1"],
        ["plan", "mini", "--seeds", "1001"],
        ["run", "mini", "--selection", "train"],
        ["run"],
        ["plan", "mini", "--budget", "2h"],  # what does not apply is refused
        ["report", "mini", "--short"],
        ["tidy"],
    ],
)
def test_bad_options(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert "error: " in err.splitlines()[-1]


def test_times():
    assert seconds("2h") == 7200
    assert seconds("1h30m5s") == 5405
    assert seconds("90m") == 5400


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["2>&1 | true", ">/dev/full 2>&1", ">&- 2>&-"])
def test_output_that_breaks_does_not_end_experiments(redirected, tmp_path):
    """As | head -1 does it, a full disk, and a stream that was closed before the start."""
    given = ["--seeds", "1", "--jobs", "1", "--results", f"{tmp_path}/results", "--set", f"runs_dir={tmp_path}/runs"]
    words = [sys.executable, "-m", "experiments", "run", "demo", "--only", "optim=adam", *given]
    command = f"set -o pipefail; {shlex.join(words)} {redirected}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, timeout=300).returncode == 0
    assert "1 run" in (tmp_path / "results" / "demo.md").read_text()
