#!/usr/bin/env python3
"""Rank the finished runs of a sweep by their headline metric at the last epoch, seeds averaged:

python scripts/rank_runs.py runs [--split val] [--only optim.name=adam_lawn] [--top 10]

Prints what differs between the runs, then mean, standard error and number of seeds, the best first.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf


def read(folder: Path, split: str) -> pd.DataFrame:
    """A row for each finished run of `split`: the flattened config and the headline metric as `score`."""
    rows = []
    for marker in sorted(folder.glob("*/DONE")):
        result = json.loads((marker.parent / "result.json").read_text())
        if result["split"] != split:
            continue
        tree = OmegaConf.to_container(OmegaConf.load(marker.parent / "config.yaml"))
        row = pd.json_normalize(tree).iloc[0].to_dict()
        rows.append({**row, "score": result["last"].get(f"{split}_{result['headline']}")})
    return pd.DataFrame(rows)


def rank(runs: pd.DataFrame) -> pd.DataFrame:
    """Seeds averaged, the best first; columns that are the same everywhere are left out."""
    settings = runs.drop(columns=["score", "seed", "hash", "run_dir", "runs_dir", "data_dir", "device"]).astype(str)
    varied = [column for column in settings if settings[column].nunique() > 1]
    keys = [settings[column] for column in varied] or [settings["optim.name"]]
    ranked = runs["score"].groupby(keys, dropna=False).agg(["mean", "sem", "count"]).reset_index()
    return ranked.sort_values("mean", ascending=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--only", metavar="KEY=VALUE", help="runs whose config has this value, e.g. optim.name=adam")
    parser.add_argument("--top", type=int, default=10)
    given = parser.parse_args()
    runs = read(given.folder, given.split)
    if given.only and not runs.empty:
        key, _, value = given.only.partition("=")
        if key not in runs:
            parser.error(f"--only {given.only}: no such key in these runs")
        runs = runs[runs[key].astype(str) == value]
    if runs.empty:
        print(f"error: {given.folder}: no finished runs with eval.split={given.split}", file=sys.stderr)
        return 1
    print(rank(runs).head(given.top).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
