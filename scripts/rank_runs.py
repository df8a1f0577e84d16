#!/usr/bin/env python3
"""Rank the finished runs of a sweep by their headline metric at the last epoch, seeds averaged:

python scripts/rank_runs.py runs [--split val] [--only optim=adam_lawn] [--top 10] [--csv FILE]

Prints what differs between the runs of a dataset, then mean, standard error and number of seeds, the best first. Runs
of equal settings that have read different data have rows of their own. --csv keeps a row for each run: its hash, the
code version, what differs, and its metrics.
"""

import argparse
import sys
from numbers import Number
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lawn.config import GROUPS
from lawn.data.folders import CHECKSUM
from lawn.errors import UserError
from lawn.files import write_text
from lawn.identity import NOT_IDENTITY
from lawn.output import echo, echo_error
from lawn.train.run_directory import LAST_KEY, environments, read_config, read_environment, read_result


def read(folder: Path, split: str) -> tuple[pd.DataFrame, int]:
    """A row for each finished run of `split`: the flattened config, code version, metrics and headline `score`; and the
    number of finished runs of the other split."""
    rows, others = [], 0
    for run in sorted(folder.iterdir()):
        if not (run / "DONE").exists():
            continue
        result, environment = read_result(run), read_environment(run)
        data = environments(environment)[-1].get("data") or {}  # of older runs it is not known
        if result["split"] != split:
            others += 1
            continue
        rows.append(
            {
                **pd.json_normalize(read_config(run, "hash", LAST_KEY)).iloc[0].to_dict(),
                "git": environment["git"],
                "data": data.get("checksum", data.get(CHECKSUM)),
                "status": result["status"],
                **{key: result["last"].get(key) for key in ("train_loss", "margin_p50", "weight_norm")},
                **{key: value for key, value in result["last"].items() if key.startswith(split)},
                "headline": result["headline"],
                "score": result["last"].get(f"{split}_{result['headline']}"),
            }
        )
    return pd.DataFrame(rows), others


def varied(runs: pd.DataFrame) -> list[str]:
    """The settings in which the runs differ, the seed and what leaves the results apart, and the checksum of their
    data if that alone differs; the optimizer's name if nothing does."""
    settings = [c for c in runs if "." in c and c not in NOT_IDENTITY]
    differing = [c for c in settings if runs[c].astype(str).nunique(dropna=False) > 1]
    of_data = [runs[c].astype(str) for c in differing if c.startswith("dataset.")]
    checksums = runs["data"].groupby(of_data).nunique() if of_data else pd.Series(runs["data"].nunique())
    return [*differing, *(["data"] if (checksums > 1).any() else [])] or ["optim.name"]


def rank(runs: pd.DataFrame) -> pd.DataFrame:
    """Seeds averaged, the best first; a setting with a diverged seed has no mean and comes last."""
    keys = [runs[column].astype(str) for column in varied(runs)]
    scores = runs["score"].groupby(keys, dropna=False)
    ranked = scores.agg(
        mean=lambda s: s.mean(skipna=False),
        sem=lambda s: s.sem(skipna=False),
        seeds="size",
        diverged=lambda s: s.isna().sum(),
    ).reset_index()
    return ranked.sort_values("mean", ascending=False)


def _equal(value: Any, wanted: Any) -> bool:
    """Whether a value of a config is this one; pandas has NaN for null, and floats beside it."""
    if wanted is None:
        return bool(pd.api.types.is_scalar(value) and pd.isna(value))
    if all(isinstance(each, Number) and not isinstance(each, bool) for each in (value, wanted)):
        return bool(value == wanted)
    return str(value) == str(wanted)


def main() -> int:
    try:
        return rank_runs()
    except (UserError, OSError) as error:
        return echo_error(error)


def rank_runs() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="runs with this override, e.g. optim=adam_lawn; may be repeated",
    )
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a row for each run")
    given = parser.parse_args()
    if given.top < 1:
        parser.error(f"--top {given.top}: must be a positive number")
    if given.csv and not given.csv.resolve().parent.is_dir():
        parser.error(f"--csv {given.csv}: no such folder")
    if not given.folder.is_dir():
        parser.error(f"{given.folder}: no such folder")
    runs, others = read(given.folder, given.split)
    for only in given.only if not runs.empty else ():
        key, _, value = only.partition("=")
        key = f"{key}.name" if key in GROUPS else key
        if key not in runs:
            parser.error(f"--only {only}: no such key in these runs")
        try:
            wanted = OmegaConf.from_dotlist([f"value={value}"])["value"]
        except (OmegaConfBaseException, YAMLError):
            parser.error(f"--only {only}: {value} cannot be read as a value")
        runs = runs[[_equal(value, wanted) for value in runs[key]]]
        if runs.empty:
            chosen = " ".join(f"--only {each}" for each in given.only)
            parser.error(f"{chosen}: no finished run of eval.split={given.split} has this")
    if not runs.empty and len(names := sorted(set(runs["dataset.name"]))) > 1:
        parser.error(f"runs of {', '.join(names)}: choose one dataset with --only dataset={names[0]}")
    if runs.empty:
        other = "val" if given.split == "test" else "test"
        hint = f"; rank the {others} with eval.split={other} by --split {other}" if others else ""
        raise UserError(f"{given.folder}: no finished runs with eval.split={given.split}{hint}")
    same = ["hash", "data"]  # a run may be in several folders
    results = runs.groupby(same, dropna=False)[["status", "score"]].nunique(dropna=False).max(axis=1)
    if (results > 1).any():
        raise UserError(f"{given.folder}: run directories with the hash {results.idxmax()[0]} have different results")
    runs = runs.drop_duplicates(same)
    if given.csv:
        metrics = runs.columns[runs.columns.get_loc("status") :].drop(["headline", "score"])
        kept = runs[["hash", "git", *varied(runs), "seed", *metrics]].dropna(axis=1, how="all")
        write_text(given.csv.resolve(), kept.to_csv(index=False, float_format="%.6g"))
    ranked = rank(runs).rename(columns={"mean": f"mean {given.split}_{runs['headline'].iloc[0]}"})
    echo(ranked.head(given.top).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
