"""The jobs that Hydra's submitit launchers hand to other processes. The launchers do not say where the output of a job
goes or how it has ended, and leave the others at the first that has failed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus

from lawn.errors import ConfigError, RunError, UserError
from lawn.train.progress import echo


@contextmanager
def report_submitit_jobs(arguments: Sequence[str], fail: Callable[[Exception], None]) -> Iterator[None]:
    """Inside, jobs of a launcher that `arguments` of run.py choose are reported on: a line when they start and one when
    they have ended, all of them, whatever becomes of the others. `fail` is called with what has gone wrong.

    Raises ConfigError where submitit is not installed.
    """
    launcher = next((text for text in arguments if text.startswith("hydra/launcher=submitit")), None)
    if launcher is None:
        yield
        return
    if find_spec("submitit") is None:
        raise ConfigError(f"{launcher}: the package submitit is not installed; pip install '.[slurm]'")
    import submitit

    left: list[Any] = []

    class Reporting(submitit.AutoExecutor):
        def map_array(self, fn: Callable[..., Any], *iterables: Any) -> list[Any]:
            jobs = super().map_array(fn, *iterables)
            left.extend(jobs)
            return [Awaited(job, " ".join(overrides)) for job, overrides in zip(jobs, iterables[0], strict=True)]

    class Awaited:
        """What the launcher gets for a job, and waits for."""

        def __init__(self, job: Any, name: str) -> None:
            self._job, self._name = job, name
            echo(f"job {job.job_id}, {name}: output in {_logs(job)}")

        def results(self) -> list[JobReturn]:
            try:
                returned = self._job.results()[0]
                with redirect_stderr(StringIO()):  # where Hydra says that there was an error
                    result = returned.return_value
            except UserError as error:  # which says what job it is of
                fail(error)
            except submitit.core.utils.UncompletedJobError:
                fail(RunError(f"in the job {self._name}: {_lost(self._job)}; see {_logs(self._job)}"))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                fail(RunError(f"in the job {self._name}: {what}; see {_logs(self._job)}"))
            else:
                echo(f"job {self._job.job_id}, {self._name}: {_ended(result)}")
            left.remove(self._job)
            return [JobReturn(status=JobStatus.COMPLETED)]

    try:
        with patch.object(submitit, "AutoExecutor", Reporting):  # where the launcher looks for it
            yield
    except KeyboardInterrupt:
        if left:
            echo(f"not waited for, and not cancelled: jobs {', '.join(job.job_id for job in left)}")
        raise


def _logs(job: Any) -> str:
    """Standard output and standard error of a job."""
    return f"{job.paths.stdout} and {job.paths.stderr.name}"


def _lost(job: Any) -> str:
    """Why a job has no result: the last that it said, if anything."""
    said = (job.stderr() or "").strip().splitlines()
    return said[-1] if said else "ended without a result; killed, or out of memory or of hydra.launcher.timeout_min"


def _ended(result: dict[str, Any]) -> str:
    """How a run has ended, by its result.json, which may be an older version's."""
    last, key = result["last"], f"{result['split']}_{result['headline']}"
    value = "" if last.get(key) is None else f", {key} {last[key]:.4g}"
    return f"{result['status']} after epoch {last['epoch']}{value}"
