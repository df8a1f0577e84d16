"""torch's errors about the machine (memory, data workers, lost ranks) as one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lawn.errors import RunError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA, CPU, cuBLAS and cuDNN
SHARED_MEMORY = ("shared memory(shm)", "file </torch_", "Bus error")  # how workers hand over what they have made
RESUME_HINT = "run the same command again to resume"


class LostRankError(RunError):
    """The connection to another rank is lost; that rank reports the cause."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextmanager
def translate_torch_errors(rank: int) -> Iterator[None]:
    """Raise RunError for errors that are no mistake in the code: no memory left, a dead data worker or rank.

    Most of torch's errors of this kind differ by their text alone.
    """
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
        if "DataLoader worker" in text:  # raised anywhere in the main process
            raise RunError(f"a data worker has died ({text.partition('. ')[0]}); {RESUME_HINT}") from error
        if isinstance(error, dist.DistError) or "gloo" in text:
            reason = (text.rpartition("] ")[2] if text.startswith("[") else text)[:200]
            raise LostRankError(
                f"rank {rank}: the connection to another rank is lost ({reason}); {RESUME_HINT}"
            ) from error
        raise
