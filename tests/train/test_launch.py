import json

import pytest
import torch

from lawn.compose import compose
from lawn.errors import ConfigError
from lawn.train import run, train
from lawn.train.multirun import train_many
from lawn.train.run_directory import RunDirectory
from tests.helpers import run as command

SHORT = ("dataset=digits", "train.epochs=2", "model.widths=[8]", "dataset.limit=100", "device=cpu")


def test_a_call_from_python_is_the_run_of_its_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*SHORT, "optim=adam", "run_dir=here")
    assert (result["status"], result["last"]["epoch"], result["headline"]) == ("done", 2, "accuracy")
    assert (tmp_path / "here" / "DONE").exists()
    assert result == train(compose(*SHORT, "optim=adam", f"run_dir={tmp_path}/here"))  # done already


def test_a_call_from_python_refuses_what_the_command_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overrides in (["sweep=e_free"], ["optim.lr=-1"], ["optim=adm"]):
        with pytest.raises(ConfigError, match=overrides[0].partition("=")[0]):
            run(*SHORT, *overrides)
    assert not list(tmp_path.iterdir())


def test_a_list_of_overrides_is_refused():
    with pytest.raises(ConfigError, match=r"\['dataset=digits'\]: an override is a text such as"):
        run(["dataset=digits"])


def test_the_state_of_torch_in_a_notebook_does_not_matter(tmp_path):
    alone = run(*SHORT, f"run_dir={tmp_path}/alone")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            result = run(*SHORT, f"run_dir={tmp_path}/in float64")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert result["last"] == alone["last"]
    with torch.inference_mode():
        assert run(*SHORT, f"run_dir={tmp_path}/in inference mode")["last"] == alone["last"]
    with torch.device("meta"):
        assert run(*SHORT, f"run_dir={tmp_path}/on meta")["last"] == alone["last"]


def test_a_run_leaves_the_settings_of_torch(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    try:
        run(*SHORT, f"run_dir={tmp_path}/run")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False


def test_vectorized_runs_do_not_depend_on_the_state_of_torch(tmp_path):
    def losses(folder: str) -> list[float]:
        configs = [compose(*SHORT, "train.vectorize=2", f"seed={k}", f"runs_dir={tmp_path}/{folder}") for k in (0, 1)]
        assert not train_many(configs)
        return [RunDirectory(config).result()["last"]["train_loss"] for config in configs]

    alone = losses("alone")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert losses("in float64") == alone
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_call_from_python_gives_what_the_command_gives(tmp_path):
    result = run(*SHORT, f"run_dir={tmp_path}/one")
    assert command(*SHORT, f"run_dir={tmp_path}/other").returncode == 0
    given = json.loads((tmp_path / "other" / "result.json").read_text())
    assert {key: result[key] for key in given} == given
