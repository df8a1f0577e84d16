"""submitit's files in runs_dir: the jobs that were submitted, and their results, as pickles."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

FOLDERS = {"slurm": ".submitit", "local": ".submitit_local"}  # in runs_dir


def submitted_runs(runs_dir: Path) -> set[str]:
    """The names of the runs whose jobs are queued or at work, or were lost since the last call."""
    paths = [path for folder in FOLDERS.values() for path in submitted_files(runs_dir / folder)]
    names: set[str] = set()
    for path in paths:
        with suppress(Exception):  # it has just ended, or another version has written it
            work: Any = DelayedSubmission.load(path).function
            names |= {job.name for job in work.jobs}
    return names


def submitted_files(folder: Path) -> list[Path]:
    """submitit's files of this user's jobs. Those of others are neither unpickled nor deleted."""
    return [path for path in folder.glob("*_submitted.pkl") if is_own(path)]


def is_own(path: Path) -> bool:
    """Whether this user has made a file; of one that is missing, an error says so later."""
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return True


def results_at_hand(folder: Path) -> dict[Path, int]:
    """The results in the folder, with the times of their last change."""
    found = {}
    for path in folder.glob("*_result.pkl"):
        with suppress(FileNotFoundError):  # another call has deleted it
            found[path] = path.stat().st_mtime_ns
    return found


def forget(handle: Any, succeeded: bool = False) -> None:
    """Delete submitit's files of a job that has ended. If it has failed, its result stays for another call that waits
    for it, and its logs.
    """
    for pattern in ("*_result.pkl", "*_log.out", "*_log.err") if succeeded else ():
        for path in handle.paths.folder.glob(f"{handle.job_id}_{pattern}"):
            path.unlink(missing_ok=True)
    handle.paths.submitted_pickle.unlink(missing_ok=True)
