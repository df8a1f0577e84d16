"""The search for hyperparameters: on made-up scores, and a miniature of a table from the first rung to the report."""

import shutil
from dataclasses import replace
from math import inf, nan, prod
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.definitions.spec import Cell, Experiment
from experiments.planning import search
from experiments.planning.grid import Grid
from experiments.planning.study import Study, studies
from experiments.records import Store
from experiments.reporting import report
from lawn.identity import run_name
from tests.experiments import helpers
from tests.experiments.helpers import ACCURACY, TUNED, records_in, run_experiment, write_records

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(SHAPES)
def test_neighbours_are_one_step_away(shape):
    points = search.grid(shape)
    assert len(points) == prod(shape)
    for point in points:
        near = search.neighbours(point, shape)
        assert len(near) == len(set(near)) == 2 * len(shape)
        assert all(sum(abs(a - b) for a, b in zip(point, other, strict=True)) == 1 for other in near)
    assert search.neighbours((-1, *[0] * (len(shape) - 1)), shape)[0][0] == 0  # no second step beyond an end


@settings(deadline=None)
@given(SHAPES, st.data())
def test_the_search_follows_from_scores_alone(shape, data):
    """Whatever finishes first, the same points are tried, at most as many as are allowed, none twice; with some of the
    scores it is a beginning of the same search."""
    points = search.grid(shape)
    scores = {point: float(data.draw(st.integers(0, 9))) for point in points}
    start = data.draw(st.permutations(points))
    limit = search.num_trials(len(shape))
    tried = search.points_to_try(shape, start, limit, lambda p: scores.get(p, nan), scores.__contains__)
    assert len(set(tried)) == len(tried) == min(limit, prod(shape))
    assert set(start[: min(search.BEST, limit)]) <= set(tried)
    known = data.draw(st.sets(st.sampled_from(points)))
    partly = search.points_to_try(shape, start, limit, lambda p: scores[p] if p in known else None, scores.__contains__)
    assert tried[: len(partly)] == partly
    assert partly == tried or not set(partly) <= known


@given(st.integers(-1, 6), st.integers(-1, 4), st.permutations(search.grid((6, 4))))
def test_the_search_climbs_a_hill(x, y, start):
    """From anywhere, with one peak that may lie a step beyond the grid, and trials enough."""

    def height(point: search.Point) -> float:
        return -abs(point[0] - x) - abs(point[1] - y)

    tried = search.points_to_try((6, 4), start, 48, height)
    assert (x, y) in tried


def test_without_a_shorter_budget_the_whole_grid_is_tried_and_what_lies_beyond():
    tried = search.points_to_try((3, 4), search.grid((3, 4)), None, lambda point: float(point[0]))
    assert tried[:12] == search.grid((3, 4))
    assert {(3, k) for k in range(-1, 4)} <= set(tried)  # where the scores are best, and no further
    assert not any(point[0] == -1 for point in tried)
    assert search.points_to_try((3,), search.grid((3,)), None, lambda _: 1.0, lambda point: point[0] < 3)[-1] == (-1,)


def test_a_diverged_point_is_worse_than_any_and_its_neighbours_are_not_tried():
    scores = {(0,): nan, (1,): 0.0, (2,): 5.0}
    assert search.ranked(list(scores), scores.get) == [(2,), (1,), (0,)]
    start = [(8,), (4,), (0,), *((k,) for k in range(9) if k % 4)]
    tried = search.points_to_try((9,), start, 7, lambda point: nan if point == (8,) else -float(point[0]))
    assert set(tried) == {(8,), (4,), (0,), (-1,), (1,), (3,), (5,)}


def test_where_no_neighbour_is_left_the_next_best_of_the_short_ones_follow():
    start = [(k,) for k in range(9)]
    asked = search.points_to_try((9,), start, 9, lambda point: nan if point in start[: search.BEST] else None)
    assert asked == start[: 2 * search.BEST]


