"""A function of tensors as a CUDA graph: one launch for all its kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class GraphedFunction:
    """Calls a function; on a GPU, from the second call with inputs of the same shapes, as a CUDA graph.

    The graph repeats the kernels of the call in which it was captured. The function must therefore launch the same ones
    each time, never wait for the device, and take from the host nothing that changes until `reset`. Inputs of other
    shapes, as those of the last batch of an epoch, are for the function itself.

    Args:
        function: takes and returns tensors.
        enabled: False: every call is one of the function.
    """

    def __init__(self, function: Callable[..., Tensors], enabled: bool) -> None:
        self._function, self._enabled = function, enabled
        self._stream: torch.cuda.Stream | None = None  # one, because memory and workspaces of a stream stay with it
        self.reset()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def reset(self) -> None:
        """Capture the graph anew: what the function takes from the host has changed."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shapes: list[torch.Size] = []

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The results of the function, which the next call may overwrite."""
        if not self._enabled:
            return self._function(*inputs)
        shapes = [given.shape for given in inputs]
        if shapes != self._shapes:
            if self._graph is None:
                self._shapes = shapes
            return self._on_another_stream(inputs)
        if self._graph is None:
            self._inputs = tuple(given.clone() for given in inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._results = self._function(*self._inputs)
            self._graph = graph
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results

    def _on_another_stream(self, inputs: Tensors) -> Tensors:
        """Not on the default one, as the capture: libraries are then ready for other streams."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        here, there = torch.cuda.current_stream(), self._stream
        there.wait_stream(here)
        with torch.cuda.stream(there):
            results = self._function(*inputs)
        here.wait_stream(there)
        return results
