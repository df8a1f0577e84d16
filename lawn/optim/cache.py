"""Cache directories."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cache_directories() -> Iterator[Path]:
    """Yield the directories to try for compiled CPU kernels and composed configs, the preferred one first."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        yield Path(given) / "lawn"
    with suppress(RuntimeError):  # the user has no home directory
        yield Path.home() / ".cache" / "lawn"


def ensure_triton_cache() -> None:
    """Give Triton a cache directory that can be written.

    Triton compiles into the user's home directory and fails where it cannot write there. Then a temporary directory is
    used, which is removed when the process ends.
    """
    try:
        if given := os.environ.get("TRITON_CACHE_DIR"):
            folder = Path(given)
        else:
            folder = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
        atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
