"""Jobs of submitit's executor for debugging, which runs them here; tests/test_cli.py has the real command."""

import re

import pytest
import submitit
from hydra.core.utils import JobReturn, JobStatus

from lawn.errors import ConfigError
from lawn.train import report_submitit_jobs

pytestmark = pytest.mark.filterwarnings(  # files that this executor leaves open
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
RESULT = {"status": "done", "split": "test", "headline": "hr10", "last": {"epoch": 3, "test_hr10": 61.234}}
OUTCOMES = {
    "done": JobReturn(status=JobStatus.COMPLETED, _return_value=RESULT),
    "refused": JobReturn(status=JobStatus.FAILED, _return_value=ConfigError("in the job refused: no")),
    "broken": JobReturn(status=JobStatus.FAILED, _return_value=TypeError("None")),
    "killed": None,
    "diverged": JobReturn(
        status=JobStatus.COMPLETED,
        _return_value={**RESULT, "status": "diverged", "last": {"epoch": 2, "test_hr10": None}},
    ),
}


def submit(folder):
    jobs = submitit.AutoExecutor(folder, cluster="debug").map_array(
        lambda overrides: OUTCOMES[overrides[0]], [[name, "seed=0"] for name in OUTCOMES]
    )
    jobs[3]._job.cancel()
    return jobs


def test_every_job_is_reported_on(tmp_path, capsys):
    usual, failures = submitit.AutoExecutor, []
    with report_submitit_jobs(["-m", "hydra/launcher=submitit_slurm"], failures.append):
        returned = [job.results()[0].return_value for job in submit(tmp_path)]
    assert submitit.AutoExecutor is usual
    assert returned == [None] * 5
    out, err = capsys.readouterr()
    assert "Error executing job" not in err
    *begun, done, diverged = out.splitlines()
    for name, line in zip(OUTCOMES, begun, strict=True):
        log = rf"{tmp_path}/DEBUG_\d+_0_log"
        assert re.fullmatch(rf"job DEBUG_\d+, {name} seed=0: output in {log}.out and DEBUG_\d+_0_log.err", line)
    assert re.fullmatch(r"job DEBUG_\d+, done seed=0: done after epoch 3, test_hr10 61.23", done)
    assert re.fullmatch(r"job DEBUG_\d+, diverged seed=0: diverged after epoch 2", diverged)
    refused, broken, killed = map(str, failures)
    assert refused == "in the job refused: no"
    assert broken.startswith(f"in the job broken seed=0: TypeError: None; see {tmp_path}/DEBUG_")
    assert killed.startswith("in the job killed seed=0: ended without a result; killed, or out of memory")
    assert [error.exit_code for error in failures] == [2, 1, 1]


def test_jobs_that_nobody_waits_for_are_named(tmp_path, capsys):
    def interrupted():
        with report_submitit_jobs(["hydra/launcher=submitit_local"], pytest.fail):
            first, *_ = submit(tmp_path)
            first.results()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert re.fullmatch(
        r"not waited for, and not cancelled: jobs (DEBUG_\d+, ){3}DEBUG_\d+", capsys.readouterr().out.splitlines()[-1]
    )
