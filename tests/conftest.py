import os
from pathlib import Path

import pytest
import torch

from lawn.config import Config, register
from lawn.data.movielens import movielens1m
from lawn.data.ratings import read_ratings
from tests.data.test_in_memory import write_cifar
from tests.helpers import compose, synthetic_ratings, write_folders, write_ratings, write_three_files

torch.set_num_threads(1)  # small tensors: threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so in the processes that tests start
register()


@pytest.fixture
def data_dir() -> Path:
    """The folder with the real datasets that LAWN_DATA names."""
    if "LAWN_DATA" not in os.environ:
        pytest.skip("LAWN_DATA is not set")
    return Path(os.environ["LAWN_DATA"])


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data_dir with a few samples of every dataset but the digits."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder / "cifar10")
    write_cifar(folder / "cifar100")
    write_folders(folder)
    write_ratings(folder / "ml-100k" / "u.data", synthetic_ratings())
    write_ratings(folder / "ml-1m" / "ratings.dat", synthetic_ratings(), "::")
    test = movielens1m(folder, "test", seed=0, negatives=4, candidates=20)
    for prefix in ("ml-1m", "pinterest-20"):
        (folder / prefix).mkdir(exist_ok=True)
        write_three_files(folder / prefix, prefix, read_ratings(folder / "ml-1m" / "ratings.dat", "::"), test)
    return folder


@pytest.fixture
def tiny(tmp_path: Path):
    """Config of a digits run of a second, with more overrides."""

    def make(*overrides: str) -> Config:
        return compose(
            "train.epochs=4",
            "model.widths=[16]",
            "dataset.limit=200",
            f"runs_dir={tmp_path}/runs",
            "device=cpu",
            *overrides,
        )

    return make
