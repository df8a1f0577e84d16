"""python -m lawn.data NAME... [--data-dir D] [--download | --verify | --stats]: fetch, check and describe datasets.

Arguments dataset.KEY=VALUE set keys of the datasets, as dataset.path of movielens. In every mode, missing files are
downloaded where possible, and all files are read and checked.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from lawn.compose import compose
from lawn.data.download import CountMismatch
from lawn.data.folders import FolderImages
from lawn.errors import DataError, UserError
from lawn.output import echo, echo_error
from lawn.task import TASKS, dataset_reader

# A dataset of conf/dataset, with overrides if it has several forms.
NAMES = {name: (f"dataset={name}",) for task in TASKS for name in task.datasets} | {
    "movielens1m-ratings": ("dataset=movielens1m", "dataset.prefix=null")
}
MODES = {
    "download": "print the counts in one line (the default)",
    "verify": "fail if counts are not as published or an image is damaged",
    "stats": "print statistics",
}


def main(arguments: list[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m lawn.data", description=f"{head.partition(': ')[2]} {rest}")
    parser.add_argument("name", nargs="+", metavar="NAME", help=", ".join(sorted(NAMES)))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds a folder for each (default: data)")
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="download", help=text)
    given = parser.parse_intermixed_args(arguments)
    overrides = [argument for argument in given.name if argument.startswith("dataset.")]
    names = [argument for argument in given.name if argument not in overrides]
    if wrong := [name for name in names if name not in NAMES]:
        parser.error(f"{wrong[0]}: no such dataset; choose from {', '.join(sorted(NAMES))}")
    if not names or any(override.startswith("dataset.name=") for override in overrides):
        parser.error("name a dataset, without dataset.name=")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    code = 0
    for name in names:
        try:
            config = compose(*NAMES[name], *overrides)
            config.data_dir = str(given.data_dir)
            show(name, dataset_reader(config)(), given.mode)
        except (UserError, OSError) as error:
            code = max(code, echo_error(error))
    return code


def show(name: str, data: Any, mode: str) -> None:
    """Print the output of the mode; the default one has the first three statistics. Raises DataError in mode verify."""
    statistics = {key: f"{v:,}" if isinstance(v, int) else v for key, v in data.statistics().items()}
    if mode == "stats":
        echo("\n".join([name, *(f"  {key}: {value}" for key, value in statistics.items())]))
    else:
        echo(f"{name}: " + ", ".join(f"{value} {key}" for key, value in list(statistics.items())[:3]))
    for warning in data.warnings:
        echo(f"warning: {warning}")
    if mode == "verify":
        damaged = list(data.damaged()) if isinstance(data, FolderImages) else []
        for line in damaged:
            echo(f"damaged: {line}")
        wrong = [warning for warning in data.warnings if isinstance(warning, CountMismatch)]
        if damaged or wrong:
            raise DataError(f"{name}: {len(wrong)} counts are not as published, {len(damaged)} files are damaged")


if __name__ == "__main__":
    sys.exit(main())
