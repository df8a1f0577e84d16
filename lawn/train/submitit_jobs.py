"""Reports on the jobs of Hydra's submitit launchers.

The launchers do not print where the output of a job is or how it ended, and stop waiting at the first failure.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus

from lawn.errors import ConfigError, RunError, UserError
from lawn.output import echo
from lawn.packages import check_installed


@contextmanager
def report_submitit_jobs(arguments: Sequence[str], fail: Callable[[Exception], None]) -> Iterator[None]:
    """In the body, print a line when a job starts and one when it ends, for a launcher chosen by `arguments` of run.py.

    All jobs are waited for; `fail` is called with each error. Raises ConfigError if submitit is not installed, or if
    the multirun expands to no job.
    """
    launcher = next((text for text in arguments if text.startswith("hydra/launcher=submitit")), None)
    if launcher is None:
        yield
        return
    check_installed("submitit", launcher, "'.[slurm]'")
    import submitit

    submitted: list[Any] = []
    waiting: list[Any] = []

    class Reporting(submitit.AutoExecutor):
        def map_array(self, fn: Callable[..., Any], *iterables: Any) -> list[Any]:
            jobs = super().map_array(fn, *iterables)
            submitted.extend(jobs)
            waiting.extend(jobs)
            return [Awaited(job, " ".join(overrides)) for job, overrides in zip(jobs, iterables[0], strict=True)]

    class Awaited:
        """What the launcher waits for in the place of the job."""

        def __init__(self, job: Any, name: str) -> None:
            self._job, self._name = job, name
            echo(f"job {job.job_id}, {name}: output in {logs_of(job)}")

        def results(self) -> list[JobReturn]:
            try:
                returned = self._job.results()[0]
                with redirect_stderr(StringIO()):  # Hydra prints that there was an error
                    result = returned.return_value
            except UserError as error:  # it names the job
                fail(error)
            except submitit.core.utils.UncompletedJobError:
                fail(RunError(f"in the job {self._name}: {reason_of_loss(self._job)}; see {logs_of(self._job)}"))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                fail(RunError(f"in the job {self._name}: {what}; see {logs_of(self._job)}"))
            else:
                echo(f"job {self._job.job_id}, {self._name}: {_ended(result)}")
            waiting.remove(self._job)
            return [JobReturn(status=JobStatus.COMPLETED)]

    try:
        with patch.object(submitit, "AutoExecutor", Reporting):  # the launcher imports it from there
            yield
    except AssertionError:
        if submitted:
            raise
        # The launcher asserts that there are jobs.
        raise ConfigError(f"{' '.join(arguments)}: expands to no job") from None
    except KeyboardInterrupt:
        if waiting:
            echo(f"not waited for, and not cancelled: jobs {', '.join(job.job_id for job in waiting)}")
        raise


def logs_of(job: Any) -> str:
    """The files of standard output and standard error of a job."""
    return f"{job.paths.stdout} and {job.paths.stderr.name}"


def reason_of_loss(job: Any, limit: str = "hydra.launcher.timeout_min") -> str:
    """Why a job has no result: the last line of its standard error, if any. `limit` is the option of its time."""
    lines = (job.stderr() or "").strip().splitlines()
    return lines[-1] if lines else f"ended without a result; killed, or out of memory or of {limit}"


def _ended(result: dict[str, Any]) -> str:
    """How a run ended, from its result."""
    last, key = result["last"], f"{result['split']}_{result['headline']}"
    value = "" if last.get(key) is None else f", {key} {last[key]:.4g}"
    return f"{result['status']} after epoch {last['epoch']}{value}"
