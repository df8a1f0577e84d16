"""Run directories that are damaged, deleted, moved or another run's."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.records import Store
from lawn.errors import ConfigError, RunError, UserError
from lawn.train import train, train_vectorized
from lawn.train.run_directory import RunDirectory, read_config, read_result
from tests.train.faults import ALWAYS, DIGITS, after, check_equal, copied


@pytest.mark.parametrize("gone", ["deleted", "moved", "begun again"])
@pytest.mark.parametrize("when", [3, 52])  # in the middle, and before the result is written
def test_a_run_directory_that_disappears_during_the_run(tiny, whole, tmp_path, monkeypatch, gone, when):
    """It is not made again; a moved one is resumed by the same command."""
    config = tiny(*DIGITS, ALWAYS, f"run_dir={tmp_path}/run")
    path = RunDirectory(config).path

    def go() -> None:
        if gone == "deleted":
            shutil.rmtree(path)
            return
        path.rename(tmp_path / "moved")
        if gone == "begun again":
            path.mkdir()
            (path / ".lock").touch()

    with monkeypatch.context() as patch:
        after(when, go, patch)
        with pytest.raises(RunError, match=r"run: was deleted or moved during the run, .* command again to resume$"):
            train(config)
    assert [file.name for file in path.glob("*")] == ([".lock"] if gone == "begun again" else [])
    assert path.exists() == (gone == "begun again")
    if gone == "deleted":
        return
    shutil.rmtree(path, ignore_errors=True)
    (tmp_path / "moved").rename(path)
    train(config)
    check_equal(config, whole)


def test_a_run_directory_is_another_runs_before_its_first_checkpoint_too(tiny, tmp_path):
    """Asked again with the lock held: the other may have begun in between."""
    one, other = (tiny(f"seed={seed}", f"run_dir={tmp_path}/run") for seed in range(2))
    late = RunDirectory(other)
    with RunDirectory(one).lock():
        RunDirectory(one).begin({})
    with pytest.raises(RunError, match="holds run"), late.lock():
        pass
    with pytest.raises(RunError, match="holds run"):
        train(other)
    assert train(one)["status"] == "done"


@pytest.mark.parametrize("damage", [b"epoch,step\n1,", b"", None])
def test_metrics_are_rewritten_from_the_checkpoint(stopped_run, tmp_path, damage):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.unlink() if damage is None else metrics.write_bytes(damage)
    train(config)
    check_equal(config, whole)


def test_temporary_files_of_a_killed_process_are_removed(stopped_run, tmp_path):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    for name in (".checkpoint.pt.abcd.pt", ".metrics.csv.efgh.csv"):
        (tmp_path / "run" / name).write_bytes(b"half")
    (tmp_path / "run" / "env.json").write_text('{"git": ')
    train(config)
    check_equal(config, whole)
    assert {path.name for path in (tmp_path / "run").glob(".*")} == {".lock"}


@pytest.mark.parametrize("damage", ["[", "", None])
def test_a_damaged_result_is_written_again(stopped_run, tmp_path, damage):
    config, whole = copied(stopped_run[1], tmp_path / "run"), stopped_run[1]
    path = tmp_path / "run" / "result.json"
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(RunError, match=r"result.json: cannot be read .*; delete DONE in its folder"):
        train(config)
    (tmp_path / "run" / "DONE").unlink()
    train(config)
    check_equal(config, whole)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """After half of it; of a YAML file after a whole line, since it may be no YAML otherwise."""
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half[: half.rindex(b"\n") + 1] if path.suffix == ".yaml" else half)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path) -> None:
    """Even for root: a file whose first byte is an error."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("damage", [emptied, cut, a_folder, unreadable])
@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "checkpoint_previous.pt", "config.yaml", "env.json", "metrics.csv", "output.log"]
)
def test_a_damaged_file_of_a_stopped_run_is_named_or_has_no_effect(stopped_run, tmp_path, capsys, name, damage):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    path = tmp_path / "run" / name
    path.touch()
    damage(path)
    if (name == "config.yaml" and damage is not cut) or (damage is a_folder and name != "output.log"):
        with pytest.raises(UserError) as caught:
            train(config)
        assert str(caught.value).startswith(f"{path}: ")
        assert re.search("; (put it back|move it away)", str(caught.value))
        assert "\n" not in str(caught.value)
        return
    train(config)
    check_equal(config, whole)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    (now,) = env["resumed"]
    lost = name == "env.json"
    assert env["git"] == (None if lost else now["git"])
    assert ("the run's initial environment is unknown" in capsys.readouterr().out) == lost


def test_a_file_without_permission_is_not_to_be_deleted(stopped_run, tmp_path, monkeypatch):
    config = copied(stopped_run[1], tmp_path / "run")
    read = Path.read_text

    def denied(path, *arguments, **keys):
        if path.parent == tmp_path / "run":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **keys)

    monkeypatch.setattr(Path, "read_text", denied)
    for name, call in {"config.yaml": read_config, "result.json": read_result}.items():
        with pytest.raises(RunError, match=f"{name}: cannot be read .*Permission denied.*; make it readable$"):
            call(Path(config.run_dir))


def test_a_checkpoint_without_a_part_is_one_line(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["scheduler"]
    torch.save(state, path)
    with pytest.raises(RunError, match=r"^/.*/run: its checkpoint lacks 'scheduler'; delete it to start over$"):
        train(config)


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler"])
def test_a_checkpoint_of_other_code_is_one_line(stopped_run, tmp_path, part):
    """As after a change of the model's class, which is not part of the config."""
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state[part] = {"another": 1} if part in ("model", "optimizer") else 1
    torch.save(state, path)
    with pytest.raises(RunError, match=r"^/.*/run: its checkpoint (lacks|does not fit the code) .*to start over$"):
        train(config)


@pytest.mark.parametrize("damage", [emptied, cut, a_folder, unreadable])
@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.csv", "result.json", "timing.json"])
def test_a_damaged_file_of_a_finished_run_is_named_or_not_needed(stopped_run, tmp_path, name, damage):
    """By a call that finds the run done, and where it is recorded."""
    config = copied(stopped_run[1], tmp_path / "run")
    path = tmp_path / "run" / name
    damage(path)
    needed = {"result.json", "timing.json"} | ({"config.yaml"} if damage is not cut else set())  # its hash comes first
    calls: list[Callable[[], object]] = [lambda: train(config)] if name in needed else []
    if name != "config.yaml" or damage is not cut:
        calls.append(lambda: Store(tmp_path / "results").write(config, (), "one"))
    for call in calls:
        with pytest.raises(RunError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ")
        assert re.search("; (put it back|delete DONE)", str(caught.value))
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "results").rglob("*.json"))
    if name not in needed:
        assert train(config)["status"] == "done"


def test_a_reader_sees_that_a_run_is_in_use(tiny, monkeypatch):
    """Also one that may not write."""
    directory, opened, plain = RunDirectory(tiny()), [], Path.open

    def spy(path, mode="r", *rest):
        opened.append(mode)
        return plain(path, mode, *rest)

    assert not directory.in_use
    with directory.lock():
        monkeypatch.setattr(Path, "open", spy)
        assert directory.in_use
    assert not directory.in_use
    assert opened == ["r", "r"]


def test_vectorized_runs_have_a_folder_each(tiny, tmp_path):
    configs = [tiny(f"seed={seed}", f"run_dir={tmp_path}/one") for seed in range(2)]
    with pytest.raises(ConfigError, match=f"^run_dir={tmp_path}/one: is the folder of one run; for several, set runs_"):
        train_vectorized(configs)
    assert not (tmp_path / "one").exists()
