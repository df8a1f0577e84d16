"""Lines for standard output and standard error."""

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from tqdm import tqdm

from lawn.errors import UserError


def echo(line: str, stream: IO[str] | None = None) -> None:
    """Print a line to `stream` (stdout), above progress bars; what cannot be written is lost (`keep_going`)."""
    stream = stream or sys.stdout
    if stream is None:  # closed before the start
        return
    with keep_going(stream):
        tqdm.write(line, stream)
        stream.flush()


def echo_error(error: Exception) -> int:
    """Print why a command has failed, in one line on stderr; returns the exit code."""
    echo(f"error: {error}", sys.stderr)
    return getattr(error, "exit_code", UserError.exit_code)


@contextmanager
def keep_going(stream: IO[str]) -> Iterator[None]:
    """In the body, an OSError of `stream` redirects it to the null device.

    Unless its reader is gone (a closed pipe or terminal), a line on stderr says so.
    """
    try:
        yield
    except OSError as error:
        _redirect(stream)
        if error.errno not in (errno.EPIPE, errno.EIO):
            echo(f"warning: {os.strerror(error.errno or 0)}; output is lost from here on", sys.stderr)


def _redirect(stream: IO[str]) -> None:
    """Write to the null device from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def is_lost(stream: IO[str]) -> bool:
    """Whether the reader of a stream is gone; then it is redirected to the null device."""
    poll = select.poll()
    poll.register(stream, 0)  # for errors alone
    lost = bool(poll.poll(0))
    if lost:
        _redirect(stream)
    return lost


def open_closed_streams() -> None:
    """Give standard streams that were closed before the start the null device. Otherwise the next file to open gets
    their number, and processes that write to theirs write there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number that is free
    sys.stdout, sys.stderr = (
        stream or os.fdopen(number, "w", closefd=False) for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
