"""Files that are written at once or not at all."""

import os

import pytest

from lawn.errors import UserError
from lawn.files import atomic, write_text


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"{pipe}: is a device or a pipe"):
        write_text(pipe, "text")
    with pytest.raises(UserError, match="is a folder"), atomic(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [pipe]
