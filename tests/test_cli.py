"""The real commands, each in its own process."""

import pytest

from tests.helpers import ROOT, run, synthetic_ratings, write_ratings

SHORT = ("dataset=digits", "train.epochs=2", "model.widths=[8]", "dataset.limit=100", "device=cpu")


def test_sweep_runs_then_skips(tmp_path):
    command = ("-m", *SHORT, "optim=adam,adam_lawn", "seed=0,1", f"runs_dir={tmp_path}/runs")
    first = run(*command)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.count("done after epoch 2") == 4
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith("."))
    assert len(runs) == 4
    again = run(*command)
    assert again.returncode == 0
    assert again.stdout.count("done already") == 4
    assert "done after" not in again.stdout


def test_a_failing_job_does_not_keep_the_others(tmp_path):
    result = run("-m", *SHORT, "optim.lr=-1,0.01", f"runs_dir={tmp_path}/runs")
    assert result.returncode == 2
    assert result.stdout.count("done after epoch 2") == 1
    assert "error in the job" in result.stderr
    assert "optim.lr=-1.0: must be a finite number above 0" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["optim=adm"], 2, "optim=adm: no such optim; choose from adam, adam_lawn, adamw, sgd, sgd_lawn"),
        (["optim.lrr=1"], 2, "optim.lrr: no such key; optim takes name, lr"),
        (["+optim.lrr=1"], 2, "optim.lrr: no such key; optim takes name, lr"),
        (["optim.free_epochs=400", "train.epochs=300"], 2, "must be below train.epochs=300"),
        (["optim.lr=fast"], 2, "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (["dataset=imagenet", "data_dir={tmp}"], 1, "put its images into"),
        (["dataset=movielens100k", "data_dir={tmp}/cut"], 1, "u.data, line 3: want user, item, rating and timestamp"),
        (["optim.lr=="], 2, "Error parsing override"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, code, words):
    path = tmp_path / "cut" / "ml-100k" / "u.data"
    write_ratings(path, synthetic_ratings()[:3])
    path.write_bytes(path.read_bytes()[:-12])
    result = run(*(a.format(tmp=tmp_path) for a in arguments), f"runs_dir={tmp_path}/runs")
    assert result.returncode == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


def test_offline_is_one_line(tmp_path):
    """A proxy that nobody listens at stands for the network that is not there."""
    result = run("dataset=movielens100k", f"data_dir={tmp_path}", https_proxy="http://127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "put ml-100k.zip from there, or its u.data, into" in result.stderr


def test_rank_runs(tmp_path):
    run("-m", *SHORT, "optim.lr=1e-6,1e-2", "seed=0,1", "eval.split=val", f"runs_dir={tmp_path}/runs")
    result = run(str(tmp_path / "runs"), "--only", "optim.name=adam_lawn", script="scripts/rank_runs.py")
    assert result.returncode == 0
    best = result.stdout.splitlines()[1].split()
    assert (best[0], best[-1]) == ("0.01", "2")
    empty = run(str(tmp_path), script="scripts/rank_runs.py")
    assert (empty.returncode, empty.stderr.count("\n")) == (1, 1)


def test_the_library_needs_nothing_but_torch():
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'pandas', 'torchvision', 'timm', 'sklearn', 'matplotlib', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from lawn import AdamLAWN, SGDLAWN, LinearWarmupDecay\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=120)
