"""Downloads from the official places, and the published counts of a dataset beside those found."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from zipfile import BadZipFile, ZipFile

from lawn.errors import DataError
from lawn.files import atomic

_allowed = True


@contextmanager
def downloads_disabled() -> Iterator[None]:
    """In the body, `download` raises DataError."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def download(url: str, target: Path, md5: str | None, advice: str) -> None:
    """Download `url` to `target` with a progress bar and check its MD5 sum, if one is published.

    Raises DataError if that fails; `advice`, the end of its message, says which file to put where by hand.
    """
    if not _allowed:
        raise DataError(f"{target}: not there; {advice}")
    from torchvision.datasets import utils  # takes seconds to import

    try:
        with atomic(target) as temporary:
            temporary.unlink()  # without an MD5 sum, torchvision takes an existing file for the download
            utils.download_url(url, str(temporary.parent), temporary.name, md5)
    except (URLError, HTTPException, OSError, RuntimeError) as error:
        raise DataError(f"cannot download {url} ({error}); {advice}") from error


def read_member(archive: Path, md5: str, name: str) -> bytes:
    """The content of one member of a zip or tar file; nothing is extracted to disk.

    Raises DataError, before opening the archive, unless it has the published MD5 sum.
    """
    from torchvision.datasets import utils

    try:
        if not utils.check_integrity(str(archive), md5):
            raise DataError(f"{archive}: not the published file (MD5 sum {md5}); delete it to download it again")
        if archive.suffix == ".zip":
            with ZipFile(archive) as zipped:
                return zipped.read(name)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(name)
            if file is None:
                raise KeyError(f"{name} is no file")
            return file.read()
    except (BadZipFile, tarfile.TarError, KeyError, OSError) as error:
        raise DataError(f"{archive}: {error}; delete it to download it again") from error


class CountMismatch(str):
    """A warning that a count differs from the published one; the records of runs keep it."""


def count_mismatches(name: str, found: dict[str, int], published: dict[str, int]) -> list[str]:
    return [
        CountMismatch(f"{name}: {found[k]} {k}, published are {published[k]}")
        for k in found
        if found[k] != published[k]
    ]
