"""ImageNet in the ImageFolder layout: `imagenet/train/<wnid>/*.JPEG` and `imagenet/val/<wnid>/*.JPEG`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lawn.errors import ConfigError, DataError

PUBLISHED_CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training set, in units of 1; the field's constants


class FolderImages:
    """Images decoded and augmented by worker processes, moved to the device batch by batch."""

    def __init__(
        self,
        train: Subset,
        held_out: Subset,
        num_classes: int,
        image_size: int,
        workers: int,
        warnings: list[str],
    ) -> None:
        self.train, self.held_out = train, held_out
        self.num_classes = num_classes
        self.shape = (3, image_size, image_size)
        self.workers = workers
        self.warnings = warnings
        self.device = torch.device("cpu")

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return len(self.train)

    def to(self, device: torch.device) -> "FolderImages":
        self.device = device
        return self

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order. The last batch may be smaller."""
        order = torch.Generator().manual_seed(generator.initial_seed())  # a loader's generator is on the CPU
        yield from self._batches(DataLoader(self.train, batch_size, shuffle=True, generator=order, **self._options()))

    def eval_batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation split in order, without augmentation."""
        yield from self._batches(DataLoader(self.held_out, batch_size, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def imagenet(
    root: Path,
    split: str,
    *,
    seed: int,
    val_fraction: float,
    image_size: int,
    workers: int,
    limit: int | None = None,
) -> FolderImages:
    """Reads `root`/imagenet. split="val" holds out a stratified `val_fraction` of the training images.

    Training: random resized crop and flip; evaluation: resize the short side to image_size * 256/224, center crop.
    """
    from sklearn.model_selection import train_test_split  # seconds to import: only for those who use them
    from torchvision.transforms import v2

    normalize = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *normalize])
    plain = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size), *normalize])
    train = _folder(root / "imagenet" / "train", augment)
    held_out = _folder(root / "imagenet" / "val", plain)
    if train.classes != held_out.classes:
        raise DataError(f"{root / 'imagenet'}: train and val do not have the same class folders")
    chosen = np.arange(len(train))
    kept = np.arange(len(held_out))
    if split == "val":
        try:
            chosen, kept = train_test_split(
                chosen, test_size=val_fraction, random_state=seed, stratify=np.asarray(train.targets)
            )
        except ValueError as error:
            raise DataError(
                f"{root / 'imagenet' / 'train'}: too few images for a validation split ({error})"
            ) from error
        held_out = _folder(root / "imagenet" / "train", plain)
    if limit is not None:
        if limit > len(chosen):
            raise ConfigError(f"dataset.limit={limit}: there are only {len(chosen)} training images")
        chosen = np.random.default_rng(seed).permutation(chosen)[:limit]
    classes = len(train.classes)
    warnings = (
        [] if classes == PUBLISHED_CLASSES else [f"imagenet: {classes} classes, published are {PUBLISHED_CLASSES}"]
    )
    return FolderImages(
        Subset(train, chosen.tolist()), Subset(held_out, kept.tolist()), classes, image_size, workers, warnings
    )


def _folder(folder: Path, transform: Callable[[Any], Tensor]) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no class folders with images there; ImageNet asks for an account at image-net.org, "
            f"so put its images into {folder}/<wnid>/*.JPEG yourself"
        ) from error
