"""Folders of images decoded and cropped by NVIDIA DALI, on the GPU if the device is one."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lawn.data.batching import Batching, MicroBatch, shard
from lawn.data.folders import Files, FolderImages
from lawn.data.jpeg import RATIO, SCALE, decode, draw_epoch, normalized, short_side
from lawn.errors import ConfigError, DataError

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator
except ImportError as missing:
    raise ConfigError("dataset.loader=dali: the package DALI is not installed; pip install '.[dali]'") from missing

AHEAD = 4  # batches that a pipeline may have started when one fails; its queue holds 2


class DaliImages(FolderImages):
    """`FolderImages` with DALI's decoder.

    The order of an epoch is the same. Crops and flips have the same distribution, but DALI draws them, from the seed of
    the epoch and the rank. Evaluation images differ by one gray level, some by half a pixel.
    """

    def train_batches(
        self, batching: Batching, generator: torch.Generator
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, Tensor]]]:
        seed = generator.initial_seed()
        order, _ = draw_epoch(seed, self.num_train)
        micro_batches = replace(batching, skip=0).micro_batches(self.num_train)  # as a pipeline draws
        rows = [order[micro_batch.start : micro_batch.stop] for micro_batch in micro_batches]
        drawn = int(np.random.SeedSequence([seed, batching.rank]).generate_state(1)[0] >> 1)
        yield from batching.remaining(self._decoded(self.train, rows, drawn), self.num_train)

    def eval_batches(
        self, rank: int = 0, world_size: int = 1, batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        mine = shard(len(self.held_out.labels), rank, world_size)
        if mine.start < mine.stop:
            yield from self._decoded(self.held_out, torch.arange(mine.start, mine.stop).split(batch_size))

    def _decoded(
        self, files: Files, rows: Sequence[Tensor], seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each row of file indices; augmented if there is a seed."""
        paths = [files.paths[row.numpy()] for row in rows]
        labels = torch.from_numpy(files.labels)[torch.cat(list(rows))].to(self.device)
        done = 0
        try:
            for images, some in zip(self._crops(paths, seed), labels.split(list(map(len, rows))), strict=True):
                yield normalized(images), some
                done += 1
            return
        except (RuntimeError, OSError) as error:
            reason = _reason(error)
            error.__traceback__ = None  # its frames would keep the pipeline and its threads alive
        for path in np.concatenate(paths[done : done + AHEAD]):  # DALI's error does not name the file
            decode(os.fsdecode(path))
        raise DataError(f"dataset.loader=dali: {reason}; dataset.loader=torch may read the file")

    def _crops(self, paths: list[np.ndarray], seed: int | None) -> Iterator[Tensor]:
        """uint8 [B, S, S, 3] on the device for each batch of paths; threads read the files ahead of the decoder."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            encoded = (list(pool.map(_read, batch)) for batch in paths)
            for (out,) in DALIGenericIterator(self._pipeline(encoded, max(map(len, paths)), seed), ["images"]):
                yield out["images"]

    def _pipeline(self, encoded: Iterator[list[np.ndarray]], max_batch: int, seed: int | None) -> Any:
        """From files to uint8 crops [B, S, S, 3], in batches of at most `max_batch`."""
        size, on_gpu = self.shape[1], self.device.type == "cuda"
        decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
        device = torch.empty(0, device=self.device).get_device() if on_gpu else None
        pipeline = Pipeline(max_batch, max(1, self.workers), device, seed=0 if seed is None else seed)
        with pipeline:
            files = fn.external_source(source=encoded, dtype=types.UINT8, ndim=1)
            if seed is None:
                images = fn.decoders.image(files, **decoder)
                images = fn.resize(images, resize_shorter=short_side(size), subpixel_scale=False)  # as torchvision does
                images = fn.crop(images, crop=(size, size), rounding="truncate")
            else:
                images = fn.decoders.image_random_crop(files, random_area=SCALE, random_aspect_ratio=RATIO, **decoder)
                images = fn.flip(fn.resize(images, size=(size, size)), horizontal=fn.random.coin_flip())
            pipeline.set_outputs(images)
        return pipeline


def _read(path: bytes) -> np.ndarray:
    return np.fromfile(path, np.uint8)


def _reason(error: Exception) -> str:
    """The line of DALI's error that has the reason."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "failure" in line), lines[0])[:200]
