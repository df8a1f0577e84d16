"""Processes on device slots: each slot has one job at a time, in a process of its own."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from experiments.planning.grid import Job
from lawn.child_signals import signals_blocked
from lawn.config import Config
from lawn.errors import UserError
from lawn.train import Stopped, train, train_vectorized
from lawn.train.run_directory import RunDirectory
from lawn.train.signals import end_with_parent, raise_on_signal


@dataclass(frozen=True)
class JobResult:
    job: Job
    seconds: float  # its share of the process, if several jobs were vectorized
    failure: str | None  # why it has no result, in one line
    group_size: int  # jobs that were vectorized in its process
    diverged: bool = False


@dataclass(frozen=True)
class _Running:
    jobs: list[Job]
    process: BaseProcess
    slots: list[str]
    start: float
    log: Path


class Pool:
    """Runs jobs on `slots`: device names, each repeated for every process that the device takes at the same time.

    A process has one job, or several vectorized ones, and takes one slot; a job that uses all devices takes all. On
    leaving the context, running jobs are stopped with a checkpoint. Output goes to output.log in the run directory of
    the first job.
    """

    def __init__(self, slots: Sequence[str]) -> None:
        self._slots, self._free = list(slots), list(slots)
        self._running: list[_Running] = []
        # On CPUs a server that has imported everything forks: jobs start at once, without the state of the caller. A
        # process that has used a GPU must not be forked.
        gpu = any(slot.startswith("cuda") for slot in slots)
        self._context = get_context("spawn") if gpu else get_context("forkserver")
        self._context.set_forkserver_preload(["experiments.execution.pool", "torch._dynamo", "sklearn.datasets"])

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.join()

    def takes(self, job: Job) -> bool:
        """Whether the job can start now."""
        return len(self._free) == len(self._slots) if job.uses_all_devices else bool(self._free)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return len(self._free)

    @property
    def running(self) -> int:
        """The number of running jobs."""
        return sum(len(running.jobs) for running in self._running)

    def start(self, jobs: list[Job]) -> None:
        """Start a job, or several vectorized ones, on a free slot or on all slots."""
        all_slots = jobs[0].uses_all_devices
        slots = [self._free.pop(0) for _ in (self._slots if all_slots else self._slots[:1])]
        devices = list(dict.fromkeys(slots))
        configs = [replace(job.config, device=slots[0]) for job in jobs]
        if len(devices) > 1:
            configs = [replace(c, device="cuda", train=replace(c.train, devices=len(devices))) for c in configs]
        log = Path(configs[0].runs_dir) / jobs[0].name / "output.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, torch.get_num_threads() * len(slots) // len(self._slots))
        process = self._context.Process(target=_work, args=(configs, devices, threads, log))
        with signals_blocked(self._context.get_start_method()):
            process.start()
        self._running.append(_Running(jobs, process, slots, time.monotonic(), log))

    def wait(self, timeout: float) -> list[JobResult]:
        """The results of the jobs that have ended; waits up to `timeout` seconds for the first."""
        sentinels = wait([running.process.sentinel for running in self._running], timeout)
        ended = [running for running in self._running if running.process.sentinel in sentinels]
        for running in ended:
            running.process.join()
            self._running.remove(running)
            self._free += running.slots
        now = time.monotonic()
        return [
            JobResult(job, (now - running.start) / len(running.jobs), _failure(running, job), len(running.jobs))
            for running in ended
            for job in running.jobs
        ]


def _failure(running: _Running, job: Job) -> str | None:
    try:
        if RunDirectory(job.config).done:
            return None
    except UserError as error:
        return str(error)
    code = running.process.exitcode or 0
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if not running.log.exists():
        return f"{running.log.parent}: was deleted or moved while the run was at work in it"
    try:
        lines = running.log.read_text("utf8", "replace").strip().splitlines()
    except OSError as error:
        return f"{running.log}: cannot be read ({error.strerror}); move it away"
    return (lines[-1] if lines else f"exit code {code}").removeprefix("error: ")


def _work(configs: list[Config], devices: list[str], threads: int, log: Path) -> None:
    """The main function of a process."""
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    output = log.open("a", encoding="utf8")
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    torch.set_num_threads(threads)
    try:
        with raise_on_signal():
            end_with_parent()
            if len(configs) > 1:
                train_vectorized(configs)
            else:
                train(configs[0])
    except (Stopped, UserError, OSError) as error:
        print(f"{'' if isinstance(error, Stopped) else 'error: '}{error}", flush=True)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))


def visible_gpus(devices: list[str], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a subset of the visible devices, in which ranks count from 0."""
    indices = [int(device.partition(":")[2]) for device in devices]
    names = (visible or "").split(",")
    return ",".join(names[k] if len(names) > max(indices) else str(k) for k in indices)
