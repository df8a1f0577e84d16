import pytest

from lawn import compose as module
from lawn.compose import compose, compose_many, compose_unchecked, refuse_sweeps
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


def test_without_a_checkout_an_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    with pytest.raises(UserError, match=r"conf: not there; configs are in a checkout: pip install -e '.\[harness\]'"):
        compose()


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=adam", "dataset=cifar10", "optim.lr=1e-2", "train.epochs=7", "seed=3", "runs_dir='a b'"),
        ("sweep=cifar/adam_lawn", "dataset=cifar10", "optim=adam_lawn", "train.epochs=30", "optim.betas=[0.8,0.9]"),
        ("dataset=movielens1m", "optim=adam_hoffer", "train.epochs=300", "sweep=ncf/adam_hoffer"),
        (
            "sweep=peak_lr",
            "hydra.sweeper.params={optim.lr: '1,2'}",
            "++model.widths=[8]",
            "optim.free_epochs=${scaled:1,2}",
        ),
        ("++dataset.limit=null", "optim=sgd"),
    ],
)
def test_composing_many_gives_what_composing_one_gives(overrides):
    composed, swept = compose_many(*overrides)
    again, _ = compose_many(*overrides)
    assert (composed, swept) == compose_unchecked(*overrides)
    assert again == composed
    assert again is not composed


@pytest.mark.parametrize(
    "override", ["optim.lrr=1", "optim.lr=fast", "optim=adm", "optim=adam,sgd", "optim.lr=1,2", "a=[1"]
)
def test_composing_many_raises_what_composing_one_raises(override):
    errors = []
    for composing in (compose_many, compose_unchecked):
        with pytest.raises(ConfigError) as raised:
            composing(override)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
