"""Downloads from the official places."""

from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from zipfile import BadZipFile, ZipFile

from lawn.errors import DataError
from lawn.files import atomic


def download(url: str, target: Path, md5: str | None, advice: str) -> None:
    """Download `url` to `target` with a progress bar and check its MD5 sum, where one is published.

    `advice` says what to put where by hand; it ends the DataError that is raised when the download fails.
    """
    from torchvision.datasets import utils  # seconds to import: only for those who use it

    try:
        with atomic(target) as temporary:
            temporary.unlink()  # without an MD5 sum to compare, a file that is there counts as downloaded
            utils.download_url(url, str(temporary.parent), temporary.name, md5)
    except (URLError, HTTPException, OSError, RuntimeError) as error:
        raise DataError(f"cannot download {url} ({error}); {advice}") from error


def extract(archive: Path, md5: str, member: str, target: Path) -> None:
    """Write one member of a zip file to `target`; nothing else of the archive is touched.

    An archive that is not the published one, byte by byte, is not opened.
    """
    from torchvision.datasets import utils

    try:
        if not utils.check_integrity(str(archive), md5):
            raise DataError(f"{archive}: not the published file (MD5 sum {md5}); delete it to download it again")
        with ZipFile(archive) as zipped, zipped.open(member) as source, atomic(target) as temporary:
            temporary.write_bytes(source.read())
    except (BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{archive}: {error}; delete it to download it again") from error
