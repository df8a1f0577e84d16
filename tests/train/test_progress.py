import io
import sys

import pytest

from lawn.train.progress import Progress

ROW = {"epoch": 2, "step": 9, "lr": 0.1, "train_loss": 0.25, "constrained": 1, "norm/weight": 3.0}


def kind(name: str, module: str, terminal: bool) -> io.StringIO:
    return type(name, (io.StringIO,), {"__module__": module, "isatty": lambda self: terminal})()


@pytest.mark.parametrize(
    ("stream", "bar"),
    [
        (kind("OutStream", "ipykernel.iostream", False), True),
        (kind("Terminal", "io", True), True),
        (kind("File", "io", False), False),
    ],
)
def test_a_bar_on_a_terminal_and_in_a_notebook_lines_elsewhere(stream, bar, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("name", 1, 2)
    progress.epoch(ROW)
    progress.close()
    lines, drawn = capsys.readouterr().out, stream.getvalue()
    assert (lines == "", drawn == "") == (bar, not bar)
    shown = drawn.rpartition("\r")[2] if bar else lines
    assert "name" in shown
    assert "2/2" in shown
    assert "train_loss 0.25" in shown


def test_fast_epochs_do_not_fill_a_notebook(monkeypatch):
    stream = kind("OutStream", "ipykernel.iostream", False)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("name", 0, 1000)
    for epoch in range(1, 1001):
        progress.epoch({**ROW, "epoch": epoch})
    progress.close()
    assert stream.getvalue().count("\r") < 100
