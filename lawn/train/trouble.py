"""What torch raises when the machine fails it, in a line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lawn.errors import RunError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA, CPU, cuBLAS and cuDNN
SHARED_MEMORY = ("shared memory(shm)", "file </torch_", "Bus error")  # how workers hand over what they have made
GOES_ON = "the same command goes on from the last checkpoint"


class LostRankError(RunError):
    """Another rank has ended; why is for that one to say."""


@contextmanager
def explained(rank: int) -> Iterator[None]:
    """Raises RunError for what is no mistake in the code: memory that is used up, a data worker or a rank that has
    died. Torch tells most of these apart by their text alone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first, _, more = str(error).strip().partition("\n")
        caught = "in DataLoader worker process" in first  # and then the worker's traceback
        text = more.rpartition("\n")[2] if caught else first
        if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
            raise RunError(f"out of memory ({text}); a smaller train.micro_batch_size needs less") from error
        if any(words in text for words in SHARED_MEMORY):
            raise RunError(
                f"a data worker has used up the shared memory ({text.partition('. ')[0]}); give the machine more "
                "(docker run --shm-size=8g), or set dataset.workers=0"
            ) from error
        if "DataLoader worker" in text:  # raised wherever the main process is when it learns of it
            raise RunError(f"a data worker has died ({text.partition('. ')[0]}); {GOES_ON}") from error
        if isinstance(error, dist.DistError) or "gloo" in text:
            reason = (text.rpartition("] ")[2] if text.startswith("[") else text)[:200]
            raise LostRankError(f"rank {rank}: the connection to another rank is lost ({reason}); {GOES_ON}") from error
        raise
