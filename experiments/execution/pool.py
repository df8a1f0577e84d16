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

from experiments.execution.executor import JobResult, job_results, make_output
from experiments.execution.worker import work
from experiments.planning.grid import Job
from lawn.child_signals import signals_blocked
from lawn.config import Config


@dataclass(frozen=True)
class _Running:
    jobs: list[Job]
    process: BaseProcess
    slots: list[str]
    start: float


class Pool:
    """Runs jobs on `slots` of this machine: device names, each repeated for every process that the device takes at the
    same time.

    A process takes one slot; a job that uses all devices takes all. On leaving the context, running jobs are stopped
    with a checkpoint.
    """

    def __init__(self, slots: Sequence[str]) -> None:
        self._slots, self._free, self.size = list(slots), list(slots), len(slots)
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

    def places(self, job: Job) -> int:
        if job.uses_all_devices:
            return int(len(self._free) == len(self._slots))
        return len(self._free)

    @property
    def running(self) -> int:
        return sum(len(running.jobs) for running in self._running)

    def start(self, jobs: list[Job]) -> None:
        log, all_slots = make_output(jobs), jobs[0].uses_all_devices
        slots = [self._free.pop(0) for _ in (self._slots if all_slots else self._slots[:1])]
        devices = list(dict.fromkeys(slots))
        configs = [replace(job.config, device=slots[0]) for job in jobs]
        if len(devices) > 1:
            configs = [replace(c, device="cuda", train=replace(c.train, devices=len(devices))) for c in configs]
        threads = max(1, torch.get_num_threads() * len(slots) // len(self._slots))
        process = self._context.Process(target=_work, args=(configs, devices, threads, log))
        with signals_blocked(self._context.get_start_method()):
            process.start()
        self._running.append(_Running(jobs, process, slots, time.monotonic()))

    def wait(self, timeout: float) -> list[JobResult]:
        sentinels = wait([running.process.sentinel for running in self._running], timeout)
        ended = [running for running in self._running if running.process.sentinel in sentinels]
        for running in ended:
            running.process.join()
            self._running.remove(running)
            self._free += running.slots
        return [result for running in ended for result in _results(running)]


def _results(running: _Running) -> list[JobResult]:
    code = running.process.exitcode or 0
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else code
    return job_results(running.jobs, running.jobs, [ended], time.monotonic() - running.start)


def _work(configs: list[Config], devices: list[str], threads: int, log: Path) -> None:
    """The main function of a process."""
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    sys.exit(work(configs, log, threads))


def visible_gpus(devices: list[str], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a subset of the visible devices, in which ranks count from 0."""
    indices = [int(device.partition(":")[2]) for device in devices]
    names = (visible or "").split(",")
    return ",".join(names[k] if len(names) > max(indices) else str(k) for k in indices)
