"""Whatever is typed: run.py goes on with a config that can be, or says in one line why not."""

import math
import sys
from dataclasses import asdict
from itertools import chain
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import run as run_module
from lawn.config import GROUPS, Config
from lawn.train import launch
from lawn.train.prepare import PreparedRun
from tests.helpers import ROOT

MEMBERS = {group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in GROUPS}
COUNTS = (
    *("train.epochs", "train.batch_size", "train.micro_batch_size", "train.devices", "train.vectorize"),
    *("dataset.limit", "dataset.image_size", "dataset.negatives", "dataset.candidates"),
    *("model.factors", "model.layers", "eval.every", "diagnostics.updates"),
)
WORDS = {
    "model.init": {"he2017", "torch"},
    "eval.split": {"test", "val"},
    "optim.scope": {"all", "final_homogeneous"},
    "optim.granularity": {"tensor", "row"},
    "schedule.name": {"linear", "constant"},
    "logger.mode": {"online", "offline", "disabled"},
    "dataset.loader": {"torch", "dali"},
    "train.precision": {"fp32", "tf32", "bf16"},
    "train.compile": {"off", "default", "reduce-overhead"},
    **{f"{group}.name": set(members) for group, members in MEMBERS.items()},
}
LIMITS = {
    "dataset.seed": 2**32,
    "dataset.workers": 1024,
    "train.devices": 1024,
    "dataset.image_size": 2**16,
    "model.factors": 2**16,
    "model.layers": 32,
}
SWITCHES = (
    *("model.batch_norm", "model.bias", "optim.nesterov", "optim.include_bias", "optim.fused"),
    *("train.sync_batchnorm", "train.channels_last", "train.deterministic"),
)
FROM_ZERO = (  # finite numbers, not negative
    *("optim.eps", "optim.weight_decay", "loss.gamma", "loss.level"),
    *("schedule.warmup_epochs", "train.checkpoint_seconds"),
)
TEXTS = (
    "device",
    "data_dir",
    "runs_dir",
    "run_dir",
    "dataset.shards",
    "dataset.path",
    "dataset.prefix",
    "logger.project",
)
REQUIRED = (  # never null
    *("seed", "device", "data_dir", "runs_dir", "dataset.seed", "optim.lr", "schedule.warmup_epochs", "train.epochs"),
    *("train.batch_size", "train.checkpoint_seconds", "eval.split", "eval.every"),
    *(f"{group}.name" for group in GROUPS),
)
KEYS = [f"{group}.{key}" for group in (*GROUPS, "train", "eval") for key in vars(getattr(Config(), group))]
KEYS += [key for key, value in vars(Config()).items() if not hasattr(value, "__dict__")]


def is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def fits(key: str, value: Any) -> bool:
    """Whether this can be the value of the key, by what lawn/config.py says of it."""
    if value is None:
        return key not in REQUIRED
    if key in COUNTS:
        return type(value) is int and 0 < value < LIMITS.get(key, 2**63)
    if key in ("seed", "dataset.seed", "dataset.workers"):
        return type(value) is int and 0 <= value < LIMITS.get(key, 2**63)
    if key in WORDS:
        return value in WORDS[key]
    if key in SWITCHES:
        return type(value) is bool
    if key in FROM_ZERO:
        return is_number(value) and value >= 0
    if key in ("loss.smoothing", "optim.momentum"):
        return is_number(value) and 0 <= value < 1
    if key == "dataset.val_fraction":
        return is_number(value) and 0 < value < 1
    if key == "optim.free_epochs":
        return value == "auto" or (is_number(value) and value >= 0)
    if key == "optim.warm_start_epochs":
        return is_number(value) and value > 0
    if key == "diagnostics.samples":
        return type(value) is int and 1 < value < 2**63
    if key == "optim.lr":
        return is_number(value) and value > 0
    if key == "train.logit_scale":
        return is_number(value) and 1e-6 <= value <= 1
    if key == "optim.betas":
        return len(value) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in value)
    if key == "model.widths":
        return all(type(width) is int and 0 < width < 2**16 for width in value)
    assert key in TEXTS
    return isinstance(value, str) and value != ""


