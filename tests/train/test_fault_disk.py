"""Full disks, quotas, used-up memory and output that breaks."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lawn.errors import RunError
from lawn.train import train
from lawn.train.run_directory import RunDirectory
from tests.helpers import ROOT
from tests.train.faults import ALWAYS, DIGITS, after, check_equal, command, overrides


@pytest.fixture
def tmpfs(tmp_path):
    """A filesystem of its own, and how to give it a size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def size(kilobytes: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a filesystem")
        return folder

    yield size
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_filesystem(tmpfs, tiny, whole, capsys, monkeypatch):
    """The first checkpoint fits, the second does not; with more room the same command resumes, to the same end."""
    folder = tmpfs(128)
    config = tiny(*DIGITS, ALWAYS, f"runs_dir={folder}")
    path = RunDirectory(config).path
    path.mkdir()
    size = (RunDirectory(whole).path / "checkpoint.pt").stat().st_size
    (folder / "others").write_bytes(bytes(128 * 1024 - size * 3 // 2 - 3 * 4096))
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint.pt"):
        train(config)
    state = RunDirectory(config).load()
    assert state is not None
    assert state["step"] == 1
    assert not list(path.glob(".checkpoint*"))
    assert command(config, monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 28] No space left on device: ")
    tmpfs(1024, "remount")
    train(config)
    check_equal(config, whole)


def test_a_limit_on_the_size_of_files(tiny, capsys, monkeypatch):
    """A quota, of the process: 20 kB for a file."""
    config = tiny(*DIGITS, "model.widths=[128]")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, limits[1]))
    try:
        assert command(config, monkeypatch) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = RunDirectory(config).path
    assert capsys.readouterr().err == f"error: [Errno 27] File too large: '{path / 'checkpoint.pt'}'\n"
    assert not list(path.glob(".checkpoint*"))
    assert not (path / "DONE").exists()


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("... DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_memory_that_is_used_up(tiny, monkeypatch, raised):
    def fail() -> None:
        raise raised

    after(3, fail, monkeypatch)
    with pytest.raises(RunError, match=r"^out of memory \(.*\); a smaller train.micro_batch_size needs less$"):
        train(tiny(*DIGITS))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["closed", "full", "none"])
def test_output_that_breaks_does_not_end_a_run(tiny, output):
    """As | head -1 does it, a full disk, and a stream that was closed before the start."""
    config = tiny(*DIGITS)
    redirected = {"closed": "2>&1 | true", "full": ">/dev/full 2>&1", "none": ">&- 2>&-"}[output]
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} run.py {' '.join(overrides(config))} {redirected}"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    assert RunDirectory(config).done
