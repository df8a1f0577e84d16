"""Compare runs with diagnostics=on in one figure: python -m lawn.diagnostics RUN_DIR... [--out diagnostics.png]"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from lawn.diagnostics import figure
from lawn.errors import ConfigError, RunError, UserError
from lawn.files import atomic
from lawn.output import echo, echo_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lawn.diagnostics", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directory of a run; NAME=RUN_DIR names it")
    parser.add_argument("--out", type=Path, default=Path("diagnostics.png"), help="the PNG file to write")
    given = parser.parse_args(arguments)
    try:
        runs: dict[str, pd.DataFrame] = {}
        for text in given.runs:
            name, _, path = ("", "", text) if Path(text).exists() else text.partition("=")
            if not path:
                raise RunError(f"{text}: no such run directory")
            name = name or Path(path).absolute().name  # of "." too
            if name in runs:
                raise ConfigError(f"{text}: another run is called {name}; give names, as NAME=RUN_DIR")
            runs[name] = figure.read(Path(path))
        if given.out.suffix.lower() != ".png":
            raise ConfigError(f"--out {given.out}: the figure is a PNG file, so its name must end with .png")
        with atomic(given.out.resolve()) as temporary:
            figure.save(runs, temporary)
    except (UserError, OSError) as error:
        return echo_error(error)
    echo(str(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
