"""CIFAR-10 and CIFAR-100, cached as `train.npz` and `test.npz` (images uint8 [N, 32, 32, 3], labels int64 [N])."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from lawn.data.download import count_mismatches, download, read_member
from lawn.data.in_memory import InMemoryImages, in_memory_images
from lawn.errors import DataError
from lawn.files import atomic

PARTS = ("train", "test")
PUBLISHED = {"training images": 50_000, "test images": 10_000}
PADDING = 4  # the field's standard augmentation: pad 4, random crop 32, horizontal flip
URL = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class Release:
    """The binary version of a dataset: records of labels and 3 x 32 x 32 pixels. (The Python version uses pickle.)"""

    archive: str
    md5: str
    members: dict[str, tuple[str, ...]]  # by part
    labels: int  # bytes; the last one counts (CIFAR-100 has coarse classes before it)


CIFAR10 = Release(
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    {
        "train": tuple(f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)),
        "test": ("cifar-10-batches-bin/test_batch.bin",),
    },
    labels=1,
)
CIFAR100 = Release(
    "cifar-100-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8",
    {part: (f"cifar-100-binary/{part}.bin",) for part in PARTS},
    labels=2,
)


def cifar10(root: Path, split: str, *, seed: int, val_fraction: float, limit: int | None = None) -> InMemoryImages:
    """Read `root`/cifar10; downloads missing files."""
    return _load(root / "cifar10", CIFAR10, 10, split, seed, val_fraction, limit)


def cifar100(root: Path, split: str, *, seed: int, val_fraction: float, limit: int | None = None) -> InMemoryImages:
    """Read `root`/cifar100; downloads missing files."""
    return _load(root / "cifar100", CIFAR100, 100, split, seed, val_fraction, limit)


def _load(
    folder: Path, release: Release, classes: int, split: str, seed: int, val_fraction: float, limit: int | None
) -> InMemoryImages:
    files = [folder / f"{part}.npz" for part in PARTS]
    missing = {part: file for part, file in zip(PARTS, files, strict=True) if not file.exists()}
    found: dict[str, int] = {}
    try:
        for part in missing:
            _cache(folder, release, part, classes)
        train, test = (_read(file, classes) for file in files)
        found = {"training images": len(train[1]), "test images": len(test[1])}
    finally:
        if found != PUBLISHED and not (folder / release.archive).exists():
            for file in missing.values():  # of unpacked files, which may be put right later
                file.unlink(missing_ok=True)
    return in_memory_images(
        train,
        test,
        split=split,
        val_fraction=val_fraction,
        limit=limit,
        seed=seed,
        num_classes=classes,
        padding=PADDING,
        warnings=count_mismatches(folder.name, found, PUBLISHED),
    )


def _cache(folder: Path, release: Release, part: str, classes: int) -> None:
    """Write a part as an npz file, from the archive or its unpacked files; downloads a missing archive."""
    archive, unpacked = folder / release.archive, [folder / name for name in release.members[part]]
    size = release.labels + 3 * 32 * 32
    if not archive.exists() and all(path.exists() for path in unpacked):
        contents = [path.read_bytes() for path in unpacked]
        for path, content in zip(unpacked, contents, strict=True):
            if not content or len(content) % size:
                raise DataError(
                    f"{path}: {len(content)} bytes are no records of {size}; delete it to download it again"
                )
            label = max(content[release.labels - 1 :: size])
            if label >= classes:
                raise DataError(f"{path}: damaged (a label of {label}); delete it to download it again")
    else:
        if not archive.exists():
            advice = (
                f"put {release.archive} from there, or all of its {unpacked[0].parent.name}/, "
                f"or train.npz and test.npz, into {folder}"
            )
            download(f"{URL}/{release.archive}", archive, release.md5, advice)
        contents = [read_member(archive, release.md5, name) for name in release.members[part]]
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, size)
    images = records[:, release.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    with atomic(folder / f"{part}.npz") as temporary:
        np.savez(temporary, images=images, labels=records[:, release.labels - 1].astype(np.int64))


def _read(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # numpy does not check the checksums
                raise BadZipFile(f"wrong sum of {damaged}")
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except Exception as error:  # numpy raises many types
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
        raise DataError(f"{path}: labels must be 0 to {classes - 1}, and at least one; delete it to make it again")
    return images, labels
