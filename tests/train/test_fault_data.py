"""A run does not resume on other data than it started on."""

import re
from pathlib import Path

import pytest

from lawn.config import Config
from lawn.errors import RunError
from lawn.train import train
from tests import helpers
from tests.helpers import compose, synthetic_ratings, write_ratings
from tests.train.faults import NCF, stop


def left_in(folder: Path) -> tuple[Config, Path]:
    """A run that was stopped, and its file of ratings."""
    data = folder / "data" / "ml-100k" / "u.data"
    write_ratings(data, synthetic_ratings())
    config = compose(*NCF, f"data_dir={folder}/data", "device=cpu", f"run_dir={folder}/run")
    stop(config, 30)
    return config, data


def test_resuming_on_other_data_is_refused(tmp_path, capsys):
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
        with pytest.raises(
            RunError, match=rf"^{tmp_path}/run: was started on other data \({words}.*\); put those back"
        ):
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


def test_a_run_without_recorded_data_is_done(tmp_path, capsys):
    config, data = left_in(tmp_path)
    train(config)
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
    assert last.startswith(f"error: {tmp_path}/run: was started on other data (items 150 then, 160 now, ")
    assert "Traceback" not in ended.stderr
