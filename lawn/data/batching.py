"""How the samples of an epoch are shared out: over updates, over micro-batches, over ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Part(NamedTuple):
    """One micro-batch of one rank: positions `start` to `stop` in the order of the epoch.

    `share` is its weight in the mean loss of the update, whose samples are at positions `update`. It is 0 where an
    update has too few samples for all ranks: then the part is a sample of another rank, computed and not counted.
    """

    start: int
    stop: int
    update: slice
    share: float
    first: bool
    last: bool

    @property
    def within(self) -> slice:
        """The same positions, counted from the first sample of the update."""
        return slice(self.start - self.update.start, self.stop - self.update.start)


@dataclass(frozen=True)
class Batching:
    """The global batch, cut into parts of equal size to within one sample, the same number for every rank, none
    larger than `micro_batch_size`. Where the number of parts is the same, a sample is in the same part for any number
    of ranks, so that batch norm sees the same. The first `skip` updates of an epoch are left out: they are done."""

    batch_size: int
    micro_batch_size: int | None = None
    rank: int = 0
    world: int = 1
    skip: int = 0

    def updates(self, samples: int) -> int:
        """Updates in an epoch of that many samples."""
        return ceil(samples / self.batch_size)

    def parts(self, samples: int) -> Iterator[Part]:
        """The parts of this rank in an epoch of that many samples."""
        for start in range(self.skip * self.batch_size, samples, self.batch_size):
            size = min(self.batch_size, samples - start)
            update = slice(start, start + size)
            each = ceil(size / self.world)
            rounds = ceil(each / (self.micro_batch_size or each))
            pieces = rounds * self.world
            for k in range(rounds):
                piece = self.rank * rounds + k
                begin, end = (start + size * i // pieces for i in (piece, piece + 1))
                share = (end - begin) / size
                if begin == end:
                    begin, end = (begin, begin + 1) if begin < update.stop else (begin - 1, begin)
                yield Part(begin, end, update, share, first=k == 0, last=k == rounds - 1)

    def rest(self, batches: Iterable[T], samples: int) -> Iterator[tuple[Part, T]]:
        """The parts with their batches, from batches of the whole epoch, skipped updates among them."""
        whole = list(replace(self, skip=0).parts(samples))
        parts = list(self.parts(samples))
        yield from zip(parts, islice(batches, len(whole) - len(parts), None), strict=True)


def chunk(samples: int, rank: int, world: int) -> slice:
    """The share of a rank when nothing is random: consecutive samples, equally many to within one."""
    return slice(samples * rank // world, samples * (rank + 1) // world)
