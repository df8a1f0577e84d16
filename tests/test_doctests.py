"""The examples in docstrings."""

import doctest
import importlib

import pytest

import lawn
import lawn.diagnostics
import lawn.optim
from lawn import losses, metrics
from lawn.compose import compose
from lawn.optim import param_groups
from lawn.train import run, train, train_many, train_vectorized
from lawn.train.prepare import prepare
from lawn.validation import validate
from tests.helpers import ROOT

WITH_EXAMPLES = [path for path in sorted((ROOT / "lawn").rglob("*.py")) if ">>> " in path.read_text("utf8")]
PUBLIC = [getattr(package, name) for package in (lawn, lawn.optim, lawn.diagnostics) for name in package.__all__]
PUBLIC += [
    value
    for module in (param_groups, losses, metrics)
    for name, value in vars(module).items()
    if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
]
PUBLIC += [compose, prepare, run, train, train_many, train_vectorized, validate]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_give_the_output_they_show(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("value", dict.fromkeys(PUBLIC), ids=lambda value: value.__name__)
def test_public_names_have_examples(value):
    assert "Examples:\n" in (value.__doc__ or "")
