"""ImageNet (ILSVRC 2012; paper section 4.4), from folders or shards."""

from pathlib import Path

from lawn.data.download import count_mismatches
from lawn.data.folders import Files, FolderImages, list_split_folders
from lawn.data.in_memory import split_and_limit
from lawn.data.jpeg import JPEGImages

PUBLISHED = {"classes": 1000, "training images": 1_281_167, "validation images": 50_000}


def imagenet(
    root: Path,
    split: str,
    *,
    seed: int,
    val_fraction: float,
    image_size: int,
    workers: int,
    limit: int | None = None,
    loader: str | None = None,
    shards: str | None = None,
) -> JPEGImages:
    """Read `root`/imagenet/{train,val}/<wnid>/*.JPEG, or `shards`.

    split="val" holds out a stratified `val_fraction` of the training images, or whole shards. Training images are
    cropped at random and flipped (RandomResizedCrop); evaluation images are resized to a short side of
    image_size * 256/224 and cropped to their center. `loader="dali"` decodes folders with NVIDIA DALI. `seed` and
    `limit` do not apply to shards.
    """
    if shards is not None:
        from lawn.data.shards import shard_images

        return shard_images(
            shards, split, val_fraction=val_fraction, image_size=image_size, workers=workers, published=PUBLISHED
        )
    kind: type[FolderImages] = FolderImages
    if loader == "dali":
        from lawn.data.dali import DaliImages

        kind = DaliImages
    classes, train, held_out = list_split_folders(root / "imagenet")
    found = {
        "classes": len(classes),
        "training images": len(train.labels),
        "validation images": len(held_out.labels),
    }
    used, test = split_and_limit(train, held_out, split=split, val_fraction=val_fraction, limit=limit, seed=seed)
    warnings = count_mismatches("imagenet", found, PUBLISHED)
    return kind(Files(*used), Files(*test), len(classes), image_size, workers, warnings)