def test_as_many_trials_for_fewer_hyperparameters_and_more_for_more():
    assert [search.num_trials(axes) for axes in (1, 3, 4)] == [18, 18, 24]


def test_half_of_the_best_seed_and_nothing_at_all_are_no_collapse():
    assert all(map(search.is_stable, ([60.0, 30.0], [0.0, 0.0])))
    assert not search.is_stable([60.0, 29.9])


def test_who_loses_a_seed_makes_room_for_the_next():
    best = [(i,) for i in range(9)]
    scores: dict[search.Point, list[float | None]] = {point: [70.0 - point[0], None, None] for point in best}
    assert search.points_to_confirm(best, scores.__getitem__) == best[:3]
    scores[0,] = [70.0, nan, 70.0]  # diverged
    scores[1,] = [69.0, 69.0, 34.0]  # collapsed
    scores[2,] = [68.0, 67.0, 66.0]
    assert search.points_to_confirm(best, scores.__getitem__) == best[:5]
    for point in best[3:]:
        scores[point] = [60.0, 0.0, 60.0]
    asked = search.points_to_confirm(best, scores.__getitem__)
    assert asked == best[:6]
    known = {point: [value for value in found if value is not None] for point, found in scores.items()}
    assert search.best_point(asked, known.__getitem__) == (2,)
    known[2,] = [68.0, nan, nan]
    assert search.best_point(asked, known.__getitem__) == (1,)  # none is stable: the best mean, and none that diverged


def test_the_mean_chooses():
    known = {(0,): [71.0, 65.0, 65.0], (1,): [70.0, 69.0, 69.0], (2,): [69.0, 69.0, 69.0]}
    assert search.best_point(list(known), known.__getitem__) == (1,)
    assert search.mean([1.0, nan]) == -inf


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        (["1e-3", "3e-3", "1e-2"], ("0.000333333", "0.0333333")),
        (["0", "1e-6", "1e-5"], (None, "0.0001")),
        (["1e-2", "1e-3"], ("0.1", "0.0001")),
        (["1"], (None, None)),
        (["adam", "sgd"], (None, None)),
        (["-1", "1"], (None, None)),
    ],
)
def test_one_value_beyond_the_ends(values, ends):
    assert search.extrapolate(values) == ends


SMALL = ("dataset=digits", "model.widths=[8]", "dataset.limit=100")
RUNGS = Experiment(
    "rungs",
    "Rungs",
    (
        Cell("Adam", (*SMALL, "optim=adam"), column="x", epochs=(6, 2), sweep="cifar/adam"),  # 4 rates, 3 warmups
        Cell("Adam-LAWN", (*SMALL, "optim=adam_lawn", "optim.free_epochs=${scaled:1,2}"), column="x", epochs=(6, 2)),
    ),
    (ACCURACY,),
    pairs=(("Adam", "Adam-LAWN"),),
    seeds=2,
)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rungs")
    assert run_experiment(RUNGS, folder) == []
    return folder


