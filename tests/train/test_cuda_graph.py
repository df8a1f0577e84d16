"""When a function is called and when its graph is replayed. CUDA's part is replaced by one that runs on a CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lawn.train.cuda_graph import GraphedFunction


class Counted:
    """Adds its input to a total; `graphed` calls it as a replay does, with what the graph has as inputs."""

    def __init__(self, monkeypatch) -> None:
        self.total = torch.zeros(2)
        self.calls = self.captures = self.replays = self.streams = 0
        self.graphed = GraphedFunction(self, enabled=True)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        stream, self.streams = self.stream(), 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        self.calls += 1
        self.total = self.total + x.sum()
        return (self.total,)

    def stream(self) -> SimpleNamespace:
        self.streams += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    def capture(self, graph: SimpleNamespace):
        self.captures += 1
        self.before = self.total  # a capture computes nothing
        return nullcontext()

    def replay(self) -> None:
        self.replays += 1
        if self.replays == self.captures:
            self.total = self.before
        (given,) = self.graphed._inputs
        self.total = self.total + given.sum()
        self.graphed._results = (self.total,)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def test_the_second_call_with_the_same_shapes_is_captured_and_the_next_ones_replayed(counted):
    sums = [counted.graphed(torch.full((2,), k))[0][0].item() for k in (1.0, 2.0, 3.0)]
    assert sums == [2, 6, 12]
    assert (counted.calls, counted.captures, counted.replays) == (2, 1, 2)  # one of the calls is the capture
    assert counted.graphed.captured


def test_inputs_of_other_shapes_are_for_the_function_itself(counted):
    for size in (2, 2, 1, 2):
        counted.graphed(torch.ones(size))
    assert (counted.calls, counted.captures, counted.replays) == (3, 1, 2)
    assert counted.total[0] == 7


def test_shapes_that_never_repeat_are_never_captured(counted):
    for size in (2, 1, 2, 1):
        counted.graphed(torch.ones(size))
    assert (counted.calls, counted.captures) == (4, 0)


def test_after_a_reset_the_graph_is_captured_anew(counted):
    for _ in range(2):
        counted.graphed(torch.ones(2))
    counted.graphed.reset()
    assert not counted.graphed.captured
    counted.graphed(torch.ones(2))
    assert (counted.calls, counted.captures) == (3, 1)
    counted.graphed(torch.ones(2))
    assert counted.captures == 2
    assert counted.total[0] == 8


def test_one_other_stream_is_used_again(counted):
    """Each has its own memory and workspaces, which are never freed."""
    for size in (2, 1, 2, 1, 2, 2, 1):
        counted.graphed(torch.ones(size))
    counted.graphed.reset()
    counted.graphed(torch.ones(2))
    assert counted.streams == 1


def test_without_a_gpu_every_call_is_one_of_the_function():
    called = []
    function = GraphedFunction(lambda x: called.append(x) or (x,), enabled=False)
    assert [function(torch.ones(1))[0].item() for _ in range(3)] == [1, 1, 1]
    assert len(called) == 3
    assert not function.captured
