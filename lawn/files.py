"""Files that are either whole or not there."""

import os
import sys
import tempfile
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
    """Yield a temporary path beside `path`; on success flush it to disk and move it into place. What was there before
    is kept as `previous`, if that is given; folders that were made for it go again where it fails. Raises UserError
    where a folder has the name of the file."""
    for target in (path, previous):
        if target is not None and target.is_dir():
            raise UserError(f"{target}: is a folder, where a file is to be written; move it away")
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
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
    except OSError as error:
        if error.filename is None:  # as when the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            with suppress(OSError):  # another has put something there
                for folder in made:
                    folder.rmdir()


def _flush_folder(path: Path) -> None:
    """A new name is on the disk only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])  # a lock is not to outlive its owner


@contextmanager
def locked(path: Path) -> Iterator[IO[str] | None]:
    """Hold the lock file `path` inside; None where another process holds it. It ends with the process, however that
    ends: nothing has to be cleaned up after a crash."""
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


def still_at(path: Path, file: IO[str]) -> bool:
    """Whether `path` is the file that was opened there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, "utf8")
