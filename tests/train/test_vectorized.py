"""Runs trained as one batched model, against the same runs alone."""

import json
import random
from pathlib import Path

import pytest
import torch

from lawn.config import Config
from lawn.errors import ConfigError, RunError
from lawn.task import task_builder
from lawn.train import multirun, train, train_vectorized
from lawn.train.distributed import World
from lawn.train.run_directory import RunDirectory
from lawn.train.trainer import Trainer
from lawn.train.vectorized import CPU_ROWS, VectorizedTrainer, max_vectorized_runs, vectorization_key
from tests.helpers import compose
from tests.train.faults import ALWAYS, NCF, check_equal

CPU = torch.device("cpu")
# Six optimizers, of which the LAWN ones switch at different steps; the schedules and seeds differ too.
MEMBERS = [
    ("optim=sgd", "optim.lr=0.1", "optim.momentum=0.9", "optim.weight_decay=1e-3", "seed=0"),
    ("optim=sgd_lawn", "optim.lr=0.1", "optim.free_epochs=1", "seed=1"),
    ("optim=adam", "optim.lr=0.003", "optim.weight_decay=1e-3", "schedule.warmup_epochs=2", "seed=0"),
    ("optim=adamw", "optim.lr=0.01", "optim.weight_decay=0.1", "seed=2"),
    ("optim=adam_lawn", "optim.lr=0.01", "optim.free_epochs=1.4", "seed=0"),
    ("optim=adam_lawn", "optim.lr=0.002", "optim.free_epochs=3", "schedule.warmup_epochs=1", "seed=1"),
    ("optim=adam_lawn", "optim.lr=0.005", "optim.free_epochs=2", "train.logit_scale=0.3", "seed=2"),
    ("optim=lamb", "optim.lr=0.02", "optim.weight_decay=1e-2", "seed=0"),
    ("optim=lamb_lawn", "optim.lr=0.02", "optim.free_epochs=2", "seed=2"),
]
DIGITS = ("model.widths=[16,12]", "dataset.limit=200", "train.batch_size=16", "train.epochs=4")  # 52 updates
RATINGS = (
    "dataset=movielens100k",
    "model.factors=4",
    "dataset.candidates=20",
    "train.batch_size=190",
    "train.epochs=6",
)


def runs_of(configs: list[Config], device: torch.device = CPU) -> list[Trainer]:
    return [Trainer(config, task_builder(config)(device), World(device)) for config in configs]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("kind", ["digits", "ratings", "ratings, tables larger than a batch"])
