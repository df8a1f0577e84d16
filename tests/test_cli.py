"""The commands: whole ones in their own process, one-line errors through their main function."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from lawn.data.folders import CHECKSUM
from lawn.identity import run_name
from lawn.train import train
from scripts import rank_runs
from tests.helpers import ROOT, compose, run, synthetic_ratings, write_ratings

SHORT = ("dataset=digits", "train.epochs=2", "model.widths=[8]", "dataset.limit=100", "device=cpu")


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """A folder with one finished run, scored on validation."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    train(compose(*SHORT, "eval.split=val", f"runs_dir={folder}"))
    return folder


def test_sweep_runs_then_skips(tmp_path, main):
    command = ("-m", *SHORT, "optim=adam,adam_lawn", f"runs_dir={tmp_path}/runs")
    code, out, err = main(*command)
    assert (code, err) == (0, "")
    assert out.count("done after epoch 2") == 2
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith("."))
    assert len(runs) == 2
    code, out, _ = main(*command)
    assert code == 0
    assert out.count("done already") == 2
    assert "done after" not in out


@pytest.mark.parametrize("wrong", ["sweep=e_fre", "preset=digits-adm"])
@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_an_optional_member_that_does_not_exist(tmp_path, main, multirun, wrong):
    """Hydra itself takes it for none."""
    code, _, err = main(*multirun, *SHORT, wrong, f"runs_dir={tmp_path}/runs")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{wrong}: no such {wrong.partition('=')[0]}; choose from" in err
    assert not list(tmp_path.glob("runs/digits-*"))


def test_a_choice_of_sweeps_is_refused(tmp_path, main):
    """Hydra expands neither: it takes the values of a sweep from the command as a whole."""
    code, _, err = main("-m", *SHORT, "sweep=peak_lr,warmup", f"runs_dir={tmp_path}/runs")
    assert code == 2
    assert "sweep=peak_lr: optim.lr has no value in this job, as a multirun takes one sweep; start one for each" in err
    assert not list(tmp_path.glob("runs/digits-*"))


def test_a_failing_job_does_not_keep_the_others(tmp_path, main):
    code, out, err = main("-m", *SHORT, "optim.lr=-1,0.01", f"runs_dir={tmp_path}/runs")
    assert code == 2
    assert out.count("done after epoch 2") == 1
    assert err.startswith("error: in the job")
    assert "optim.lr=-1.0: must be a finite number above 0" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["optim=adm"],
            2,
            "optim=adm: no such optim; choose from adam, adam_cpr, adam_hoffer, adam_lawn, adamp, adamw, lamb",
        ),
        (["optim.lrr=1"], 2, "optim.lrr: no such key; optim takes name, lr"),
        (
            ["optim.lr=a=b"],
            2,
            """optim.lr=a=b: cannot be read; quote the value, once for Hydra and once for the shell: \
'optim.lr="a=b"'""",
        ),
        (["data_dir=~/x"], 2, """once for the shell: 'data_dir="~/x"'"""),
        (["data_dir=/tmp/ü"], 2, """once for the shell: 'data_dir="/tmp/ü"'"""),
        (["data_dir=it's"], 2, """once for the shell: data_dir="it's\""""),
        (["data_dir=50%=x"], 2, """once for the shell: 'data_dir="50%=x"'"""),
        (["optim.lr=[1"], 2, "optim.lr=[1: cannot be read; a list is [a,b]"),
        (["train.epochs=", "3"], 2, "3: must be key=value, without spaces around the sign"),
        (["optim.lr"], 2, "optim.lr: must be key=value"),
        (["dataset=null"], 2, "dataset=null: must be the name of a member of the group"),
        (["optim=[adam]"], 2, "dataset and optim: each must be the name of one member of its group"),
        (["~optim"], 2, "dataset and optim: each must be the name of one member of its group"),
        (["optim=3"], 2, "optim=3: must be the name of a member of the group"),
        (["device=mps"], 2, "device=mps: cannot be used (training is for CPUs and CUDA's GPUs); choose auto, cpu"),
        (
            ["sweep=peak_lr"],
            2,
            "sweep=peak_lr: optim.lr has the values 1e-4,3e-4,1e-3,3e-3,1e-2,3e-2; add -m to run all",
        ),
        (
            ['data_dir="$NO_SUCH_VARIABLE/x"'],
            2,
            "data_dir=$NO_SUCH_VARIABLE/x: the environment has no variable NO_SUCH",
        ),
        (["+optim.lrr=1"], 2, "optim.lrr: no such key; optim takes name, lr"),
        (["optim.free_epochs=400", "train.epochs=300"], 2, "must be below train.epochs=300"),
        (["optim.lr=${{nothing}}"], 2, "optim.lr: Interpolation key 'nothing' not found"),
        (["dataset.name=${{nothing}}"], 2, "dataset.name: Interpolation key 'nothing' not found"),
        (["optim.lr=fast"], 2, "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (["dataset=imagenet", "data_dir={tmp}"], 1, "put its images into"),
        (["dataset=movielens100k", "data_dir={tmp}/cut"], 1, "u.data, line 3: want user, item, rating (1 or more)"),
        (["optim.lr=="], 2, "optim.lr==: cannot be read; quote the value"),
    ],
)
def test_bad_input_is_one_line(tmp_path, main, arguments, code, words):
    path = tmp_path / "cut" / "ml-100k" / "u.data"
    write_ratings(path, synthetic_ratings()[:3])
    path.write_bytes(path.read_bytes()[:-12])
    got, out, err = main(*(a.format(tmp=tmp_path) for a in arguments), f"runs_dir={tmp_path}/runs")
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ")
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_a_multirun_may_be_asked_for_between_overrides(tmp_path, main):
    """Hydra's own parser takes the flag before or after all of them."""
    code, out, _ = main(*SHORT, "-m", "seed=0,1", f"runs_dir={tmp_path}/runs")
    assert (code, out.count("done after epoch 2")) == (0, 2)


