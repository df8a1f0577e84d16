"""Processes that signals to all of a run do not end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lawn.child_signals import SIGNALS, end_on_parents_sigterm, signals_blocked, unblock_signals
from lawn.data.batching import Batching
from lawn.data.imagenet import imagenet


@pytest.mark.parametrize("number", SIGNALS)
def test_data_workers_do_not_end_by_signals_of_others(tiny_data, number):
    data = imagenet(tiny_data, "test", seed=0, val_fraction=0.1, image_size=32, workers=2)
    batches = data.train_batches(Batching(4), torch.Generator().manual_seed(0))
    next(batches)
    workers = [process.pid for process in data._train_loader._iterator._workers]
    assert len(workers) == 2
    for worker in workers:  # from another process, as a terminal does it
        subprocess.run(["kill", f"-{number.name[3:]}", str(worker)], check=True)
    time.sleep(0.1)
    assert len(list(batches)) == 2
    assert len(list(data.train_batches(Batching(4), torch.Generator().manual_seed(1)))) == 3
    assert [process.pid for process in data._train_loader._iterator._workers] == workers


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the sender of a signal is not known")
def test_a_data_worker_ends_when_its_parent_terminates_it():
    with signals_blocked("fork"):
        child = os.fork()
        if not child:
            end_on_parents_sigterm()
            time.sleep(60)
            os._exit(1)
    time.sleep(0.1)
    subprocess.run(["kill", "-TERM", str(child)], check=True)
    time.sleep(0.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0) == (child, 0)


def test_signals_are_blocked_inside_alone_and_taken_again_when_asked_for():
    """Those that were blocked before stay blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with signals_blocked("fork"):
            assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1}
        unblock_signals()
        assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
