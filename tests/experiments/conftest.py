"""Miniatures that are run once, and copies of them for tests that change files."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.reporting import drawing, report
from lawn.plotting import Figure
from tests.experiments.helpers import MINI, TUNED, run_experiment


@pytest.fixture(autouse=True)
def empty_figures(monkeypatch):
    """Figures are files without content: drawing one takes longer than the runs of most tests."""
    monkeypatch.setattr(report, "save", lambda _, path: drawing.save(drawing.Drawing(lambda _: Figure(), None), path))


@pytest.fixture
def drawn_figures(empty_figures, monkeypatch):
    """Figures are drawn."""
    monkeypatch.setattr(report, "save", drawing.save)


@pytest.fixture(scope="session")
def finished_mini(tmp_path_factory) -> Path:
    """The folder of runs and results of the first two cells of MINI."""
    folder = tmp_path_factory.mktemp("mini")
    assert run_experiment(replace(MINI, cells=MINI.cells[:2]), folder) == []
    return folder


@pytest.fixture(scope="session")
def finished_tuned(tmp_path_factory) -> Path:
    """The folder of runs and results of TUNED."""
    folder = tmp_path_factory.mktemp("tuned")
    assert run_experiment(TUNED, folder) == []
    return folder


@pytest.fixture
def results(finished_mini, tmp_path) -> Path:
    """A copy of the results of MINI."""
    return Path(shutil.copytree(finished_mini / "results", tmp_path / "results"))


@pytest.fixture
def tuned(finished_tuned, tmp_path) -> Path:
    """A copy of the runs and results of TUNED."""
    return Path(shutil.copytree(finished_tuned, tmp_path / "tuned"))
