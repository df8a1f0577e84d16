import pytest

from lawn import compose as module
from lawn.compose import compose, compose_unchecked, refuse_sweeps
from lawn.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim=adm", "optim=adm: no such optim; choose from adam"),
        ("optim.lrr=1", "optim.lrr: no such key; optim takes name, lr"),
        ("optim=adam,sgd", "Ambiguous value for argument 'optim=adam,sgd'"),
        ("optim.lr=a=b", "cannot be read; quote the value"),
        ("train.epochs=0", "train.epochs=0: must be a finite number above 0"),
    ],
)
def test_what_cannot_be_is_one_line_without_hydras_traceback(override, words):
    with pytest.raises(ConfigError) as raised:
        compose(override)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_sweep_preset_has_to_be_a_point_of_its_grid():
    _, swept = compose_unchecked("sweep=e_free")
    assert list(swept) == ["optim.free_epochs"]
    with pytest.raises(ConfigError, match=r"^sweep=e_free: optim.free_epochs has the values .*; add -m"):
        refuse_sweeps(["sweep=e_free"], swept)
    refuse_sweeps(["sweep=e_free", "++optim.free_epochs=3"], swept)


def test_without_a_checkout_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    with pytest.raises(UserError, match=r"conf: not there; configs are in a checkout: pip install -e '.\[harness\]'"):
        compose()
