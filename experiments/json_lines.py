"""A file of JSON lines that several processes append to and read while it grows."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lawn.errors import RunError
from lawn.files import exclusively, named, write_text
from lawn.output import echo


@dataclass(frozen=True)
class _Seen:
    """How far a file has been read."""

    inode: int = 0
    modified: int = 0  # nanoseconds
    size: int = 0  # bytes
    lines: int = 0
    last: bytes = b""  # the last of the lines


class JsonLines:
    """The lines of a file, as far as this object has read them. Raises RunError if the file cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _Seen()
        self._cut = 0  # size of the file at the last warning

    def take(self, lines: list[tuple[int, str]]) -> None:
        """Called with the numbers and texts of new lines. If it raises, it is called with them again the next time."""

    def forget(self) -> None:
        """Called when the lines that were taken are gone: the file was deleted, or is another one."""

    def read_new(self) -> None:
        """Take the lines that were appended, or all lines of another file in the place of the one before.

        A line without an end is still being written, or its writer was killed, or the file was cut: a warning says so.
        """
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._begin()  # a file in its place is another one
            return
        except OSError as error:
            raise RunError(f"{self.path}: cannot be read ({error.strerror}); put it back, or delete it") from error
        seen = self._seen
        if (seen.inode, seen.modified, seen.size) == (stat.st_ino, stat.st_mtime_ns, stat.st_size):
            return
        grown = seen.inode == stat.st_ino and seen.size < stat.st_size
        content = read_bytes(self.path, seen.size - len(seen.last)) if grown else b""
        if not (grown and content.startswith(seen.last)):  # another file; the system gives its inode to the next one
            seen, content = self._begin(), read_bytes(self.path)
        text = decode(self.path, content[len(seen.last) :])
        end = text.rfind("\n") + 1
        tail = text[end:].strip(" \t\r\n")
        if 0 < (stop := _end_of_json(tail)) < len(tail):  # such as line ends of another system; no writer leaves that
            raise RunError(f"{self.path}: its last line goes on after a record; end each record with a line feed")
        if not stop:
            if end < len(text) and stat.st_size != self._cut:
                what = "the last line has no end; its record is being written, or lost"
                echo(f"warning: {self.path}: {what}", sys.stderr)
                self._cut = stat.st_size
            text = text[:end]
        self.take([(number, line) for number, line in enumerate(text.split("\n"), start=seen.lines + 1) if line])
        read = text.encode()
        ends = seen.last + read
        last = ends[ends.rstrip(b"\n").rfind(b"\n") + 1 :]
        lines = seen.lines + text.count("\n")
        self._seen = _Seen(stat.st_ino, stat.st_mtime_ns, seen.size + len(read), lines, last)

    def _begin(self) -> _Seen:
        """Forget what has been read."""
        if self._seen.size:
            self.forget()
        self._seen, self._cut = _Seen(), 0
        return self._seen

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In the body, no other process writes, and all lines have been read; then those that the body has written."""
        with exclusively(self.path):
            self.read_new()
            yield
            self.read_new()

    def lines(self) -> list[str]:
        """The lines that have been read, as they are written."""
        text = read_bytes(self.path)[: self._seen.size].decode("utf8") if self._seen.size else ""
        return [line for line in text.split("\n") if line]

    def append(self, line: str) -> None:
        """Append a line, in the place of one without an end that a killed writer has left. Needs the lock."""
        self.path.touch()
        with named(self.path), self.path.open("rb+") as file:
            file.truncate(self._seen.size)
            file.seek(max(0, self._seen.size - 1))
            if file.read() not in (b"", b"\n"):
                file.write(b"\n")
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def replace(self, lines: list[str]) -> None:
        """Replace all lines, if they differ. Needs the lock."""
        text = "".join(f"{line}\n" for line in lines)
        if not self.path.exists() or text.encode() != read_bytes(self.path):
            write_text(self.path, text)


def read_bytes(path: Path, start: int = 0) -> bytes:
    """The content of a file from the byte `start`."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error}); put it back, or delete it and run again") from error


def decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf8")
    except ValueError as error:
        raise RunError(f"{path}: cannot be read ({error}); put it back, or delete it and run again") from error


def _end_of_json(text: str) -> int:
    """Where the JSON value ends with which a text begins; 0 without one."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except ValueError:
        return 0
