"""What can happen to a run from outside: it ends clearly, or goes on as if nothing had been."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

import run
from experiments.records import Store
from lawn.child_signals import SIGNALS
from lawn.config import Config
from lawn.errors import RunError, UserError
from lawn.files import locked
from lawn.task import Classification
from lawn.train import Stopped, logger, train, train_many, train_vectorized
from lawn.train.progress import echo
from lawn.train.run_directory import CHECKPOINT_VERSION, RunDirectory
from lawn.train.torch_errors import translate_torch_errors
from lawn.train.trainer import Trainer
from lawn.validation import explain
from tests import helpers
from tests.helpers import ROOT, Paused, compose, synthetic_ratings, write_folders, write_ratings

FILES = ("metrics.csv", "result.json")
ALWAYS = "train.checkpoint_seconds=0"  # after every update
DIGITS = ("train.batch_size=16", "optim.free_epochs=2", "optim.lr=0.01")  # 13 updates an epoch


def outcome(config: Config) -> tuple[dict[str, torch.Tensor], list[bytes]]:
    path = RunDirectory(config).path
    model = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    return model, [(path / name).read_bytes() for name in FILES]


def check_equal(one: Config, other: Config) -> None:
    """Bit by bit."""
    (weights, files), (expected, expected_files) = outcome(one), outcome(other)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert files == expected_files


def start(config: Config) -> BaseProcess:
    context = get_context("forkserver")
    context.set_forkserver_preload(["lawn.train.launch", "torch._dynamo", "sklearn.datasets"])
    process = context.Process(target=work, args=(config,))
    process.start()
    return process


def work(config: Config) -> None:
    output = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    try:
        train(config)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


NCF = ("dataset=movielens100k", "model.factors=4", "dataset.candidates=20", "train.batch_size=90", "train.epochs=8")
VGG = ("dataset=cifar10", "optim=sgd", "dataset.limit=24", "train.batch_size=8", "train.epochs=2")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("kind", "window"), [((*NCF, "optim=adam_lawn"), 1.5), (VGG, 5.0)])
def test_killed_at_random_moments(kind, window, devices, tiny_data, tmp_path):
    """20 times, at any moment of a run that writes checkpoints nearly all the time; it ends as if it had not been."""
    moments = random.Random(devices)
    given = (*kind, ALWAYS, f"data_dir={tiny_data}", "device=cpu", f"train.devices={devices}")
    whole = compose(*given, f"run_dir={tmp_path}/whole")
    train(whole)
    killed, within, finished = 0, 0, 0
    while killed < 20 or finished < 1:
        config = compose(*given, f"run_dir={tmp_path}/{finished}")
        before = begun(config)
        process = start(config)
        while begun(config) == before and process.is_alive():
            time.sleep(0.005)
        process.join(moments.uniform(0, window) if killed < 20 else None)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            while not free(config):
                time.sleep(0.01)
            within += RunDirectory(config).load() is not None
        else:
            assert process.exitcode == 0
            check_equal(config, whole)
            finished += 1
    assert within >= 10


def begun(config: Config) -> int:
    """Changes whenever a process has begun, or gone on, with the run."""
    path = RunDirectory(config).path / "env.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def free(config: Config) -> bool:
    """Whether the ranks that a killed process has started are gone."""
    try:
        with RunDirectory(config).lock():
            return True
    except RunError:
        return False


def after(updates: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after so many updates of this process."""
    update, made = Trainer.after_update, 0

    def counted(run: Trainer) -> None:
        nonlocal made
        update(run)
        made += 1
        if made == updates:
            act()

    monkeypatch.setattr(Trainer, "after_update", counted)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop(config: Config, updates: int, number: signal.Signals = signal.SIGTERM) -> str:
    """Train so far; what is said at the end."""
    with pytest.MonkeyPatch.context() as patch:
        after(updates, send(number), patch)
        with pytest.raises(Stopped) as stopped:
            train(config)
    return str(stopped.value)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("updates", [1, 18, 26])  # in the first epoch, in the second, at the end of the second
