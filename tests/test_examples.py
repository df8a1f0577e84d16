import runpy

import pytest

from tests.helpers import ROOT


def test_train_digits_runs(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "train_digits.py"))
    example["main"](["--epochs", "3", "--out", f"{tmp_path}/digits.png"])
    assert "AdamLAWN: test accuracy" in capsys.readouterr().out
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (["--epochs", "0"], ["--out", f"{tmp_path}/absent/digits.png"]):
        with pytest.raises(SystemExit, match="2"):  # before it trains
            example["main"](wrong)
