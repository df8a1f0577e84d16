"""A run from a checked config to a finished run directory, in this process or in several."""

import logging
import signal
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from lawn.compose import refuse_sweeps, unchecked
from lawn.config import Config, run_name
from lawn.data.fetch import without_downloads
from lawn.data.fingerprint import differences
from lawn.errors import ConfigError, RunError, UserError
from lawn.optimizers import optimizer_arguments
from lawn.signals import sheltered
from lawn.task import Task, build, reader
from lawn.train import logger as loggers
from lawn.train.execution import constrained_step
from lawn.train.journal import Journal
from lawn.train.loop import Run
from lawn.train.notice import Notice, Stopped, end_with_parent, noticed, stoppable
from lawn.train.progress import say
from lawn.train.provenance import environment
from lawn.train.ranks import (
    Ranks,
    joined_by_torchrun,
    joined_on_one_machine,
    local_device,
    started_by_torchrun,
    use,
)
from lawn.train.record import RunDirectory
from lawn.train.trouble import GOES_ON, LostRankError, explained
from lawn.validation import validate

AGREE_SECONDS = 0.1


def run(*overrides: str) -> dict[str, Any]:
    """Train one run, go on with it, or find it done: what `python run.py OVERRIDES` does, for notebooks and programs.

    Returns its result: `status` ("done" or "diverged"), `last` (the last row of metrics.csv), `headline` (the name of
    the task's metric), `best` (its best epoch), `seconds`, and what else is in result.json. Paths are relative to the
    working directory. Raises a UserError that says in one line what is wrong, and Stopped at a signal (an interrupted
    kernel), after which the same call goes on. With `train.devices` a program needs `if __name__ == "__main__":`.
    """
    composed, swept = unchecked(*overrides)
    refuse_sweeps(overrides, swept)
    return train(validate(composed))


def train(config: Config) -> dict[str, Any]:
    """Run `config`, go on with it, or find it done; returns its result.

    Everything that can be refused is refused before data is read. A loss that is not finite ends the run with
    status "diverged": that is a result, not an error. Under torchrun this process is one rank of the run; otherwise
    `train.devices` ranks are started here. The signals of lawn.signals end the run between two updates, with a
    checkpoint: raises Stopped.
    """
    check(config)
    if started_by_torchrun():
        with joined_by_torchrun(config) as ranks:
            return _run(config, ranks)
    devices = config.train.devices or 1
    device = local_device(config.device, local_world=devices)
    if devices == 1 or RunDirectory(config).done:
        use(device)
        with explained(rank=0):
            return _run(config, Ranks(device))
    # A process that has looked at a GPU must not be forked; on CPUs a server that has imported everything forks.
    return _run_in_ranks(config, devices, "spawn" if device.type == "cuda" else "forkserver")


def check(config: Config) -> Config:
    """The config, if nothing about it can be refused before data is read. Raises ConfigError."""
    if not isinstance(config, Config):
        raise ConfigError(f"a config of type {type(config).__name__}: pass what lawn.validation.validate makes of it")
    build(config)
    optimizer_arguments(config)
    loggers.make(config)
    on_cpu = config.device.startswith("cpu") or not torch.cuda.is_available()
    if on_cpu and config.train.sync_batchnorm:
        raise ConfigError("train.sync_batchnorm=True: torch has it for GPUs only; leave it out, or set device=cuda")
    if on_cpu and config.train.precision == "tf32":
        raise ConfigError("train.precision=tf32: is a format of GPUs; choose fp32 or bf16")
    return config


def _run(config: Config, ranks: Ranks) -> dict[str, Any]:
    """One rank's part of a run. The main rank alone touches the run directory."""
    directory = RunDirectory(config) if ranks.main else None
    result = ranks.share(directory.result() if directory and directory.done else None)
    if result is not None:
        if directory:
            say_done(config, directory)
        return result
    with ranks.one_first():
        task = build(config)(ranks.device)
    with directory.alone() if directory else nullcontext(), noticed() as notice:
        run, journal = begin(config, task, ranks, directory)
        pause = _Pause(run, journal, notice)
        while run.status == "running":
            if run.next_epoch(pause) is not None and journal:
                journal.epoch(run)
            if not run.between_epochs or (run.status == "running" and pause(at_once=True)):
                raise stopped(notice, run, run_name(config))
        return ranks.share(journal.finish(run) if journal else {})


def say_done(config: Config, directory: RunDirectory) -> None:
    """That a run is done already, and whether it was on other data than those that are there now, if there are any."""
    say(f"{directory.path}: done already")
    then = directory.fingerprint
    if then is None:  # of an older version
        return
    with suppress(UserError, OSError), without_downloads():
        if other := differences(then, reader(config)().fingerprint):
            say(f"warning: {directory.path}: was run on other data ({other}); delete it to run it again")


