"""Folders of JPEG images, one for each class, decoded by worker processes."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lawn.data.batching import Batching, MicroBatch, shard
from lawn.data.fingerprint import Fingerprint, checksum
from lawn.data.jpeg import Crop, JPEGImages, decode, draw_epoch, seeded
from lawn.errors import DataError

CHECKSUM = "checksum of the files' names"  # in fingerprints


class Files(NamedTuple):
    """Paths as bytes [N] and labels int64 [N]: arrays, so that workers share them with the main process."""

    paths: np.ndarray
    labels: np.ndarray


class FolderImages(JPEGImages):
    """Images decoded and augmented by worker processes, moved to the device batch by batch.

    The augmentation of an image depends only on the seed of the epoch and the index of the image.
    """

    def __init__(
        self, train: Files, held_out: Files, num_classes: int, image_size: int, workers: int, warnings: list[str]
    ) -> None:
        super().__init__(num_classes, image_size, workers, warnings)
        self.train, self.held_out = train, held_out
        self._sampler = EpochSampler(len(train.labels))

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return len(self.train.labels)

    def train_batches(
        self, batching: Batching, generator: torch.Generator
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, Tensor]]]:
        """One epoch in random order: normalized float images and labels. The last batch may be smaller."""
        self._sampler.batching, self._sampler.seed = batching, generator.initial_seed()
        yield from zip(batching.micro_batches(self.num_train), self._batches(self._train_loader), strict=True)

    def eval_batches(
        self, rank: int = 0, world_size: int = 1, batch_size: int = 256
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation images of a rank, in order, without augmentation."""
        mine = shard(len(self.held_out.labels), rank, world_size)
        indices = [(index, 0) for index in range(mine.start, mine.stop)]  # the center crop needs no seed
        yield from self._batches(
            self._loader(Samples(self.held_out, self.plain), batch_size=batch_size, sampler=indices)
        )

    @cached_property
    def _train_loader(self) -> DataLoader:
        """Cached, so that its workers live from epoch to epoch."""
        return self._loader(
            Samples(self.train, self.augment), batch_sampler=self._sampler, persistent_workers=self.workers > 0
        )

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the names of the files with their folders, and of the labels; the images are not read."""
        return {
            "training images": self.num_train,
            "evaluation images": len(self.held_out.labels),
            "classes": self.num_classes,
            CHECKSUM: checksum_of_files(self.train, self.held_out),
        }

    def statistics(self) -> dict[str, object]:
        each = np.bincount(self.train.labels, minlength=self.num_classes)
        return {
            "training images": self.num_train,
            "evaluation images": len(self.held_out.labels),
            "classes": self.num_classes,
            "training images of a class": f"{each.min()} to {each.max()}",
        }

    def damaged(self) -> Iterator[str]:
        """Decode every image; yields a line for each that fails."""
        for files in (self.train, self.held_out):
            for batch in self._iterate(self._loader(DecodingErrors(files.paths), batch_size=64, collate_fn=list)):
                yield from filter(None, batch)


def checksum_of_files(train: Files, held_out: Files) -> str:
    """That of the names of the files with their folders, and of the labels."""
    names = ["/".join(os.fsdecode(path).split("/")[-2:]) for files in (train, held_out) for path in files.paths]
    return checksum(names, train.labels, held_out.labels)


class EpochSampler:
    """Yields the batches of an epoch: indices of images, each with the seed of its augmentation.

    It runs in the main process, so `batching` and `seed` can be set for each epoch.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.batching = Batching(samples)
        self.seed = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seeds = draw_epoch(self.seed, self.samples)
        for micro_batch in self.batching.micro_batches(self.samples):
            index = order[micro_batch.start : micro_batch.stop]
            yield list(zip(index.tolist(), seeds[index].tolist(), strict=True))


class Samples(Dataset):
    """Crops and labels of files, by the index of the file and a seed."""

    def __init__(self, files: Files, crop: Crop) -> None:
        self.files, self.crop = files, crop

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        image = decode(os.fsdecode(self.files.paths[index]))
        return seeded(self.crop, image, seed), int(self.files.labels[index])


class DecodingErrors(Dataset):
    """The decoding error of each file; empty if it can be decoded."""

    def __init__(self, paths: np.ndarray) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        try:
            decode(os.fsdecode(self.paths[index]))
        except DataError as error:
            return str(error)
        return ""


def list_split_folders(root: Path) -> tuple[list[str], Files, Files]:
    """The classes of `root`/train and `root`/val, and the images of both. Raises DataError if the classes differ."""
    (classes, train), (classes_of_val, val) = _list_folder(root / "train"), _list_folder(root / "val")
    if classes != classes_of_val:
        own = {"train": set(classes) - set(classes_of_val), "val": set(classes_of_val) - set(classes)}
        found = [f"only {part} has {_abbreviated(sorted(names))}" for part, names in own.items() if names]
        raise DataError(f"{root}: train and val must have the same class folders; {', '.join(found)}")
    return classes, train, val


def _abbreviated(names: list[str]) -> str:
    """The first five names, and the number of others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list_folder(folder: Path) -> tuple[list[str], Files]:
    """The classes of a folder and its images, in order. Raises DataError if there are none."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    try:
        entries = list(os.scandir(folder))
        flat = sum(has_file_allowed_extension(entry.name, IMG_EXTENSIONS) for entry in entries)
        if flat and not any(entry.is_dir() for entry in entries):
            raise DataError(
                f"{folder}: {flat:,} images but no class folders, as ILSVRC ships val; sort them into {folder}/<wnid>, "
                f"or remove the folder, put ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into "
                f"{folder.parent}, and let torchvision do it: python -c "
                f"\"from torchvision.datasets import ImageNet; ImageNet('{folder.parent}', 'val')\""
            )
        found = ImageFolder(str(folder))
    except OSError as error:
        reason = str(error).partition("\n")[0][:200]
        remedy = (
            f"ImageNet asks for an account at image-net.org, so put its images into {folder}/<wnid>/*.JPEG yourself"
        )
        if reason.startswith("Found no valid file"):
            remedy = "remove these folders, or put images into them"
        raise DataError(f"{folder}: {reason}; {remedy}") from error
    paths = np.array([os.fsencode(path) for path, _ in found.samples])
    return found.classes, Files(paths, np.array(found.targets, dtype=np.int64))
