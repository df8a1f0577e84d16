"""What is recorded of where a run comes from."""

import os
import subprocess

import pytest
import torch

from lawn.train import provenance
from tests.helpers import ROOT

CPU = torch.device("cpu")


def git(folder, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def other(tmp_path):
    """Another repository."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "of something else")
    return tmp_path


def test_a_copy_inside_another_repository_has_no_version(other, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(other / "copy" / "lawn" / "train" / "provenance.py"))
    (other / "copy").mkdir()
    found = provenance.environment(CPU)
    assert (found["git"], found["dirty"]) == (None, None)


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "absent").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "absent"))
    assert provenance.environment(CPU)["packages"].keys() == {"torch"}


def test_the_environments_repository_is_not_this_one(other, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert provenance.environment(CPU)["git"] == git(ROOT, "rev-parse", "HEAD")


def test_without_git_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance.environment(CPU)
    assert (found["git"], found["dirty"]) == (None, None)


def test_changes_of_the_code_count_and_others_do_not(other, monkeypatch):
    (other / "lawn" / "train").mkdir(parents=True)
    (other / "lawn" / "train" / "provenance.py").write_text("1")
    git(other, "add", ".")
    git(other, "commit", "--quiet", "--message", "code")
    monkeypatch.setattr(provenance, "__file__", str(other / "lawn" / "train" / "provenance.py"))
    (other / "notes").write_text("")
    assert provenance.environment(CPU)["dirty"] is False
    (other / "lawn" / "train" / "provenance.py").write_text("2")
    found = provenance.environment(CPU)
    assert (found["git"], found["dirty"]) == (git(other, "rev-parse", "HEAD"), True)
