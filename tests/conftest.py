import os
from pathlib import Path

import pytest
import torch

from lawn.config import Config, register
from tests.helpers import compose

torch.set_num_threads(1)  # small tensors: threads only get in each other's way
register()


@pytest.fixture
def data_dir() -> Path:
    """The folder with the real datasets that LAWN_DATA names."""
    if "LAWN_DATA" not in os.environ:
        pytest.skip("LAWN_DATA is not set")
    return Path(os.environ["LAWN_DATA"])


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
