"""The split of an epoch's samples into updates, micro-batches and ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class MicroBatch(NamedTuple):
    """One micro-batch of one rank: positions `start` to `stop` in the order of the epoch.

    `share` is its weight in the mean loss of the update, whose samples are at positions `update`. It is 0 where an
    update has fewer samples than there are ranks: the micro-batch is then a sample of another rank, computed but not
    counted.
    """

    start: int
    stop: int
    update: slice
    share: float
    first: bool
    last: bool

    @property
    def within_update(self) -> slice:
        """The same positions, counted from the first sample of the update."""
        return slice(self.start - self.update.start, self.stop - self.update.start)


@dataclass(frozen=True)
class Batching:
    """Splits each global batch into micro-batches of at most `micro_batch_size` samples.

    Their sizes differ by at most one sample, and each rank has equally many. For the same total number of
    micro-batches a sample is in the same one on any number of ranks, so batch norm sees the same samples. The first
    `skip` updates of an epoch, which are done, are omitted.
    """

    batch_size: int
    micro_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1
    skip: int = 0

    def updates(self, samples: int) -> int:
        """The updates in an epoch of so many samples."""
        return ceil(samples / self.batch_size)

    def micro_batches(self, samples: int) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in an epoch of so many samples."""
        for start in range(self.skip * self.batch_size, samples, self.batch_size):
            size = min(self.batch_size, samples - start)
            update = slice(start, start + size)
            each = ceil(size / self.world_size)
            rounds = ceil(each / (self.micro_batch_size or each))
            pieces = rounds * self.world_size
            for k in range(rounds):
                piece = self.rank * rounds + k
                begin, end = (start + size * i // pieces for i in (piece, piece + 1))
                share = (end - begin) / size
                if begin == end:
                    begin, end = (begin, begin + 1) if begin < update.stop else (begin - 1, begin)
                yield MicroBatch(begin, end, update, share, first=k == 0, last=k == rounds - 1)

    def remaining(self, batches: Iterable[T], samples: int) -> Iterator[tuple[MicroBatch, T]]:
        """Pairs of micro-batch and batch, from the batches of the whole epoch including those of skipped updates."""
        whole = list(replace(self, skip=0).micro_batches(samples))
        remaining = list(self.micro_batches(samples))
        yield from zip(remaining, islice(batches, len(whole) - len(remaining), None), strict=True)


def shard(samples: int, rank: int, world_size: int) -> slice:
    """The consecutive samples of a rank in evaluation; the sizes of the ranks differ by at most one."""
    return slice(samples * rank // world_size, samples * (rank + 1) // world_size)