def test_a_miniature_goes_from_the_short_budget_to_the_report(climbed):
    store = Store(climbed / "results")
    study = studies(RUNGS)[0]
    tuning = study.tuning(store)
    points = study.grid.points
    trials = len(tuning.full)
    assert (len(points), len(tuning.short), len(tuning.confirming)) == (12, 12, 6)
    assert 12 < trials <= search.num_trials(3) == 18  # with those beyond the grid
    assert {job.config.train.epochs for job in tuning.short} == {2}
    assert {job.config.train.epochs for job in tuning.full + tuning.confirming} == {6}
    first = sorted(points, key=lambda point: -study.shorter.score(store, point))[:3]
    assert tuning.full[:3] == study.grid.jobs(first)
    page = report.experiment_page(RUNGS, store)
    adam, lawn = page.cell_results
    assert adam.epochs == lawn.epochs == 6
    means = {
        setting: sum(r.value("headline") for j, r in adam.tried if j.setting == setting and j not in tuning.short) / 3
        for setting in {job.setting for job in tuning.confirming}
    }
    assert means[adam.setting] == max(means.values())
    for record in adam.records:
        assert record.result["split"] == "test"
        assert float(adam.setting[0].removeprefix("optim.lr=")) == record.config["optim"]["lr"]
    (row,) = page.tuned.rows
    assert row[5] == f"{[job.setting for job in tuning.full].index(adam.setting) + 1} of {trials}"
    assert row[6:8] == [f"12 + {trials} + 6", f"{12 * 2 + (trials + 6) * 6}"]
    assert len(page.comparisons.rows) == 1
    report.write(page, climbed / "results")
    text = (climbed / "results" / "rungs.md").read_text()
    assert "| Adam → Adam-LAWN |" in text
    assert "then, for the whole schedule, 18 runs, or 6 for each hyperparameter where there are more than 3," in text
    assert len(page.tuning) == 18 + trials
    assert set(page.tuning["part"]) == {"short", "full", "seeds"}


SLOW = [pytest.param(recorded, marks=pytest.mark.slow) for recorded in (12, 31)]


