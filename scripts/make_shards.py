"""Pack folders of images into shards that dataset.shards can stream, from a disk, a web server or object storage.

    python -m scripts.make_shards data/imagenet shards/imagenet

writes train-000000.tar and so on, val-000000.tar and so on, and at last index.json, with a checksum of the names of the
images and the first key of each shard. The training images are in random order, so that a shard is a fair sample of
them. The bytes of the images stay as they are; each image is decoded once to see that it can be.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from webdataset import ShardWriter

from lawn.data.folders import Files, checksum_of_files, list_split_folders
from lawn.data.jpeg import decode
from lawn.data.shards import INDEX
from lawn.errors import DataError, UserError
from lawn.files import locked, named, write_text
from lawn.output import echo_error

LOCK = ".lock"  # is free when the process has ended, however it did
AT_ONCE = 256  # images that are decoded before they are written


def make(source: Path, target: Path, maxcount: int = 1000) -> None:
    """Shards of at most `maxcount` images of `source`/train and `source`/val, with their index, in `target`."""
    classes, train, val = list_split_folders(source)
    order = np.random.default_rng(0).permutation(len(train.labels))
    with named(target), locked(target / LOCK) as held:
        if held is None:
            raise DataError(f"{target}: another process writes shards there")
        if (target / INDEX).exists():
            raise DataError(f"{target / INDEX}: is there already; remove it with its shards, or choose another folder")
        first_keys: dict[str, str] = {}
        counts = {
            "train": pack(Files(train.paths[order], train.labels[order]), target, "train", maxcount, first_keys),
            "val": pack(val, target, "val", maxcount, first_keys),
        }
        index = {"classes": classes, "checksum": checksum_of_files(train, val), **counts, "first keys": first_keys}
        write_text(target / INDEX, json.dumps(index, indent=1) + "\n")
        known = counts["train"].keys() | counts["val"].keys()
        if others := sorted(path.name for path in target.glob("*-[0-9]*.tar") if path.name not in known):
            print(f"warning: {target}: {len(others)} other shards, such as {others[0]}; delete them", file=sys.stderr)


def pack(files: Files, target: Path, part: str, maxcount: int, first_keys: dict[str, str]) -> dict[str, int]:
    """Write the shards of one part; their names, each with the number of its images. `first_keys` gets their first.

    Raises DataError that names an image which cannot be decoded.
    """
    counts: dict[str, int] = {}
    paths = [Path(os.fsdecode(encoded)) for encoded in files.paths]
    pattern = f"{target.resolve()}/".replace("%", "%%") + f"{part}-%06d.tar"
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        ShardWriter(pattern, maxcount, verbose=0, encoder=False, mtime=0) as shards,
    ):
        for number, (path, label) in enumerate(zip(paths, files.labels, strict=True)):
            if number % AT_ONCE == 0:
                list(pool.map(_check, paths[number : number + AT_ONCE]))
            name = f"{path.parent.name}/{path.name}".replace(".", "_")  # what follows a dot is the kind of a file
            shards.write(
                {"__key__": (key := f"{number:08d}/{name}"), "jpg": path.read_bytes(), "cls": str(label).encode()}
            )
            counts[Path(shards.fname).name] = shards.count
            first_keys.setdefault(Path(shards.fname).name, key)
    print(f"{part}: {len(files.labels):,} images in {len(counts):,} shards", flush=True)
    return counts


def _check(path: Path) -> None:
    decode(str(path))  # which lets go of the interpreter


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
        return echo_error(error)
    except KeyboardInterrupt:
        print(f"interrupted; {given.target} has no {INDEX} yet; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
