"""One rank's part of a run, from the run directory and back to it."""

import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

from lawn.config import Config
from lawn.data.download import downloads_disabled
from lawn.data.fingerprint import differences
from lawn.errors import ConfigError, DataError, RunError, UserError
from lawn.identity import changed_keys
from lawn.output import echo
from lawn.task import Task, dataset_reader
from lawn.train.distributed import World
from lawn.train.execution import constrained_step
from lawn.train.prepare import PreparedRun
from lawn.train.provenance import code_version, environment
from lawn.train.recorder import RunRecorder
from lawn.train.run_directory import RunDirectory
from lawn.train.signals import Stopped, StopRequest, deferred_signals
from lawn.train.threads import FreeCores
from lawn.train.trainer import Trainer

AGREE_SECONDS = 0.1


def run_rank(run: PreparedRun, world: World) -> dict[str, Any]:
    """Train until the run ends; returns its result. Only the main rank touches the run directory.

    Raises Stopped at a signal.
    """
    directory = run.directory if world.is_main else None
    _check_ranks_alike(run.config, world)
    if (result := _result_if_done(run, world)) is not None:
        return result
    cores = FreeCores()
    with world.main_process_first():
        task = run.build_task(world.device)
    with directory.lock() if directory else nullcontext(), deferred_signals() as request, cores:
        if (result := _result_if_done(run, world)) is not None:  # another process has finished it meanwhile
            return result
        state = world.broadcast(directory.load() if directory else None)
        trainer, recorder = start_or_resume(run, task, world, directory, state)
        pause = _PauseCallback(trainer, recorder, request, cores)
        while trainer.status == "running":
            if trainer.train_epoch(pause) is not None and recorder:
                recorder.record_epoch(trainer)
            if not trainer.between_epochs or (trainer.status == "running" and pause(at_once=True)):
                raise stopped(request, trainer, run.directory.name)
        return world.broadcast(recorder.finish(trainer, cores.note()) if recorder else {})


def _check_ranks_alike(config: Config, world: World) -> None:
    """Raise ConfigError, on all ranks, if one has another config or code: each would take steps of its own."""
    if world.size == 1:
        return
    (first, first_code), *others = world.all_gather_object((config, code_version()))
    for rank, (other, code) in enumerate(others, start=1):
        changed = changed_keys(asdict(first), other)
        if not changed and None not in (code, first_code) and code != first_code:
            changed = f"the code is {first_code} there, {code} here"
        if changed:
            raise ConfigError(f"rank {rank} differs from rank 0 ({changed}); start the same command on all machines")


def _result_if_done(run: PreparedRun, world: World) -> dict[str, Any] | None:
    """The result of a run that is done already, which is reported; None of another."""
    result = world.broadcast(run.directory.result() if world.is_main and run.directory.done else None)
    if result is not None and world.is_main:
        report_done(run)
    return result


def report_done(run: PreparedRun) -> None:
    """Print that a run is done already, and a warning if its data differs from the data at hand, if there is any."""
    directory = run.directory
    echo(f"{directory.path}: done already")
    recorded = directory.fingerprint
    if recorded is None:  # 0.1.0 did not record it
        return
    with suppress(UserError, OSError), downloads_disabled():
        if changed := differences(recorded, dataset_reader(run.config)().fingerprint):
            echo(f"warning: {directory.path}: was run on other data ({changed}); delete it to run it again")


def start_or_resume(
    run: PreparedRun,
    task: Task,
    world: World,
    directory: RunDirectory | None,
    state: dict[str, Any] | None,
    together: int | None = None,
) -> tuple[Trainer, RunRecorder | None]:
    """The run in the state of a checkpoint, or at its start; `together` is the number of runs that are vectorized."""
    data = task.dataset.fingerprint
    (reader, first), *others = world.all_gather_object((type(task.dataset).__name__, data))
    for rank, (other_reader, other) in enumerate(others, start=1):
        changed = differences(first, other, "there", "here")
        if other_reader != reader:  # whose epochs have other orders
            changed = f"{reader} there, {other_reader} here"
        if changed:
            raise DataError(f"rank {rank} has read other data than rank 0 ({changed}); give all machines the same")
    trainer = Trainer(run.config, task, world)
    if directory:
        for warning in task.warnings:
            echo(f"warning: {warning}")
    if state is not None and (changed := differences(state["data"], data)):
        raise RunError(
            f"{run.directory.path}: was started on other data ({changed}); put those back, or delete it to start over"
        )
    if directory:
        # Vectorized runs have a step of their own.
        step = constrained_step(trainer.optimizer) if together is None else {"together": together}
        execution = {"ranks": world.size, "execution": asdict(trainer.execution), **step}
        directory.begin({**environment(world.device), "data": data, **execution})
    if state is not None:
        try:
            trainer.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):  # as out of memory
                raise
            lines = map(str.strip, str(error).splitlines())
            reason = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit the code ({' '.join(lines)})"
            raise RunError(f"{run.directory.path}: its checkpoint {reason}; delete it to start over") from error
    if not directory:
        return trainer, None
    if state is not None:
        if not trainer.between_epochs and state["order"] != trainer.order:
            trainer.warnings.append(
                f"epoch {trainer.epoch} went on with another kind of device, or other workers or ranks, on which its "
                "order depends: some of its samples are trained on twice, and others not"
            )
            echo(f"warning: {trainer.warnings[-1]}")
        within = "" if trainer.between_epochs else f"in epoch {trainer.epoch}, after {trainer.step} updates"
        echo(f"{directory.path}: going on {within or f'after epoch {trainer.epoch}'}")
    logger = run.start_logger(directory.hash, directory.path)
    return trainer, RunRecorder(run.config, directory, logger, len(trainer.rows))


def stopped(request: StopRequest, trainer: Trainer, name: str) -> Stopped:
    where = f"{name} has stopped in epoch {trainer.epoch}, after {trainer.step} updates"
    return Stopped(f"{request.signal}: {where}; run the same command again to resume")


class _PauseCallback:
    """Decides between two updates whether the run has to stop, and saves a checkpoint then and when one is due. Adapts
    the number of threads.

    The ranks decide together about every AGREE_SECONDS, because the collective operation delays them.
    """

    def __init__(self, trainer: Trainer, recorder: RunRecorder | None, request: StopRequest, cores: FreeCores) -> None:
        self._trainer, self._recorder, self._request, self._cores = trainer, recorder, request, cores
        self._last_step, self._last_time, self._next_step = trainer.step, time.monotonic(), trainer.step

    def __call__(self, at_once: bool = False) -> bool:
        trainer, recorder = self._trainer, self._recorder
        if trainer.execution.adaptive_threads:
            self._cores.adapt()
        alone = trainer.world.size == 1
        if not alone and trainer.step < self._next_step and not at_once:
            return False
        save, stop = 1, 2
        action = stop if self._request.signal else int(recorder is not None and not at_once and recorder.due)
        if not alone:
            now = time.monotonic()
            seconds = (now - self._last_time) / max(1, trainer.step - self._last_step)  # of an update
            action, microseconds = trainer.world.all_reduce_max(action, round(1e6 * seconds))
            self._last_step, self._last_time = trainer.step, now
            self._next_step = trainer.step + max(1, round(1e6 * AGREE_SECONDS / max(1, microseconds)))
        if action in (save, stop):
            with trainer.clock("log"):
                state = trainer.state_dict()
                if recorder:
                    recorder.save_checkpoint(state)
        if action == stop and self._request.signal is None:
            self._request.signal = "a signal to another rank"
        return action == stop
