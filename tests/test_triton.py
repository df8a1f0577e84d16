"""The tests of Triton's kernels in Triton's interpreter, on the CPU.

The interpreter is chosen when the kernels are defined, so these tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")
FILES = ("tests/optim/test_triton_kernels.py", "tests/test_lookup.py")


@pytest.mark.parametrize(("marked", "count"), [("not slow", 29), pytest.param("slow", 5, marks=pytest.mark.slow)])
def test_in_the_interpreter(marked, count):
    command = [sys.executable, "-m", "pytest", *FILES, "-p", "no:cacheprovider", "--noconftest", "-m", marked]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout
    assert f"{count} passed" in done.stdout
