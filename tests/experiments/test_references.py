"""Popularity, iALS and rankings of all items, against computations from the rating files alone."""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import __main__ as command
from experiments.definitions.matrix_factorization import MATRIX_FACTORIZATION
from experiments.definitions.spec import Cell
from experiments.definitions.tables import TABLE4
from experiments.planning.study import Tuning
from experiments.record import Record
from experiments.records import Store
from experiments.references import Settings, run
from experiments.reporting import report
from experiments.reporting.cell_results import CellResult
from experiments.reporting.literature import literature_table
from experiments.reporting.references import REFERENCES
from lawn.errors import ConfigError
from lawn.metrics import ranking_metrics
from lawn.train import run as train
from tests.helpers import synthetic_ratings

TINY = Settings("movielens100k", factors=3, iterations=2, alphas=(1.0, 5.0), regularizations=(1.0, 10.0), seeds=2)


def held_out() -> tuple[dict[int, set[int]], dict[int, int]]:
    """Training items and the held-out item of each user with the ids of the file: the latest, in Python alone."""
    training, held = {}, {}
    for user in {row[0] for row in synthetic_ratings()}:
        rows = sorted((r for r in synthetic_ratings() if r[0] == user), key=lambda r: r[3])
        training[user], held[user] = {r[1] for r in rows[:-1]}, rows[-1][1]
    return training, held


def hits(ranks: list[int]) -> dict[str, float]:
    return {
        "hr10": 100 * float(np.mean([rank < 10 for rank in ranks])),
        "ndcg10": 100 * float(np.mean([1 / np.log2(rank + 2) if rank < 10 else 0 for rank in ranks])),
    }


def test_popularity_is_counted(tiny_data):
    pytest.importorskip("implicit")
    training, held = held_out()
    counts = Counter(item for items in training.values() for item in items)
    items = {row[1] for row in synthetic_ratings()}
    among_all = [
        sum(counts[i] >= counts[held[user]] for i in items - training[user] - {held[user]}) for user in training
    ]
    result = run(TINY, (f"data_dir={tiny_data}", "dataset.candidates=20"))
    (popularity,) = result["metrics"]["popularity"]
    expected = {f"{name}_all": value for name, value in hits(among_all).items()}
    assert {name: popularity[name] for name in expected} == pytest.approx(expected)
    assert 0 < popularity["hr10_all"] < popularity["hr10"]
    assert len(result["grid"]) == 4
    assert result["chosen"] == max(result["grid"], key=lambda point: point["hr10"])
    first, second = result["metrics"]["ials"]
    assert first != second  # the seeds


def test_a_run_ranks_all_items(tiny_data, tmp_path):
    keys = (
        "dataset=movielens100k", "dataset.candidates=20", "model=mf", "model.factors=4", "optim=sgd", "optim.lr=5",
        "train.batch_size=100", "train.epochs=3", "eval.candidates=all", f"data_dir={tiny_data}", "device=cpu",
    )  # fmt: skip
    result = train(*keys, f"run_dir={tmp_path}")
    weights = {k: v.double() for k, v in torch.load(tmp_path / "checkpoint.pt", weights_only=False)["model"].items()}
    scores = weights["user.weight"] @ weights["item.weight"].T + weights["item_bias"]  # the user's biases order nothing
    training, held = held_out()
    users, items = sorted(training), sorted({row[1] for row in synthetic_ratings()})
    ranks = []
    for u, user in enumerate(users):
        own = scores[u, items.index(held[user])]
        others = [i for i, item in enumerate(items) if item not in training[user] and item != held[user]]
        ranks.append(sum(bool(scores[u, i] >= own) for i in others))
    expected = hits(ranks)
    assert result["last"]["test_hr10_all"] == pytest.approx(expected["hr10"])
    assert result["last"]["test_ndcg10_all"] == pytest.approx(expected["ndcg10"])
    assert result["last"]["test_hr10"] > result["last"]["test_hr10_all"]
    assert ranking_metrics(torch.tensor(ranks))["hr10"] == pytest.approx(expected["hr10"])


def test_only_recommenders_have_items():
    with pytest.raises(ConfigError, match=r"eval.candidates=all: is for recommenders, not dataset=digits"):
        train("dataset=digits", "eval.candidates=all")


@pytest.fixture
def tiny_references(monkeypatch):
    """The references on tiny data."""
    tiny = replace(REFERENCES, settings=TINY)
    monkeypatch.setitem(command.SIMULATIONS, "references", tiny)
    monkeypatch.setattr("experiments.reporting.literature.REFERENCES", tiny)


