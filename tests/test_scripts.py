"""The benchmarks, started as the Makefile does; what they time is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lawn.data.movielens import movielens1m
from lawn.data.ratings import read_ratings
from tests.helpers import ROOT, synthetic_ratings, write_ratings, write_three_files


def run_module(name: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"scripts.{name}", "--rounds", "1", "--device", "cpu", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})


def content(folder: Path, name: str) -> dict:
    assert (folder / f"{name}-cpu.md").read_text().startswith("# ")
    found = json.loads((folder / f"{name}-cpu.json").read_text())
    assert "command" not in found["environment"]  # it would name folders of this machine
    return found["rows"]


@pytest.mark.slow
def test_bench_ncf(tmp_path):
    rows = synthetic_ratings(items=600, each=80)
    write_ratings(tmp_path / "ml-100k" / "u.data", rows)
    write_ratings(tmp_path / "ml-1m" / "ratings.dat", rows, "::")
    test = movielens1m(tmp_path, "test", seed=0, negatives=4, candidates=99)
    write_three_files(tmp_path / "ml-1m", "ml-1m", read_ratings(tmp_path / "ml-1m" / "ratings.dat", "::"), test)
    run_module("bench_ncf", "--data-dir", str(tmp_path), "--results", str(tmp_path / "results"))
    measured = content(tmp_path / "results", "ncf")
    assert set(measured) == {"movielens100k", "movielens1m"}
    assert all(row["ratio"] > 0 and row["peak_memory_gb"] > 0 for row in measured.values())
    assert measured["movielens1m"]["flops_per_sample"]["of the network"] == 3 * 2 * (128 * 64 + 64 * 32 + 32 * 16 + 16)


@pytest.mark.slow
def test_bench_optim(tmp_path):
    run_module("bench_optim", "--results", str(tmp_path))
    assert content(tmp_path, "optim")["torch Adam, fused"]["ratio"] == 1