@pytest.mark.parametrize("nothing", ["seed=range(0)", "optim=glob(zzz*)"])
def test_a_multirun_of_nothing_says_so(tmp_path, main, nothing):
    code, out, err = main("-m", *SHORT, f"runs_dir={tmp_path}/runs", nothing)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith(f"{nothing}: expands to no job\n")


def test_a_submitit_launcher_without_jobs_says_so(tmp_path, main):
    """The launcher itself asserts that there are some, without a word."""
    code, out, err = main("-m", "hydra/launcher=submitit_local", *SHORT, f"runs_dir={tmp_path}/runs", "seed=range(0)")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("seed=range(0): expands to no job\n")


def test_a_point_of_a_sweep_is_one_run(tmp_path, main):
    code, out, err = main(*SHORT, "sweep=peak_lr", "optim.lr=0.01", f"runs_dir={tmp_path}/runs")
    assert (code, err) == (0, "")
    assert out.count("done after epoch 2") == 1


def test_all_spellings_of_a_number_are_one_run(tmp_path, main):
    keys = (*SHORT, "optim=adam_lawn", f"runs_dir={tmp_path}/runs")
    names = {
        run_name(compose(*keys, f"optim.lr={rate}", f"optim.free_epochs={free}"))
        for rate in ("1e-3", "0.001", "1.0e-03", '"1e-3"', ".001", "1E-3", "+0.001", "1_0e-4")
        for free in ("0", "0.0", "-0.0", '"0"')
    }
    assert len(names) == 1
    assert main(*keys, "optim.lr=1e-3", "optim.free_epochs=0")[0] == 0
    code, out, err = main(*keys, 'optim.lr="1_0e-4"', "optim.free_epochs=-0.0")
    assert (code, err) == (0, "")
    assert "done already" in out


def test_paths_are_expanded(tmp_path, main, monkeypatch):
    """~ and variables, quoted for Hydra."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "a b"))
    monkeypatch.chdir(tmp_path)
    assert main(*SHORT, 'runs_dir="~/x"', "seed=1")[0] == 0
    assert main(*SHORT, 'runs_dir="$SCRATCH/x"', "seed=2")[0] == 0
    assert main(*SHORT, 'run_dir="${SCRATCH}/y"'.replace("${", "\\${"), "seed=3")[0] == 0
    assert len(list((tmp_path / "home" / "x").iterdir())) == 1
    assert len(list((tmp_path / "a b" / "x").iterdir())) == 1
    assert (tmp_path / "a b" / "y" / "DONE").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "a b"}


def test_offline_is_one_line(tmp_path, main, monkeypatch):
    """A proxy that nobody listens at stands for the network that is not there."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    code, _, err = main("dataset=movielens100k", f"data_dir={tmp_path}")
    assert (code, err.count("\n")) == (1, 1)
    assert "put ml-100k.zip from there, or its u.data, into" in err


