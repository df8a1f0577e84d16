"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images that come with the package, no download."""

from pathlib import Path

import numpy as np

from lawn.data.in_memory import InMemoryImages, in_memory_images

TEST_SIZE = 360  # a fifth, stratified, always the same


def digits(root: Path, split: str, *, seed: int, val_fraction: float, limit: int | None = None) -> InMemoryImages:
    """Pixels are 0 to 16; `root` is not used. No augmentation, because a mirrored digit is no longer that digit."""
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = data.images.astype(np.uint8)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=TEST_SIZE, random_state=0, stratify=data.target
    )
    return in_memory_images(
        (train_x, train_y),
        (test_x, test_y),
        split=split,
        val_fraction=val_fraction,
        limit=limit,
        seed=seed,
        num_classes=10,
        padding=0,
        warnings=[],
    )
