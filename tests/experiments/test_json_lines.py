"""A file of lines that goes away, or becomes another, while it is used."""

import json
import resource

import pytest

from experiments.json_lines import JsonLines


class Taken(JsonLines):
    def __init__(self, path):
        super().__init__(path)
        self.taken = []

    def take(self, lines):
        self.taken += lines

    def forget(self):
        self.taken = []


def write(lines: JsonLines, record: dict[str, int]) -> None:
    with lines.locked():
        lines.append(json.dumps(record))


def test_a_file_that_was_deleted_begins_anew(tmp_path):
    """As after a checkout of a branch without the file, while a runner is at work."""
    lines = Taken(tmp_path / "records.jsonl")
    write(lines, {"a": 1})
    lines.path.unlink()
    write(lines, {"b": 2})
    assert lines.path.read_bytes() == b'{"b": 2}\n'
    assert lines.taken == [(1, '{"b": 2}')]


def test_lines_that_are_added_are_counted_on(tmp_path):
    lines = Taken(tmp_path / "records.jsonl")
    write(lines, {"a": 1})
    write(lines, {"b": 2})
    assert [number for number, _ in lines.taken] == [1, 2]


def test_letters_of_several_bytes(tmp_path):
    """As a hand may write them; places in a file count bytes."""
    lines = Taken(tmp_path / "records.jsonl")
    lines.path.write_text(first := '{"é": "ééé"}\n', "utf8")
    write(lines, {"b": 2})
    write(lines, {"c": 3})
    assert lines.path.read_text("utf8") == first + '{"b": 2}\n{"c": 3}\n'
    assert lines.taken == list(enumerate(lines.lines(), start=1))


def test_a_full_disk_is_named(tmp_path):
    """A quota, of the process; the line that has no end is replaced by the next."""
    lines = JsonLines(tmp_path / "records.jsonl")
    write(lines, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{lines.path}'"):
            write(lines, {"b" * 30: 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(lines, {"c": 3})
    assert lines.path.read_text() == '{"a": 1}\n{"c": 3}\n'