def test_a_preset_sweep_validates(tmp_path, main):
    code, out, _ = main("-m", "sweep=e_free", *SHORT, f"runs_dir={tmp_path}/runs")
    assert code == 0
    assert out.count("val_accuracy") >= 6
    assert out.count("done after epoch 2") == 6


def test_paths_that_cannot_be_are_one_line(tmp_path, main):
    (tmp_path / "file").write_text("")
    for arguments in (["-m", "seed=0,1"], []):
        code, _, err = main(*arguments, *SHORT, f"runs_dir={tmp_path}/file/x")
        assert (code, err.count("\n")) == (1, 1)
    code, _, err = main("dataset=movielens100k", f"data_dir={tmp_path}/file", f"runs_dir={tmp_path}/runs")
    assert (code, err.count("\n")) == (1, 1)


def test_rank_runs(tmp_path, monkeypatch, capsys):
    for lr in ("1e-6", "1e-2"):
        for seed, fused in ((0, "null"), (1, "false")):  # the second key is not part of the identity
            given = f"optim.lr={lr}", f"seed={seed}", f"optim.fused={fused}", "eval.split=val"
            train(compose(*SHORT, *given, f"runs_dir={tmp_path}/runs"))
    capsys.readouterr()
    only = ("--only", "optim=adam_lawn", "--csv", f"{tmp_path}/table.csv")
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", *only])
    assert rank_runs.main() == 0
    (tmp_path / "link.csv").symlink_to(tmp_path / "table.csv")
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", *only[:-1], f"{tmp_path}/link.csv"])
    (tmp_path / "table.csv").write_text("old")
    capsys.readouterr()
    assert rank_runs.main() == 0
    assert (tmp_path / "link.csv").is_symlink()
    best = capsys.readouterr().out.splitlines()[1].split()
    copied = next(iter((tmp_path / "runs").glob("*adam_lawn-s0-*")))
    shutil.copytree(copied, tmp_path / "runs" / "copy")
    assert rank_runs.main() == 0
    assert capsys.readouterr().out.splitlines()[1].split() == best  # a copy is no other seed
    assert (best[0], best[-2:]) == ("0.01", ["2", "0"])  # setting, seeds, diverged
    with (tmp_path / "table.csv").open() as file:
        assert len(file.readlines()) == 5
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", "--split", "test"])
    assert rank_runs.main() == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/runs: no finished runs with eval.split=test; rank the 5 with eval.split=val by "
        "--split val\n"
    )
    for same in ("optim.name=adam_lawn", "optim.lr=0.01", "optim.lr=1e-2", "train.epochs=2.0", "model.bias=null"):
        monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", "--only", same])
        assert rank_runs.main() == 0, same
    capsys.readouterr()
    for two in (("optim.lr=1e-6", "seed=1"), ("seed=1", "optim.lr=1e-6")):  # in any order, all of them count
        both = [f"--only={each}" for each in two]
        monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", *both, "--csv", f"{tmp_path}/two.csv"])
        assert rank_runs.main() == 0
        assert len((tmp_path / "two.csv").read_text().splitlines()) == 2
    for wrong in (
        ["--only", "seed=1", "--only", "seed=0"],
        ["--only", "optim.lr=[1"],
        ["--only", "optim.lr=${oc.env:ABSENT}"],
        ["--top", "0"],
    ):
        monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", *wrong])
        with pytest.raises(SystemExit, match="2"):
            rank_runs.main()
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/absent"])
    with pytest.raises(SystemExit, match="2"):
        rank_runs.main()
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/absent: no such folder\n")
    for place in (tmp_path, "/proc/absent.csv", "/dev/null"):
        monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", "--csv", str(place)])
        assert rank_runs.main() == 1
        err = capsys.readouterr().err
        assert str(place) in err
        assert err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", f"{tmp_path}/runs", *only])
    other = tmp_path / "runs" / "of-another-dataset"
    shutil.copytree(next((tmp_path / "runs").glob("digits-*")), other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: digits", "name: cifar10"))
    with pytest.raises(SystemExit):
        rank_runs.main()
    assert "runs of cifar10, digits: choose one dataset with --only dataset=cifar10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "given", "expected"),
    [
        ([1.0, 2.0], "1", [True, False]),
        ([3, 4], "3.0", [True, False]),
        ([1e-3, 1e-2], "1e-2", [False, True]),
        ([None, 1000], "1000", [False, True]),
        ([None, 1000], "null", [True, False]),
        ([None, "auto"], "null", [True, False]),
        ([True, 1], "true", [True, False]),
        ([True, 1], "1", [False, True]),
        (["auto", 1.0], "auto", [True, False]),
        ([[1, 2], None], "[1,2]", [True, False]),
    ],
)
def test_rank_runs_compares_values_instead_of_spellings(column, given, expected):
    wanted = OmegaConf.from_dotlist([f"value={given}"])["value"]
    assert [rank_runs._equal(value, wanted) for value in pd.DataFrame({"key": column})["key"]] == expected


