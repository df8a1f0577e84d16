"""ImageNet in the ImageFolder layout: `imagenet/train/<wnid>/*.JPEG` and `imagenet/val/<wnid>/*.JPEG`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lawn.data.images import split_and_limit
from lawn.data.published import deviations
from lawn.errors import DataError

PUBLISHED = {"classes": 1000, "training images": 1_281_167, "validation images": 50_000}
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
        try:
            for images, labels in loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except DataError as error:  # from a worker it comes with the worker's traceback around it
            raise DataError(str(error).splitlines()[-1].partition("DataError: ")[2] or str(error)) from None

    def statistics(self) -> dict[str, object]:
        folder: Any = self.train.dataset
        labels = torch.tensor(folder.targets)[self.train.indices]
        each = labels.bincount(minlength=self.num_classes)
        return {
            "training images": self.num_train,
            "evaluation images": len(self.held_out),
            "classes": self.num_classes,
            "training images of a class": f"{each.min()} to {each.max()}",
        }

    def damaged(self) -> Iterator[str]:
        """Decode every image of the two folders; a line for each that cannot be."""
        folders: dict[int, Any] = {id(part.dataset): part.dataset for part in (self.train, self.held_out)}
        for folder in folders.values():
            paths = [path for path, _ in folder.samples]
            for batch in DataLoader(Damage(paths), 64, num_workers=self.workers, collate_fn=list):
                yield from filter(None, batch)


class Damage(Dataset):
    """What is wrong with each of the files; an empty text where nothing is."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        try:
            decode(self.paths[index])
        except DataError as error:
            return str(error)
        return ""


def decode(path: str) -> Any:
    """The image of a file in RGB, be it grayscale or CMYK. Raises DataError that names the file."""
    from PIL import Image  # comes with torchvision

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a decoder raises what the damage makes it raise
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be decoded ({reason}); put the image there again, or remove it") from error


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
    from torchvision.transforms import v2  # seconds to import: only for those who use it

    normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *normalize])
    plain = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size), *normalize])
    train = _folder(root / "imagenet" / "train", augment)
    held_out = _folder(root / "imagenet" / "val", plain)
    if train.classes != held_out.classes:
        raise DataError(f"{root / 'imagenet'}: train and val do not have the same class folders")
    found = {"classes": len(train.classes), "training images": len(train), "validation images": len(held_out)}
    targets = np.asarray(train.targets)
    chosen, _, kept, _ = split_and_limit(
        np.arange(len(train)), targets, split=split, val_fraction=val_fraction, limit=limit, seed=seed
    )
    if kept is None:
        kept = np.arange(len(held_out))
    else:
        held_out = _folder(root / "imagenet" / "train", plain)
    return FolderImages(
        Subset(train, chosen.tolist()),
        Subset(held_out, kept.tolist()),
        len(train.classes),
        image_size,
        workers,
        deviations("imagenet", found, PUBLISHED),
    )


def _folder(folder: Path, transform: Callable[[Any], Tensor]) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform, loader=decode)
    except OSError as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(
            f"{folder}: {reason}; ImageNet asks for an account at image-net.org, "
            f"so put its images into {folder}/<wnid>/*.JPEG yourself"
        ) from error
