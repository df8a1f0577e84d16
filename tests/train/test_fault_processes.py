"""Killed processes, several processes of one run, and data workers that die."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess

import pytest
import torch

from lawn.config import Config
from lawn.errors import RunError
from lawn.files import locked
from lawn.task import task_builder
from lawn.train import Stopped, multirun, train, train_many, train_vectorized
from lawn.train.run_directory import RunDirectory
from lawn.train.torch_errors import translate_torch_errors
from tests.helpers import ROOT, Paused, compose, write_folders
from tests.train.faults import ALWAYS, DIGITS, NCF, VGG, after, begun, check_equal


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


def free(config: Config) -> bool:
    """Whether the ranks that a killed process has started are gone."""
    try:
        with RunDirectory(config).lock():
            return True
    except RunError:
        return False


def test_another_process_on_the_same_run_is_refused(tiny):
    """The lock is that of a process which is alive, and no more."""
    config = tiny(*DIGITS)
    with RunDirectory(config).lock():
        with pytest.raises(RunError, match="another process uses this run directory"):
            train(config)
        with pytest.raises(RunError, match="another process uses this run directory"):
            train_vectorized([config, tiny(*DIGITS, "seed=1")])
    assert (RunDirectory(config).path / ".lock").exists()
    assert train(config)["status"] == "done"


@pytest.mark.parametrize("together", [False, True])
def test_a_run_that_another_process_finishes_meanwhile(tiny, together, monkeypatch, capsys):
    """While this one reads data: it changes nothing then."""
    configs = [tiny("seed=1"), tiny("seed=2")][: 1 + together]
    paths = [RunDirectory(config).path for config in configs]

    def contents():
        return [path.read_bytes() for folder in paths for path in sorted(folder.iterdir())]

    def build_slowly(config):
        def build(*given):
            if not files:
                files.append(b"")
                for one in configs:
                    train(one)
                files[1:] = contents()
            return task_builder(config)(*given)

        return build

    files: list[bytes] = []
    monkeypatch.setattr(import_module("lawn.train.prepare"), "task_builder", build_slowly)
    train_vectorized(configs) if together else train(configs[0])
    assert files[1:] == contents()
    assert capsys.readouterr().out.count(": done already") == len(configs)


@pytest.mark.slow
def test_one_of_three_processes_trains_a_run(tmp_path):
    """The real command; that one waits in its first update until the others have been refused."""
    keys = ("model.widths=[16]", "dataset.limit=200", "train.epochs=2", "device=cpu", f"run_dir={tmp_path}/run")
    three = [Paused(tmp_path / f"{k}", "lawn.train.trainer:Trainer.after_update", *keys) for k in range(3)]
    while sum(one.process.poll() is None for one in three) > 1:
        time.sleep(0.05)
    ends = sorted(one.go() for one in three)
    assert [code for code, *_ in ends] == [0, 1, 1]
    line = f"error: {tmp_path}/run: another process uses this run directory; wait for it, or stop it\n"
    assert [err for *_, err in ends] == ["", line, line]


def test_the_lock_ends_with_its_owner_and_not_with_the_owners_children(tmp_path):
    code = """
import os, sys, time, types
from pathlib import Path
package = sys.modules["lawn"] = types.ModuleType("lawn")  # its own imports torch
package.__path__ = ["lawn"]
from lawn.files import locked
with locked(Path(sys.argv[1])) as free:
    if not os.fork():
        print(free is not None, os.getpid(), flush=True)  # the child has closed its copy of the file
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
    """Nor does a vectorized group of which one run cannot go on."""
    good = [tiny("train.vectorize=2", f"seed={seed}", "train.epochs=1") for seed in range(2)]
    keys = ("train.vectorize=2", "model.widths=[8]")
    bad = [tiny(*keys, f"seed={seed}", f"run_dir={tmp_path}/bad{seed}") for seed in (1, 2)]
    for seed in (1, 2):
        (tmp_path / f"bad{seed}").mkdir()
        (tmp_path / f"bad{seed}" / "config.yaml").write_text("hash: other")
    (failure,) = train_many([*bad, *good])
    assert "holds run other" in str(failure)
    assert all(RunDirectory(config).done for config in good)


def test_a_run_that_failed_is_named_where_a_later_one_is_stopped(tiny, tmp_path, monkeypatch, capsys):
    bad, good = (tiny(f"seed={seed}", f"run_dir={tmp_path}/{seed}") for seed in range(2))
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text("hash: other")

    def stopped(config):
        if config is good:
            raise Stopped("stopped by SIGTERM")
        return train(config)

    monkeypatch.setattr(multirun, "train", stopped)
    with pytest.raises(Stopped):
        train_many([bad, good])
    assert "holds run other" in capsys.readouterr().err


def test_a_bad_run_does_not_keep_its_vectorized_group(tiny, tmp_path, capsys):
    configs = [tiny("train.vectorize=3", f"seed={seed}", "train.epochs=1") for seed in range(3)]
    bad = RunDirectory(configs[1]).path
    bad.mkdir(parents=True)
    (bad / "config.yaml").write_text("hash: other")
    (failure,) = train_many(configs)
    assert "holds run other" in str(failure)
    for k in (0, 2):
        assert RunDirectory(configs[k]).done
    capsys.readouterr()


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
        with pytest.raises(RunError, match=r"^a data worker has died \(DataLoader worker .*\); run the same command"):
            train(broken)
    state = RunDirectory(broken).load()
    assert state is not None
    assert 3 <= state["step"] < 9
    train(broken)
    check_equal(broken, whole)


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
        (f"{WORKER}Killed.", f"has died ({WORKER}Killed.); run the same command again"),
    ],
)
def test_causes_of_dead_data_workers(text, words):
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
    line = done.stderr.partition("\n")[0]  # a data worker that outlives its rank for a moment may add to it
    assert re.fullmatch(r"error: a data worker has used up the shared memory \(.*\); .*dataset.workers=0", line)
