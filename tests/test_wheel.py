"""The wheel: built from the project, imported where only torch is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

# The packages of the extra `harness` cannot be imported; numpy can, which torch itself reads.
IMPORT = """
import sys

wheel, packages = sys.argv[1:]
sys.path += [wheel, packages]
REFUSED = {"hydra", "omegaconf", "pandas", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "tqdm", "wandb"}
sys.modules |= dict.fromkeys(REFUSED)  # an import of None is refused
import torch

import lawn
from lawn import AdamLAWN

assert lawn.__file__.startswith(wheel), lawn.__file__
weight = torch.nn.Parameter(torch.ones(3, 2))
optimizer = AdamLAWN([weight], lr=0.1, free_steps=0)
weight.grad = torch.randn(3, 2)
optimizer.step()
print(weight.norm().item())
"""


@pytest.mark.slow
def test_the_wheel_needs_nothing_but_torch(tmp_path):
    shutil.copytree(ROOT / "lawn", tmp_path / "project" / "lawn")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    (tmp_path / "dist").mkdir()
    build = [sys.executable, "-W", "ignore", "-c", BUILD, str(tmp_path / "dist")]
    subprocess.run(build, cwd=tmp_path / "project", check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("lawn-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    packages = Path(torch.__file__).parents[1]
    python = [sys.executable, "-I", "-S", "-W", "ignore", "-c", IMPORT, str(tmp_path / "installed"), str(packages)]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(6**0.5, rel=1e-5)