class _Pause:
    """Asked between two updates whether the run has to stop; saves it then, and whenever it is time to. The ranks agree
    on it about every AGREE_SECONDS, since agreeing holds them up."""

    def __init__(self, run: Run, journal: Journal | None, notice: Notice) -> None:
        self._run, self._journal, self._notice = run, journal, notice
        self._last, self._at, self._next = run.step, time.monotonic(), run.step

    def __call__(self, at_once: bool = False) -> bool:
        run, journal, alone = self._run, self._journal, self._run.ranks.world == 1
        if not alone and run.step < self._next and not at_once:
            return False
        wish = 2 if self._notice.signal else int(journal is not None and not at_once and journal.due)
        if not alone:
            now = time.monotonic()
            each = (now - self._at) / max(1, run.step - self._last)
            wish, micros = run.ranks.most(wish, round(1e6 * each))
            self._last, self._at = run.step, now
            self._next = run.step + max(1, round(1e6 * AGREE_SECONDS / max(1, micros)))
        if wish:
            with run.clock("log"):
                state = run.state_dict()
                if journal:
                    journal.checkpoint(state)
        if wish == 2 and self._notice.signal is None:
            self._notice.signal = "a signal to another rank"
        return wish == 2


def stopped(notice: Notice, run: Run, name: str) -> Stopped:
    where = f"{name} has stopped in epoch {run.epoch}, after {run.step} updates"
    return Stopped(f"{notice.signal}: {where}; the same command goes on from there")


def begin(
    config: Config, task: Task, ranks: Ranks, directory: RunDirectory | None, **more: object
) -> tuple[Run, Journal | None]:
    """A run as it was left in its directory, or a new one. How it runs, and `more`, goes into env.json."""
    run = Run(config, task, ranks)
    if directory:
        for warning in task.warnings:
            say(f"warning: {warning}")
    state = ranks.share(directory.load() if directory else None)
    data = task.dataset.fingerprint
    if state is not None and (other := differences(state.get("data", {}), data)):
        where = directory.path if directory else run_name(config)
        raise RunError(f"{where}: was begun on other data ({other}); put those back, or delete it to start over")
    if directory:
        step = {} if more else constrained_step(run.optimizer)  # runs that are trained together have a joint one
        how = {"ranks": ranks.world, "execution": asdict(run.execution), **step}
        directory.begin({**environment(ranks.device), "data": data, **how, **more})
    if state is not None:
        run.load_state_dict(state)
    if not directory:
        return run, None
    if state is not None:
        where = f"after epoch {run.epoch}" if run.between_epochs else f"in epoch {run.epoch}, after {run.step} updates"
        say(f"{directory.path}: going on {where}")
    logger = loggers.make(config)(directory.hash, directory.path)
    return run, Journal(config, directory, logger, len(run.rows))


def _run_in_ranks(config: Config, world: int, method: str) -> dict[str, Any]:
    """Start the ranks as processes of this machine, and wait for them. Where one fails, all end."""
    context = multiprocessing.get_context(method)
    logging.getLogger("torch.multiprocessing.spawn").setLevel("ERROR")  # it warns of each rank that it terminates
    context.set_forkserver_preload([__name__, "torch._dynamo", "sklearn.datasets"])
    threads = max(1, torch.get_num_threads() // world)
    with tempfile.TemporaryDirectory() as folder, noticed() as notice:
        with sheltered(method):
            errors: SimpleQueue = context.SimpleQueue()
            arguments = (config, world, threads, str(Path(folder) / "store"), errors)
            ranks = multiprocessing.start_processes(_rank, arguments, world, join=False, start_method=method)
        assert ranks is not None
        try:
            while not ranks.join(timeout=1):
                if notice.signal:
                    for process in ranks.processes:
                        process.terminate()  # they agree on where to stop
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            cause = _cause(ranks.processes, errors)
            if cause is None and notice.signal:  # it has met them before the first update, or after the last
                cause = Stopped(f"{notice.signal}: {run_name(config)} has stopped; {GOES_ON}")
            raise cause or error from None
        finally:
            for process in ranks.processes:
                process.terminate()
    return RunDirectory(config).result()


def _rank(rank: int, config: Config, world: int, threads: int, store: str, errors: SimpleQueue) -> None:
    """The process of a rank."""
    torch.set_num_threads(threads)
    try:
        with stoppable():
            end_with_parent()
            with joined_on_one_machine(config.device, rank, world, store) as ranks:
                _run(config, ranks)
    except Stopped as stopped:
        errors.put((False, stopped))
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        errors.put((isinstance(error, LostRankError), error))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        errors.put((False, RunError(f"rank {rank}: {type(error).__name__}: {error}")))
        sys.exit(1)


def _cause(processes: list[Any], errors: SimpleQueue) -> BaseException | None:
    """Why the ranks have ended: what one of them said, or what killed it. That others then lost it is no cause."""
    said = []
    while not errors.empty():
        said.append(errors.get())
    for lost, error in said:
        if not lost:
            return error
    for rank, process in enumerate(processes):
        code = process.exitcode or 0
        if code < 0 and -code != signal.SIGTERM:
            return RunError(
                f"rank {rank} was killed by {signal.Signals(-code).name}; the others were stopped; {GOES_ON}"
            )
    return said[0][1] if said else None
