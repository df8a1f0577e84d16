"""Train one run, in this process or in several."""

import os
from typing import Any

from lawn.compose import compose_unchecked, refuse_sweeps
from lawn.config import Config
from lawn.errors import ConfigError
from lawn.output import echo
from lawn.train.distributed import World, init_from_torchrun, launched_by_torchrun, local_device, set_device
from lawn.train.execution import settings_of_a_new_process
from lawn.train.prepare import prepare
from lawn.train.session import run_rank
from lawn.train.spawn import run_in_processes
from lawn.train.torch_errors import translate_torch_errors
from lawn.validation import validate


def run(*overrides: str) -> dict[str, Any]:
    """Train one run, resume it, or find it done: `python run.py OVERRIDES` for notebooks and programs.

    With `train.devices` above 1, a program has to guard the call with `if __name__ == "__main__":`.

    Args:
        *overrides: Hydra overrides such as "dataset=digits". Relative paths are below the working directory.

    Returns:
        The content of result.json and timing.json, among it `status` ("done" or "diverged"), `last` (the last row of
        metrics.csv), `headline` (the name of the task's metric), `best` (the best epoch by that metric) and `seconds`.

    Raises:
        UserError: in one line, what is wrong.
        OSError: if a file cannot be written.
        Stopped: at a signal, such as that of an interrupted notebook kernel; the same call resumes the run.

    Examples:
        >>> from lawn.train import run
        >>> result = run("dataset=digits", "optim=adam_lawn", "train.epochs=5")  # doctest: +SKIP
        >>> result["last"]["test_accuracy"]  # doctest: +SKIP
    """
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(f'{override!r}: an override is a text such as "dataset=digits"')
    composed, swept = compose_unchecked(*overrides)
    refuse_sweeps(overrides, swept)
    return train(validate(composed))


@settings_of_a_new_process()
def train(config: Config) -> dict[str, Any]:
    """Train the run of a config, resume it, or find it done; returns its result.

    It trains as in a new process, whatever torch's defaults are in this one. Everything that can be refused is refused
    before data is read. A loss that is not finite ends the run with status "diverged": that is a result, not an error.
    Under torchrun this process is one rank of the run; otherwise `train.devices` ranks are started here. A signal ends
    the run between two updates, with a checkpoint.

    Args:
        config: what `lawn.compose.compose` has returned.

    Returns:
        The result as `run` returns it.

    Raises:
        UserError: in one line, what is wrong.
        OSError: if a file cannot be written.
        Stopped: at a signal (see `lawn.train.signals`).

    Examples:
        >>> from lawn.compose import compose
        >>> from lawn.train import train
        >>> train(compose("dataset=digits", "optim=adam_lawn", "train.epochs=5"))["status"]  # doctest: +SKIP
        'done'
    """
    prepared = prepare(config)
    if launched_by_torchrun():
        with init_from_torchrun(config) as world:
            return run_rank(prepared, world)
    devices = config.train.devices or 1
    device = local_device(config.device, local_size=devices)
    if devices == 1 or prepared.directory.done:
        set_device(device)
        with translate_torch_errors(rank=0):
            return run_rank(prepared, World(device))
    if device.type == "cpu" and devices > (cores := os.cpu_count() or devices):
        echo(f"warning: train.devices={devices}: so many processes share {cores} CPU cores")
    # A process that has used a GPU must not be forked; on CPUs a server that has imported everything forks.
    return run_in_processes(prepared, devices, "spawn" if device.type == "cuda" else "forkserver")