@pytest.mark.parametrize("recorded", [5, 16, 25, *SLOW])
def test_killed_in_and_between_rungs_nothing_is_lost(climbed, tmp_path, monkeypatch, recorded):
    """After so many records: in the first rung, after it, in the second, in the confirmation, in the final runs."""
    write = Store.write
    written: list[str] = []
    trained: list[str] = []

    def finished(config):
        """In place of training: the run directory of the same run of `climbed`."""
        name = run_name(config)
        if not (tmp_path / "runs" / name / "DONE").exists():
            shutil.copytree(climbed / "runs" / name, tmp_path / "runs" / name, dirs_exist_ok=True)
            trained.append(name)

    monkeypatch.setattr(helpers, "train", finished)
    monkeypatch.setattr(helpers, "train_vectorized", lambda configs: list(map(finished, configs)))

    def stop(self, *arguments):
        if len(written) == recorded:
            raise KeyboardInterrupt
        written.append(write(self, *arguments).name)
        return self.read(written[-1])

    monkeypatch.setattr(Store, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(RUNGS, tmp_path)
    monkeypatch.setattr(Store, "write", write)
    assert set(written) < set(trained)
    killed = len(trained)
    assert run_experiment(RUNGS, tmp_path) == []
    assert set(trained[:killed]).isdisjoint(trained[killed:])
    names = [[record.name for record in Store(folder / "results").all()] for folder in (climbed, tmp_path)]
    assert names[0] == names[1]


def test_a_setting_that_cannot_be_stops_only_its_cell(tmp_path):
    """Nothing can be chosen for it; the other cell is filled."""
    bad = replace(RUNGS.cells[0], overrides=(*RUNGS.cells[0].overrides, "hydra.sweeper.params={optim.lr: '-1,1'}"))
    both = replace(RUNGS, cells=(bad, RUNGS.cells[1]))
    assert run_experiment(both, tmp_path) == []
    page = report.experiment_page(both, Store(tmp_path / "results"))
    assert [len(result.records) for result in page.cell_results] == [0, 2]


def test_a_run_that_diverged_within_an_epoch_does_not_tell_its_updates(tuned):
    path = tuned / "results" / "tuning" / "tuned.jsonl"
    (study,) = studies(TUNED)
    updates = study._updates_per_epoch(Store(tuned / "results"))
    records = records_in(path)
    result = records[study.grid.jobs()[0].name]["result"]
    result["status"], result["last"]["epoch"] = "diverged", 100
    write_records(path, records)
    assert study._updates_per_epoch(Store(tuned / "results")) == updates > 0


@pytest.mark.parametrize(
    ("point", "updates", "repeated"),
    [
        ({"optim.free_epochs": -1}, 5, True),
        ({"optim.free_epochs": -1}, 50, False),
        ({"optim.free_epochs": 0}, 5, False),
        ({"optim.free_epochs": 3}, 5, False),
        ({"optim.lr": -1}, 5, False),
        ({"schedule.warmup_epochs": -1}, 5, False),
        ({"schedule.warmup_epochs": -1}, 1, True),  # half an epoch, and an eighth
        ({"optim.free_epochs": -1, "optim.lr": -1}, 5, True),  # the point beyond the end of optim.lr alone
    ],
)
def test_values_that_round_to_the_updates_of_the_end_are_no_other_run(point, updates, repeated):
    """E_free of 0.2 epochs, and of 0.08 beyond the end, is one of 5 updates in an epoch; of 50 it is 10, and 4."""
    overrides = ("dataset=cifar10", "optim=adam_lawn", "train.batch_size=10000", "train.epochs=30")
    grid = Grid(overrides, "cifar/adam_lawn", "val", (), "x")
    indices = tuple(point.get(key, 1) for key in grid.axes)
    assert grid.job(indices) is not None
    assert grid.is_repeated(indices, updates) == repeated


def test_a_value_beyond_the_upper_end_may_round_to_its_updates():
    """0.9, 1 and 1.11 epochs are a single update."""
    axes = "hydra.sweeper.params={optim.free_epochs: '0.9,1'}"
    grid = Grid(("dataset=digits", "optim=adam_lawn", axes), "e_free", "val", (), "x")
    assert grid.job((2,)).setting == ("optim.free_epochs=1.11111",)
    assert [grid.is_repeated((index,), 1) for index in (-1, 0, 1, 2)] == [True, False, False, True]
    assert not grid.is_repeated((2,), 100)


@pytest.mark.parametrize(("updates", "tried"), [(1, 2), (100, 4)])
def test_what_repeats_a_point_of_the_grid_is_not_tried(updates, tried):
    """With an update in an epoch, the points beyond both ends are the same runs as those at them."""
    axes = "hydra.sweeper.params={optim.free_epochs: '0.9,1'}"
    study = Study(Cell("LAWN", ("dataset=digits", "optim=adam_lawn", axes), sweep="e_free"))
    record = SimpleNamespace(headline=60.0, diverged=False, result={"last": {"step": 5 * updates, "epoch": 5}})
    store = SimpleNamespace(read=lambda _: record, has=lambda _: True)
    assert [job.config.optim.free_epochs for job in study.tuning(store).full] == [0.9, 1.0, 0.81, 1.11111][:tried]


def test_a_search_on_the_whole_grid_has_no_shorter_schedule():
    cell = replace(RUNGS.cells[0], whole_grid=True)
    store = SimpleNamespace(read=lambda _: None, has=lambda _: False)
    tuning = Study(cell, cell.epochs).tuning(store)
    assert (tuning.short, len(tuning.full), tuning.unknown) == ([], 12, 6)
    assert {job.config.train.epochs for job in tuning.full} == {6}


def test_the_mean_of_all_seeds_chooses_a_point():
    """The best one with seed 0 has 68.3 on average, the best one with the others 67.7."""
    study = Study(TUNED.cells[0])
    scores = {(2,): (71.0, 67.0, 67.0), (3,): (67.0, 68.0, 68.0)}
    points = [(index,) for index in range(-1, 7)]
    jobs = [study.grid.jobs([point], (0, 1, 2)) for point in points]
    known = {
        job.name: SimpleNamespace(headline=score, diverged=False, result={"last": {"step": 9, "epoch": 3}})
        for point, of_point in zip(points, jobs, strict=True)
        for job, score in zip(of_point, scores.get(point, (60.0, 60.0, 60.0)), strict=True)
    }
    assert study.tuning(SimpleNamespace(read=known.get, has=known.__contains__)).chosen == (2,)
