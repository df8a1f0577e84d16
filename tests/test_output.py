"""Lines for streams that close or break."""

import io
import os
from pathlib import Path

import pytest
from tqdm import tqdm

from lawn.output import echo, is_lost, keep_going


def test_output_to_a_closed_stream_is_dropped():
    """The stream is usable afterwards, and its last flush does not fail."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        echo("one", stream)
        echo("two", stream)
        assert Path(f"/proc/self/fd/{stream.fileno()}").readlink() == Path(os.devnull)


def test_a_stream_without_a_reader_is_lost():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        assert not is_lost(stream)
        os.close(reading)
        stream.write("for nobody")
        assert is_lost(stream)
        assert not is_lost(stream)  # it goes to the null device


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_said_once(capfd):
    with Path("/dev/full").open("w") as stream:
        for _ in range(3):
            echo("lost", stream)
        with keep_going(stream):
            stream.write("lost")
            stream.flush()
    assert capfd.readouterr() == ("", "warning: No space left on device; output is lost from here on\n")


def test_a_stream_that_was_closed_before_the_start(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    echo("lost")


def test_lines_stay_above_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    with tqdm(total=2, file=terminal, leave=False) as bar:
        bar.update()
        echo("a line")
    above, _, below = terminal.getvalue().partition("a line\n")
    assert above.endswith("\r")
    assert "1/2" in below
