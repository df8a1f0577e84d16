"""Several runs in this process: one after the other, or vectorized as one batched model."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from lawn.config import Config
from lawn.data.batching import Batching
from lawn.errors import ConfigError, UserError
from lawn.identity import config_hash, run_name
from lawn.output import echo
from lawn.train.distributed import World, local_device, set_device
from lawn.train.execution import settings_of_a_new_process
from lawn.train.launch import train
from lawn.train.prepare import PreparedRun, prepare
from lawn.train.recorder import RunRecorder
from lawn.train.session import report_done, start_or_resume, stopped
from lawn.train.signals import Stopped, deferred_signals
from lawn.train.threads import FreeCores
from lawn.train.torch_errors import translate_torch_errors
from lawn.train.trainer import Trainer
from lawn.train.vectorized import VectorizedTrainer, max_vectorized_runs, vectorization_key

State = dict[str, Any] | None  # of a checkpoint; None: the start of a run


def train_many(configs: Sequence[Config]) -> list[Exception]:
    """Train runs, up to `train.vectorize` compatible ones at a time as one batched model.

    Args:
        configs: the configs of the runs, with `train.vectorize` set.

    Returns:
        The errors of those that failed, one where a whole group did; the others are trained nevertheless.

    Raises:
        Stopped: at a signal (see `lawn.train.signals`); the same call resumes the runs.

    Examples:
        >>> from lawn.compose import compose
        >>> from lawn.train import train_many
        >>> configs = [compose("dataset=movielens100k", "train.vectorize=8", f"seed={seed}") for seed in range(8)]
        >>> train_many(configs)  # doctest: +SKIP
        []
    """
    failures: list[Exception] = []
    failed: list[Exception] = []  # of the present group
    different = {(config_hash(config), config.run_dir or config.runs_dir): config for config in configs}
    waiting = [(config, vectorization_key(config)) for config in different.values()]
    alike = Counter(key for _, key in waiting)
    if alone := sum(key is None or alike[key] == 1 for _, key in waiting):
        echo(f"warning: train.vectorize: {alone} of {len(waiting)} runs train alone, as no other fits them")
    try:
        while waiting:
            first, key = waiting[0]
            group = [entry for entry in waiting if key is not None and entry[1] == key] or waiting[:1]
            group = group[: first.train.vectorize]
            waiting = [entry for entry in waiting if entry not in group]
            failed = []
            with _kept(failed):
                if len(group) > 1:
                    train_vectorized([config for config, _ in group], failed)
                else:
                    train(first)
            failures += failed if len(failed) < len(group) else failed[:1]
    except Stopped:
        for failure in (*failures, *failed):  # which are not returned
            echo(f"error: {failure}", sys.stderr)
        raise
    return failures


@settings_of_a_new_process()
@translate_torch_errors(rank=0)
def train_vectorized(configs: Sequence[Config], failures: list[Exception] | None = None) -> None:
    """Train runs of one `vectorization_key` as one batched model, in as many groups as the memory requires.

    Each run has the directory of the run alone and, to rounding, its updates; a long run amplifies rounding. env.json
    has the size of its group.

    Args:
        configs: the configs of the runs.
        failures: receives the errors of runs that cannot begin, which do not keep the others then; None raises them.

    Raises:
        ConfigError: if the runs cannot be vectorized.
        Stopped: at a signal (see `lawn.train.signals`); the same call resumes the runs.

    Examples:
        >>> from lawn.compose import compose
        >>> from lawn.train import train_vectorized
        >>> train_vectorized([compose("dataset=movielens100k", f"seed={seed}") for seed in range(8)])  # doctest: +SKIP
    """
    device = local_device(configs[0].device)
    keys = {vectorization_key(config) for config in configs}
    if len(keys) > 1 or None in keys:
        raise ConfigError("runs that differ in more than seed, optimizer and schedule cannot be trained together")
    folders = [os.path.realpath(config.run_dir) for config in configs if config.run_dir]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"run_dir={configs[0].run_dir}: is the folder of one run; for several, set runs_dir")
    set_device(device)
    runs: list[PreparedRun | None] = []  # None for one that is done or cannot begin
    for config in configs:
        runs.append(None)
        with _kept(failures):
            run = prepare(config)
            if run.directory.done:
                report_done(run)
            else:
                runs[-1] = run
    waiting = [run for run in runs if run is not None]
    if not waiting:
        return
    task = waiting[0].build_task(device)
    generator = torch.Generator(device).manual_seed(0)
    _, batch = next(task.dataset.train_batches(Batching(configs[0].train.batch_size), generator))
    size = max_vectorized_runs(task, batch)
    if size == 1 and len(waiting) > 1:
        echo(f"train.vectorize: {len(waiting)} runs train alone: together they are no faster, or do not fit in memory")
    for first in range(0, len(runs), size):  # the same groups in a call that resumes, when some of the runs are done
        group = [run for run in runs[first : first + size] if run is not None]
        if len(group) == 1:
            with _kept(failures):
                train(group[0].config)
        elif group:
            _train_group(group, task.dataset, World(device), failures)


@contextmanager
def _kept(failures: list[Exception] | None) -> Iterator[None]:
    """Add the errors of a run to a list, if there is one."""
    try:
        yield
    except (UserError, OSError) as error:
        if failures is None:
            raise
        failures.append(error)


def _train_group(group: list[PreparedRun], dataset: object, world: World, failures: list[Exception] | None) -> None:
    with ExitStack() as locks, deferred_signals() as request, FreeCores() as cores:
        recorders: dict[Trainer, RunRecorder] = {}
        begun = []
        for run in group:
            with _kept(failures):
                locks.enter_context(run.directory.lock())
                if run.directory.done:  # another process has finished it meanwhile
                    report_done(run)
                else:
                    begun.append((run, list(run.directory.states()) if run.directory.begun else []))
        for (run, states), state in zip(begun, _states_of_one_epoch([states for _, states in begun]), strict=True):
            with _kept(failures):
                if states and state is not states[0]:
                    epoch, latest = (_epoch(each) for each in (state, states[0]))
                    echo(f"{run.directory.path}: goes back from epoch {latest} to {epoch}, as others of its group do")
                    run.directory.drop_checkpoint()
                task = run.build_task(world.device, dataset)
                single = replace(run, config=replace(run.config, train=replace(run.config.train, compile="off")))
                trainer, recorder = start_or_resume(single, task, world, run.directory, state, together=len(begun))
                assert recorder is not None  # there is a directory
                if not trainer.between_epochs:  # it was paused when it ran alone; the group begins with whole epochs
                    trainer.train_epoch()
                    recorder.record_epoch(trainer)
                recorders[trainer] = recorder
        vectorized = VectorizedTrainer(list(recorders))
        while trained := vectorized.train_epoch():
            for trainer in trained:
                recorders[trainer].log_epoch(trainer)
            if trained[0].execution.adaptive_threads:
                cores.adapt()
            stop = request.signal and any(trainer.status == "running" for trainer in recorders)
            # All of them, or none: those behind the others after a kill would train in a smaller group, which rounds
            # differently.
            if stop or any(recorders[trainer].due or trainer.status != "running" for trainer in trained):
                for trainer in trained:
                    with trainer.clock("log"):
                        recorders[trainer].save_checkpoint(trainer.state_dict())
            if stop:
                raise stopped(request, trained[0], f"{run_name(group[0].config)} with {len(group) - 1} others")
        for trainer, recorder in recorders.items():
            recorder.finish(trainer, cores.note())


def _states_of_one_epoch(histories: Sequence[Sequence[State]]) -> list[State]:
    """One of the states of each run (newest first): those of the latest epoch that all have reached, or the newest.

    A run that has diverged has reached all later epochs, too. One without states has never begun: the others do not go
    back for it.
    """
    for epoch in sorted({_epoch(state) for states in histories for state in states}, reverse=True):
        found = [
            [state for state in states if _epoch(state) == epoch or (_diverged(state) and _epoch(state) < epoch)]
            for states in histories
        ]
        if all(here or not states for here, states in zip(found, histories, strict=True)):
            return [here[0] if here else None for here in found]
    return [states[0] if states else None for states in histories]


def _epoch(state: State) -> int:
    return 0 if state is None else state["epoch"]


def _diverged(state: State) -> bool:
    return state is not None and state["divergence"] is not None
