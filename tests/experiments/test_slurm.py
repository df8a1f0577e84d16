"""What the executor makes of Slurm's answers; the commands are scripts without jobs."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.definitions.spec import Cell
from experiments.execution.executor import Resources
from experiments.execution.options import add_options, make_executor
from experiments.planning.grid import Job
from experiments.planning.study import studies
from experiments.records import Store
from lawn.errors import ConfigError, RunError
from lawn.train import Stopped
from lawn.train.signals import raise_on_signal
from tests.experiments.test_agenda import MANY

pytest.importorskip("submitit")
import cloudpickle

from experiments.execution import slurm, slurm_queue
from experiments.execution.slurm import SubmititExecutor
from experiments.execution.submitit_files import submitted_runs

SUBMITTED = "echo Submitted batch job 7; echo '7 PENDING' >> queue"


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Replaces a command of Slurm by a script."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "DISK_SECONDS", 0.0)
    monkeypatch.setattr(slurm_queue, "QUEUE_SECONDS", 0.0)

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    for name, script in {"srun": "", "sbatch": SUBMITTED, "squeue": "cat queue"}.items():
        write(name, script)
    (tmp_path / "queue").touch()
    return write


def jobs_of(folder: Path, number: int = 1) -> list[Job]:
    (study,) = studies(MANY, extra=(f"runs_dir={folder}/runs",), seeds=number)
    return study.outstanding(Store(folder / "results"))


def executor_of(folder: Path, size: int = 4) -> SubmititExecutor:
    return SubmititExecutor(folder / "runs", Resources(gpus=0, cpus=3), size)


def submit(folder: Path, jobs: list[Job]) -> SubmititExecutor:
    executor = executor_of(folder).__enter__()
    executor.start(jobs)
    assert executor.wait(0) == []
    return executor


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / ".submitit").glob("*.pkl"))


def test_a_job_that_is_not_in_the_queue_is_lost(command, tmp_path):
    executor = submit(tmp_path, jobs_of(tmp_path))
    (tmp_path / "queue").write_text("8 RUNNING\n7 NODE_FAIL\n")
    (ended,) = executor.wait(1)
    assert ended.lost
    assert ended.failure.startswith("lost with its process: ")
    assert files(tmp_path) == []


@pytest.mark.parametrize("state", ["SUSPENDED", "CONFIGURING", "REQUEUED", "COMPLETING"])
def test_a_job_in_another_state_is_waited_for(command, tmp_path, state):
    executor = submit(tmp_path, jobs_of(tmp_path))
    (tmp_path / "queue").write_text(f"7 {state}\n")
    assert executor.wait(0.1) == []


def test_a_job_that_is_in_the_queue_again_is_not_lost(command, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "DISK_SECONDS", 0.5)
    executor = submit(tmp_path, jobs_of(tmp_path))
    for _ in range(3):
        (tmp_path / "queue").write_text("")
        assert executor.wait(0) == []
        (tmp_path / "queue").write_text("7 PENDING\n")
        assert executor.wait(0) == []
        time.sleep(0.3)


def test_without_an_answer_of_slurm_no_job_is_lost(command, tmp_path, capsys):
    executor = submit(tmp_path, jobs_of(tmp_path))
    command("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    assert executor.wait(1.5) == []
    assert capsys.readouterr().out.count("until it succeeds, a job that is lost is not noticed") == 1
    assert submit(tmp_path, jobs_of(tmp_path)).running == 1
    assert "job 7, of an earlier call: " in capsys.readouterr().out
    command("squeue", "true")
    assert executor.wait(1)[0].lost


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "FailedJobError"),
        ("echo sbatch: error: one >&2; echo sbatch: error: Invalid partition >&2; exit 1", "Invalid partition"),
        ("echo welcome", 'Could not make sense of sbatch output "welcome"'),
    ],
)
def test_sbatch_fails(command, tmp_path, script, message):
    command("sbatch", script)
    executor = executor_of(tmp_path).__enter__()
    executor.start(jobs_of(tmp_path))
    with pytest.raises(RunError, match=f"^the jobs could not be submitted: .*{message}") as raised:
        executor.wait(0)
    assert "\n" not in str(raised.value)


def test_a_signal_while_a_job_is_submitted(command, tmp_path, capsys):
    """The next call finds the job."""
    command("sbatch", f"kill -TERM $PPID; sleep 0.3; {SUBMITTED}")

    def stopped() -> None:
        with raise_on_signal(), executor_of(tmp_path) as executor:
            executor.start(jobs_of(tmp_path))
            executor.wait(0)

    with pytest.raises(Stopped):
        stopped()
    assert "to cancel them: scancel 7\n" in capsys.readouterr().out
    assert files(tmp_path) == ["7_submitted.pkl"]


def test_files_of_jobs_that_are_gone(command, tmp_path):
    """Whatever they contain; those of a job that is in the queue must be readable."""
    folder = tmp_path / "runs" / ".submitit"
    folder.mkdir(parents=True)
    (tmp_path / "queue").write_text("5_1 RUNNING\n")
    for job in ("3", "4_0"):
        (folder / f"{job}_submitted.pkl").write_bytes(b"of another version")
        (folder / f"{job}_0_result.pkl").write_bytes(b"")
    executor_of(tmp_path).__enter__()
    assert files(tmp_path) == ["3_0_result.pkl", "4_0_0_result.pkl"]  # another call may wait for these jobs
    for content in (b"", b"of another version", cloudpickle.dumps(len), cloudpickle.dumps([])[:-1]):
        (folder / "5_1_submitted.pkl").write_bytes(content)
        with pytest.raises(RunError, match=r"5_1_submitted.pkl: cannot be read .*; delete it if its job has ended"):
            executor_of(tmp_path).__enter__()


def test_the_result_of_an_earlier_job_of_the_same_number_is_not_that_of_the_new_one(command, tmp_path):
    """Slurm begins again with 1 if its state is lost, and two clusters may share a disk."""
    folder = tmp_path / "runs" / ".submitit"
    folder.mkdir(parents=True)
    (folder / "7_0_result.pkl").write_bytes(cloudpickle.dumps(("success", 1)))
    executor = submit(tmp_path, jobs_of(tmp_path))
    assert executor.wait(0.1) == []
    assert files(tmp_path) == ["7_submitted.pkl"]


class Mischief:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
def test_files_of_other_users_are_left_alone(command, tmp_path):
    folder, made = tmp_path / "runs" / ".submitit", tmp_path / "made"
    folder.mkdir(parents=True)
    for name in ("8_submitted.pkl", "9_submitted.pkl"):
        (folder / name).write_bytes(cloudpickle.dumps(Mischief(made)))
        os.chown(folder / name, 65534, 65534)
    (tmp_path / "queue").write_text("9 RUNNING\n")
    assert submitted_runs(tmp_path / "runs") == set()
    executor = submit(tmp_path, jobs_of(tmp_path))
    assert files(tmp_path) == ["7_submitted.pkl", "8_submitted.pkl", "9_submitted.pkl"]
    (folder / "7_0_result.pkl").write_bytes(cloudpickle.dumps(Mischief(made)))
    os.chown(folder / "7_0_result.pkl", 65534, 65534)
    (ended,) = executor.wait(1)
    assert "7_0_result.pkl: cannot be read (it is another user's)" in str(ended.failure)
    assert not made.exists()


def test_two_commands_do_not_submit_a_job_twice(command, tmp_path, capsys):
    jobs = jobs_of(tmp_path, 3)
    second = executor_of(tmp_path).__enter__()
    first = submit(tmp_path, jobs[:2])
    second.start(jobs[1:])
    command("sbatch", SUBMITTED.replace("7", "8"))
    assert second.wait(0) == []
    assert files(tmp_path) == ["7_submitted.pkl", "8_submitted.pkl"]
    assert f"job 7, of an earlier call: {jobs[0].name} and 1 more" in capsys.readouterr().out
    assert (first.running, second.running) == (2, 2)


def test_a_job_of_a_group_that_has_ended_is_submitted_again(command, tmp_path):
    """The group is of an earlier call, and this call has asked for one of its jobs first."""
    jobs = jobs_of(tmp_path, 2)
    submit(tmp_path, jobs)
    executor = submit(tmp_path, jobs[:1])
    (tmp_path / "queue").write_text("")
    assert [ended.job.name for ended in executor.wait(1)] == [jobs[0].name]
    command("sbatch", SUBMITTED.replace("7", "8"))
    executor.start(jobs[1:])
    assert executor.wait(0) == []
    assert files(tmp_path) == ["8_submitted.pkl"]


@pytest.mark.parametrize(
    ("content", "failure"),
    [
        (
            cloudpickle.dumps(("error", "Traceback:\n  of a job\nValueError: no\n---\n such thing\n")),
            " such thing; see ",
        ),
        (cloudpickle.dumps(("success", 1)), "the disk is full"),
        (b"", "7_0_result.pkl: cannot be read (Ran out of input)"),
    ],
)
def test_a_job_that_fails(command, tmp_path, content, failure):
    (job,) = jobs_of(tmp_path)
    executor = submit(tmp_path, [job])
    (tmp_path / "runs" / job.name / "output.log").write_text("error: the disk is full\n")
    (tmp_path / "runs" / ".submitit" / "7_0_result.pkl").write_bytes(content)
    (ended,) = executor.wait(1)
    assert failure in ended.failure
    assert not ended.lost


def test_two_commands_wait_for_a_job_that_fails(command, tmp_path):
    """Both say why, whichever reads its result first; neither submits it again."""
    (job,) = jobs_of(tmp_path)
    first, second = submit(tmp_path, [job]), submit(tmp_path, [job])
    (tmp_path / "runs" / job.name / "output.log").write_text("error: the disk is full\n")
    (tmp_path / "runs" / ".submitit" / "7_0_result.pkl").write_bytes(cloudpickle.dumps(("success", 1)))
    (tmp_path / "queue").write_text("7 COMPLETED\n")
    for executor in (first, second):
        (ended,) = executor.wait(1)
        assert (ended.failure, ended.lost) == ("the disk is full", False)
        executor_of(tmp_path).__enter__()  # deletes what is not needed any more


def test_a_job_that_is_cancelled_is_not_lost(command, tmp_path):
    executor = submit(tmp_path, jobs_of(tmp_path))
    (tmp_path / "queue").write_text("7 CANCELLED\n")
    (ended,) = executor.wait(1)
    assert (ended.failure, ended.lost, ended.cancelled) == ("cancelled: job 7", False, True)


def test_slurm_may_forget_a_job_that_was_cancelled(command, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "DISK_SECONDS", 0.2)
    executor = submit(tmp_path, jobs_of(tmp_path))
    (tmp_path / "queue").write_text("7 CANCELLED\n")
    assert executor.wait(0) == []
    (tmp_path / "queue").write_text("")
    (ended,) = executor.wait(2)
    assert ended.cancelled


def made(folder: Path, *options: str) -> SubmititExecutor:
    parser = argparse.ArgumentParser()
    add_options(parser)
    executor = make_executor(parser.parse_args(("--executor", "slurm", *options)), folder / "runs")
    assert isinstance(executor, SubmititExecutor)
    return executor


def test_options_of_sbatch(command, tmp_path):
    """Those of --slurm replace those of the executor; srun does not inherit the number of cores."""
    command("sbatch", f'cp "$1" script; {SUBMITTED}')
    executor = made(
        tmp_path, "--cpus", "8", "--gpus", "2", "--time", "4h", "--slurm", "gpus-per-node=a100:1", "mem=3GB"
    )
    with executor:
        executor.start(jobs_of(tmp_path))
        executor.wait(0)
    lines = (tmp_path / "script").read_text().splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"cpus-per-task=8", "gpus-per-node=a100:1", "mem=3GB", "time=240"} <= set(options)
    assert len([option for option in options if option.startswith("gpus-per-node")]) == 1
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert " --cpus-per-task=8 " in srun


def test_what_a_job_of_slurm_gets(command, tmp_path):
    """By default an hour and a GPU; a run on ImageNet has nodes with as many GPUs as ranks."""
    command("sbatch", f'cp "$1" "$(ls scripts | wc -l)"; mv [01] scripts; {SUBMITTED}')
    (tmp_path / "scripts").mkdir()
    large = replace(MANY, cells=(*MANY.cells, Cell("All", ("dataset=imagenet", "train.epochs=1"))))
    jobs = [
        job
        for study in studies(large, extra=(f"runs_dir={tmp_path}/runs",), seeds=1)
        for job in study.outstanding(Store(tmp_path / "results"))
    ]
    assert made(tmp_path).size == 64
    with made(tmp_path, "--nodes", "2", "--partition", "gpu", "--jobs", "3") as executor:
        assert executor.size == 3
        for job in jobs:
            executor.start([job])
        executor.wait(0)
    found = [(tmp_path / "scripts" / name).read_text().splitlines() for name in "01"]
    options = [{line.removeprefix("#SBATCH --") for line in lines} for lines in found]
    assert all({"partition=gpu", "time=60", "cpus-per-task=1"} <= each for each in options)
    assert {"nodes=1", "ntasks-per-node=1", "gpus-per-node=1"} <= options[0]
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8"} <= options[1]


def test_more_jobs_than_an_array_has(command, tmp_path, monkeypatch):
    """They are several arrays."""
    monkeypatch.setattr(slurm, "MAX_ARRAY", 2)
    number = 'cat "$1" >> scripts; echo >> calls; n=$(wc -l < calls); echo "Submitted batch job $n"'
    command("sbatch", f'{number}; for k in "$n" "${{n}}_0" "${{n}}_1"; do echo "$k PENDING"; done >> queue')
    jobs = jobs_of(tmp_path, 5)
    executor = executor_of(tmp_path, 6).__enter__()
    for job in jobs:
        executor.start([job])
    assert executor.places(jobs[0]) == 1
    assert executor.wait(0) == []
    assert (executor.running, executor.places(jobs[0])) == (5, 1)
    assert files(tmp_path) == [f"{job}_submitted.pkl" for job in ("1_0", "1_1", "2_0", "2_1", "3")]
    assert submitted_runs(tmp_path / "runs") == {job.name for job in jobs}
    assert (tmp_path / "scripts").read_text().count("#SBATCH --array=0-1%2\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "0.25"), "--gpus 0.25: Slurm jobs do not share a GPU"),
        (("--time", "1m"), "--time: must be at least 5m"),
        (("--slurm", "exclusive"), "--slurm exclusive: must be KEY=VALUE"),
    ],
)
def test_options_that_slurm_cannot_have(command, tmp_path, options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        made(tmp_path, *options)


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "1.5", "one"])
def test_numbers_of_gpus(command, tmp_path, number, capsys):
    with pytest.raises(SystemExit):
        made(tmp_path, "--gpus", number)
    assert "must be a whole number, or a fraction below 1" in capsys.readouterr().err
