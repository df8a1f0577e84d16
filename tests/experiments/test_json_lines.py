"""A file of lines that goes away, or becomes another, while it is used."""

import json

from experiments.json_lines import JsonLines


def write(lines: JsonLines, record: dict[str, int]) -> None:
    with lines.locked(lambda number, line: None):
        lines.append(json.dumps(record))


def test_a_file_that_was_deleted_begins_anew(tmp_path):
    """As after a checkout of a branch without the file, while a runner is at work."""
    lines = JsonLines(tmp_path / "records.jsonl")
    write(lines, {"a": 1})
    lines.path.unlink()
    write(lines, {"b": 2})
    assert lines.path.read_bytes() == b'{"b": 2}\n'
    seen = []
    JsonLines(lines.path).read_new(lambda number, line: seen.append((number, line)))
    assert seen == [(1, '{"b": 2}')]