def check_whole(config: Config) -> None:
    """What a config that is let through has to be."""
    for key in KEYS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert fits(key, value), f"{key}={value!r}"
    assert config.optim.free_epochs in (None, "auto") or config.optim.free_epochs < config.train.epochs
    assert (config.diagnostics.updates is not None) == (config.diagnostics.name == "on")
    assert config.diagnostics.samples is None or config.diagnostics.name == "on"
    assert config.train.logit_scale is None or config.optim.free_epochs != "auto"
    assert config.schedule.warmup_epochs < config.train.epochs
    assert (config.train.devices or 1) <= config.train.batch_size
    assert (config.optim.name == "adam_cpr") == (config.optim.warm_start_epochs is not None)
    assert (config.optim.warm_start_epochs or 0) < config.train.epochs
    assert ("lawn" in config.optim.name) == (config.optim.free_epochs is not None)
    assert not ("lawn" in config.optim.name and config.optim.weight_decay)
    assert config.train.logit_scale is None or config.optim.free_epochs is not None
    recommends = config.dataset.name in ("movielens", "movielens100k", "movielens1m", "pinterest")
    assert recommends == (config.model.name == "ncf_mlp")
    assert (config.dataset.candidates is not None) == recommends


numbers = st.one_of(
    st.integers(-3, 400), st.integers(), st.floats(), st.floats(0, 2), st.sampled_from([2**31, 2**32, 2**63, 10**400])
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
SPECIAL = ("null", "true", "False", "yes", "???", "''", "${seed}", "${optim.lr}", "${nothing}", "${oc.env:HOME}", "nan")
words = st.sampled_from([*SPECIAL, *sorted({word for known in WORDS.values() for word in known})])
scalars = st.one_of(numbers.map(str), texts, words)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    st.tuples(texts, scalars).map(lambda item: f"{{{item[0]}:{item[1]}}}"),
)
places = ("train", "eval", "sweep", "preset", "hydra", "hydra.run.dir", "optim.", ".lr", "optim.lr.x")
keys = st.one_of(
    st.sampled_from(KEYS),
    st.tuples(st.sampled_from(KEYS), texts).map("".join),
    st.sampled_from([*GROUPS, *places]),
    texts,
)
members = st.sampled_from(sorted(set(chain.from_iterable(MEMBERS.values()))))
typed = st.one_of(
    st.tuples(st.sampled_from(["", "", "", "+", "++"]), keys, values).map(lambda part: f"{part[0]}{part[1]}={part[2]}"),
    st.tuples(st.sampled_from(GROUPS), members).map("=".join),
    keys.map("~{}".format),
)


def command(arguments: list[str]) -> tuple[int, list[Config]]:
    """The exit code of run.py, and the configs that it would have trained."""
    let_through: list[Config] = []

    def take(prepared: PreparedRun, *_: object) -> dict[str, Any]:
        assert isinstance(prepared.directory.done, bool)  # reads the folder, which the user may have trained in
        let_through.append(prepared.config)
        return {}

    with (
        patch.object(launch, "run_rank", take),
        patch.object(launch, "run_in_processes", take),
        patch.object(sys, "argv", ["run.py", *arguments]),
        patch.dict("os.environ", HYDRA_FULL_ERROR="0"),
    ):
        return run_module.main(), let_through


def check_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code, let_through = command(arguments)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code == 0:
        assert err == ""
        (config,) = let_through
        check_whole(config)
        return
    assert code in (1, 2)
    assert let_through == []
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@given(arguments=st.lists(typed, min_size=1, max_size=3))
@example(arguments=["optim=adam_lawn"])  # is let through; most of what is drawn is not
@settings(max_examples=20, **FUZZ)
def test_a_config_that_can_be_or_one_line(arguments, capsys):
    check_command(arguments, capsys)


@pytest.mark.slow
@given(arguments=st.lists(typed, min_size=1, max_size=3))
@settings(max_examples=500, **FUZZ)
def test_a_config_that_can_be_or_one_line_500_times(arguments, capsys):
    check_command(arguments, capsys)


@pytest.mark.slow
@given(key=st.sampled_from(KEYS), value=st.one_of(numbers.map(str), words), context=st.sampled_from(MEMBERS["dataset"]))
@settings(max_examples=500, **FUZZ)
def test_one_key_500_times(key, value, context, capsys):
    check_command([f"dataset={context}", f"{key}={value}"], capsys)


@pytest.mark.slow
def test_the_oracle_knows_every_key():
    """And takes the configs that the groups give."""
    for group, members in MEMBERS.items():
        for member in members:
            code, let_through = command([f"{group}={member}"])
            if code == 0:
                check_whole(let_through[0])
                assert asdict(let_through[0])[group]["name"] == member
