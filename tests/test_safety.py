"""Files that others have made: nothing in them is run, and nothing is written where they say."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lawn.data.cifar import cifar10
from lawn.errors import DataError, RunError
from lawn.train import train
from lawn.train.run_directory import CHECKPOINT_VERSION, RunDirectory
from tests.helpers import ROOT, write_cifar

UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPACKING = {"extractall", "extract", "unpack_archive", "extract_archive", "download_and_extract_archive"}
READERS = {"read_pickle", "Unpickler", "load_state_dict_from_url"}
SOURCES = sorted(path for folder in ("lawn", "experiments", "scripts") for path in (ROOT / folder).rglob("*.py"))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("path", [ROOT / "run.py", *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_unpacks(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not UNPICKLING & {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert str(node.module).partition(".")[0] not in UNPICKLING
            assert not {alias.name for alias in node.names} & {*UNPACKING, *READERS, "load"}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        called = ast.unparse(node.func)
        assert called.rpartition(".")[2] not in UNPACKING | READERS
        assert called not in ("torch.jit.load", "torch.hub.load")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert "allow_pickle" not in keywords
        if called == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"


@pytest.mark.parametrize("how", ["torch", "plain", "legacy"])
def test_a_checkpoint_with_more_than_tensors_is_not_loaded(tiny, tmp_path, how):
    config = tiny("train.epochs=1")
    train(config)
    directory = RunDirectory(config)
    (directory.path / "DONE").unlink()
    state = {"version": CHECKPOINT_VERSION, "hash": directory.hash, "model": Payload(tmp_path / "run by it")}
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        path = directory.path / name
        if how == "plain":
            path.write_bytes(pickle.dumps(state))
        else:
            torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(RunError, match=r"checkpoint.pt: cannot be read \(.*checkpoint_previous.pt: cannot be read \("):
        train(config)
    assert not (tmp_path / "run by it").exists()


def test_arrays_of_objects_are_not_loaded(tmp_path):
    write_cifar(tmp_path / "cifar10")
    images = np.array([Payload(tmp_path / "run by it")] * 4, dtype=object)
    np.savez(tmp_path / "cifar10" / "train.npz", images=images, labels=np.zeros(4, int))
    with pytest.raises(DataError, match=r"train.npz: damaged \(Object arrays cannot be loaded"):
        cifar10(tmp_path, "test", seed=0, val_fraction=0.1)
    assert not (tmp_path / "run by it").exists()


def test_without_fcntl():
    """As on Windows: one line, and the optimizers all the same."""
    code = "import sys; sys.modules['fcntl'] = None; from lawn import AdamLAWN; import run"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: training needs Linux or macOS")
