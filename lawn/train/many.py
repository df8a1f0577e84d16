"""Many runs in this process: one after the other, or as one batched model."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from lawn.config import Config, config_hash, run_name
from lawn.data.batching import Batching
from lawn.errors import ConfigError, UserError
from lawn.task import build
from lawn.train.launch import begin, check, say_done, stopped, train
from lawn.train.notice import noticed
from lawn.train.ranks import Ranks, local_device, use
from lawn.train.record import RunDirectory
from lawn.train.together import Together, kin, room
from lawn.train.trouble import explained


def train_many(configs: Sequence[Config]) -> list[Exception]:
    """Train runs one after the other; those that can be, `train.vectorize` of them together. Returns why some failed:
    they do not keep the others."""
    failures: list[Exception] = []
    left = list({config_hash(config): config for config in configs}.values())
    while left:
        family = kin(left[0])
        group = [config for config in left if family is not None and kin(config) == family] or left[:1]
        group = group[: left[0].train.vectorize]
        left = [config for config in left if config not in group]
        try:
            if len(group) > 1:
                train_together(group)
            else:
                train(group[0])
        except (UserError, OSError) as error:
            failures.append(error)
    return failures


@explained(rank=0)
def train_together(configs: Sequence[Config]) -> None:
    """Train runs that are `kin` as one batched model, in as many goes as the memory asks for. Each has the run
    directory and the result that it has alone (to rounding); env.json says with how many others it was trained.

    Raises ConfigError for runs that have to be alone.
    """
    device = local_device(configs[0].device)
    if len({kin(config) for config in configs}) > 1 or kin(configs[0]) is None:
        raise ConfigError("runs that differ in more than seed, optimizer and schedule cannot be trained together")
    configs = [check(config) for config in configs]
    use(device)
    ranks = Ranks(device)
    waiting = []
    for config in configs:
        directory = RunDirectory(config)
        if directory.done:
            say_done(config, directory)
        else:
            waiting.append((config, directory))
    if not waiting:
        return
    first = build(waiting[0][0])(device)
    generator = torch.Generator(device).manual_seed(0)
    _, batch = next(first.dataset.train_batches(Batching(configs[0].train.batch_size), generator))
    at_once = room(first, batch)
    while waiting:
        now, waiting = waiting[:at_once], waiting[at_once:]
        if len(now) == 1:
            train(now[0][0])
            continue
        with ExitStack() as held, noticed() as notice:
            journals = {}
            for config, directory in now:
                held.enter_context(directory.alone())
                task = build(config)(device, first.dataset)
                uncompiled = replace(config, train=replace(config.train, compile="off"))
                run, journal = begin(uncompiled, task, ranks, directory, together=len(now))
                assert journal is not None  # there is a directory
                journals[run] = journal
                if not run.between_epochs:  # left by itself; the others begin with whole epochs
                    run.next_epoch()
                    journal.epoch(run)
            together = Together(list(journals))
            while runs := together.next_epoch():
                for run in runs:
                    journals[run].epoch(run)
                if notice.signal and any(run.status == "running" for run in journals):
                    for run, journal in journals.items():
                        journal.checkpoint(run.state_dict())
                    raise stopped(notice, runs[0], f"{run_name(now[0][0])} with {len(now) - 1} others")
            for run, journal in journals.items():
                journal.finish(run)
