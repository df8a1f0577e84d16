"""python -m experiments run|report NAME: run an experiment's cells, or report on the recorded ones.

The report also renews the tables of README.md when it is about the results of this checkout.
"""

import argparse
import sys
from pathlib import Path

from experiments import records, report
from experiments.demo import DEMO
from experiments.movielens100k import MOVIELENS100K
from lawn.errors import UserError
from lawn.train import train

EXPERIMENTS = {experiment.name: experiment for experiment in (DEMO, MOVIELENS100K)}
README = Path(__file__).resolve().parents[1] / "README.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("name", choices=sorted(EXPERIMENTS))
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="where tables, figures and runs/ go")
    parser.add_argument("override", nargs="*", help="for run: where and how, as for run.py, e.g. device=cpu runs_dir=D")
    given = parser.parse_intermixed_args(arguments)
    experiment = EXPERIMENTS[given.name]
    try:
        if given.action == "run":
            for cell in experiment.cells:
                for config in experiment.configs(cell, *given.override):
                    train(config)
                    records.write(config, given.results / "runs")
        print(report.write(experiment, given.results))
        if given.results == report.RESULTS and README.exists():
            report.embed(README, EXPERIMENTS.values())
        print(f"\n{given.results / given.name}.md, .png and .svg")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