def test_a_signal_stops_after_the_update(tiny, tmp_path, number, updates):
    whole, stopped = (tiny(*DIGITS, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    handler = signal.getsignal(number)
    said = stop(stopped, updates, number)
    assert re.match(f"{number.name}: .* has stopped in epoch .*, after {updates} updates", said)
    assert signal.getsignal(number) == handler
    state = RunDirectory(stopped).load()
    assert state is not None
    assert (state["step"], state["left"] is None) == (updates, updates == 26)
    train(stopped)
    check_equal(stopped, whole)


def test_a_signal_in_an_evaluation_stops_at_its_end(tiny, tmp_path, monkeypatch):
    whole, stopped = (tiny(*DIGITS, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    rows = Classification.rows
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "rows", lambda *given: send(signal.SIGTERM)() or rows(*given))
        with pytest.raises(Stopped, match=r"SIGTERM: .* has stopped in epoch 1, after 13 updates"):
            train(stopped)
    state = RunDirectory(stopped).load()
    assert state is not None
    assert state["left"] is None
    assert [row["epoch"] for row in state["rows"]] == [1]
    assert state["rows"][0]["test_accuracy"] is not None
    train(stopped)
    check_equal(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_stop_at_the_same_update(tiny, tmp_path, number):
    """The process that has started them hands the signal on."""
    keys = (*DIGITS, "train.devices=2", "train.epochs=40")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)

    def notify() -> None:
        while not begun(stopped):
            time.sleep(0.005)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    thread = Thread(target=notify, daemon=True)
    thread.start()
    with pytest.raises(Stopped):
        train(stopped)
    thread.join()
    state = RunDirectory(stopped).load()
    assert state is not None
    assert 0 < state["step"] < 40 * 13
    train(stopped)
    check_equal(stopped, whole)


def test_a_signal_after_the_last_update_ends_a_run_that_is_done(tiny, monkeypatch):
    config = tiny(*DIGITS)
    after(52, send(signal.SIGINT), monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert not isinstance(caught.value, Stopped)
    assert RunDirectory(config).done


def test_a_second_interrupt_is_obeyed_at_once(tiny, monkeypatch):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after(3, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(*DIGITS))
    assert not isinstance(caught.value, Stopped)


@pytest.mark.parametrize("optim", ["schedule_free", "muon", "lamb_lawn", "sgd_lawn", "automatic"])
def test_the_middle_of_an_epoch_is_whole_for_other_optimizers(tiny, tmp_path, optim):
    pytest.importorskip({"schedule_free": "schedulefree"}.get(optim, "torch"))
    keys: tuple[str, ...] = ("train.batch_size=16", f"optim={optim}", "optim.lr=0.01")
    if optim == "automatic":  # the switch comes after the stop, whose epoch has been watched in part
        keys = ("train.batch_size=16", "optim.free_epochs=auto", "optim.lr=1e-3", "diagnostics=on")
    whole, stopped = (tiny(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 20)
    train(stopped)
    check_equal(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [("dataset=cifar10", "dataset.limit=12"), ("dataset=imagenet", "dataset.image_size=32", "dataset.workers=0")],
    ids=["cifar10", "imagenet"],
)
def test_augmentation_and_statistics_go_on_in_the_middle(kind, tiny_data, tmp_path):
    keys = (*kind, f"data_dir={tiny_data}", "device=cpu", "train.batch_size=4", "train.epochs=1", "optim=sgd")
    whole, stopped = (compose(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "stopped"))
    train(whole)
    stop(stopped, 2)
    train(stopped)
    check_equal(stopped, whole)


def test_runs_that_are_trained_together_stop_at_the_end_of_the_epoch(tiny, tmp_path, monkeypatch):
    keys = [("seed=1",), ("optim.lr=0.02",), ("optim.free_epochs=1",)]
    whole, stopped = ([tiny(*DIGITS, *more, f"runs_dir={tmp_path}/{name}") for more in keys] for name in ("w", "s"))
    train_vectorized(whole)
    with monkeypatch.context() as patch:
        after(3 * 15, send(signal.SIGTERM), patch)
        with pytest.raises(Stopped, match=r"SIGTERM: .* with 2 others has stopped in epoch 2, after 26 updates"):
            train_vectorized(stopped)
    states = [RunDirectory(config).load() for config in stopped]
    assert [state and (state["epoch"], state["left"]) for state in states] == [(2, None)] * 3
    train_vectorized(stopped)
    for one, other in zip(stopped, whole, strict=True):
        check_equal(one, other)


def test_one_that_was_left_in_the_middle_is_taken_in_by_others(tiny):
    configs = [tiny(*DIGITS, f"seed={seed}") for seed in range(2)]
    stop(configs[0], 20)
    train_vectorized(configs)
    assert all(RunDirectory(config).result()["status"] == "done" for config in configs)


def left_in(folder: Path) -> tuple[Config, Path]:
    """A run that was stopped, and its file of ratings."""
    data = folder / "data" / "ml-100k" / "u.data"
    write_ratings(data, synthetic_ratings())
    config = compose(*NCF, f"data_dir={folder}/data", "device=cpu", f"run_dir={folder}/run")
    stop(config, 30)
    return config, data


def test_other_data_than_a_run_was_begun_on(tmp_path, capsys):
    """To go on with them is refused, and changes nothing; a run that is done says that it was on others."""
    config, data = left_in(tmp_path)
    others = {
        "items 150 then, 149 now, .*checksum ": [row for row in synthetic_ratings() if row[1] != 150],
        "training interactions 380 then, 379 now, checksum ": synthetic_ratings()[1:],
        "checksum ": synthetic_ratings()[::-1],
    }
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for words, other in others.items():
        write_ratings(data, other)
        with pytest.raises(RunError, match=rf"^{tmp_path}/run: was begun on other data \({words}.*\); put those back"):
            train(config)
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint
    write_ratings(data, synthetic_ratings())
    result = train(config)
    capsys.readouterr()
    done = f"{tmp_path}/run: done already\n"
    assert train(config) == result
    assert capsys.readouterr().out == done
    for words, other in others.items():
        write_ratings(data, other)
        assert train(config) == result
        pattern = rf"{done}warning: {tmp_path}/run: was run on other data \({words}.*\); delete it to run it again\n"
        assert re.fullmatch(pattern, capsys.readouterr().out)
    data.unlink()
    assert train(config) == result  # nor are they looked for elsewhere
    assert capsys.readouterr().out == done


def test_a_run_of_before_data_were_recorded_goes_on(tmp_path, capsys):
    config, data = left_in(tmp_path)
    state = RunDirectory(config).load()
    assert state is not None
    assert state.pop("data")["users"] == 30
    RunDirectory(config).save(state)
    (tmp_path / "run" / "env.json").write_text("{}")
    assert train(config)["status"] == "done"
    (tmp_path / "run" / "env.json").write_text("{}")
    data.write_text("")
    train(config)
    assert capsys.readouterr().out.endswith("run: done already\n")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_command_on_other_data(tmp_path, devices):
    _, data = left_in(tmp_path)
    write_ratings(data, synthetic_ratings(items=160))
    keys = (*NCF, f"data_dir={tmp_path}/data", "device=cpu", f"run_dir={tmp_path}/run", f"train.devices={devices}")
    ended = helpers.run(*keys)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/run: was begun on other data (items 150 then, 160 now, ")
    assert "Traceback" not in ended.stderr


def test_another_process_on_the_same_run_is_refused(tiny):
    """The lock is that of a process which is alive, and no more."""
    config = tiny(*DIGITS)
    with RunDirectory(config).lock():
        with pytest.raises(RunError, match="another process is at work on this run"):
            train(config)
        with pytest.raises(RunError, match="another process is at work on this run"):
            train_vectorized([config, tiny(*DIGITS, "seed=1")])
    assert (RunDirectory(config).path / ".lock").exists()
    assert train(config)["status"] == "done"


@pytest.mark.slow
def test_of_three_that_are_started_together_one_runs(tmp_path):
    """The real command; that one waits in its first update until the others have been refused."""
    keys = ("model.widths=[16]", "dataset.limit=200", "train.epochs=2", "device=cpu", f"run_dir={tmp_path}/run")
    three = [Paused(tmp_path / f"{k}", "lawn.train.trainer:Trainer.after_update", *keys) for k in range(3)]
    while sum(one.process.poll() is None for one in three) > 1:
        time.sleep(0.05)
    ends = sorted(one.go() for one in three)
    assert [code for code, *_ in ends] == [0, 1, 1]
    line = f"error: {tmp_path}/run: another process is at work on this run; wait for it, or stop it\n"
    assert [err for *_, err in ends] == ["", line, line]


@pytest.mark.parametrize("gone", ["deleted", "moved", "begun again"])
@pytest.mark.parametrize("when", [3, 52])  # in the middle, and before the result is written
def test_a_run_directory_that_goes_while_the_run_is_at_work(tiny, tmp_path, monkeypatch, gone, when):
    """It is not made again; of a moved one the same command goes on."""
    config, whole = (tiny(*DIGITS, ALWAYS, f"run_dir={tmp_path}/{name}") for name in ("run", "whole"))
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
        with pytest.raises(
            RunError, match=r"run: was deleted or moved while the run was at work in it, .* last checkpoint$"
        ):
            train(config)
    assert [file.name for file in path.glob("*")] == ([".lock"] if gone == "begun again" else [])
    assert path.exists() == (gone == "begun again")
    if gone == "deleted":
        return
    shutil.rmtree(path, ignore_errors=True)
    (tmp_path / "moved").rename(path)
    train(config)
    train(whole)
    check_equal(config, whole)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["closed", "full", "none"])
def test_output_that_breaks_does_not_end_a_run(tiny, output):
    """As | head -1 does it, a full disk, and a stream that was closed before the start."""
    config = tiny(*DIGITS)
    redirected = {"closed": "2>&1 | true", "full": ">/dev/full 2>&1", "none": ">&- 2>&-"}[output]
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} run.py {' '.join(overrides(config))} {redirected}"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    assert RunDirectory(config).done


def test_what_is_said_to_nobody_is_dropped():
    """The stream is usable afterwards, and its last flush does not fail."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        echo("one", stream)
        echo("two", stream)
        assert Path(f"/proc/self/fd/{stream.fileno()}").readlink() == Path(os.devnull)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The files of a run that was left with two checkpoints, and what the run gives in the end."""
    folder = tmp_path_factory.mktemp("stopped")
    config = compose("model.widths=[16]", "dataset.limit=200", "train.epochs=4", "device=cpu", *DIGITS, ALWAYS)
    config = replace(config, run_dir=str(folder / "run"))
    stop(config, 30)
    whole = replace(config, run_dir=str(folder / "whole"))
    train(whole)
    return config, whole


def copied(config: Config, folder: Path) -> Config:
    shutil.copytree(RunDirectory(config).path, folder)
    return replace(config, run_dir=str(folder))


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_checkpoint_that_is_cut_is_named_and_the_one_before_it_taken(stopped_run, tmp_path, capsys, sixteenths):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenths // 16])
    state = RunDirectory(config).load()
    assert state is not None
    assert state["step"] == 29
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {path}: cannot be read (")
    assert out.endswith("; going on from checkpoint_previous.pt\n")
    if sixteenths in (0, 7, 15):
        train(config)
        check_equal(config, whole)


def test_a_flipped_bit_is_found_wherever_it_matters(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    expected = RunDirectory(config).load()
    draw = random.Random(0)
    damaged = 0
    for _ in range(200):
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        state = RunDirectory(config).load()
        assert state is not None
        damaged += state["step"] == 29
        if state["step"] == 30:  # in padding, or in a field that nothing is read from
            assert repr(state) == repr(expected)
    assert damaged > 50


def test_no_whole_checkpoint_is_an_error_and_so_is_one_of_another_run(stopped_run, tmp_path):
    config = copied(stopped_run[0], tmp_path / "run")
    newest, previous = (tmp_path / "run" / name for name in ("checkpoint.pt", "checkpoint_previous.pt"))
    previous.write_bytes(b"")
    torch.save({"version": CHECKPOINT_VERSION, "hash": "another"}, newest)
    with pytest.raises(RunError, match=rf"format {CHECKPOINT_VERSION} and run another, not .*checkpoint_previous.pt: "):
        train(config)


@pytest.mark.parametrize("damage", [b"epoch,step\n1,", b"", None])
def test_metrics_are_written_anew_from_the_checkpoint(stopped_run, tmp_path, damage):
    config, whole = copied(stopped_run[0], tmp_path / "run"), stopped_run[1]
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.unlink() if damage is None else metrics.write_bytes(damage)
    train(config)
    check_equal(config, whole)


@pytest.fixture
def tmpfs(tmp_path):
    """A filesystem of its own, and how to give it a size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def size(kilobytes: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a filesystem")
        return folder

    yield size
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_filesystem(tmpfs, tiny, capsys, monkeypatch):
    """The first checkpoint fits, the second does not; with more room the same command goes on, to the same end."""
    folder = tmpfs(128)
    whole, config = tiny(*DIGITS, ALWAYS), tiny(*DIGITS, ALWAYS, f"runs_dir={folder}")
    train(whole)
    path = RunDirectory(config).path
    path.mkdir()
    size = (RunDirectory(whole).path / "checkpoint.pt").stat().st_size
    (folder / "others").write_bytes(bytes(128 * 1024 - size * 3 // 2 - 3 * 4096))
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint.pt"):
        train(config)
    state = RunDirectory(config).load()
    assert state is not None
    assert state["step"] == 1
    assert not list(path.glob(".checkpoint*"))
    assert command(config, monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 28] No space left on device: ")
    tmpfs(1024, "remount")
    train(config)
    check_equal(config, whole)


def test_a_file_that_may_not_be_as_large(tiny, capsys, monkeypatch):
    """A quota, of the process: 20 kB for a file."""
    config = tiny(*DIGITS, "model.widths=[128]")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, limits[1]))
    try:
        assert command(config, monkeypatch) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = RunDirectory(config).path
    assert capsys.readouterr().err == f"error: [Errno 27] File too large: '{path / 'checkpoint.pt'}'\n"
    assert not list(path.glob(".checkpoint*"))
    assert not (path / "DONE").exists()


def command(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of run.py for a run of the digits."""
    monkeypatch.setattr(sys, "argv", ["run.py", *overrides(config)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it for its process
    return run.main()


def overrides(config: Config) -> list[str]:
    """What run.py has to be given for a run of the digits."""
    keys = ("train.epochs", "train.batch_size", "optim.free_epochs", "optim.lr", "train.checkpoint_seconds")
    keys = (*keys, "dataset.limit", "model.widths", "runs_dir", "device")
    values = {key: reduce(getattr, key.split("."), config) for key in keys}
    return [f"{key}={str(value).replace(' ', '')}" for key, value in values.items()]


@pytest.mark.parametrize("age", ["checkpoint", "config", "key", "no config"])
def test_what_an_older_version_left(stopped_run, tmp_path, age):
    """Of another format: named, and what to delete. Made with a key that is no more: it is another run's."""
    config = copied(stopped_run[0], tmp_path / "run")
    if age == "checkpoint":
        for name in ("checkpoint.pt", "checkpoint_previous.pt"):
            state = torch.load(tmp_path / "run" / name, weights_only=True)
            torch.save({**state, "version": 2}, tmp_path / "run" / name)
        formats = rf"of format 2 and run (\w+), not {CHECKPOINT_VERSION} and \1"
        problem = rf"checkpoint.pt: is {formats}.*; delete .* to start over"
    else:
        path = tmp_path / "run" / "config.yaml"
        written = path.read_text().splitlines()
        if age == "config":  # before there were hashes
            written = [line for line in written if not line.startswith("hash:")]
            problem = r"config.yaml: cannot be read \(no .hash.\); put it back, or choose another run_dir"
        elif age == "no config":
            written = ["hash: [", "}"]
            problem = r"config.yaml: cannot be read \(while parsing.*\); put it back, or choose another"
        else:
            written = [f"hash: {'f' * 12}" if line.startswith("hash:") else line for line in written]
            problem = r"holds run f{12}, this config is run \w+; choose another"
        path.write_text("\n".join(written))
    with pytest.raises(RunError, match=problem) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert explain(caught.value) == str(caught.value)  # what the command line prints


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


def test_what_a_killed_process_left_beside_is_cleared_away(stopped_run, tmp_path):
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
    with pytest.raises(RunError, match=r"result.json: cannot be read .*; delete DONE beside it"):
        train(config)
    (tmp_path / "run" / "DONE").unlink()
    train(config)
    check_equal(config, whole)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
def test_whatever_file_of_a_stopped_run_is_damaged_it_is_named_or_the_end_is_the_same(
    stopped_run, tmp_path, capsys, name, damage
):
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
    assert ("what the run was begun with is not known any more" in capsys.readouterr().out) == lost


@pytest.mark.parametrize("damage", [emptied, cut, a_folder, unreadable])
@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.csv", "result.json", "timing.json"])
def test_whatever_file_of_a_finished_run_is_damaged_it_is_named_or_not_needed(stopped_run, tmp_path, name, damage):
    """By a call that finds the run done, and where it is recorded."""
    config = copied(stopped_run[1], tmp_path / "run")
    path = tmp_path / "run" / name
    damage(path)
    needed = {"result.json", "timing.json"} | ({"config.yaml"} if damage is not cut else set())  # its hash comes first
    calls: list[Callable[[], object]] = [lambda: train(config)] if name in needed else []
    if name != "config.yaml" or damage is not cut:
        calls.append(lambda: Store(tmp_path / "results").write(config, ()))
    for call in calls:
        with pytest.raises(RunError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ")
        assert re.search("; (put it back|delete DONE)", str(caught.value))
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "results").rglob("*.json"))
    if name not in needed:
        assert train(config)["status"] == "done"


def test_the_lock_ends_with_its_owner_and_not_with_the_owners_children(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from lawn.files import locked
with locked(Path(sys.argv[1])) as free:
    child = os.fork()
    if child:
        print(free is not None, child, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        free, child = owner.stdout.readline().split()
        assert free == "True"
        with locked(tmp_path / "lock") as taken:
            assert not taken
        owner.kill()
        owner.wait()
        with locked(tmp_path / "lock") as taken:
            assert taken
        os.kill(int(child), signal.SIGKILL)


def test_one_of_many_that_fails_does_not_keep_the_others(tiny, tmp_path):
    """Nor a group that is trained together, of which one cannot go on."""
    good = [tiny("train.vectorize=2", f"seed={seed}", "train.epochs=1") for seed in range(2)]
    bad = [tiny("train.vectorize=2", f"seed={seed}", "model.widths=[8]", f"run_dir={tmp_path}/bad") for seed in (1, 2)]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("hash: other")
    (failure,) = train_many([*bad, *good])
    assert "holds run other" in str(failure)
    assert all(RunDirectory(config).done for config in good)


def test_a_run_that_an_older_version_has_finished_is_done(stopped_run, tmp_path, capsys):
    """Then result.json had the times too, and nothing on divergence."""
    config = copied(stopped_run[1], tmp_path / "run")
    result = RunDirectory(config).result()
    del result["divergence"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    (tmp_path / "run" / "timing.json").unlink()
    assert train(config) == result
    assert "done already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_data_worker_that_is_killed(tiny_data, tmp_path):
    keys = ("dataset=imagenet", "dataset.image_size=32", "model=mlp", "model.widths=[8]", "dataset.workers=2")
    keys = (*keys, f"data_dir={tiny_data}", "device=cpu", "train.batch_size=4", "train.epochs=3", ALWAYS)
    whole, broken = (compose(*keys, f"run_dir={tmp_path}/{name}") for name in ("whole", "broken"))
    train(whole)

    def kill() -> None:
        worker = active_children()[0]
        worker.kill()
        worker.join()

    with pytest.MonkeyPatch.context() as patch:
        after(4, kill, patch)
        with pytest.raises(RunError, match=r"^a data worker has died \(DataLoader worker .*\); the same command"):
            train(broken)
    state = RunDirectory(broken).load()
    assert state is not None
    assert 3 <= state["step"] < 9
    train(broken)
    check_equal(broken, whole)


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("... DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_memory_that_is_used_up(tiny, monkeypatch, raised):
    def fail() -> None:
        raise raised

    after(3, fail, monkeypatch)
    with pytest.raises(RunError, match=r"^out of memory \(.*\); a smaller train.micro_batch_size needs less$"):
        train(tiny(*DIGITS))


WORKER = "DataLoader worker (pid 7) is killed by signal: "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f"{WORKER}Bus error. It is possible that dataloader's workers are",
            f"has used up the shared memory ({WORKER}Bus error)",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\n",
            "has used up the shared memory (RuntimeError: unable to allocate shared memory(shm) for file </torch_1>:",
        ),
        (f"{WORKER}Killed.", f"has died ({WORKER}Killed.); the same command goes on"),
    ],
)
def test_what_data_workers_die_of(text, words):
    with pytest.raises(RunError) as caught, translate_torch_errors(rank=0):
        raise RuntimeError(text)
    assert f"a data worker {words}" in str(caught.value)
    assert ("dataset.workers=0" in str(caught.value)) == ("shared memory" in words)


def test_a_mistake_in_a_data_worker_keeps_its_traceback():
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\nRuntimeError: shapes differ"
    with pytest.raises(RuntimeError, match="Original Traceback"), translate_torch_errors(rank=0):
        raise RuntimeError(text)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_little_shared_memory(tmp_path, devices):
    """As in Docker: a batch of 100 x 100 pixels does not fit into 4 MB several times."""
    write_folders(tmp_path, each=50)
    keys = ["dataset=imagenet", "dataset.image_size=128", "model=mlp", "model.widths=[2]", "dataset.workers=2"]
    keys += ["train.batch_size=100", "train.epochs=2", "device=cpu", f"train.devices={devices}", f"data_dir={tmp_path}"]
    keys += [f"run_dir={tmp_path}/run"]
    small = f"mount -t tmpfs -o size=4m none /dev/shm && exec {sys.executable} run.py {' '.join(keys)}"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a filesystem")
    done = subprocess.run(["unshare", "-m", "sh", "-c", small], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: a data worker has used up the shared memory \(.*\); .*dataset.workers=0\n", done.stderr
    )


@pytest.mark.parametrize("asked", ["init", "log", "finish"])
def test_a_wandb_server_that_hangs(tiny, monkeypatch, capsys, asked):
    import wandb

    hanging = Event()
    answers = dict.fromkeys(("init", "log", "finish"), lambda *_, **__: None)
    answers[asked] = lambda *_, **__: hanging.wait(60)
    stub = SimpleNamespace(log=answers["log"], finish=answers["finish"], summary={})
    monkeypatch.setattr(wandb, "init", lambda **_: answers["init"]() or stub)
    monkeypatch.setattr(logger, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(logger.WandbLogger, "silent", False)
    assert train(tiny("logger=wandb"))["status"] == "done"
    hanging.set()
    assert capsys.readouterr().out.count("wandb: no answer in 0.2 s; logging to it ends here") == 1


@pytest.mark.slow
def test_a_real_wandb_with_a_server_that_hangs_at_the_end(tiny):
    """A server that answers until files are to be uploaded."""
    config = tiny(*DIGITS)
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
            asked.append(self.path)
            if self.path != "/graphql" or "createRunFiles" in query:
                closing.wait(300)
                return
            bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
            bucket["project"] = {"id": "p", "name": "lawn", "entity": {"id": "e", "name": "me"}}
            viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}, "viewer": viewer, "model": None}
            content = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    closing = Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    code = "from lawn.train import logger; logger.TIMEOUT_SECONDS = 8; import sys, run; sys.exit(run.main())"
    where = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-c", code, *overrides(config), "logger=wandb"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, **where}
        )
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
    assert done.returncode == 0
    assert "wandb: no answer in 8 s; logging to it ends here\ndone after epoch 4" in done.stdout
    assert any(path.endswith("file_stream") for path in asked)
    assert RunDirectory(config).done
