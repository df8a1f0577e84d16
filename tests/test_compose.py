import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lawn import compose as module
from lawn import composition
from lawn.compose import compose, compose_unchecked, refuse_sweeps
from lawn.composition import compose_many
from lawn.errors import ConfigError, UserError
from lawn.validation import resolve


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim=adm", "optim=adm: no such optim; choose from adam"),
        ("sweep=e_fre", "sweep=e_fre: no such sweep; choose from e_free, peak_lr"),
        ("sweep=ncf/adm", "sweep=ncf/adm: no such sweep; choose from e_free, peak_lr, warmup or from conf/sweep/ncf"),
        ("preset=digits-adm", "preset=digits-adm: no such preset; choose from cifar10-adam_lawn"),
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
        ("train={epochs: 5}", "train.batch_size=7", "seed=3"),
        ("runs_dir='~/runs'", "optim.eps=-0.0", "optim.betas=[-0.0,0.9]"),
    ],
)
def test_composing_many_gives_what_composing_one_gives(overrides):
    composed, swept = compose_unchecked(*overrides)
    found = compose_many(*overrides)
    assert (found.config, found.swept) == (resolve(composed), swept)
    other = compose_many(*overrides, "train.epochs=90")
    assert other.config == resolve(compose_unchecked(*overrides, "train.epochs=90")[0])
    bare = [override for override in overrides if "." not in override.partition("=")[0]]
    assert compose_many(*bare).config == resolve(compose_unchecked(*bare)[0])
    again = compose_many(*overrides)
    assert (again.config, again.swept) == (found.config, found.swept)
    assert again.config.optim is not found.config.optim


@given(
    st.lists(
        st.sampled_from(
            (
                "optim.lr=0.3",
                "optim.betas=[0.5,0.6]",
                "train.epochs=7",
                "train.epochs=${seed}",
                "optim.free_epochs=2",
                "optim.free_epochs=${scaled:1,2}",
                "seed=5",
                "data_dir='a b'",
                "schedule.warmup_epochs=${optim.free_epochs}",
            )
        ),
        unique_by=lambda override: override.partition("=")[0],
    ),
    st.sampled_from((("optim=adam_lawn",), ("optim=adam_lawn", "dataset=cifar10", "sweep=cifar/adam_lawn"))),
)
@settings(deadline=None, max_examples=6)
def test_what_is_set_does_not_stay_set(values, choices):
    found = compose_many(*choices, *values)
    composed, swept = compose_unchecked(*choices, *values)
    assert (found.config, found.swept) == (resolve(composed), swept)


def test_threads_compose_their_own_configs(monkeypatch):
    """Values are set on what all have in common, for as long as it takes to read them."""
    members, select = composition._members("optim=sgd"), composition._select

    def slowly(*arguments):
        time.sleep(0.001)
        return select(*arguments)

    monkeypatch.setattr(composition, "_select", slowly)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: members.config({"seed": seed}).seed, range(8)))
    assert found == list(range(8))


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of composed configs, empty, as for a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # that of the user may have the config
    forget()
    yield tmp_path / "lawn" / "conf"
    forget()


def forget():
    """What this process has composed."""
    module.compose_choices.cache_clear()
    composition._members.cache_clear()


def test_a_choice_of_members_is_composed_once_on_a_machine(cache, monkeypatch):
    first = compose_many("optim=sgd", "sweep=peak_lr", "train.epochs=3")
    assert len(list(cache.iterdir())) == 1
    forget()
    monkeypatch.setattr(module, "_compose", lambda *_: pytest.fail("composed again"))
    again = compose_many("optim=sgd", "sweep=peak_lr", "train.epochs=4")
    assert first.swept == again.swept
    assert (first.config.train.epochs, again.config.train.epochs) == (3, 4)
    assert first.with_value("train.epochs", 4).config == again.config


@pytest.mark.parametrize("damage", [b"", b"\xff", b"0" * 64 + b"\n\x80"])
def test_a_damaged_file_in_the_cache_is_replaced(cache, damage, monkeypatch):
    expected = compose_many("optim=sgd").config
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    for _ in range(2):
        forget()
        assert compose_many("optim=sgd").config == expected
        monkeypatch.setattr(module, "_compose", lambda *_: pytest.fail("composed again"))


def test_a_cache_that_cannot_be_written_is_not_needed(cache, monkeypatch, tmp_path):
    (tmp_path / "lawn").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "lawn" / "nowhere"))
    assert compose_many("optim=sgd").config.optim.name == "sgd"


@pytest.fixture
def conf(cache, tmp_path, monkeypatch):
    """A copy of the configs; the next process composes from them anew."""
    folder = tmp_path / "conf"
    shutil.copytree(module.CONF, folder)
    monkeypatch.setattr(module, "CONF", folder)
    return folder


def composed_anew(*overrides):
    """As by another process."""
    forget()
    return compose_many(*overrides)


def test_other_configs_are_other_files(conf):
    before = compose_many("optim=sgd").config.optim.momentum
    file = conf / "optim" / "sgd.yaml"
    file.write_text(re.sub(r"(?m)^momentum: .*$", "momentum: 0.123", file.read_text()))
    assert before != composed_anew("optim=sgd").config.optim.momentum == 0.123


def test_a_variable_that_chooses_a_member_is_part_of_what_was_composed(conf, monkeypatch):
    file = conf / "config.yaml"
    file.write_text(file.read_text().replace("schedule: linear", "schedule: ${oc.env:LAWN_SCHEDULE,linear}"))
    assert composed_anew("optim=sgd").config.schedule.name == "linear"
    monkeypatch.setenv("LAWN_SCHEDULE", "constant")
    assert composed_anew("optim=sgd").config.schedule.name == "constant"


@pytest.mark.parametrize("where", ["a linked folder", "another search path"])
def test_configs_that_lie_elsewhere_are_read_again(conf, tmp_path, where):
    folder = tmp_path / "mine" / "sweep"
    folder.mkdir(parents=True)
    if where == "a linked folder":
        (conf / "sweep" / "own").symlink_to(folder)
        sweep = "own/rates"
    else:
        file = conf / "config.yaml"
        file.write_text(file.read_text().replace("hydra:\n", f"hydra:\n  searchpath: ['file://{folder.parent}']\n"))
        sweep = "rates"
    for rates in ("1,2", "3,4"):
        (folder / "rates.yaml").write_text(
            f"# @package _global_\nhydra: {{sweeper: {{params: {{optim.lr: '{rates}'}}}}}}\n"
        )
        assert composed_anew("optim=sgd", f"sweep={sweep}").swept == {"optim.lr": rates}


def test_files_beside_the_configs_do_not_matter(conf):
    (conf / "optim" / ".#sgd.yaml").symlink_to("user@host.1")  # of Emacs, while the file is edited
    (conf / "optim" / "lost.yaml").symlink_to("nowhere")
    (conf / "optim" / "old.yaml").write_bytes(b"# \xe4\n")
    assert compose_many("optim=sgd").config.optim.name == "sgd"
