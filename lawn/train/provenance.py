"""What a run comes from: code version, packages, hardware."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "adamp", "pytorch-cpr", "schedulefree")


def environment(device: torch.device, code: Sequence[str] = ("lawn", "conf", "run.py")) -> dict[str, Any]:
    """Code version, packages and hardware of this process; `dirty`: what it runs, `code`, has uncommitted changes, None
    where there is no git to say so."""
    return {
        **_version(code),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
        "system": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _version(code: Sequence[str]) -> dict[str, str | bool | None]:
    """The commit of the project's own checkout: not that of a repository which a copy of it lies in."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return {"git": None, "dirty": None}
    changed = _git(root, "status", "--porcelain", "--", *code)
    return {"git": _git(root, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command there; None where there is no git, or no checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another one
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
