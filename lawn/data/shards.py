"""JPEG images streamed from tar files (WebDataset shards), in a folder or at a URL.

`index.json` beside the shards lists them with their numbers of samples, and the classes; scripts/make_shards.py writes
both. So the shard of every position of an epoch is known before any is opened.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lawn.data.batching import Batching, MicroBatch, shard
from lawn.data.download import count_mismatches
from lawn.data.fingerprint import Fingerprint, checksum
from lawn.data.folders import CHECKSUM
from lawn.data.jpeg import Crop, JPEGImages, decode, draw_epoch, seeded
from lawn.errors import ConfigError, DataError

try:
    from webdataset.filters import shuffle
    from webdataset.gopen import gopen, set_options
    from webdataset.tariterators import group_by_keys, tar_file_expander
except ImportError as missing:
    raise ConfigError("dataset.shards: the package webdataset is not installed; pip install '.[shards]'") from missing

INDEX = "index.json"
BUFFER = 1000  # encoded samples that a worker shuffles: about 100 MB of ImageNet
BOTH = "get both again"
REMEDY = "get the shard again, or make it again without the sample"


class Shard(NamedTuple):
    name: str  # in the index
    url: str
    size: int  # samples
    first: int  # index of its first sample, counted through all shards
    first_key: str | None  # of that sample; None if the index does not have it


class Index(NamedTuple):
    classes: list[str]
    train: list[Shard]
    val: list[Shard]
    checksum: str | None  # of the files' names, as for folders; None in an older index


class Sample(NamedTuple):
    number: int
    name: str  # shard and key, for errors
    jpeg: bytes
    label: bytes  # a decimal number


class ShardImages(JPEGImages):
    """Images streamed from shards by worker processes.

    An epoch concatenates all shards in random order. Each rank reads a consecutive range of it, as long as its
    micro-batches together; each worker reads a part of that range and shuffles within a buffer. So an epoch has every
    sample once on any number of ranks and workers. Its order depends on them; the augmentation of a sample does not.
    """

    def __init__(
        self,
        train: list[Shard],
        held_out: list[Shard],
        num_classes: int,
        image_size: int,
        workers: int,
        warnings: list[str],
        checksum_of_files: str | None,
    ) -> None:
        super().__init__(num_classes, image_size, workers, warnings)
        self.train, self.held_out, self._checksum_of_files = train, held_out, checksum_of_files

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return sum(s.size for s in self.train)

    def order_depends_on(self, world_size: int) -> list[int]:
        """What the order of an epoch depends on, besides its seed."""
        return [self.workers, world_size]

    def train_batches(
        self, batching: Batching, generator: torch.Generator
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, Tensor]]]:
        """One epoch: normalized float images and labels. The last batch may be smaller."""
        seed = generator.initial_seed()
        order, _ = draw_epoch(seed, len(self.train))
        whole = replace(batching, skip=0)  # a stream can only be read from its start
        start = sum(sum(self._sizes(replace(whole, rank=rank))) for rank in range(batching.rank))
        shards = [self.train[k] for k in order.tolist()]
        stream = Stream(shards, start, self._sizes(whole), self.num_classes, self.augment, seed)
        yield from batching.remaining(self._batches(self._loader(stream, batch_size=None)), self.num_train)

    def eval_batches(
        self, rank: int = 0, world_size: int = 1, batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation images of a rank, without augmentation, in the order of `eval_places`."""
        mine, sizes = self._eval_sizes(rank, world_size, batch_size)
        stream = Stream(self.held_out, mine.start, sizes, self.num_classes, self.plain)
        yield from self._batches(self._loader(stream, batch_size=None))

    def eval_places(self, rank: int = 0, world_size: int = 1, batch_size: int = 256) -> Tensor:
        """The place of each image that `eval_batches` yields among those of the rank: its workers take turns."""
        _, sizes = self._eval_sizes(rank, world_size, batch_size)
        workers = max(1, self.workers)
        starts = list(accumulate((sum(sizes[k::workers]) for k in range(workers)), initial=0))
        places = []
        for number, size in enumerate(sizes):
            worker = number % workers
            places.append(torch.arange(starts[worker], starts[worker] + size))
            starts[worker] += size
        return torch.cat(places) if places else torch.empty(0, dtype=torch.long)

    def _eval_sizes(self, rank: int, world_size: int, batch_size: int) -> tuple[slice, list[int]]:
        """The images of a rank, and how many of them each batch has."""
        mine = shard(sum(s.size for s in self.held_out), rank, world_size)
        return mine, [min(batch_size, mine.stop - start) for start in range(mine.start, mine.stop, batch_size)]

    def _sizes(self, batching: Batching) -> list[int]:
        """Samples in each of a rank's parts; 0 for those that do not count."""
        return [
            micro_batch.stop - micro_batch.start if micro_batch.share else 0
            for micro_batch in batching.micro_batches(self.num_train)
        ]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the names and sizes of the shards, wherever they are, and of what was packed; they are not read."""
        names = [f"{shard.name.rpartition('/')[2]} {shard.size}" for shard in [*self.train, *self.held_out]]
        found: Fingerprint = {
            "training images": self.num_train,
            "evaluation images": sum(s.size for s in self.held_out),
            "classes": self.num_classes,
            "checksum of the shards' names": checksum(names),
        }
        return found if self._checksum_of_files is None else {**found, CHECKSUM: self._checksum_of_files}

    def statistics(self) -> dict[str, object]:
        return {
            "training images": self.num_train,
            "evaluation images": sum(s.size for s in self.held_out),
            "classes": self.num_classes,
            "training shards": len(self.train),
        }


class Stream(IterableDataset):
    """Batches of `sizes` from the concatenation of `shards`, from `start` on: uint8 [B, S, S, 3] and labels [B].

    With a seed they are shuffled and augmented. Worker k of n yields the batches k, k + n, ..., from its own range of
    samples. For a size of 0 the batch is one sample, which another worker or rank reads too.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        start: int,
        sizes: Sequence[int],
        num_classes: int,
        crop: Crop,
        seed: int | None = None,
    ) -> None:
        self.shards, self.start, self.sizes = shards, start, sizes
        self.num_classes, self.crop, self.seed = num_classes, crop, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.sizes[worker::workers]
        start = self.start + sum(sum(self.sizes[other::workers]) for other in range(worker))
        samples = between(self.shards, start, start + sum(mine))
        total = sum(s.size for s in self.shards)
        seeds = None
        if self.seed is not None:
            samples = shuffle(BUFFER, initial=BUFFER, rng=random.Random(f"{self.seed}, {start}"))(samples)
            _, seeds = draw_epoch(self.seed, total)
        any_at = start % total
        batch: list[Sample] = []
        for size in mine:
            batch = list(islice(samples, size)) or batch[-1:] or list(between(self.shards, any_at, any_at + 1))
            yield self._decoded(batch, seeds)

    def _decoded(self, samples: list[Sample], seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for sample in samples:
            labels.append(int(sample.label) if re.fullmatch(rb"\d{1,9}", sample.label) else self.num_classes)
            if labels[-1] >= self.num_classes:
                raise DataError(
                    f"{sample.name}: its class is {sample.label[:20]!r}, {INDEX} has {self.num_classes}; {REMEDY}"
                )
            image = decode(BytesIO(sample.jpeg), sample.name, REMEDY)
            images.append(seeded(self.crop, image, 0 if seeds is None else int(seeds[sample.number])))
        return torch.stack(images), torch.tensor(labels)


def between(shards: Sequence[Shard], start: int, stop: int) -> Iterator[Sample]:
    """The samples at positions `start` to `stop` of the concatenated shards."""
    for one in shards:
        first, last = max(start, 0), min(stop, one.size)
        if first < last:
            yield from read(one, first, last)
        start, stop = start - one.size, stop - one.size


def read(source: Shard, start: int, stop: int) -> Iterator[Sample]:
    """The samples at positions `start` to `stop` of one source. Raises DataError where it is not as its index says.

    Of a sample `jpg` and `cls` are read and nothing else, so that there is nothing that could be unpickled.
    """
    wanted = {"select_files": lambda name: name.lower().endswith((".jpg", ".cls"))}
    count = 0
    try:
        stream = gopen(source.url)
        try:
            for sample in group_by_keys(tar_file_expander([{"url": source.url, "stream": stream}], **wanted)):
                if not count and source.first_key not in (None, sample["__key__"]):
                    raise DataError(
                        f"{source.url}: begins with {sample['__key__']}, but {INDEX} has {source.first_key}; {BOTH}"
                    )
                if start <= count < stop:
                    name = f"{source.url}: {sample['__key__']}"
                    yield Sample(source.first + count, name, sample.get("jpg", b""), sample.get("cls", b""))
                count += 1
                if count == stop < source.size:
                    return
        finally:
            set_options(stream, ignore_errors=True)  # a partial read closes the pipe early
            stream.close()
    except DataError:
        raise
    except Exception as error:  # webdataset raises many types
        raise DataError(f"{source.url}: {_reason(error)} after {count} samples; get the shard again") from error
    if count != source.size:
        raise DataError(f"{source.url}: {count} samples, but {INDEX} has {source.size}; {BOTH}")


def shard_images(
    prefix: str, split: str, *, val_fraction: float, image_size: int, workers: int, published: dict[str, int]
) -> ShardImages:
    """The shards listed by `index.json` at `prefix`. split="val" holds out the last training shards, as few as have
    `val_fraction` of the training samples."""
    index = read_index(prefix)
    train, held_out = index.train, index.val
    found = {
        "classes": len(index.classes),
        "training images": sum(s.size for s in train),
        "validation images": sum(s.size for s in held_out),
    }
    if split == "val":
        wanted = val_fraction * found["training images"]
        keep = next(k for k in range(len(train) - 1, -1, -1) if sum(s.size for s in train[k:]) >= wanted)
        if not keep:
            raise ConfigError(
                f"dataset.val_fraction={val_fraction}: eval.split=val holds out whole shards, and {prefix} has "
                f"{len(train)}; make smaller ones"
            )
        train, held_out = train[:keep], train[keep:]
    warnings = count_mismatches("imagenet", found, published)
    return ShardImages(train, held_out, len(index.classes), image_size, workers, warnings, index.checksum)


def read_index(prefix: str) -> Index:
    """The index at `prefix`. Raises DataError without one."""
    url = shard_url(prefix, INDEX)
    try:
        with gopen(url) as stream:
            text = stream.read()
    except Exception as error:  # the handlers of URLs raise many types
        raise DataError(
            f"{url}: {_reason(error)}; python -m scripts.make_shards writes shards and their {INDEX}, and "
            f"dataset.shards is a folder, a URL, or a text with {{}} for the name of a file"
        ) from error
    try:
        index: Any = json.loads(text)
        classes, parts = index["classes"], [index["train"], index["val"]]
        checksum_of_files, first_keys = index.get("checksum"), dict(index.get("first keys", {}))
        names = [name for part in parts for name in part]
        counts = [count for part in parts for count in part.values()]
        # A name can become part of a command (pipe:), so only safe characters are allowed.
        usable = [re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) for name in names] + [
            type(count) is int and count > 0 for count in counts
        ]
        if not (all(parts) and all(usable) and classes and all(isinstance(name, str) for name in classes)):
            raise ValueError
        if not isinstance(checksum_of_files, str | None):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url}: not an index of shards; python -m scripts.make_shards writes one") from error
    train, held_out = (_shards(prefix, part, first_keys) for part in parts)
    return Index(classes, train, held_out, checksum_of_files)


def _shards(prefix: str, counts: dict[str, int], first_keys: dict[str, str]) -> list[Shard]:
    firsts = accumulate(counts.values(), initial=0)
    return [
        Shard(name, shard_url(prefix, name), size, first, first_keys.get(name))
        for (name, size), first in zip(counts.items(), firsts, strict=False)
    ]


def shard_url(prefix: str, name: str) -> str:
    """The URL of a file: the prefix with `{}` replaced by the name, or the name below the prefix."""
    return prefix.replace("{}", name) if "{}" in prefix else f"{prefix.rstrip('/')}/{name}"


def _reason(error: Exception) -> str:
    """The reason in one line, without webdataset's additions."""
    text = getattr(error, "strerror", None) or str(error.args[0] if error.args else error)
    if code := re.search(r"exit (-?\d+) \(read\)", text):
        return f"the command that reads it ended with code {code[1]}"
    return text.partition(" @ ")[0].partition("\n")[0][:200]
