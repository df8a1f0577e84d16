"""python -m lawn.data NAME... [--data-dir D] [--download | --verify | --stats]: fetch, check and describe datasets.

In every mode what is not there is downloaded first, where it can be, and everything is read and checked.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lawn.data.cifar import cifar10, cifar100
from lawn.data.download import CountMismatch
from lawn.data.imagenet import FolderImages, imagenet
from lawn.data.movielens import movielens1m, movielens100k
from lawn.data.pinterest import pinterest
from lawn.errors import DataError, UserError

IMAGES: dict[str, Any] = {"seed": 0, "val_fraction": 0.1}
INTERACTIONS: dict[str, Any] = {"seed": 0, "negatives": 4, "candidates": 99}
DATASETS: dict[str, Callable[..., Any]] = {
    "cifar10": partial(cifar10, **IMAGES),
    "cifar100": partial(cifar100, **IMAGES),
    "imagenet": partial(imagenet, image_size=224, **IMAGES),
    "movielens100k": partial(movielens100k, **INTERACTIONS),
    "movielens1m": partial(movielens1m, prefix="ml-1m", **INTERACTIONS),
    "movielens1m-ratings": partial(movielens1m, prefix=None, **INTERACTIONS),
    "pinterest": partial(pinterest, prefix="pinterest-20", **INTERACTIONS),
}
MODES = {
    "download": "say in a line what is there (the default)",
    "verify": "fail if counts are not as published or an image is damaged",
    "stats": "describe what is there",
}


def main(arguments: list[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m lawn.data", description=f"{head.partition(': ')[2]} {rest}")
    parser.add_argument("name", nargs="+", choices=sorted(DATASETS), metavar="NAME", help=", ".join(sorted(DATASETS)))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds a folder for each (default: data)")
    parser.add_argument(
        "--workers", type=_natural, default=0, help="processes that decode ImageNet's images for --verify"
    )
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="download", help=text)
    given = parser.parse_args(arguments)
    code = 0
    for name in given.name:
        try:
            options = {"workers": given.workers} if name == "imagenet" else {}
            show(name, DATASETS[name](given.data_dir, "test", **options), given.mode)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = max(code, getattr(error, "exit_code", UserError.exit_code))
    return code


def show(name: str, data: Any, mode: str) -> None:
    """Print what the mode asks for; the first three statistics sum a dataset up. Raises DataError in mode verify."""
    statistics = {key: f"{v:,}" if isinstance(v, int) else v for key, v in data.statistics().items()}
    if mode == "stats":
        print("\n".join([name, *(f"  {key}: {value}" for key, value in statistics.items())]))
    else:
        print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in list(statistics.items())[:3]), flush=True)
    for warning in data.warnings:
        print(f"warning: {warning}", flush=True)
    if mode == "verify":
        damaged = list(data.damaged()) if isinstance(data, FolderImages) else []
        for line in damaged:
            print(f"damaged: {line}", flush=True)
        wrong = [warning for warning in data.warnings if isinstance(warning, CountMismatch)]
        if damaged or wrong:
            raise DataError(f"{name}: {len(wrong)} counts are not as published, {len(damaged)} files are damaged")


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
