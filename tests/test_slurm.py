"""The batch scripts, with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

SCONTROL = """case "$1" in
  show) printf 'node-a\\nnode-b\\n' ;;
  *) echo "$@" >> "$CALLS" ;;
esac"""


def batch(tmp_path: Path, script: str, srun: str, *arguments: str) -> subprocess.Popen[str]:
    """The script as a job of two nodes; `srun` is what that command does."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in (("srun", srun), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "40007",
        "SLURM_GPUS_ON_NODE": "8",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / "scripts" / "slurm" / script), *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_ranks_of_all_nodes_meet_at_the_first(tmp_path):
    job = batch(tmp_path, "train.sbatch", 'echo "$@"; exit 3', "dataset=imagenet", "optim.lr=1e-3")
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 3
    assert "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node-a:20007 --rdzv-id=40007" in said
    assert said.rstrip().endswith("run.py dataset=imagenet optim.lr=1e-3")
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("script", ["train.sbatch", "experiment.sbatch"])
def test_before_the_time_is_up_the_job_goes_back_into_the_queue(tmp_path, script):
    with batch(tmp_path, script, "echo started; exec sleep 100", "table3") as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    assert "requeueing" in said
    assert (tmp_path / "calls").read_text() == "requeue 40007\n"


@pytest.mark.slow
def test_an_experiment_runs_in_a_job(tmp_path):
    arguments = ("demo", "--results", str(tmp_path / "results"), "--set", f"runs_dir={tmp_path}/runs", "--seeds", "1")
    job = batch(tmp_path, "experiment.sbatch", 'exec "$@"', *arguments)
    said, _ = job.communicate(timeout=500)
    assert job.returncode == 0, said
    assert len(list((tmp_path / "runs").glob("*/DONE"))) == 3
