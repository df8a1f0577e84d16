"""The options of `experiments run` about where jobs run, and the executor that they describe."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from experiments.execution.executor import Executor, Resources
from experiments.execution.pool import Pool
from lawn.errors import ConfigError
from lawn.packages import check_installed

MAX_SEEDS = 1_000  # of a cell
MAX_NUMBER = 100_000  # of jobs, GPUs, cores or nodes
LOCAL, SLURM, SUBMITIT_LOCAL, RAY = "local", "slurm", "submitit_local", "ray"
CLUSTER = (SLURM, SUBMITIT_LOCAL, RAY)
TAKEN_BY = {  # options that do not apply to every executor
    "devices": (LOCAL,),
    "gpus": CLUSTER,
    "cpus": CLUSTER,
    "nodes": (SLURM, RAY),
    "ranks_per_node": CLUSTER,
    "time": (SLURM, SUBMITIT_LOCAL),
    "partition": (SLURM,),
    "slurm": (SLURM,),
    "address": (RAY,),
}
PACKAGES = {SLURM: ("submitit", "slurm"), SUBMITIT_LOCAL: ("submitit", "slurm"), RAY: ("ray", "ray")}  # and extras
SHORTEST_TIME = 300.0  # seconds, of a Slurm job


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", "--max-jobs", type=positive, metavar="N", help="processes at the same time")
    parser.add_argument(
        "--executor",
        choices=(LOCAL, *CLUSTER),
        default=LOCAL,
        help="processes of this machine (default), Slurm jobs, the same jobs as processes of this machine, Ray tasks",
    )
    parser.add_argument("--devices", help="local: auto (default), cpu, or e.g. cuda:0,cuda:1")
    parser.add_argument("--gpus", type=gpus, metavar="N", help="GPUs of a job; with ray also a fraction")
    parser.add_argument("--cpus", type=positive, metavar="N", help="CPU cores of a job, or of each of its ranks")
    parser.add_argument("--nodes", type=positive, metavar="N", help="nodes of a run on ImageNet (default: 1)")
    parser.add_argument(
        "--ranks-per-node", type=positive, metavar="N", help="its ranks on each node (default: 8; submitit_local: 1)"
    )
    parser.add_argument("--time", type=seconds, metavar="TIME", help="slurm: limit of a job (default: 1h); it resumes")
    parser.add_argument("--partition", metavar="NAME", help="slurm: partition")
    parser.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="slurm: other options of sbatch, e.g. account=abc mem=32GB",
    )
    parser.add_argument("--address", help="ray: the cluster (default: auto)")


def make_executor(given: argparse.Namespace, runs_dir: Path) -> Executor:
    """The executor that the options describe. Raises ConfigError for options that do not fit together."""
    name = given.executor
    for option, takers in TAKEN_BY.items():
        if getattr(given, option) is not None and name not in takers:
            raise ConfigError(f"--{option.replace('_', '-')}: only with --executor {', '.join(takers)}")
    if name == LOCAL:
        return Pool(_slots("auto" if given.devices is None else given.devices, given.jobs))
    package, extra = PACKAGES[name]
    check_installed(package, f"--executor {name}", f"'.[{extra}]'")
    elsewhere = name != SUBMITIT_LOCAL
    if name != RAY and given.gpus is not None and given.gpus % 1:
        raise ConfigError(f"--gpus {given.gpus}: Slurm jobs do not share a GPU; a fraction needs --executor {RAY}")
    if given.time is not None and given.time < SHORTEST_TIME:
        raise ConfigError(f"--time: must be at least {SHORTEST_TIME / 60:.0f}m, as a job stops ahead of its limit")
    resources = Resources(
        gpus=float(elsewhere or torch.cuda.is_available()) if given.gpus is None else given.gpus,
        cpus=given.cpus or 1,
        nodes=given.nodes or 1,
        ranks_per_node=given.ranks_per_node or (8 if elsewhere else 1),
    )
    if name == RAY:
        from experiments.execution.ray_cluster import RayExecutor

        return RayExecutor(given.address or "auto", resources, given.jobs)
    from experiments.execution.slurm import SubmititExecutor

    parameters: dict[str, Any] = {"timeout_min": round((given.time or 3600.0) / 60)}
    parameters |= {"slurm_partition": given.partition} if given.partition else {}
    more = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in given.slurm or ())
    for key, value in more.items():
        if not value:
            raise ConfigError(f"--slurm {key}: must be KEY=VALUE, e.g. account=abc")
    more = {key.replace("-", "_"): value for key, value in more.items()}  # as submitit's, which they replace
    parameters |= {"slurm_additional_parameters": more} if more else {}
    cluster = "slurm" if name == SLURM else "local"
    return SubmititExecutor(runs_dir, resources, given.jobs or (64 if elsewhere else 1), cluster, parameters)


def _slots(devices: str, jobs: int | None) -> list[str]:
    """A device for each job that runs at the same time."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = gpus or ["cpu"] if devices == "auto" else devices.split(",")
    for name in names:
        if name not in ("cpu", *gpus):
            raise ConfigError(f"--devices {name}: not on this machine, which has {', '.join(('cpu', *gpus))}")
    return [names[i % len(names)] for i in range(jobs or len(names))]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number")
    if int(text) > MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {MAX_NUMBER}")
    return int(text)


def seed_count(text: str) -> int:
    if positive(text) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {MAX_SEEDS}")
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: must be a number up to 65535")
    return int(text)


def gpus(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number <= MAX_NUMBER and (number < 1 or number.is_integer())):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, or a fraction below 1")
    return number


def seconds(text: str) -> float:
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text)
    if not text or match is None:
        raise argparse.ArgumentTypeError(f"{text}: must be a time such as 2h, 90m or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + rest
