"""CIFAR-10 and CIFAR-100, cached as `train.npz` and `test.npz` (images uint8 [N, 32, 32, 3], labels int64 [N])."""

from pathlib import Path
from urllib.error import URLError
from zipfile import BadZipFile, ZipFile

import numpy as np

from lawn.data.images import DeviceImages, device_images
from lawn.data.published import deviations
from lawn.errors import DataError
from lawn.files import atomic

PARTS = ("train", "test")
PUBLISHED = {"training images": 50_000, "test images": 10_000}
PADDING = 4  # the field's standard augmentation: pad 4, random crop 32, horizontal flip


def cifar10(root: Path, split: str, *, seed: int, val_fraction: float, limit: int | None = None) -> DeviceImages:
    """Reads `root`/cifar10; downloads to it what is not there."""
    return _load(root / "cifar10", "CIFAR10", 10, split, seed, val_fraction, limit)


def cifar100(root: Path, split: str, *, seed: int, val_fraction: float, limit: int | None = None) -> DeviceImages:
    """Reads `root`/cifar100; downloads to it what is not there."""
    return _load(root / "cifar100", "CIFAR100", 100, split, seed, val_fraction, limit)


def _load(
    folder: Path, official: str, classes: int, split: str, seed: int, val_fraction: float, limit: int | None
) -> DeviceImages:
    for part in PARTS:
        if not (folder / f"{part}.npz").exists():
            _cache(folder, official, part)
    train, test = (_read(folder / f"{part}.npz", classes) for part in PARTS)
    found = {"training images": len(train[1]), "test images": len(test[1])}
    return device_images(
        train,
        test,
        split=split,
        val_fraction=val_fraction,
        limit=limit,
        seed=seed,
        num_classes=classes,
        padding=PADDING,
        warnings=deviations(folder.name, found, PUBLISHED),
    )


def _cache(folder: Path, official: str, part: str) -> None:
    """torchvision verifies the official archive and reads it, or downloads it first."""
    from torchvision import datasets  # seconds to import: only for those who use it

    reader = getattr(datasets, official)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source = reader(str(folder), train=part == "train", download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise DataError(
            f"{reader.url} cannot be downloaded ({error}); put {reader.filename} from there, "
            f"or train.npz and test.npz, into {folder}"
        ) from error
    with atomic(folder / f"{part}.npz") as temporary:
        np.savez(temporary, images=source.data, labels=np.asarray(source.targets, np.int64))


def _read(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # numpy does not read a member to its end, where its sum is compared
                raise BadZipFile(f"wrong sum of {damaged}")
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except Exception as error:  # numpy raises what the damage makes it raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: damaged ({reason}); delete it to make it again") from error
    if (
        images.dtype != np.uint8
        or images.shape[1:] != (32, 32, 3)
        or labels.dtype.kind not in "iu"
        or labels.shape != images.shape[:1]
    ):
        raise DataError(
            f"{path}: want images uint8 [N, 32, 32, 3] and integer labels [N], "
            f"found {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{path}: labels must be 0 to {classes - 1}, and at least one")
    return images, labels
