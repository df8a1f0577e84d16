"""Batches of the host, copied to the device while it still computes."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`. On a GPU the copy has a stream of its own, so it runs beside the computation of
    the batch before; it needs tensors in pinned memory for that."""
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
            tensor.record_stream(compute)  # its memory belongs to the other stream, and is used on this one
        yield moved
        computed.append(torch.cuda.current_stream(device).record_event())
        if len(computed) > 2:  # the host is not to run ahead until the device's memory is full of batches
            computed.popleft().synchronize()
