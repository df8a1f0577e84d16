"""Runs that many tests start from."""

from dataclasses import replace

import pytest

from lawn.diagnostics import figure
from lawn.plotting import Figure
from lawn.train import train
from tests.helpers import compose
from tests.train.faults import ALWAYS, DIGITS, stop


@pytest.fixture(autouse=True)
def empty_figures(monkeypatch):
    """Figures without panels, which take longer to draw than these runs to train."""
    monkeypatch.setattr(figure, "draw", lambda _: Figure())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A finished run of the digits, as `tiny(*DIGITS)` makes it."""
    config = compose("model.widths=[16]", "dataset.limit=200", "train.epochs=4", "device=cpu", *DIGITS)
    config = replace(config, run_dir=str(tmp_path_factory.mktemp("finished") / "whole"))
    train(config)
    return config


@pytest.fixture(scope="session")
def stopped_run(whole, tmp_path_factory):
    """A run that was stopped with two checkpoints, and one that has finished."""
    folder = tmp_path_factory.mktemp("stopped")
    config = compose("model.widths=[16]", "dataset.limit=200", "train.epochs=4", "device=cpu", *DIGITS, ALWAYS)
    config = replace(config, run_dir=str(folder / "run"))
    stop(config, 30)
    return config, whole