def test_rank_runs_takes_runs_on_other_data_apart(finished_runs, tmp_path, monkeypatch, capsys):
    """Not averaged, nor dropped as the same run."""
    for name, checksum, accuracy in (("a", "0" * 8, 40.0), ("b", "1" * 8, 50.0), ("copy of b", "1" * 8, 50.0)):
        run = tmp_path / "runs" / name
        shutil.copytree(next(finished_runs.glob("digits-*")), run)
        environment, result = (json.loads((run / file).read_text()) for file in ("env.json", "result.json"))
        environment["data"]["checksum"] = checksum
        result["last"]["val_accuracy"] = accuracy
        (run / "env.json").write_text(json.dumps(environment))
        (run / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", str(tmp_path / "runs"), "--csv", str(tmp_path / "runs.csv")])
    capsys.readouterr()
    assert rank_runs.main() == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["data", "mean", "val_accuracy", "sem", "seeds", "diverged"]
    assert rows == [["1" * 8, "50.0", "NaN", "1", "0"], ["0" * 8, "40.0", "NaN", "1", "0"]]
    assert (tmp_path / "runs.csv").read_text().splitlines()[0].startswith("hash,git,data,seed,")
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", str(tmp_path / "runs"), "--csv", str(tmp_path / "no" / "x.csv")])
    with pytest.raises(SystemExit, match="2"):
        rank_runs.main()
    assert not (tmp_path / "no").exists()
    shutil.copy(tmp_path / "runs" / "b" / "result.json", tmp_path / "runs" / "a" / "result.json")
    for run, data in (("a", {CHECKSUM: "x"}), ("b", {"images": 3, CHECKSUM: "x"}), ("copy of b", {"images": 3})):
        environment = json.loads((tmp_path / "runs" / run / "env.json").read_text())
        (tmp_path / "runs" / run / "env.json").write_text(json.dumps({**environment, "data": data}))
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", str(tmp_path / "runs")])
    capsys.readouterr()
    assert rank_runs.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # of folders and shards, and one that does not tell


def test_rank_runs_refuses_two_results_of_one_run(finished_runs, tmp_path, monkeypatch, capsys):
    for name, accuracy in (("a", 40.0), ("b", 50.0)):
        shutil.copytree(next(finished_runs.glob("digits-*")), tmp_path / name)
        path = tmp_path / name / "result.json"
        result = json.loads(path.read_text())
        result["last"]["val_accuracy"] = accuracy
        path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", str(tmp_path)])
    capsys.readouterr()
    assert rank_runs.main() == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "have different results" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", ""),
        ("result.json", "[]"),
        ("timing.json", "{}"),
        ("config.yaml", None),
        ("config.yaml", "["),
        ("config.yaml", "hash: 0123456789ab\ndataset:\n  name: digits\n"),
        ("env.json", "{}"),
    ],
)
def test_rank_runs_names_what_is_damaged(finished_runs, tmp_path, monkeypatch, capsys, name, content):
    shutil.copytree(finished_runs, tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob(f"*/{name}")
    path.unlink()
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["rank_runs.py", str(tmp_path / "runs")])
    capsys.readouterr()
    assert rank_runs.main() == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {path}: cannot be read (")
    assert "; put it back" in err or "; delete DONE in its folder" in err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--help", "--cfg job"])
def test_what_hydra_prints_may_break_off(option):
    command = f"set -o pipefail; {sys.executable} run.py {option} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_an_error(main, monkeypatch):
    """Such as that of a launcher to its processes."""

    def break_off() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("run.run", break_off)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)  # a file
    assert main() == (1, "", "error: [Errno 32] Broken pipe\n")


