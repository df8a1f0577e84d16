"""Labelled images as one uint8 tensor on the device, augmented there."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lawn.data.batching import Batching, MicroBatch, shard
from lawn.data.fingerprint import Fingerprint, checksum
from lawn.errors import ConfigError, DataError

Labelled = tuple[np.ndarray, np.ndarray]  # images, or their paths, and labels


@dataclass
class InMemoryImages:
    """A dataset of images on one device.

    Shapes: images uint8 [N, C, H, W], labels int64 [N]; `mean` and `std` are those of each channel, in units of pixels.
    `padding` pixels of zeros and a random crop and flip augment the training images; 0 turns augmentation off.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: list[float]
    std: list[float]
    padding: int
    warnings: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        c, h, w = self.train_images.shape[1:]
        return c, h, w

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return len(self.train_labels)

    def to(self, device: torch.device) -> "InMemoryImages":
        self.train_images, self.train_labels = self.train_images.to(device), self.train_labels.to(device)
        self.test_images, self.test_labels = self.test_images.to(device), self.test_labels.to(device)
        return self

    def train_batches(
        self, batching: Batching, generator: torch.Generator
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, Tensor]]]:
        """One epoch in random order: normalized float images and labels. The last batch may be smaller."""
        device = self.train_labels.device
        order = torch.randperm(self.num_train, generator=generator, device=device)
        if self.padding:  # draw what the skipped updates have drawn
            for start in range(0, batching.skip * batching.batch_size, batching.batch_size):
                draw_crops(min(batching.batch_size, self.num_train - start), 2 * self.padding + 1, generator, device)
        for micro_batch in batching.micro_batches(self.num_train):
            index = order[micro_batch.start : micro_batch.stop]
            if not self.padding:
                images = self.train_images[index]
            else:
                if micro_batch.first:  # drawn for the whole update, however it is split
                    size = micro_batch.update.stop - micro_batch.update.start
                    offsets, mirrored = draw_crops(size, 2 * self.padding + 1, generator, device)
                images = crop_flip(
                    self._padded,
                    index,
                    self.shape,
                    offsets[:, micro_batch.within_update],
                    mirrored[micro_batch.within_update],
                )
            yield micro_batch, (self._normalize(images), self.train_labels[index])

    def eval_batches(
        self, rank: int = 0, world_size: int = 1, batch_size: int = 2048
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation images of a rank, in order, without augmentation."""
        mine = shard(len(self.test_labels), rank, world_size)
        images, labels = self.test_images[mine].split(batch_size), self.test_labels[mine].split(batch_size)
        for some, of_some in zip(images, labels, strict=True):
            yield self._normalize(some), of_some

    @cached_property
    def fingerprint(self) -> Fingerprint:
        # In the layout of the memory.
        train, test = (images.permute(0, 2, 3, 1) for images in (self.train_images, self.test_images))
        return {
            "training images": self.num_train,
            "evaluation images": len(self.test_labels),
            "checksum": checksum(train, self.train_labels, test, self.test_labels),
        }

    def statistics(self) -> dict[str, object]:
        each = self.train_labels.bincount(minlength=self.num_classes)
        return {
            "training images": self.num_train,
            "evaluation images": len(self.test_labels),
            "classes": self.num_classes,
            "training images of a class": f"{each.min()} to {each.max()}",
            "shape": " x ".join(map(str, self.shape)),
            "mean of the channels": ", ".join(f"{value / 255:.4f}" for value in self.mean),
            "deviation of the channels": ", ".join(f"{value / 255:.4f}" for value in self.std),
        }

    @cached_property
    def _padded(self) -> Tensor:
        padded = torch.nn.functional.pad(self.train_images, [self.padding] * 4)
        return padded.contiguous(memory_format=torch.channels_last)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.mean, self.std], device=self.train_images.device)[:, None, :, None, None]
        return mean, std

    def _normalize(self, images: Tensor) -> Tensor:
        mean, std = self._statistics
        return (images.float() - mean) / std


def draw_crops(count: int, limit: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets from the top and the left [2, count], below `limit`, and whether to mirror [count]."""
    offsets = torch.randint(limit, (2, count), generator=generator, device=device)
    return offsets, torch.randint(2, (count,), generator=generator, device=device).bool()


def crop_flip(padded: Tensor, index: Tensor, shape: tuple[int, int, int], offsets: Tensor, mirrored: Tensor) -> Tensor:
    """Crop images `index` of `padded` [N, C, H + 2p, W + 2p] to `shape` at `offsets`, and mirror some.

    One gather of whole pixels: `padded` and the result have the memory format channels_last.
    """
    _, height, width = shape
    top, left = offsets
    across = torch.arange(width, device=padded.device)
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = left[:, None] + torch.where(mirrored[:, None], across.flip(0), across)
    pixels = padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def split_and_limit(
    train: Labelled, test: Labelled, *, split: str, val_fraction: float, limit: int | None, seed: int
) -> tuple[Labelled, Labelled]:
    """The images to train on and those to evaluate: `test`, or a stratified part of `train` for split="val".

    Both draws are by `seed`. Raises ConfigError if there are fewer images than `limit`.
    """
    images, labels = train
    if split == "val":
        from sklearn.model_selection import train_test_split  # takes a second to import

        try:
            images, held_images, labels, held_labels = train_test_split(
                images, labels, test_size=val_fraction, random_state=seed, stratify=labels
            )
            test = held_images, held_labels
        except ValueError as error:
            raise ConfigError(
                f"dataset.val_fraction={val_fraction}: no stratified split of {len(labels)} images ({str(error)[:200]})"
            ) from error
    if limit is not None:
        if limit > len(labels):
            raise ConfigError(f"dataset.limit={limit}: there are only {len(labels)} training images")
        chosen = np.random.default_rng(seed).permutation(len(labels))[:limit]
        images, labels = images[chosen], labels[chosen]
    return (images, labels), test


def in_memory_images(
    train: Labelled,
    test: Labelled,
    *,
    split: str,
    val_fraction: float,
    limit: int | None,
    seed: int,
    num_classes: int,
    padding: int,
    warnings: list[str],
) -> InMemoryImages:
    """The dataset of uint8 arrays [N, H, W, C] and labels. Mean and deviation are those of the training images used."""
    (images, labels), test = split_and_limit(
        train, test, split=split, val_fraction=val_fraction, limit=limit, seed=seed
    )
    mean, std = _channel_statistics(images)
    return InMemoryImages(
        train_images=_channels_first(images),
        train_labels=torch.from_numpy(labels.astype(np.int64)),
        test_images=_channels_first(test[0]),
        test_labels=torch.from_numpy(test[1].astype(np.int64)),
        num_classes=num_classes,
        mean=mean,
        std=std,
        padding=padding,
        warnings=warnings,
    )


def _channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from the counts of the 256 values."""
    values = np.arange(256.0)
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)))
        if not std[-1]:
            raise DataError(f"the training images have the same value everywhere in channel {channel}: no images")
    return mean, std


def _channels_first(images: np.ndarray) -> Tensor:
    """[N, H, W, C] to [N, C, H, W], in the same memory layout (channels_last)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
