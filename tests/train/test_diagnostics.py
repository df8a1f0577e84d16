"""diagnostics=on and optim.free_epochs=auto, in whole runs."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from lawn import LAWN
from lawn.config import OptimConfig
from lawn.diagnostics import LossSurface, UpdateMonitor, figure
from lawn.diagnostics.__main__ import main as diagnostics_main
from lawn.diagnostics.figure import draw
from lawn.diagnostics.onset import THRESHOLD
from lawn.errors import ConfigError, RunError
from lawn.identity import config_hash
from lawn.optimizers import OPTIMIZERS
from lawn.train import train, train_many
from lawn.train.run_directory import RunDirectory
from lawn.train.trainer import Trainer
from tests.helpers import ROOT, compose

AUTO = ("optim.free_epochs=auto", "optim.lr=1e-2", "train.batch_size=50")


def rows(config) -> list[dict[str, str]]:
    with (RunDirectory(config).path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_columns_and_nothing_else_changes(tiny):
    plain, watched = tiny(), tiny("diagnostics=on", "diagnostics.samples=64")
    train(plain)
    train(watched)
    for one, other in zip(rows(plain), rows(watched), strict=True):
        assert one.items() <= other.items()
        more = set(other) - set(one)
        weights = {name.partition("/")[2] for name in more if "/" in name}
        assert weights == {"1.weight", "3.weight"}
        quantities = {name.partition("/")[0] for name in more if "/" in name}
        assert quantities == {"norm", "gradient_norm", "radial", "angle", "effective_lr"}
        quantiles = [float(other[f"margin_p{q}"]) for q in (10, 25, 50, 75, 90)]
        assert quantiles == sorted(quantiles)
        assert float(other["hessian_top"]) > 0
        assert float(other["gradient_covariance"]) > 0


def test_the_numbers_are_those_of_the_library(tiny, monkeypatch):
    """By a monitor of our own."""
    config = tiny("diagnostics=on", "train.epochs=1", "train.batch_size=10")  # 20 updates, of which a tenth
    own = []
    prepare = Trainer.__init__

    def init(run, *arguments):
        prepare(run, *arguments)
        own.append(UpdateMonitor(run.model, run.optimizer, every=10))

    monkeypatch.setattr(Trainer, "__init__", init)
    train(config)
    (row,) = rows(config)
    for weight, means in own[0].means().items():
        for quantity, value in means.items():
            assert float(row[f"{quantity}/{weight}"]) == pytest.approx(value)


def test_curvature_is_of_the_same_samples_at_every_evaluation(tiny, monkeypatch):
    seen = []
    build = LossSurface.__init__

    def init(surface, model, loss, inputs, labels, chunk):
        seen.append(labels)
        build(surface, model, loss, inputs, labels, chunk)

    monkeypatch.setattr(LossSurface, "__init__", init)
    train(tiny("diagnostics=on", "diagnostics.samples=40", "eval.every=2"))
    assert len(seen) == 2
    assert len(seen[0]) == 40
    assert torch.equal(*seen)


def test_a_run_with_diagnostics_is_another_run_and_without_the_same_as_ever(tiny):
    assert config_hash(tiny("diagnostics=on")) != config_hash(tiny())
    assert config_hash(tiny("diagnostics=off")) == config_hash(tiny())


@pytest.mark.parametrize("dataset", ["movielens100k", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_other_tasks(dataset, tiny_data, tmp_path):
    keys = (f"dataset={dataset}", "train.epochs=1", "train.batch_size=8", "diagnostics=on", "diagnostics.samples=8")
    small = ("model.factors=4", "dataset.candidates=20") if dataset == "movielens100k" else ("dataset.limit=16",)
    config = compose(*keys, *small, f"data_dir={tiny_data}", "device=cpu", f"runs_dir={tmp_path}")
    train(config)
    (row,) = rows(config)
    assert float(row["hessian_top"]) > 0
    assert all(value != "" for value in row.values())


def test_the_switch_is_where_the_margins_are_high(tiny):
    """And the column tells when it was: the norms stay from then on."""
    config = tiny(*AUTO, "train.epochs=20")
    train(config)
    found = rows(config)
    free = float(found[-1]["free_epochs"])
    assert 0 < free < 20
    first = next(k for k, row in enumerate(found) if row["constrained"] == "1")
    assert first == int(free)
    margins = [float(row["margin_p50"]) for row in found]
    assert max(margins[: first - 1]) < THRESHOLD < margins[-1]
    assert len({round(float(row["weight_norm"]), 4) for row in found[first:]}) == 1


def test_a_fixed_switch_at_the_same_update_is_the_same_run(tiny):
    automatic = tiny(*AUTO, "train.epochs=20")
    train(automatic)
    free = rows(automatic)[-1]["free_epochs"]
    fixed = tiny(*AUTO[1:], "train.epochs=20", f"optim.free_epochs={free}")
    train(fixed)
    for one, other in zip(rows(automatic), rows(fixed), strict=True):
        assert other.items() <= one.items()


@pytest.mark.parametrize("how", ["micro_batch_size=7", pytest.param("devices=2", marks=pytest.mark.slow)])
def test_micro_batches_and_ranks_switch_at_the_same_epoch(tiny, tmp_path, how):
    keys = (*AUTO, "train.epochs=20", "diagnostics=on")
    whole, other = (tiny(*keys, *own, f"run_dir={tmp_path}/{len(own)}") for own in ((), (f"train.{how}",)))
    for config in (whole, other):
        train(config)
    for row, same in zip(rows(whole), rows(other), strict=True):
        assert float(same["free_epochs"]) == float(row["free_epochs"])
        for name in row:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-3, abs=1e-4), name


def test_watched_runs_are_trained_alone(tiny, capsys):
    configs = [tiny(*AUTO, f"seed={seed}", "train.vectorize=4") for seed in range(2)]
    assert train_many(configs) == []
    assert "warning: train.vectorize: 2 of 2 runs train alone, as no other fits them\n" in capsys.readouterr().out
    for config in configs:
        assert "free_epochs" in rows(config)[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["optim.free_epochs=soon"], "optim.free_epochs=soon: must be a number of epochs, or auto"),
        (["optim.free_epochs=[1]"], "must be a number of epochs, or auto"),
        (["optim.free_epochs=true"], "must be a number of epochs, or auto"),
        (["optim=adam", "optim.free_epochs=auto"], "optim.free_epochs=auto: does not apply to optim=adam"),
        (["optim.free_epochs=auto", "train.logit_scale=0.2"], "needs a number for optim.free_epochs"),
        (["diagnostics.samples=10"], "diagnostics.samples=10: needs diagnostics=on"),
        (["diagnostics=on", "diagnostics.updates=null"], "diagnostics.updates: diagnostics=on needs a value"),
        (["diagnostics=on", "diagnostics.samples=1"], "diagnostics.samples=1: must be a finite number above 1"),
    ],
)
def test_refused(tiny, keys, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        train(tiny(*keys))


def test_an_optimizer_under_lawn_is_one_with_two_phases(tiny, monkeypatch):
    """Added to the mapping as CONTRIBUTING says; it cannot wait for `constrain`."""

    def rms_lawn(model, *, lr, free_steps):
        return LAWN(torch.optim.RMSprop(model.parameters(), lr=lr), free_steps).optimizer

    optim = OptimConfig(name="rms_lawn", lr=1e-3, free_epochs=1.0)
    monkeypatch.setitem(OPTIMIZERS, "rms_lawn", rms_lawn)
    config = replace(tiny(), optim=optim)
    train(config)
    assert [row["constrained"] for row in rows(config)] == ["0", "1", "1", "1"]
    with pytest.raises(ConfigError, match="free_epochs=auto: optim=rms_lawn has no method `constrain`"):
        train(replace(config, optim=replace(optim, free_epochs="auto")))


def test_the_figure_at_the_end_and_of_several_runs(tiny, tmp_path, capsys, monkeypatch):
    configs = [tiny(*keys, "diagnostics=on") for keys in (("optim=adam",), ("optim.free_epochs=1",))]
    for config in configs:
        train(config)
        assert (RunDirectory(config).path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    first, second = (str(RunDirectory(config).path) for config in configs)
    assert diagnostics_main([first, f"LAWN={second}", "--out", f"{tmp_path}/both.png"]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(figure, "draw", draw)
    figure.save({"Adam": figure.read(Path(first))}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5 * (tmp_path / "both.png").stat().st_size
    shown = draw({"Adam": figure.read(Path(first)), "LAWN": figure.read(Path(second))})
    by_title = {axis.get_ylabel(): axis for axis in shown.axes}
    assert len(by_title) == 7  # no curvature was measured
    angles = by_title["angle of an update, rad"]
    expected = [float(row["angle/1.weight"]) * float(row["angle/3.weight"]) for row in rows(configs[0])]
    (thick,) = (line for line in angles.lines if line.get_label() == "Adam")
    assert list(thick.get_ydata()) == pytest.approx([value**0.5 for value in expected])
    assert len([line for line in angles.lines if line.get_linestyle() == ":"]) == 1  # the switch, of LAWN alone
    capsys.readouterr()


LACKING = "module://not_installed.backend_inline"
OTHERS = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("nonsense", "TkAgg")]


@pytest.mark.parametrize("backend", [LACKING, *OTHERS])
def test_no_display_and_no_backend_is_needed(tmp_path, backend):
    """MPLBACKEND as a notebook leaves it to what it starts."""
    plotting = str(ROOT / "lawn" / "plotting.py")  # all imports of matplotlib are there, see tests/test_imports.py
    code = f"import runpy; runpy.run_path({plotting!r})['Figure']().savefig('x.png')"
    environment = {**os.environ, "MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_failed_is_drawn_by_the_next_call(tiny, monkeypatch):
    config = tiny("diagnostics=on", "train.epochs=2")
    path = RunDirectory(config).path

    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    with monkeypatch.context() as broken:
        broken.setattr(figure, "save", fail)
        with pytest.raises(RuntimeError, match="no font"):
            train(config)
    assert not (path / "DONE").exists()
    before = rows(config)
    train(config)
    assert (path / "DONE").exists()
    assert (path / "diagnostics.png").exists()
    assert rows(config) == before


def test_what_cannot_be_drawn_is_one_line(tiny, tmp_path, capsys):
    plain = tiny("train.epochs=1")
    train(plain)
    capsys.readouterr()
    for path, reason in (
        (RunDirectory(plain).path, "is not of a run with diagnostics=on"),
        (tmp_path, "cannot be"),
        (tmp_path / "nothing", "nothing: no such run directory"),
    ):
        assert diagnostics_main([str(path), "--out", f"{tmp_path}/x.png"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert reason in line
    assert not (tmp_path / "x.png").exists()


def test_names_of_runs(tiny, tmp_path, capsys, monkeypatch):
    """A path with an equals sign is a path, "." has the name of its folder; two runs of one name are refused."""
    where = [tmp_path / "lr=1" / "run", tmp_path / "lr=2" / "run"]
    train(tiny("train.epochs=1", "diagnostics=on", f"run_dir='{where[0]}'"))
    shutil.copytree(*where)
    first, second = map(str, where)
    out = f"{tmp_path}/x.png"
    assert diagnostics_main([first, "--out", out]) == 0
    capsys.readouterr()
    assert diagnostics_main([first, second, "--out", out]) == ConfigError.exit_code
    assert "another run is called run; give names" in capsys.readouterr().err
    monkeypatch.chdir(where[1])
    assert diagnostics_main([first, ".", "--out", out]) == ConfigError.exit_code
    assert "another run is called run; give names" in capsys.readouterr().err
    assert diagnostics_main([first, f"b={second}", "--out", out]) == 0
    capsys.readouterr()
    assert diagnostics_main([first, "--out", f"{tmp_path}/x.pdf"]) == ConfigError.exit_code
    assert "x.pdf: the figure is a PNG file" in capsys.readouterr().err
    assert not (tmp_path / "x.pdf").exists()


def test_logarithmic_panels_show_positive_numbers_alone():
    rows = pd.DataFrame({"epoch": [1, 2], "constrained": 0, "train_loss": [1.0, 0.0], "angle/a": [4.0, 4.0]})
    rows["angle/b"] = [0.0, 9.0]
    axes = {axis.get_ylabel(): axis for axis in draw({"run": rows}).axes}
    thick = axes["angle of an update, rad"].lines[-1]
    assert list(thick.get_ydata()) == pytest.approx([4, 6])
    assert min(axes["training loss, nats"].get_ylim()) > 0.01


def test_lines_of_each_run():
    """In its color; cosines have arithmetic means, epochs without a measurement no points, margins a band."""
    rows = pd.DataFrame({"epoch": [1, 2, 3], "constrained": [0, 1, 1], "train_loss": [3.0, 2.0, 1.0]})
    rows[["margin_p10", "margin_p50", "margin_p90"]] = [[0.0, 1.0, 4.0], [1.0, 2.0, 5.0], [2.0, 3.0, 6.0]]
    nan = float("nan")
    rows[["radial/a", "radial/b"]] = [[0.1, 0.3], [nan, nan], [0.2, nan]]
    shown = draw({"first": rows, "second": rows})
    losses, margins, cosines = shown.axes
    assert losses.get_gridspec().get_geometry() == (1, 3)
    (*thin, thick, switch), others = cosines.lines[:4], cosines.lines[4:]
    assert [line.get_color() for line in (*thin, thick, switch, *others)] == ["C0"] * 4 + ["C1"] * 4
    for line, values in zip(thin, ([0.1, 0.2], [0.3, nan]), strict=True):
        assert list(line.get_ydata()) == pytest.approx(values, nan_ok=True)
    assert list(thick.get_xdata()) == [1, 3]
    assert list(thick.get_ydata()) == pytest.approx([0.2, 0.2])
    assert set(switch.get_xdata()) == {2}
    assert len(losses.lines) == 2 * 2
    for band in margins.collections:
        (path,) = band.get_paths()
        assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (0, 6)
    (legend,) = shown.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]


def test_a_table_that_a_spreadsheet_has_saved_again_is_one_line(tiny):
    config = tiny("diagnostics=on", "train.epochs=1")
    train(config)
    path = RunDirectory(config).path
    (path / "metrics.csv").write_text((path / "metrics.csv").read_text().replace(",", ";"))
    with pytest.raises(RunError, match=r"metrics.csv: is no table of numbers, as the run has written it"):
        figure.read(path)


def test_a_table_that_lacks_what_the_run_has_measured_is_refused(tiny):
    """At the end of a line, where no row looks cut."""
    config = tiny("diagnostics=on", "train.epochs=2")
    train(config)
    path = RunDirectory(config).path
    whole = (path / "metrics.csv").read_text()
    head, first, _ = whole.splitlines(keepends=True)
    for text, message in (
        (head + first, r"metrics.csv: has 1 of 2 epochs; delete DONE"),
        (head, r"metrics.csv: has 0 of 2 epochs; delete DONE"),
        (whole.replace("0.", "x.", 1), r"metrics.csv: is no table of numbers"),
    ):
        (path / "metrics.csv").write_text(text)
        with pytest.raises(RunError, match=message):
            figure.read(path)
    (path / "metrics.csv").write_text(head)
    (path / "DONE").unlink()
    with pytest.raises(RunError, match="has not finished an epoch yet"):
        figure.read(path)
    (path / "DONE").touch()
    (path / "result.json").write_text("{}")
    with pytest.raises(RunError, match=r"result.json: cannot be read \('last'\)"):
        figure.read(path)


@pytest.mark.parametrize("left", ["epoch,train_loss\n1,0.5\n2,0.4", "epoch,train_loss\n1,0.5\n3,0.4\n"])
def test_a_table_that_is_cut_is_refused(tmp_path, left):
    """In the middle of a number, or with a row that is missing."""
    (tmp_path / "metrics.csv").write_text(left)
    with pytest.raises(RunError, match=r"metrics.csv: is not whole; delete DONE in its folder and run the command"):
        figure.read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n2,0.41\n")
    assert list(figure.read_metrics(tmp_path)["train_loss"]) == [0.5, 0.41]


def test_a_diverged_run_has_a_figure_too(tiny):
    config = tiny("optim=sgd", "optim.lr=1e30", "optim.weight_decay=0", "diagnostics=on")
    assert train(config)["status"] == "diverged"
    assert (RunDirectory(config).path / "diagnostics.png").exists()
