"""A run of one short epoch for every dataset with its model: fixtures everywhere, the real data where they are."""

import csv
import os
import subprocess
import sys

import pytest

from lawn.data.__main__ import main as data_main
from lawn.train import train
from tests.helpers import FIXTURES, RECOMMENDERS, ROOT, compose, synthetic_ratings, write_folders, write_ratings

# VGG-19 is trained by CIFAR-100 and tests/train/test_execution.py.
SMALLER = {"cifar10": ("model=mlp", "model.widths=[8]"), "imagenet": ("dataset.limit=6",)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "cifar100")) for n in FIXTURES])
def test_an_epoch(name, tiny_data, tmp_path):
    config = compose(
        f"dataset={name}",
        *FIXTURES[name],
        *SMALLER.get(name, ()),
        "train.epochs=1",
        f"data_dir={tiny_data}",
        f"runs_dir={tmp_path}",
        "device=cpu",
    )
    result = train(config)
    assert result["status"] == "done"
    assert any("published are" in warning for warning in result["warnings"])


@pytest.mark.parametrize("loss", ["label_smoothing", "focal", "flooding"])
@pytest.mark.parametrize("dataset", ["digits", "movielens1m"])
def test_losses_train(loss, dataset, tiny_data, tmp_path):
    sizes = RECOMMENDERS if dataset == "movielens1m" else ("model.widths=[16]",)
    config = compose(
        f"dataset={dataset}", f"loss={loss}", *sizes, "train.epochs=8", "optim.lr=0.01", f"data_dir={tiny_data}",
        f"runs_dir={tmp_path}", "device=cpu",
    )  # fmt: skip
    result = train(config)
    with (tmp_path / next(tmp_path.iterdir()).name / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert result["status"] == "done"
    assert losses[-1] < losses[0]


@pytest.fixture
def data_command(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        return data_main(list(arguments)), *capsys.readouterr()

    return call


def test_data_command(tiny_data, data_command, tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings(items=600, each=80))
    code, out, err = data_command("movielens100k", "cifar10", "--data-dir", str(tmp_path))
    assert (code, err.count("\n")) == (1, 1)  # CIFAR-10 is not there, and nor is the network in a test
    assert out.startswith("movielens100k: 30 users, ")
    code, out, err = data_command("cifar10", "--stats", "--data-dir", str(tiny_data))
    assert (code, err) == (0, "")
    assert "  training images of a class: 6 to 6\n" in out
    assert "warning: cifar10: 60 training images, published are 50000" in out
    code, out, err = data_command("cifar10", "--verify", "--data-dir", str(tiny_data))
    assert (code, err) == (1, "error: cifar10: 2 counts are not as published, 0 files are damaged\n")


def test_data_command_in_places_that_are_none(tmp_path, data_command):
    (tmp_path / "ml-100k" / "u.data").mkdir(parents=True)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "train").write_text("")
    code, out, err = data_command("movielens100k", "imagenet", "--data-dir", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 2)


def test_data_command_with_keys(tmp_path, data_command, capsys):
    write_ratings(tmp_path / "mine.data", synthetic_ratings(items=600, each=80))
    command = "movielens", "--data-dir", str(tmp_path)
    code, out, err = data_command(*command, "dataset.path=mine.data")
    assert (code, err) == (0, "")
    assert out.startswith("movielens: 30 users, ")
    code, _, err = data_command(*command, "dataset.shards=x")
    assert (code, err.count("\n")) == (2, 1)
    for wrong, message in (
        (["dataset.path=mine.data"], "name a dataset"),
        (["digits", "dataset.name=x"], "name a"),
        (["movies"], "movies: no such dataset"),
    ):
        with pytest.raises(SystemExit, match="2"):
            data_main(wrong)
        assert f"error: {message}" in capsys.readouterr().err


def test_data_command_decodes_every_image(tmp_path, data_command):
    write_folders(tmp_path)
    path = tmp_path / "imagenet" / "val" / "n00000002" / "3.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    code, out, err = data_command("imagenet", "dataset.workers=0", "--verify", "--data-dir", str(tmp_path))
    assert code == 1
    assert f"damaged: {path}: cannot be decoded" in out
    assert "3 counts are not as published, 1 files are damaged" in err


def test_a_damaged_file_whose_name_is_no_text(tmp_path):
    """On a terminal that has no characters for it."""
    write_folders(tmp_path)
    (tmp_path / "imagenet" / "val" / "n00000002" / os.fsdecode(b"x\xff.JPEG")).write_text("broken")
    command = [sys.executable, "-m", "lawn.data", "imagenet", "dataset.workers=0", "--verify"]
    command += ["--data-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"damaged: {tmp_path}/imagenet/val/n00000002/x\\udcff.JPEG: cannot be decoded" in done.stdout
    assert done.stderr.count("\n") == 1


REAL = {
    "movielens100k": ("dataset=movielens100k",),
    "movielens1m": ("dataset=movielens1m",),
    "pinterest-subset": ("dataset=pinterest", "dataset.prefix=pinterest-subset"),
    "cifar10": ("dataset=cifar10", "dataset.limit=1024"),
    "imagenet-64": ("dataset=imagenet", "dataset.image_size=64", "dataset.workers=0", "train.batch_size=50"),
    "imagenet-224": ("dataset=imagenet", "dataset.image_size=224", "dataset.workers=1", "train.batch_size=50"),
}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_an_epoch_of_real_data(name, data_dir, tmp_path):
    if name.startswith("imagenet"):
        (tmp_path / "imagenet").symlink_to(data_dir / "imagenet-sample")
        data_dir = tmp_path
    config = compose(*REAL[name], "train.epochs=1", f"data_dir={data_dir}", f"runs_dir={tmp_path}/runs", "device=cpu")
    result = train(config)
    assert result["status"] == "done"
    if name == "pinterest-subset":
        assert result["warnings"][0] == "pinterest-subset: 37499 users, published are 55187"
    if name in ("movielens100k", "cifar10"):
        assert result["warnings"] == []
    if name == "movielens1m":
        assert result["last"]["test_hr10"] > 30  # 10 by chance, 45 by popularity