@pytest.mark.slow
def test_files_are_utf8_whatever_the_locale(tmp_path):
    """A report on the records that there are, its README.md among what is read."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "experiments", "report", "demo", "--results", str(tmp_path)]
    shutil.copytree(ROOT / "results" / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("movielens*"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.md").read_bytes() == (ROOT / "results" / "demo.md").read_bytes()


def test_text_is_utf8_whatever_the_locale(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import pathlib, sys, types\n"
        "package = sys.modules['lawn'] = types.ModuleType('lawn')\n"  # its own imports torch
        "package.__path__ = ['lawn']\n"
        "from lawn.files import write_text\n"
        "write_text(pathlib.Path(sys.argv[1]), chr(0x2192))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "x").read_bytes() == "\u2192".encode()


LAUNCHED = ("-m", "hydra/launcher=submitit_local", *SHORT, "optim=adam")  # on this machine instead of by Slurm


@pytest.mark.slow
def test_a_launcher_of_clusters_reports_on_every_job(tmp_path):
    """Where its output goes, and how it has ended: the first that fails does not hide the others."""
    result = run(*LAUNCHED, "optim.lr=-1,0.01,-2", f"runs_dir={tmp_path}/runs")
    assert result.returncode == 2
    assert len(list((tmp_path / "runs").glob("*/DONE"))) == 1
    begun, ended = result.stdout.splitlines()[:3], result.stdout.splitlines()[3:]
    logs = [Path(re.search(r"output in (\S+_log.out) and \S+_log.err$", line)[1]) for line in begun]
    assert "done after epoch 2" in logs[1].read_text()
    assert "must be a finite number above 0" in logs[2].with_suffix(".err").read_text()
    assert len(ended) == 1
    assert re.search(r"^job .* optim.lr=0.01.*: done after epoch 2, test_accuracy [0-9.]+$", ended[0])
    for line, rate in zip(result.stderr.splitlines(), ("-1", "-2"), strict=True):
        assert line.startswith("error: in the job")
        assert line.endswith(f"optim.lr={rate}.0: must be a finite number above 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, 1, "ended without a result; killed, or out of memory or of hydra.launcher.timeout_min; see /"),
        (signal.SIGTERM, 75, "run the same command again to resume"),
    ],
)
def test_a_job_of_a_launcher_that_is_killed_or_stopped(tmp_path, number, code, said):
    """The first of two; the other one is waited for, and done."""
    command = [sys.executable, str(ROOT / "run.py"), *LAUNCHED, f"runs_dir={tmp_path}/runs", "train.epochs=100000,2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = process.stdout.readline()
        log = Path(re.search(r"output in (\S+)", begun)[1])
        while not (log.exists() and "epoch 1/100000" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        controller = re.match(r"job (\d+), ", begun)[1]
        (job,) = subprocess.run(["pgrep", "-P", controller], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(job), number)
        out, err = process.communicate(timeout=200)
    assert process.returncode == code
    assert err.startswith("error: in the job")
    assert "train.epochs=100000" in err
    assert (said in err, err.count("\n")) == (True, 1)
    assert re.search(r"^job .* train.epochs=2 .*: done after epoch 2, test_accuracy", out, flags=re.MULTILINE)


@pytest.mark.slow
def test_jobs_of_a_launcher_that_nobody_waits_for(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), *LAUNCHED, f"runs_dir={tmp_path}/runs", "seed=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        job = re.match(r"job (\d+), ", process.stdout.readline())[1]
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=200)
    assert (process.returncode, out) == (75, f"not waited for, and not cancelled: jobs {job}\n")


def test_a_launcher_that_is_not_installed_is_one_line(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    said = "error: hydra/launcher=submitit_slurm: the package submitit is not installed; pip install '.[slurm]'\n"
    assert main("-m", "hydra/launcher=submitit_slurm", *SHORT) == (2, "", said)