def test_the_literature_is_beside_our_numbers(tiny_references, tiny_data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("implicit")
    monkeypatch.setattr("experiments.references.task_builder", small_task_builder)
    given = ["run", "references", "--results", str(tmp_path), "--set", f"data_dir={tiny_data}"]
    assert command.main(given) == 0
    assert "iALS" in capsys.readouterr().out
    (path,) = (tmp_path / "simulations").glob("references-*.json")
    metrics = json.loads(path.read_text())["result"]["metrics"]
    page = report.page_of(TABLE4, Store(tmp_path))
    assert page.literature is not None
    (popularity,) = (row for row in page.literature.rows if row[0] == "Popularity")
    assert popularity[1] == (
        f"{metrics['popularity'][0]['hr10']:.2f} (n=1) <sup>[record](simulations/{path.name})</sup>"
    )
    assert popularity[6:] == ["45.35", "25.43", "[Rendle et al. 2020](https://arxiv.org/abs/2005.09683), table 1"]
    report.write(page, tmp_path)
    assert "MovieLens-1M beside the literature" in (tmp_path / "table4.md").read_text()
    assert report.page_of(TABLE4, Store(tmp_path / "empty")).literature is None


def result_of(cell: Cell, **metrics: list[float]) -> CellResult:
    """Of runs with these values of the seeds 0, 1, ..."""
    records = []
    for seed, values in enumerate(zip(*metrics.values(), strict=True)):
        last = {f"test_{metric}": value for metric, value in zip(metrics, values, strict=True)}
        result = {"status": "finished", "last": last}
        records.append(Record(Path("runs/x.jsonl"), f"{cell.row} {seed}", "", {"seed": seed}, {}, result, {}))
    return CellResult(cell, None, records, Tuning(), [])


def test_rows_of_the_literature(tmp_path, monkeypatch):
    """From the cells of batch 10k, from the records of other methods, or of others alone."""
    values = {"hr10": [70.0, 71.0], "ndcg10": [40.0, 41.0], "hr10_all": [8.0, 8.5], "ndcg10_all": [4.0, 4.125]}
    others = {metric: [number + 1 for number in numbers] for metric, numbers in values.items()}
    (cell,) = (c for c in TABLE4.cells if (c.panel, c.column, c.row) == ("MovieLens-1M", "batch 10k", "Adam-LAWN"))
    (tuned,) = (c for c in TABLE4.cells if (c.panel, c.column, c.row) == (cell.panel, cell.column, "Adam, eps tuned"))
    found = [
        result_of(cell, **values),
        result_of(tuned, **others),
        *(result_of(replace(cell, **place), **others) for place in ({"column": "batch 1k"}, {"panel": "ImageNet"})),
    ]
    factors = result_of(MATRIX_FACTORIZATION.cells[0], **others)
    monkeypatch.setattr("experiments.reporting.literature.cell_results", lambda *_: [factors])
    ials = [{metric: numbers[k] for metric, numbers in values.items()} for k in range(2)]
    references = SimpleNamespace(name="references-x", result={"metrics": {"ials": ials}})
    stored = SimpleNamespace(record=lambda _: references)
    monkeypatch.setattr("experiments.reporting.literature.REFERENCES", stored)
    ours = ["70.50 (0.50, n=2)", "40.50 (0.50, n=2)", "8.25 (0.25, n=2)", "4.06 (0.06, n=2)"]
    theirs = ["71.50 (0.50, n=2)", "41.50 (0.50, n=2)", "9.25 (0.25, n=2)", "5.06 (0.06, n=2)"]

    def linked(numbers: list[str], row: str) -> list[str]:
        links = " ".join(f'[{seed}](runs/x.jsonl "{row} {seed}")' for seed in range(2))
        return [f"{numbers[0]} <sup>{links}</sup>", *numbers[1:]]

    rendle, he = (f"[{name}](https://arxiv.org/abs/" for name in ("Rendle et al. 2020", "He et al. 2017"))
    table = literature_table(Store(tmp_path), found, "val")
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["NCF MLP, Adam-LAWN"] == [*linked(ours, "Adam-LAWN"), "70.41", "", "", ""]
    assert rows["NCF MLP, Adam with eps tuned"] == [*linked(theirs, "Adam, eps tuned"), "", "", "", ""]
    assert rows["NCF MLP, Adam"] == ["", "", "", "", "", "69.2", "", f"{he}1708.05031)"]
    assert rows["Dot product, iALS"] == [
        *(f"{ours[0]} <sup>[record](simulations/references-x.json)</sup>", *ours[1:]),
        *("", "71.11", "43.83", f"{rendle}2005.09683), table 1"),
    ]
    assert rows["Dot product with biases, SGD"][:4] == linked(theirs, "Matrix factorization, SGD")
    assert rows["Popularity"][:5] == [""] * 5
    found[0].records[1].result["status"] = "diverged"
    table = literature_table(Store(tmp_path), found, "val")
    assert table is not None
    (diverged,) = (row for row in table.rows if row[0] == "NCF MLP, Adam-LAWN")
    assert diverged[1:5] == linked(["Fail", "", "", ""], "Adam-LAWN")


def test_only_the_place_of_the_data_can_be_set(tmp_path, capsys):
    given = ["run", "references", "--results", str(tmp_path), "--set", "eval.split=val"]
    assert command.main(given) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("error: eval.split=val: only where and how to run can be set")


@pytest.mark.parametrize("names", [("table4", "horizon"), ("horizon", "table4")])
def test_a_cell_of_several_experiments_keeps_most_seeds(names):
    given = Namespace(names=names, only=[], set=[], short=False, selection="val", seeds=None)
    of = {s.cell.value("optim"): s.seeds for s in command.chosen_studies(given) if s.budget == 300 and s.cell.all_items}
    assert of["adam_lawn"] == 8  # of table 4


def small_task_builder(config):
    from lawn.task import task_builder

    return task_builder(replace(config, dataset=replace(config.dataset, candidates=20)))


def test_references_without_their_package_are_one_line(tmp_path, capsys, monkeypatch):
    given = ["run", "references", "--short", "--results", str(tmp_path), "--set", f"data_dir={tmp_path}"]
    monkeypatch.setattr("lawn.packages.find_spec", lambda _: None)
    assert command.main(given) == ConfigError.exit_code
    assert capsys.readouterr().err == (
        "error: references: the package implicit is not installed; pip install '.[references]'\n"
    )
    assert not list(Path(tmp_path).rglob("*.json"))
