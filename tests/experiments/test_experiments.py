import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments import __main__ as command
from experiments import records, report
from experiments.demo import DEMO
from experiments.spec import Cell, Experiment
from lawn.errors import RunError
from lawn.train import train
from tests.helpers import ROOT

SHORT = ("dataset=digits", "train.epochs=3", "model.widths=[8]", "dataset.limit=100")
MINI = Experiment(
    "mini",
    "A miniature",
    (
        Cell("Adam", (*SHORT, "optim=adam")),
        Cell("Fails", (*SHORT, "optim=sgd", "optim.lr=1e20")),
        Cell("None", (*SHORT, "optim.lr=0.5")),
    ),
    DEMO.columns,
    2,
)


@pytest.fixture
def results(tmp_path):
    for cell in MINI.cells[:2]:
        for config in MINI.configs(cell, f"runs_dir={tmp_path}/runs", "device=cpu"):
            train(config)
            records.write(config, tmp_path / "results" / "runs")
    return tmp_path / "results"


def test_report_from_records_alone(results):
    text = report.write(MINI, results)
    frame = report.table(MINI, results / "runs").set_index("")
    found = records.read_all(MINI.configs(MINI.cells[0]), results / "runs")
    accuracy = [record.result["last"]["test_accuracy"] for record in found]
    expected = f"{np.mean(accuracy):.2f} ({abs(accuracy[0] - accuracy[1]) / 2:.2f})"
    assert frame.loc["Adam", "test accuracy, %"] == expected
    assert expected in text
    assert frame.loc["Fails", "test accuracy, %"] == "Fail"
    assert frame.loc["None", "test accuracy, %"] == ""
    assert frame.loc["None", "seeds"] == 0
    page = (results / "mini.md").read_text()
    for record in found:
        assert f"(runs/{record.name}.json)" in page
        assert (results / "runs" / f"{record.name}.json").exists()
    assert (results / "mini.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (results / "mini.svg").read_text()


def test_a_figure_without_anything_to_draw(results):
    failing = dataclasses.replace(MINI, cells=MINI.cells[1:])
    report.figure(failing, results / "nothing", results / "runs")
    assert (results / "nothing.png").exists()


def test_records_that_were_tampered_with_are_refused(results):
    config = MINI.configs(MINI.cells[0])[0]
    path = next((results / "runs").glob(f"*-adam-s0-{records.config_hash(config)}.json"))
    content = json.loads(path.read_text())
    content["config"]["optim"]["lr"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="its config is not the one"):
        report.table(MINI, results / "runs")
    path.write_text("{")
    with pytest.raises(RunError, match="damaged record"):
        report.table(MINI, results / "runs")


def test_unfinished_runs_are_not_recorded(tmp_path):
    config = MINI.configs(MINI.cells[0], f"runs_dir={tmp_path}")[0]
    with pytest.raises(RunError, match="not finished"):
        records.write(config, tmp_path)


def test_mean_and_error():
    assert report.show([1.0, 2.0, 3.0], 2) == "2.00 (0.58)"
    assert report.show([2.0], 1) == "2.0"
    assert report.show([], 1) == ""
    assert report.show([1e-4, 3e-4], -2) == "2.0e-04 (1.0e-04)"


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(command.EXPERIMENTS, "demo", MINI)
    code = command.main(
        ["run", "demo", "--results", str(tmp_path / "results"), f"runs_dir={tmp_path}/runs", "device=cpu"]
    )
    assert code == 0
    assert "Adam" in capsys.readouterr().out
    assert command.main(["run", "demo", "--results", str(tmp_path), "optim.lrr=1"]) == 2
    assert capsys.readouterr().err.startswith("error: optim.lrr: no such key")
    assert command.main(["run", "demo", "--results", str(tmp_path), "train.epochs=1"]) == 2
    assert "train.epochs=1: changes what mini runs" in capsys.readouterr().err


def test_demo_is_what_the_readme_says():
    configs = [config for cell in DEMO.cells for config in DEMO.configs(cell)]
    assert [c.optim.name for c in configs] == ["adam"] * 3 + ["adamw"] * 3 + ["adam_lawn"] * 3
    assert [c.seed for c in configs] == [0, 1, 2] * 3
    assert {c.eval.split for c in configs} == {"test"}
    assert configs[0].optim.weight_decay == 0
    assert configs[3].optim.weight_decay > 0


@pytest.mark.parametrize("experiment", command.EXPERIMENTS.values(), ids=lambda e: e.name)
def test_committed_results_are_those_of_the_records(tmp_path, experiment):
    shutil.copytree(ROOT / "results" / "runs", tmp_path / "runs")
    report.write(experiment, tmp_path)
    assert (tmp_path / f"{experiment.name}.md").read_text() == (ROOT / "results" / f"{experiment.name}.md").read_text()


def test_the_readmes_tables_are_those_of_the_records(tmp_path):
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    report.embed(page, command.EXPERIMENTS.values())
    assert page.read_text() == (ROOT / "README.md").read_text()
    for experiment in command.EXPERIMENTS:
        assert f"<!-- table {experiment} -->" in page.read_text()
