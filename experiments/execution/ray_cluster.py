"""Tasks of a Ray cluster."""

import logging
import os
import socket
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from experiments.execution.executor import LOST, JobResult, Resources, job_results, make_output
from experiments.execution.worker import work
from experiments.planning.grid import Job
from lawn.child_signals import handlers_kept
from lawn.config import Config
from lawn.errors import ConfigError

STOP_SECONDS = 60.0  # for checkpoints, when the context is left
REACH_SECONDS = 10.0
RANK_SECONDS = 10.0  # for the other ranks, when the first has ended


@dataclass(eq=False)
class _Running:
    jobs: list[Job]
    ranks: list[Any]  # their object references
    waiting: list[Any]  # those that have not ended
    group: PlacementGroup | None
    start: float


class RayExecutor:
    """Runs jobs as tasks of the Ray cluster at `address`.

    Fractions of a GPU let small models share one. The ranks of a job are tasks in a placement group. `size` is the
    number of processes at the same time, by default as many as the cluster has room for now. On leaving the context,
    running jobs are stopped with a checkpoint. If this process is killed, Ray ends its tasks.
    """

    def __init__(self, address: str, resources: Resources, size: int | None = None) -> None:
        self._address, self._resources, self._grows = address, resources, size is not None
        self.size = size or 0  # not known before the cluster is
        self._running: list[_Running] = []

    def __enter__(self) -> "RayExecutor":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _check_reachable(self._address)
        try:
            with handlers_kept():  # Ray would abort the process at SIGTERM
                ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--address {self._address}: {str(error).strip().splitlines()[0]}") from error
        self.size = self.size or self._room()
        if not self.size:
            self._no_room("a job")
        return self

    def __exit__(self, *_: object) -> None:
        tasks = [rank for running in self._running for rank in running.ranks]
        for task in tasks:
            ray.cancel(task)
        ray.wait(tasks, num_returns=len(tasks), timeout=STOP_SECONDS)
        ray.shutdown()

    def _room(self, whole: bool = False) -> int:
        """The number of processes that fit on the nodes."""
        wanted = {kind: number for kind, number in self._wanted(whole).items() if number}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(int(min(node.get(kind, 0.0) / number for kind, number in wanted.items())) for node in nodes)

    def _no_room(self, what: str) -> NoReturn:
        has = [{kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")} for node in ray.nodes()]
        wanted, nodes = self._wanted(), ", ".join(f"{node['GPU']:g} GPUs and {node['CPU']:g} CPUs" for node in has)
        ray.shutdown()
        raise ConfigError(
            f"--executor ray: no room for {what} of {wanted['GPU']:g} GPUs and {wanted['CPU']:g} CPUs; the nodes have "
            f"{nodes}. Set --gpus (0: train on CPUs) and --cpus, or --jobs for a cluster that grows"
        )

    def _wanted(self, whole: bool = False) -> dict[str, float]:
        """The resources of a process; `whole` GPUs."""
        gpus = self._resources.gpus
        return {"CPU": self._resources.cpus, "GPU": ceil(gpus) if whole else gpus}

    def places(self, job: Job) -> int:
        return max(0, self.size - len(self._running))

    @property
    def running(self) -> int:
        return sum(len(running.jobs) for running in self._running)

    def start(self, jobs: list[Job]) -> None:
        ranks = self._resources.ranks(jobs[0])
        if ranks > 1 and not self._grows and ranks > self._room(whole=True):
            self._no_room(f"a run of {ranks} ranks, each")
        group = None if ranks == 1 else placement_group([self._wanted(whole=True)] * ranks)
        tasks = self._tasks(jobs, ranks, group)
        self._running.append(_Running(jobs, tasks, list(tasks), group, time.monotonic()))

    def _tasks(self, jobs: list[Job], ranks: int, group: PlacementGroup | None) -> list[Any]:
        wanted = self._wanted(whole=group is not None)
        options = {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"], "max_retries": 0}
        arguments = Path.cwd(), [job.config for job in jobs], make_output(jobs), self._resources.cpus
        if group is None:
            # a process that has used a GPU keeps a part of its memory
            task: Any = ray.remote(max_calls=1 if wanted["GPU"] else 0)(_work)
            return [task.options(**options).remote(*arguments)]
        bundles = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(ranks)]
        address: Any = ray.remote(_free_address)
        first = address.options(num_cpus=0, scheduling_strategy=bundles[0]).remote()
        task = ray.remote(max_calls=1)(_work_as_rank)
        return [
            task.options(**options, scheduling_strategy=bundle).remote(rank, ranks, first, *arguments)
            for rank, bundle in enumerate(bundles)
        ]

    def wait(self, timeout: float) -> list[JobResult]:
        waiting = [rank for running in self._running for rank in running.waiting]
        ended, _ = ray.wait(waiting, num_returns=1, timeout=timeout)
        if ended:  # perhaps there are more
            ended, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [result for running in list(self._running) for result in self._results(running, ended)]

    def _results(self, running: _Running, ended: list[Any]) -> list[JobResult]:
        """The results of a job, if its first rank has ended, or another one that the rest would wait for."""
        new = [rank for rank in running.waiting if rank in ended]
        running.waiting = [rank for rank in running.waiting if rank not in new]
        if running.ranks[0] not in new and not any(map(_exit_code, new)):
            return []
        self._running.remove(running)
        _, left = ray.wait(running.ranks, num_returns=len(running.ranks), timeout=RANK_SECONDS)
        for rank in left:
            ray.cancel(rank, force=True)
        codes = [_exit_code(rank) for rank in running.ranks]
        if running.group is not None:
            remove_placement_group(running.group)
        return job_results(running.jobs, running.jobs, codes, time.monotonic() - running.start)


def _check_reachable(address: str) -> None:
    """Raises ConfigError if nothing listens at HOST:PORT; Ray would try for minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address {address}: no cluster can be reached there ({error})") from error


def _exit_code(task: Any) -> int | str:
    """What `work` returned, or why it did not return."""
    try:
        return int(ray.get(task))
    except RayTaskError as error:  # of our own code
        return str(error).strip().splitlines()[-1]
    except RayError as error:  # of the node, the process or its memory
        return f"{LOST}: {str(error).strip().splitlines()[0]}"


def _work(folder: Path, configs: list[Config], log: Path, threads: int) -> int:
    """`work`, with paths relative to `folder`."""
    os.chdir(folder)
    return work(configs, log, threads)


def _work_as_rank(rank: int, ranks: int, first: tuple[str, int], *arguments: Any) -> int:
    """`_work` as one rank of a run; `first` is the address at which the ranks meet."""
    os.environ |= {
        **{"MASTER_ADDR": first[0], "MASTER_PORT": str(first[1])},
        **{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        "TORCHELASTIC_RUN_ID": f"{first[0]}:{first[1]}",  # as torchrun
    }
    return _work(*arguments)


def _free_address() -> tuple[str, int]:
    """The address of this node, and a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]
