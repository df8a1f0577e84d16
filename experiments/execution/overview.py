"""Tables of what is done, what is at work and what is left, for each cell."""

from collections import Counter
from collections.abc import Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

from experiments.execution.executor import OUTPUT
from experiments.planning.estimate import RuntimeEstimate, duration
from experiments.planning.grid import Job
from experiments.planning.study import Study
from experiments.records import Store
from lawn.errors import UserError
from lawn.packages import is_installed
from lawn.train.run_directory import RunDirectory

Row = dict[str, Any]


def plan_rows(studies: Sequence[Study], store: Store, estimate: RuntimeEstimate) -> tuple[list[Row], int, list[Any]]:
    """A row for each study, the number of all runs, and the estimated seconds of each missing one, None if unknown.

    A run that several studies share is counted once, unless it is one of those that are not known before others end.
    """
    rows, total = [], 0
    known: set[str] = set()  # names of runs
    named: dict[str, float | None] = {}  # the missing runs
    unnamed: list[float | None] = []
    for study in studies:
        jobs, later = study.missing(store)
        tuning = study.tuning(store)
        tried = sum(store.has(job.name) for job in tuning.jobs)
        final = [job.name for job in islice(study.final_runs(store), study.seeds)]
        to_do = [job.config for job in jobs] + [study.grid.config] * later
        if study.problem is None:
            named |= {job.name: estimate.seconds([job.config]) for job in jobs}
            unnamed += [estimate.seconds([study.grid.config])] * later
            known |= {*final, *(job.name for job in tuning.jobs)}
            total += tuning.unknown + study.seeds - len(final)
        rows.append(
            {
                "cell": study.cell.name,
                "epochs": study.budget or "",
                "tuning": f"{tried}/{len(tuning.jobs) + tuning.unknown}" if tuning.jobs else "",
                "seeds": f"{sum(map(store.has, final))}/{study.seeds}" if study.seeds else "",
                "time": study.problem or duration(estimate.seconds(to_do)),
            }
        )
    return rows, total + len(known), [*named.values(), *unnamed]


def status_rows(studies: Sequence[Study], store: Store, estimate: RuntimeEstimate) -> list[Row]:
    """A row for each study: its runs that are done, queued, running and failed, as the run directories tell."""
    rows: list[Row] = []
    submitted = _submitted_runs(studies)
    for study in studies:
        if study.problem:
            rows.append({"cell": study.cell.name, "time left": study.problem})
            continue
        jobs, later = study.missing(store)
        tuning = study.tuning(store)
        total = len(tuning.jobs) + tuning.unknown + study.seeds
        states = Counter(state(job, submitted) for job in jobs)
        left: float | None = estimate.seconds([study.grid.config] * later)
        for job in jobs:
            seconds = estimate.seconds([job.config])
            left = None if left is None or seconds is None else left + seconds * (1 - share_done(job))
        rows.append(
            {
                "cell": study.cell.name,
                "epochs": study.budget or "",
                "done": f"{total - len(jobs) - later + states['done']}/{total}",
                "queued": states["queued"],
                "running": states["running"],
                "failed": states["failed"],
                "time left": duration(left),
            }
        )
    return rows


def _submitted_runs(studies: Sequence[Study]) -> set[str]:
    if not is_installed("submitit"):
        return set()
    from experiments.execution.submitit_files import submitted_runs

    folders = {Path(study.grid.config.runs_dir) for study in studies if not study.problem}
    return {name for folder in folders for name in submitted_runs(folder)}


def state(job: Job, submitted: Set[str] = frozenset()) -> str:
    """What its run directory tells of a job without a record: done, running, failed, or waiting for a process.

    Queued, if it is one of the `submitted` and has not begun.
    """
    try:
        directory = RunDirectory(job.config)
        if directory.done:
            return "done"
        if directory.in_use:
            return "running"
        if job.name in submitted:
            return "queued"
        lines = (directory.path / OUTPUT).read_text("utf8", "replace").strip().splitlines()
    except UserError:
        return "failed"
    except OSError:
        return "waiting"
    return "failed" if lines and lines[-1].startswith("error: ") else "waiting"


def share_done(job: Job) -> float:
    """The share of the epochs of a run that is in its metrics."""
    try:
        text = (RunDirectory(job.config).path / "metrics.csv").read_text("utf8")
    except (UserError, OSError):
        return 0.0
    return min(1.0, max(0, text.count("\n") - 1) / job.config.train.epochs)
