"""Files that are written at once or not at all."""

import os

import pytest

from lawn.errors import UserError
from lawn.files import atomic, write_text


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):  # at first the link leads nowhere
        write_text(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(UserError, match=f"{path}: is a device or a pipe"):
            write_text(path, "text")
    with pytest.raises(UserError, match="is a folder"), atomic(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
