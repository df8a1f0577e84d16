"""Provenance of a run: code version, packages, hardware."""

import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lawn import __version__

PACKAGES = ("torch", "torchvision", "timm", "numpy", "adamp", "pytorch-cpr", "schedulefree")


def environment(device: torch.device, code: Sequence[str] = ("lawn", "conf", "run.py")) -> dict[str, Any]:
    """Version of the code, packages and hardware of this process.

    `git` is the commit of the project's checkout and `dirty` whether `code` has uncommitted changes; both are None for
    an installed copy, of which `version` is known.
    """
    return {
        **_version(code),
        "python": platform.python_version(),
        "packages": _versions(PACKAGES),
        "system": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def code_version() -> str | None:
    """The commit of the project's checkout; None for an installed copy.

    It counts only of a repository that tracks this file at its place in the project: an environment inside another
    repository, or a copy in its working tree, is no checkout of the project.
    """
    root = _root()
    top = _git(root, "rev-parse", "--show-toplevel")
    tracked = _git(root, "ls-files", "--", str(Path(__file__).resolve()))
    if top is None or Path(top).resolve() != root or not tracked:
        return None
    return _git(root, "rev-parse", "HEAD")


def _root() -> Path:
    """The folder of the project, in a checkout."""
    return Path(__file__).resolve().parents[2]


def _version(code: Sequence[str]) -> dict[str, str | bool | None]:
    commit = code_version()
    changed = None if commit is None else _git(_root(), "status", "--porcelain", "--", *code)
    return {"git": commit, "dirty": None if changed is None else bool(changed), "version": __version__}


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command in `root`; None without git or a repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
