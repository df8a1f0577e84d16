"""Folders that compiled code is kept in, where the user's home cannot be written, too."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def caches() -> Iterator[Path]:
    if given := os.environ.get("XDG_CACHE_HOME"):
        yield Path(given) / "lawn"
    with suppress(RuntimeError):  # of a user without a home
        yield Path.home() / ".cache" / "lawn"


def find_for_triton() -> None:
    """Triton compiles into the user's home, and fails where there is none that can be written: then a temporary folder
    serves this process."""
    try:
        if given := os.environ.get("TRITON_CACHE_DIR"):
            folder = Path(given)
        else:
            folder = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # the latter of a user without a home
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
        atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
