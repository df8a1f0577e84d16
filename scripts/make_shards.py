"""Pack folders of images into shards that dataset.shards can stream, from a disk, a web server or object storage.

    python -m scripts.make_shards data/imagenet shards/imagenet

writes train-000000.tar and so on, val-000000.tar and so on, and at last index.json. The training images are in random
order, so that a shard is a fair sample of them. The bytes of the images stay as they are.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from webdataset import ShardWriter

from lawn.data.imagenet import Files, listed
from lawn.data.shards import INDEX
from lawn.errors import DataError, UserError
from lawn.files import write_text


def make(source: Path, target: Path, maxcount: int = 1000) -> None:
    """Shards of at most `maxcount` images of `source`/train and `source`/val, with their index, in `target`."""
    if (target / INDEX).exists():
        raise DataError(f"{target / INDEX}: is there already; remove it with its shards, or choose another folder")
    classes, train = listed(source / "train")
    classes_of_val, val = listed(source / "val")
    if classes != classes_of_val:
        raise DataError(f"{source}: train and val do not have the same class folders")
    order = np.random.default_rng(0).permutation(len(train.labels))
    target.mkdir(parents=True, exist_ok=True)
    counts = {
        "train": pack(Files(train.paths[order], train.labels[order]), target, "train", maxcount),
        "val": pack(val, target, "val", maxcount),
    }
    write_text(target / INDEX, json.dumps({"classes": classes, **counts}, indent=1) + "\n")


def pack(files: Files, target: Path, part: str, maxcount: int) -> dict[str, int]:
    """Write the shards of one part; their names, each with the number of its images."""
    counts: dict[str, int] = {}
    pattern = f"{target.resolve()}/".replace("%", "%%") + f"{part}-%06d.tar"
    with ShardWriter(pattern, maxcount, verbose=0, encoder=False, mtime=0) as shards:
        for number, (encoded, label) in enumerate(zip(files.paths, files.labels, strict=True)):
            path = Path(os.fsdecode(encoded))
            name = f"{path.parent.name}/{path.name}".replace(".", "_")  # what follows a dot is the kind of a file
            shards.write({"__key__": f"{number:08d}/{name}", "jpg": path.read_bytes(), "cls": str(label).encode()})
            counts[Path(shards.fname).name] = shards.count
    print(f"{part}: {len(files.labels):,} images in {len(counts):,} shards", flush=True)
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    parser.add_argument("target", type=Path, help="folder for the shards")
    parser.add_argument("--maxcount", type=int, default=1000, help="images in a shard, at most (default: 1000)")
    given = parser.parse_args(arguments)
    if given.maxcount < 1:
        parser.error(f"--maxcount {given.maxcount}: must be at least 1")
    try:
        make(given.source, given.target, given.maxcount)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", UserError.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
