"""Compare runs with diagnostics=on in one figure: python -m lawn.diagnostics RUN_DIR... [--out diagnostics.png]"""

import argparse
import sys
from pathlib import Path

from lawn.diagnostics import figure
from lawn.errors import UserError
from lawn.files import atomic


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lawn.diagnostics", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directory of a run; NAME=RUN_DIR names it")
    parser.add_argument("--out", type=Path, default=Path("diagnostics.png"), help="the PNG file to write")
    given = parser.parse_args(arguments)
    try:
        runs = {}
        for text in given.runs:
            name, _, path = text.rpartition("=")
            runs[name or Path(path).name] = figure.read(Path(path))
        with atomic(given.out) as temporary:
            figure.save(runs, temporary)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
