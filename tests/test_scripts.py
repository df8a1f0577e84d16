"""The benchmarks, started as the Makefile does; what they time is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lawn.data.movielens import movielens1m
from lawn.data.ratings import read_ratings
from scripts import bench_ncf, bench_optim
from tests.helpers import ROOT, synthetic_ratings, write_ratings, write_three_files


def run_module(name: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"scripts.{name}", "--rounds", "1", "--device", "cpu", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})


def write_movielens(folder: Path, each: int) -> None:
    """Both versions, of the same users and 600 items."""
    rows = synthetic_ratings(items=600, each=each)
    write_ratings(folder / "ml-100k" / "u.data", rows)
    write_ratings(folder / "ml-1m" / "ratings.dat", rows, "::")
    test = movielens1m(folder, "test", seed=0, negatives=4, candidates=99)
    write_three_files(folder / "ml-1m", "ml-1m", read_ratings(folder / "ml-1m" / "ratings.dat", "::"), test)


def content(folder: Path, name: str) -> dict:
    assert (folder / f"{name}-cpu.md").read_text().startswith("# ")
    found = json.loads((folder / f"{name}-cpu.json").read_text())
    assert "command" not in found["environment"]  # it would name folders of this machine
    return found["rows"]


@pytest.mark.slow
def test_bench_ncf(tmp_path):
    write_movielens(tmp_path, each=80)
    run_module("bench_ncf", "--data-dir", str(tmp_path), "--results", str(tmp_path / "results"))
    measured = content(tmp_path / "results", "ncf")
    sizes = ("10,000", "100,000")
    assert set(measured) == {f"{name}, batch {size}" for name in ("movielens100k", "movielens1m") for size in sizes}
    assert all(row["ratio"] > 0 and row["peak_memory_gb"] > 0 for row in measured.values())
    row = measured["movielens1m, batch 100,000"]
    assert row["flops_per_sample"]["of the network"] == 3 * 2 * (128 * 64 + 64 * 32 + 32 * 16 + 16)
    assert row["config"]["execution"]["precision"] == "fp32"


@pytest.mark.slow
def test_bench_sweep(tmp_path):
    write_movielens(tmp_path, each=20)
    run_module("bench_sweep", "--data-dir", str(tmp_path), "--results", str(tmp_path / "results"))
    measured = content(tmp_path / "results", "sweep")
    assert [row["config"]["runs"] for row in measured.values()] == [16, 16, 16, 16, 2]
    for row in measured.values():
        assert row["speedup"] * row["times_one"] == pytest.approx(row["config"]["runs"], rel=0.05)


@pytest.mark.slow
def test_bench_runner(tmp_path):
    run_module("bench_runner", "--jobs", "3", "5", "--executor-jobs", "2", "--results", str(tmp_path))
    rows = json.loads((tmp_path / "runner-cpu.json").read_text())["rows"]
    assert rows["5 tuning runs that do nothing"]["jobs"] == 5
    assert all(row["cpu_ms_per_job"] > 0 for row in rows.values())


@pytest.mark.slow
def test_bench_ncf_says_what_is_wrong_with_the_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "ml-100k.zip").write_text("not the archive")  # so that nothing is downloaded
    monkeypatch.setattr(sys, "argv", ["bench_ncf", "--data-dir", str(tmp_path), "--results", str(tmp_path)])
    assert bench_ncf.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'ml-100k' / 'ml-100k.zip'}: ")
    assert not list(tmp_path.glob("ncf-*"))


@pytest.mark.slow
def test_bench_optim(tmp_path):
    run_module("bench_optim", "--results", str(tmp_path))
    for model in bench_optim.MODELS:
        row = content(tmp_path, "optim")[f"{model}: torch Adam, fused"]
        assert row["ratio"] == 1
        params = bench_optim.parameters(model, torch.device("cpu"))
        counters = 8 * len(params)
        assert row["bytes"] - 7 * sum(p.nbytes for p in params) == counters  # gradients, weights and two moments


@pytest.mark.slow
def test_bench_fsdp(tmp_path):
    run_module("bench_fsdp", "--width", "64", "--layers", "1", "--vocabulary", "90", "--results", str(tmp_path))
    rows = content(tmp_path, "fsdp")
    assert rows["torch AdamW"]["added_share"] == 0
    assert {row["collectives"] for name, row in rows.items() if "LAWN" in name} == {2}


@pytest.mark.slow
def test_bench_images(tmp_path):
    run_module("bench_images", "--sizes", "tiny", "--results", str(tmp_path))
    measured = content(tmp_path, "images")
    assert [name.split(",")[0] for name in measured] == ["VGG-19", "ResNet-50", "CIFAR-10", "ImageNet folders"]
    assert all(row["ratio"] > 0 and row["peak_share"] > 0 for row in measured.values())
    vgg, resnet, *_ = measured.values()
    assert vgg["bare_share"] > 0
    assert vgg["config"]["updates"] == 2
    assert resnet["config"]["image_size"] == 32
    assert resnet["config"]["execution"]["channels_last"]