def test_each_is_what_it_is_alone(kind, device, tiny_data):
    common = {
        "digits": DIGITS,
        "ratings": RATINGS,
        "ratings, tables larger than a batch": (*RATINGS, "train.batch_size=60", "train.epochs=4", "model.bias=false"),
    }[kind]
    keys = (*common, f"data_dir={tiny_data}", f"device={device}", "train.precision=fp32", "eval.every=2")
    configs = [compose(*keys, *member) for member in MEMBERS]
    assert len({vectorization_key(config) for config in configs}) == 1
    joined, alone = (runs_of(configs, torch.device(device)) for _ in range(2))
    vectorized = VectorizedTrainer(joined)
    for _ in range(configs[0].train.epochs):
        assert vectorized.train_epoch() == joined
        for run in alone:
            run.train_epoch()
    assert vectorized.train_epoch() == []
    assert vectorized._computation.captured == (device == "cuda")
    assert joined[0].step >= 50
    # A GPU adds the gradients of an embedding in another order each time; Adam makes steps of the rounding errors.
    close = 1e-5 if device == "cpu" else 1e-3
    for one, other in zip(joined, alone, strict=True):
        for p, q in zip(one.task.model.parameters(), other.task.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=close)
        for row, expected in zip(one.rows, other.rows, strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                within = 5 if key.startswith("test") else 0  # an answer or two may tip over
                assert row[key] == pytest.approx(value, rel=1e-3, abs=within), key
    assert len({run.rows[-1]["weight_norm"] for run in joined}) == len(joined)


def test_a_member_that_diverges_does_not_touch_the_others(tiny):
    """One by its loss, one by its weights before the switch."""
    sane = ("optim=adam_lawn", "optim.lr=0.01", "optim.free_epochs=2")
    configs = [
        tiny(*sane),
        tiny("optim=sgd", "optim.lr=1e30"),
        tiny("optim=adam_lawn", "optim.lr=1e30"),
        tiny(*sane, "seed=1"),
    ]
    joined, alone = runs_of(configs), runs_of(configs)
    vectorized = VectorizedTrainer(joined)
    while vectorized.train_epoch():
        pass
    for run in alone:
        while run.status == "running":
            run.train_epoch()
    assert [run.status for run in joined] == ["done", "diverged", "diverged", "done"]
    for one, other in zip(joined, alone, strict=True):
        assert (one.status, one.epoch, one.step) == (other.status, other.epoch, other.step)
        assert (one.rows[-1]["train_loss"] is None) == (one.status == "diverged")
    for k in (0, 3):
        for p, q in zip(joined[k].task.model.parameters(), alone[k].task.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_each_has_the_run_directory_that_it_has_alone(tiny, tmp_path):
    keys = [("optim.lr=0.01", "seed=3"), ("optim.lr=0.003", "optim.free_epochs=2"), ("optim=sgd", "optim.lr=0.1")]
    joined = [tiny(*more) for more in keys]
    alone = [tiny(*more, f"runs_dir={tmp_path}/alone") for more in keys]
    train_vectorized(joined)
    for one, other in zip(joined, alone, strict=True):
        expected = train(other)
        path, beside = RunDirectory(one).path, RunDirectory(other).path
        assert path.name == beside.name
        assert {file.name for file in path.iterdir()} == {file.name for file in beside.iterdir()}
        result = RunDirectory(one).result()
        assert result.keys() == expected.keys()
        assert result["last"]["train_loss"] == pytest.approx(expected["last"]["train_loss"], rel=1e-4)
        assert result["samples_per_second"] > 0
        assert result["peak_share"] > 0
        environment, other_environment = (json.loads((p / "env.json").read_text()) for p in (path, beside))
        assert environment.keys() - other_environment.keys() == {"together"}
        assert environment["together"] == 3
        sizes = [(p / "checkpoint.pt").stat().st_size for p in (path, beside)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # a slice is saved, not all runs
    before = (RunDirectory(joined[0]).path / "checkpoint.pt").stat()
    train_vectorized(joined)
    assert (RunDirectory(joined[0]).path / "checkpoint.pt").stat() == before


def test_the_same_run_in_several_folders_is_trained_in_each(tiny, tmp_path):
    same = [tiny(f"runs_dir={tmp_path}/{name}", "train.vectorize=4") for name in ("a", "b", "a")]
    assert multirun.train_many(same) == []
    first, second = (RunDirectory(config).result() for config in same[:2])
    assert first["last"] == second["last"]


class PowerCutError(Exception):
    pass


def test_stopped_runs_go_on_vectorized_or_alone(tiny, tmp_path, monkeypatch):
    """One of them had a checkpoint of an earlier epoch: it catches up."""
    keys = [("optim.lr=0.01",), ("optim.lr=0.02", "optim.free_epochs=2"), ("optim=sgd", "optim.lr=0.1")]
    saved = "train.checkpoint_seconds=0"
    broken, whole = ([tiny(*more, saved, f"runs_dir={tmp_path}/{name}") for more in keys] for name in ("b", "w"))
    train_vectorized(whole)
    ends: list[int] = []
    end_epoch = Trainer.end_epoch

    def fail(self, loss, margin):
        ends.append(self.epoch)
        if len(ends) == 8:  # in the third epoch, before the second of the three
            raise PowerCutError
        return end_epoch(self, loss, margin)

    monkeypatch.setattr(Trainer, "end_epoch", fail)
    with pytest.raises(PowerCutError):
        train_vectorized(broken)
    monkeypatch.setattr(Trainer, "end_epoch", end_epoch)
    train(broken[2])
    behind = RunDirectory(broken[1]).load()
    assert behind is not None
    assert behind["epoch"] == 2
    train_vectorized(broken)
    for one, other in zip(broken, whole, strict=True):
        a, b = (torch.load(RunDirectory(c).path / "checkpoint.pt", weights_only=True) for c in (one, other))
        for name in a["model"]:
            torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=1e-5)


# The decay of the last one multiplies the weights by about -2 at each update, until the loss overflows.
KILLED = [("seed=1",), ("optim.lr=0.02",), ("optim=adamw", "optim.lr=0.027", "optim.weight_decay=120", "seed=2")]


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_group_goes_on_as_it_was(seed, tiny_data, tmp_path, monkeypatch):
    """Power cuts between the checkpoints of a group: all go on from one epoch, together, with the same bits."""
    groups: dict[tuple[str, int], set[int]] = {}  # sizes of the group, of each folder and epoch
    train_group = VectorizedTrainer._train

    def spy(self, seeds):
        first = self._stacked[0]
        groups.setdefault((Path(first.config.runs_dir).name, first.epoch), set()).add(len(self._stacked))
        return train_group(self, seeds)

    monkeypatch.setattr(VectorizedTrainer, "_train", spy)
    keys = (*NCF, "optim=adam_lawn", "train.epochs=6", f"data_dir={tiny_data}", "device=cpu", ALWAYS)
    whole, cut = ([compose(*keys, *more, f"runs_dir={tmp_path}/{name}") for more in KILLED] for name in ("w", "c"))
    train_vectorized(whole)
    epochs = [RunDirectory(config).result()["last"]["epoch"] for config in whole]
    assert epochs[:2] == [6, 6]
    assert 2 <= epochs[2] <= 4
    moments, cuts, save = random.Random(seed), 0, RunDirectory.save
    while not all(RunDirectory(config).done for config in cut):
        left = moments.randint(1, 12)

        def save_some(self, state):
            nonlocal left
            left -= 1
            if left == 0:
                raise PowerCutError
            save(self, state)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "save", save_some)
            try:
                train_vectorized(cut)
            except PowerCutError:
                cuts += 1
    assert cuts > 0
    for epoch in range(1, 7):
        assert groups["c", epoch] == groups["w", epoch]
    for one, other in zip(cut, whole, strict=True):
        check_equal(one, other)


def test_groups_do_not_depend_on_what_is_done(tiny_data, tmp_path, monkeypatch):
    """Two of four runs fit in memory. A power cut after the first result leaves the others their groups."""
    monkeypatch.setattr(multirun, "max_vectorized_runs", lambda *_: 2)
    groups: dict[str, set[tuple[int, ...]]] = {"w": set(), "c": set()}
    stack = VectorizedTrainer._stack

    def spy(self, trainers):
        groups[Path(trainers[0].config.runs_dir).name].add(tuple(trainer.config.seed for trainer in trainers))
        stack(self, trainers)

    monkeypatch.setattr(VectorizedTrainer, "_stack", spy)
    keys = (*NCF, "optim=adam_lawn", "train.epochs=3", f"data_dir={tiny_data}", "device=cpu")
    whole, cut = ([compose(*keys, f"seed={k}", f"runs_dir={tmp_path}/{name}") for k in range(4)] for name in ("w", "c"))
    train_vectorized(whole)
    finish = RunDirectory.finish

    def finish_first(self, result):
        if RunDirectory(cut[0]).done:
            raise PowerCutError
        finish(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", finish_first)
        with pytest.raises(PowerCutError):
            train_vectorized(cut)
    train_vectorized(cut)
    assert groups["c"] == groups["w"] == {(0, 1), (2, 3)}
    for one, other in zip(cut, whole, strict=True):
        check_equal(one, other)


def test_runs_of_different_epochs_start_from_the_last_that_all_have():
    def state(epoch, divergence=None):
        return {"epoch": epoch, "divergence": divergence}

    def epochs(*histories):
        return [found and found["epoch"] for found in multirun._states_of_one_epoch(histories)]

    assert epochs([state(8), state(4)], [state(8), state(4)]) == [8, 8]
    assert epochs([state(8), state(4)], [state(4), state(2)]) == [4, 4]
    assert epochs([state(4), None], [None]) == [None, None]
    assert epochs([state(4), None], [state(2), None]) == [None, None]
    assert epochs([state(9), state(8)], [state(4), state(2)]) == [9, 4]  # the second catches up
    assert epochs([state(9), state(8)], [None]) == [9, None]
    assert epochs([state(9), None], []) == [9, None]  # the second has never begun
    assert epochs([state(9), state(8)], [state(8), None], []) == [8, 8, None]
    assert epochs([state(3, {}), state(2)], [state(8), state(4)]) == [3, 8]
    assert epochs([state(3, {}), state(2)], [state(2), None]) == [2, 2]


@pytest.mark.parametrize("keys", [(), ("optim.fused=false", "optim.granularity=row")])
def test_a_weight_that_is_zero_at_the_switch_is_one_line(tiny, keys):
    members = runs_of([tiny("optim.free_epochs=0", f"seed={seed}", *keys) for seed in range(2)])
    for p in members[1].model.parameters():
        p.data.zero_()
    with pytest.raises(
        RunError, match=r"^digits-mlp-adam_lawn-s0-\w+ or another run vectorized with it: cannot constrain"
    ):
        VectorizedTrainer(members).train_epoch()


def test_as_many_at_once_as_there_is_room_for(tiny, monkeypatch, capsys):
    configs = [tiny(f"seed={seed}") for seed in range(5)]
    task = task_builder(configs[0])(CPU)
    batch = (torch.zeros(50, 1, 8, 8), torch.zeros(50, dtype=torch.long))
    assert 10 < max_vectorized_runs(task, batch) <= CPU_ROWS // 50
    assert max_vectorized_runs(
        task, tuple(t.repeat(4, *(1 for _ in t.shape[1:])) for t in batch)
    ) < max_vectorized_runs(task, batch)
    wide = task_builder(tiny("model.widths=[2000,200]"))(CPU)  # 2 MB
    assert max_vectorized_runs(wide, batch) == 1
    monkeypatch.setattr("lawn.train.vectorized._free_bytes", lambda _: 10**7)
    assert 1 <= max_vectorized_runs(task, batch) < 100
    wide_runs = [tiny("model.widths=[2000,200]", "train.epochs=1", f"seed={seed}") for seed in range(2)]
    train_vectorized(wide_runs)
    assert "train.vectorize: 2 runs train alone: together they are no faster" in capsys.readouterr().out
    sizes = []
    monkeypatch.setattr(multirun, "max_vectorized_runs", lambda *_: 2)
    monkeypatch.setattr(multirun, "VectorizedTrainer", lambda runs: sizes.append(len(runs)) or VectorizedTrainer(runs))
    train_vectorized(configs)
    assert sizes == [2, 2]  # and one alone
    assert capsys.readouterr().out.count("done after epoch 4") == 5


@pytest.mark.parametrize(
    "keys",
    [
        ("dataset=cifar10",),
        ("optim=adam_hoffer",),
        ("train.micro_batch_size=5",),
        ("train.devices=2",),
        ("train.compile=default",),
        ("train.precision=bf16",),
        ("optim.free_epochs=auto",),
        ("diagnostics=on", "diagnostics.updates=1"),
    ],
)
def test_some_have_to_be_alone(keys):
    config = compose(*keys)
    assert vectorization_key(config) is None
    with pytest.raises(ConfigError, match="cannot be trained together"):
        train_vectorized([config, config])


def test_others_differ_in_too_much(tiny):
    base = tiny()
    smoothed = ("loss=label_smoothing", "loss.smoothing=0.1")
    others: list[tuple[str, ...]] = [("train.batch_size=7",), ("model.widths=[8]",), ("eval.split=val",), smoothed]
    for keys in (*others, ("dataset.limit=10",), ("data_dir=/elsewhere",), ("train.deterministic=true",)):
        with pytest.raises(ConfigError, match="cannot be trained together"):
            train_vectorized([base, tiny(*keys)])
    for keys in (("seed=5",), ("optim=sgd",), ("schedule=constant",), ("optim.lr=5",), ("train.logit_scale=0.5",)):
        assert vectorization_key(tiny(*keys)) == vectorization_key(base)
    assert vectorization_key(tiny("loss=focal", "loss.gamma=1")) != vectorization_key(
        tiny("loss=focal", "loss.gamma=2")
    )
