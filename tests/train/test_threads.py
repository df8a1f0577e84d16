"""The number of threads follows the cores that other processes leave free."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lawn.train import threads
from lawn.train.execution import Execution
from lawn.train.session import _PauseCallback
from lawn.train.threads import FreeCores
from tests.helpers import compose

Times = namedtuple("Times", "idle iowait")


class Machine:
    """A machine with a clock, on which other processes and this one use cores."""

    def __init__(self, patch: pytest.MonkeyPatch, cores: int, limit: int) -> None:
        self.now, self.cores, self.threads = 1000.0, cores, limit
        self.idle, self.own = [1.0] * (cores + 1), 0.0  # one core more than this process may use
        patch.setattr(threads.psutil, "cpu_times", lambda percpu: [Times(idle, 0.0) for idle in self.idle])
        patch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        patch.setattr(threads.os, "times", lambda: SimpleNamespace(user=self.own, system=0.0))
        patch.setattr(threads.time, "monotonic", lambda: self.now)
        patch.setattr(threads.torch, "get_num_threads", lambda: self.threads)
        patch.setattr(threads.torch, "set_num_threads", lambda n: setattr(self, "threads", n))

    def run(self, seconds: float, own: float, others: float) -> None:
        self.now += seconds
        self.own += own * seconds
        for core in range(self.cores):
            self.idle[core] += seconds * (1 - (own + others) / self.cores)
        # The other core is idle all the time in this process's eyes: it does not count.


@given(
    cores=st.integers(1, 64),
    limit=st.integers(1, 64),
    loads=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
def test_threads_fill_the_cores_that_others_leave(cores, limit, loads):
    limit = min(limit, cores)
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, cores, limit)
        with FreeCores() as free:
            for busy, share in loads:
                others = busy * cores * share
                machine.run(1.5, own=min(machine.threads, cores - others), others=others)
                free.adapt()
                assert 1 <= machine.threads <= limit
                wanted = cores - others
                assert limit == 1 or abs(machine.threads - max(1, min(limit, wanted))) <= 0.5 + 1e-6
        assert machine.threads == limit


def test_the_load_is_measured_over_an_interval(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    free = FreeCores()
    machine.run(0.5, own=1, others=1)
    free.adapt()
    assert machine.threads == 2  # too short
    machine.run(0.6, own=1, others=1)
    free.adapt()
    assert machine.threads == 1
    machine.run(1.0, own=1, others=0)
    free.adapt()
    assert machine.threads == 2


def test_a_busy_machine_is_named(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    free = FreeCores()
    machine.run(10, own=1, others=0.2)
    assert free.note() == ""
    machine.run(10, own=0.2, others=1.6)
    assert free.note() == "; other processes used 0.9 of 2 cores"


def test_a_kernel_that_reports_zeros_is_not_taken_for_a_busy_one(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    monkeypatch.setattr(threads.psutil, "cpu_times", lambda percpu: [Times(0.0, 0.0)] * 2)
    free = FreeCores()
    machine.run(2, own=1, others=0)
    free.adapt()
    assert machine.threads == 2
    assert free.note() == ""


def test_a_single_thread_is_not_measured(monkeypatch):
    machine = Machine(monkeypatch, 2, 1)
    free = FreeCores()
    monkeypatch.setattr(threads.psutil, "cpu_times", None)
    machine.run(10, own=1, others=1)
    free.adapt()
    assert machine.threads == 1


def test_recommenders_on_a_cpu_adapt_their_threads():
    recommender, network = torch.nn.Sequential(torch.nn.Embedding(3, 2)), torch.nn.Linear(3, 2)

    def adaptive(model, device, *keys):
        train = compose("dataset=digits", *keys).train
        return Execution.choose(train, model, torch.device(device), 10).adaptive_threads

    assert adaptive(recommender, "cpu")
    assert not adaptive(network, "cpu")
    assert not adaptive(recommender, "cpu", "train.deterministic=true")
    calls = []
    for wanted in (True, False):
        trainer = SimpleNamespace(
            execution=SimpleNamespace(adaptive_threads=wanted), step=0, world=SimpleNamespace(size=1)
        )
        pause = _PauseCallback(
            trainer, None, SimpleNamespace(signal=None), SimpleNamespace(adapt=lambda: calls.append(1))
        )
        assert not pause()
        assert len(calls) == 1
