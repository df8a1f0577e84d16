import os
import subprocess
import sys

from tests.helpers import ROOT


def test_train_digits_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "train_digits.py"), "--epochs", "3", "--out", "digits.png"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=120)
    assert "AdamLAWN: test accuracy" in done.stdout
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
