"""python -m lawn.data NAME... [--data-dir D]: download what is not there, check it, print what was found."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from lawn.data.cifar import cifar10, cifar100
from lawn.data.imagenet import imagenet
from lawn.data.movielens import movielens100k
from lawn.errors import UserError


def images(name: str, root: Path) -> tuple[str, list[str]]:
    data = {"cifar10": cifar10, "cifar100": cifar100}[name](root, "test", seed=0, val_fraction=0.1)
    return f"{data.num_train:,} training and {len(data.test_labels):,} test images", data.warnings


def folders(name: str, root: Path) -> tuple[str, list[str]]:
    data = imagenet(root, "test", seed=0, val_fraction=0.1, image_size=224, workers=0)
    return f"{data.num_train:,} training images in {data.num_classes:,} classes", data.warnings


def ratings(name: str, root: Path) -> tuple[str, list[str]]:
    data = movielens100k(root, "test", seed=0, negatives=4, candidates=99)
    held_out = len(data.candidates)
    found = (
        f"{data.num_users:,} users, {data.num_items:,} items, {len(data.users):,} training and {held_out:,} held out"
    )
    return found, data.warnings


CHECKS: dict[str, Callable[[str, Path], tuple[str, list[str]]]] = {
    "cifar10": images,
    "cifar100": images,
    "imagenet": folders,
    "movielens100k": ratings,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lawn.data", description=__doc__)
    parser.add_argument("name", nargs="+", choices=sorted(CHECKS))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    given = parser.parse_args(arguments)
    code = 0
    for name in given.name:
        try:
            found, warnings = CHECKS[name](name, given.data_dir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
            continue
        print(f"{name}: {found}", flush=True)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
