"""Generated images in the files that CIFAR-10 and ImageNet come in, for benchmarks that need no download."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
WIDTH, HEIGHT = 500, 375  # the most frequent size of ImageNet
DIFFERENT = 256  # pictures, each in as many files as it takes


def write_cifar(root: Path, images: int) -> None:
    """CIFAR-10's two files, with noise."""
    rng = np.random.default_rng(0)
    folder = root / "cifar10"
    folder.mkdir()
    for part, count in (("train", images), ("test", CLASSES)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", images=pixels, labels=np.arange(count) % CLASSES)


def write_photos(root: Path, images: int) -> None:
    """ImageNet's folders."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(min(images, DIFFERENT))]
    for part, count in (("train", images), ("val", CLASSES)):
        for c in range(CLASSES):
            (root / "imagenet" / part / f"n{c:08d}").mkdir(parents=True)
        for k in range(count):
            path = root / "imagenet" / part / f"n{k % CLASSES:08d}" / f"{k}.JPEG"
            path.write_bytes(pictures[k % len(pictures)])


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG file of random blotches of several sizes, about as large as ImageNet's are."""
    layers = []
    for size in (64, 8, 2):
        grid = rng.integers(0, 256, (HEIGHT // size + 1, WIDTH // size + 1, 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)))
    file = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
