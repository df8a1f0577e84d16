"""Batches copied from the host to the device while it computes."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`. On a GPU, a stream of its own copies them during the computation of the previous batch.

    The tensors have to be in pinned memory for that.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    copies = torch.cuda.Stream(device)
    computed: deque[torch.cuda.Event] = deque()
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in moved:
            tensor.record_stream(compute)  # its memory belongs to the stream of the copies
        yield moved
        computed.append(torch.cuda.current_stream(device).record_event())
        if len(computed) > 2:  # bounds the batches in the device's memory
            computed.popleft().synchronize()
