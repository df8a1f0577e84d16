"""Damaged checkpoints, and those of older versions."""

import random

import pytest
import torch

from lawn.errors import RunError
from lawn.train import train
from lawn.train.run_directory import CHECKPOINT_VERSION, RunDirectory
from lawn.validation import explain
from tests.train.faults import check_equal, copied


@pytest.mark.parametrize("sixteenths", [0, 1, 4, 7, 8, 12, 15])
def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(stopped_run, tmp_path, capsys, sixteenths):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenths // 16])
    state = RunDirectory(config).load()
    assert state is not None
    assert state["step"] == 29
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {path}: cannot be read (")
    assert out.endswith("; going on from checkpoint_previous.pt\n")
    if sixteenths in (0, 7, 15):
        train(config)
        check_equal(config, whole)


def test_a_flipped_bit_is_found_wherever_it_matters(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    expected = RunDirectory(config).load()
    draw = random.Random(0)
    damaged = 0
    for _ in range(60):
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        state = RunDirectory(config).load()
        assert state is not None
        damaged += state["step"] == 29
        if state["step"] == 30:  # in padding, or in a field that nothing is read from
            assert repr(state) == repr(expected)
    assert damaged > 15


def test_two_damaged_or_foreign_checkpoints_are_an_error(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    newest, previous = (tmp_path / "run" / name for name in ("checkpoint.pt", "checkpoint_previous.pt"))
    previous.write_bytes(b"")
    torch.save({"version": CHECKPOINT_VERSION, "hash": "another"}, newest)
    with pytest.raises(
        RunError, match=rf"format {CHECKPOINT_VERSION} and run hash another; expected .*checkpoint_previous.pt: "
    ):
        train(config)


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    newer = CHECKPOINT_VERSION + 1
    torch.save({**torch.load(path, weights_only=True), "version": newer}, path)
    written = path.read_bytes()
    problem = f"checkpoint.pt: has format {newer} .*; delete .* to start over, or go on with the version"
    with pytest.raises(RunError, match=problem):
        train(config)
    assert path.read_bytes() == written


@pytest.mark.parametrize("age", ["checkpoint", "config", "key", "no config"])
def test_files_of_an_older_version(stopped_run, tmp_path, age):
    """Of another format: named, and what to delete. Made with a key that is no more: it is another run's."""
    config = copied(stopped_run[0], tmp_path / "run")
    if age == "checkpoint":
        for name in ("checkpoint.pt", "checkpoint_previous.pt"):
            state = torch.load(tmp_path / "run" / name, weights_only=True)
            torch.save({**state, "version": 2}, tmp_path / "run" / name)
        formats = rf"has format 2 and run hash (\w+); expected {CHECKPOINT_VERSION} and \1"
        problem = rf"checkpoint.pt: {formats}.*; delete .* to start over"
    else:
        path = tmp_path / "run" / "config.yaml"
        written = path.read_text().splitlines()
        if age == "config":  # before there were hashes
            written = [line for line in written if not line.startswith("hash:")]
            problem = r"config.yaml: cannot be read \(no .hash.\); put it back, or choose another run_dir"
        elif age == "no config":
            written = ["hash: [", "}"]
            problem = r"config.yaml: cannot be read \(while parsing.*\); put it back, or choose another"
        else:
            written = [f"hash: {'f' * 12}" if line.startswith("hash:") else line for line in written]
            problem = r"holds run f{12}, this config is run \w+; choose another"
        path.write_text("\n".join(written))
    with pytest.raises(RunError, match=problem) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert explain(caught.value) == str(caught.value)  # what the command line prints
