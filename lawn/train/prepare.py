"""A checked config, and the builders of its run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from lawn.config import Config
from lawn.errors import ConfigError
from lawn.optimizers import check_schedule, optimizer_arguments
from lawn.task import Task, task_builder
from lawn.train.logger import Logger, logger_builder
from lawn.train.run_directory import RunDirectory


@dataclass(frozen=True)
class PreparedRun:
    """A run that nothing refuses before its data is read."""

    config: Config
    build_task: Callable[..., Task]  # from a device, and optionally a loaded dataset
    start_logger: Callable[[str, Path], Logger]  # from the run's hash and directory

    @cached_property
    def directory(self) -> RunDirectory:
        """Raises RunError if another run owns it. On several ranks only the main one asks for it."""
        return RunDirectory(self.config)


def prepare(config: Config) -> PreparedRun:
    """Check everything that can be checked before data is read.

    Args:
        config: what `lawn.compose.compose` or `lawn.validation.validate` has returned.

    Returns:
        The run, which can build its task and start its logger.

    Raises:
        ConfigError: in one line, what does not fit together.

    Examples:
        >>> from lawn.compose import compose
        >>> from lawn.train.prepare import prepare
        >>> run = prepare(compose("dataset=digits", "device=cpu"))
        >>> run.config.model.name
        'mlp'
    """
    if not isinstance(config, Config):
        raise ConfigError(f"a config of type {type(config).__name__}: pass what lawn.validation.validate makes of it")
    build_task = task_builder(config)
    optimizer_arguments(config)
    check_schedule(config)
    start_logger = logger_builder(config)
    on_cpu = config.device.startswith("cpu") or not torch.cuda.is_available()
    if on_cpu and config.train.sync_batchnorm:
        raise ConfigError("train.sync_batchnorm=True: torch has it for GPUs only; leave it out, or set device=cuda")
    if on_cpu and config.train.precision == "tf32":
        raise ConfigError("train.precision=tf32: is a format of GPUs; choose fp32 or bf16")
    return PreparedRun(config, build_task, start_logger)
