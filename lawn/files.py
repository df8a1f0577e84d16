"""Atomic writes and lock files."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lawn.errors import UserError

try:
    import fcntl
except ImportError:
    sys.exit(
        "error: training needs Linux or macOS (WSL on Windows); the optimizers, `from lawn import AdamLAWN`, do not"
    )


@contextmanager
def atomic(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and move it into place.

    An existing file is kept as `previous`, if given; a symbolic link is replaced. On failure, folders made for the file
    are removed. Raises UserError if `path` is a folder, a device or a pipe.
    """
    for target in (path, previous):
        if target is not None and target.is_dir():
            raise UserError(f"{target}: is a folder, where a file is to be written; move it away")
    if path.exists() and not path.is_file() and not path.is_symlink():
        raise UserError(f"{path}: is a device or a pipe, which cannot be replaced by a file")
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:
        error.filename = str(path)  # not the temporary file's
        raise
    os.close(handle)
    temporary = Path(name)
    try:
        with named(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
            if previous is not None and path.exists():
                path.replace(previous)
            temporary.replace(path)
            _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            with suppress(OSError):  # if it is not empty
                for folder in made:
                    folder.rmdir()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError in the body that names no file, for example of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _flush_folder(path: Path) -> None:
    """A new file name is on the disk only after its folder is flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_held: set[IO[str]] = set()
# A lock does not outlive its owner in a child.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def locked(path: Path) -> Iterator[IO[str] | None]:
    """Hold the lock file `path` in the body; yields None if another process holds it.

    The lock ends with the process, so a crash leaves nothing to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            _held.add(file)
            try:
                yield file
            finally:
                _held.remove(file)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`. It need not be writable."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """In the body, no other process is in such a body for `path`; waits for the others."""
    while True:
        with locked(path.with_name(f".{path.name}.lock")) as held:
            if held:
                yield
                return
        time.sleep(0.01)


def still_at(path: Path, file: IO[str]) -> bool:
    """Whether `path` is still the opened file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder; if it does not exist, in the nearest one that does."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            return True
    except OSError:
        return False


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, "utf8")
