"""Where rows go beside metrics.csv, and what decides on it."""

import sys

import pytest

from lawn.errors import ConfigError
from lawn.train import logger, prepare
from tests.helpers import ROOT, run

SHORT = ("dataset=digits", "train.epochs=2", "model.widths=[8]", "dataset.limit=100", "device=cpu", "logger=wandb")


def test_wandbs_own_variables_hold_where_no_key_is_given(tiny, tmp_path, monkeypatch):
    import wandb

    given = {}
    monkeypatch.setattr(logger.WandbLogger, "silent", False)
    monkeypatch.setattr(wandb, "init", lambda **keys: given.update(keys))

    def start(*overrides):
        logger.logger_builder(tiny("logger=wandb", *overrides))("id", tmp_path)
        return given["mode"], given["project"]

    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_PROJECT", "theirs")):
        monkeypatch.setenv(variable, value)
    assert start() == (None, "theirs")  # None: wandb looks for itself
    assert start("logger.mode=disabled", "logger.project=mine") == ("disabled", "mine")
    assert start("logger.project=null") == (None, "theirs")
    monkeypatch.delenv("WANDB_PROJECT")
    assert start() == (None, "lawn")


@pytest.mark.slow
def test_the_command_with_wandb_turned_off(tmp_path):
    """By a variable that only wandb reads: it does as it is told, which without an account would not go otherwise."""
    result = run(*SHORT, f"runs_dir={tmp_path}", WANDB_MODE="offline")
    assert (result.returncode, "logging to it ends" in result.stdout) == (0, False)
    assert list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))


def test_every_run_directory_has_a_wandb_run_of_its_own(tiny, tmp_path, monkeypatch):
    """Also one of the same run, or one that is deleted and begun anew; not one that is resumed."""
    import wandb

    ids = []
    monkeypatch.setattr(logger.WandbLogger, "silent", False)
    monkeypatch.setattr(wandb, "init", lambda **keys: ids.append(keys["id"]))
    start = logger.logger_builder(tiny("logger=wandb"))
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        start("id", tmp_path / folder)
    (tmp_path / "a" / "wandb_id").unlink()
    start("id", tmp_path / "a")
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(each.startswith("id-") for each in ids)


def test_wandb_that_is_not_installed_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^logger=wandb: the package wandb is not installed; pip install wandb$"):
        prepare(tiny("logger=wandb"))
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        prepare(tiny("logger=wandb"))


@pytest.mark.slow
def test_the_command_without_wandb_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    result = run(*SHORT, f"runs_dir={tmp_path}/runs", PYTHONPATH=f"{tmp_path}:{ROOT}")
    said = "error: logger=wandb: the package wandb is not installed; pip install wandb\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
    assert not (tmp_path / "runs").exists()
