import csv
import json
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lawn.data.batching import Batching
from lawn.errors import ConfigError, RunError
from lawn.identity import config_hash
from lawn.models.ncf import NCFMLP
from lawn.models.vgg import VGG19
from lawn.optimizers import OPTIMIZERS, PACKAGES, lawn_groups, optimizer_arguments
from lawn.task import task_builder
from lawn.train import train
from lawn.train.distributed import World
from lawn.train.recorder import result_of
from lawn.train.run_directory import RunDirectory, decode_outcomes, encode_outcomes
from lawn.train.throughput import flops_per_sample
from lawn.train.trainer import Trainer, epoch_seed, updates_in
from tests.helpers import RECOMMENDERS, compose, synthetic_ratings, write_ratings

CPU = torch.device("cpu")


def directory(config) -> Path:
    return RunDirectory(config).path


def rows(config) -> list[dict[str, str]]:
    with (directory(config) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_run_directory(tiny):
    config = tiny("optim.free_epochs=2")
    result = train(config)
    path = directory(config)
    assert {p.name for p in path.iterdir()} == {
        *("DONE", "config.yaml", "env.json", "metrics.csv", "result.json", "timing.json", "checkpoint.pt"),
        ".lock",
    }
    given, timing = (json.loads((path / name).read_text()) for name in ("result.json", "timing.json"))
    assert result == {**given, **timing}
    assert result["status"] == "done"
    assert result["last"]["epoch"] == 4
    assert result["best"]["accuracy"] == max(float(row["test_accuracy"]) for row in rows(config))
    assert 100 * decode_outcomes(result["outcomes"]).mean() == pytest.approx(result["last"]["test_accuracy"])
    assert [row["constrained"] for row in rows(config)] == ["0", "0", "1", "1"]
    norms = [float(row["weight_norm"]) for row in rows(config)]
    assert norms[2] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] != pytest.approx(norms[1], rel=1e-6)
    assert f"hash: {config_hash(config)}" in (path / "config.yaml").read_text()
    assert json.loads((path / "env.json").read_text())["packages"]["torch"] == version("torch")


def test_the_rank_of_every_test_user_is_kept(tiny_data, tmp_path):
    places = (f"data_dir={tiny_data}", f"runs_dir={tmp_path}", "device=cpu", "train.epochs=2")
    result = train(compose("dataset=movielens100k", "optim=adam_lawn", *places, *RECOMMENDERS))
    ranks = decode_outcomes(result["outcomes"])
    assert len(ranks) == 30
    for k in (5, 10, 20):
        assert 100 * (ranks < k).mean() == pytest.approx(result["last"][f"test_hr{k}"])


@given(st.lists(st.integers(0, 2**15 - 1)))
def test_outcomes_come_back(numbers):
    assert decode_outcomes(encode_outcomes(torch.tensor(numbers, dtype=torch.long))).tolist() == numbers


@pytest.mark.parametrize("text", ["", "AAAA", "not base64", "eJwDAAAAAAE"])
def test_damaged_outcomes(text):
    with pytest.raises(ValueError, match=r"."):
        decode_outcomes(text)


def test_done_runs_are_not_run_again(tiny, capsys):
    config = tiny()
    result = train(config)
    checkpoint = (directory(config) / "checkpoint.pt").stat()
    assert train(config) == result
    assert "done already" in capsys.readouterr().out
    assert (directory(config) / "checkpoint.pt").stat() == checkpoint


class PowerCutError(Exception):
    pass


RESUMED = [
    *(("adam_lawn", after) for after in (1, 2, 3)),
    *(
        pytest.param(name, 2, marks=[pytest.mark.slow] * ("lawn" not in name))
        for name in sorted({*OPTIMIZERS} - {"adam_lawn"})
    ),
]


@pytest.mark.parametrize(("optim", "after"), RESUMED)
def test_resume_is_exact(tiny, tmp_path, monkeypatch, optim, after):
    overrides = [f"optim={optim}", "train.checkpoint_seconds=0", "optim.lr=0.01"]
    if "lawn" in optim:
        overrides += ["optim.free_epochs=2", "train.logit_scale=0.2"]
    whole, broken = (tiny(*overrides, f"run_dir={tmp_path}/{name}") for name in ("whole", "broken"))
    train(whole)
    train_epoch = Trainer.train_epoch

    def fail(self, *pause):
        if self.epoch == after:
            raise PowerCutError
        return train_epoch(self, *pause)

    monkeypatch.setattr(Trainer, "train_epoch", fail)
    with pytest.raises(PowerCutError):
        train(broken)
    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    assert len(rows(broken)) == after
    train(broken)
    a, b = (torch.load(directory(c) / "checkpoint.pt", weights_only=True) for c in (whole, broken))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert (directory(whole) / "metrics.csv").read_bytes() == (directory(broken) / "metrics.csv").read_bytes()


def test_a_checkpoint_within_an_epoch_has_the_seconds_until_then(tiny, monkeypatch):
    """With the clocks that run; each second is in one account, now and after the epoch."""
    now = 0.0
    monkeypatch.setattr("lawn.train.trainer.time.perf_counter", lambda: now)
    config = tiny()
    trainer = Trainer(config, task_builder(config)(torch.device("cpu")), World(torch.device("cpu")))
    with trainer.clock("train"):
        now = 10.0
        with trainer.clock("log"):
            now = 12.0
            within = trainer._seconds_until_now(trainer._clocks)
        now = 15.0
        assert trainer._seconds_until_now(trainer._clocks) == {"train": 13.0, "eval": 0.0, "log": 2.0}
        with trainer.clock("log"):
            now = 16.0
        now = 20.0
    assert within == {"train": 10.0, "eval": 0.0, "log": 2.0}
    assert trainer.seconds == {"train": 17.0, "eval": 0.0, "log": 3.0}


# Compiling AdamCPR takes longer than all the others.
@pytest.mark.parametrize(
    "optim", [pytest.param(o, marks=[pytest.mark.slow] * (o == "adam_cpr")) for o in sorted(OPTIMIZERS)]
)
def test_every_optimizer_learns(tiny, optim):
    lr = 0.1 if "sgd" in optim else 0.02 if "lamb" in optim else 0.01
    result = train(tiny(f"optim={optim}", f"optim.lr={lr}", "train.epochs=15", "train.batch_size=20"))
    assert result["status"] == "done"
    assert result["last"]["train_loss"] < 1  # ln 10 = 2.3 at the start
    assert result["last"]["test_accuracy"] > 60


def test_hoffers_weights_keep_the_norms_that_they_began_with(tiny):
    config = tiny("optim=adam_hoffer", "optim.lr=0.01")
    task = task_builder(config)(torch.device("cpu"))
    before = [p.norm().item() for p in task.model.parameters()]
    run = Trainer(config, task, World(CPU))
    values = [layer.weight.detach().clone() for layer in task.model if hasattr(layer, "weight")]
    run.train_epoch()
    layers = [layer.weight.detach() for layer in task.model if hasattr(layer, "weight")]
    assert [w.norm().item() for w in layers] == pytest.approx(before, rel=1e-6)
    assert not any(torch.equal(a, b) for a, b in zip(values, layers, strict=True))


def test_logits_are_attenuated_at_the_switch_and_norms_fixed_there(tiny):
    """Figure 1: the free phase, then the output layer times alpha, then the constraint."""
    free = 20
    common = f"train.epochs={free + 2}", f"optim.free_epochs={free}", "optim.lr=0.01", "train.batch_size=20"
    config = tiny(*common, "train.logit_scale=0.2")
    task = task_builder(config)(torch.device("cpu"))
    run = Trainer(config, task, World(CPU))
    norms = []
    for _ in range(free + 2):
        run.train_epoch()
        norms.append([p.norm().item() for p in task.model.parameters()])
    hidden, output = norms[free - 1]
    assert norms[free] == pytest.approx([hidden, 0.2 * output], rel=1e-5)
    assert norms[free + 1] == pytest.approx(norms[free], rel=1e-6)
    margins = [row["margin_p50"] for row in run.rows]
    assert margins[free] < 0.4 * margins[free - 1]
    plain = tiny(*common)
    other = Trainer(plain, task_builder(plain)(torch.device("cpu")), World(CPU))
    assert [other.train_epoch()["train_loss"] for _ in range(free)] == [row["train_loss"] for row in run.rows[:free]]


def test_scope_of_the_constraint(tiny):
    """All weights of the digits MLP are a homogeneous sub-network; in VGG-19 only the last layer is."""
    both = [
        Trainer(c, task_builder(c)(torch.device("cpu")), World(CPU)).optimizer.param_groups
        for c in (tiny(), tiny("optim.scope=final_homogeneous"))
    ]
    assert [[p.shape for p in g["params"]] for g in both[0]] == [[p.shape for p in g["params"]] for g in both[1]]
    model = VGG19((3, 32, 32), 10, batch_norm=True)
    bound, free = lawn_groups(model, "final_homogeneous", True)
    assert [tuple(p.shape) for p in bound["params"]] == [(10, 512), (10,)]
    assert bound["blocks"] == [0, 0]
    assert len(free["params"]) == len(list(model.parameters())) - 2
    with pytest.raises(ConfigError, match=r"optim.scope=final_homogeneous: no final homogeneous sub-network"):
        lawn_groups(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), "final_homogeneous", False)


def test_granularity_of_the_norms(tiny):
    """Norms of rows: of outputs, of filters. A run goes on from its switch."""
    config = tiny("optim.granularity=row", "optim.free_epochs=0")
    trainer = Trainer(config, task_builder(config)(torch.device("cpu")), World(CPU))
    trainer.train_epoch()
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            norms = trainer.optimizer.state[p]["lawn_norm"]
            assert norms == 0.0 if p.ndim < 2 else norms.tolist() == pytest.approx(p.norm(dim=1).tolist(), rel=1e-5)
    rows = lawn_groups(VGG19((3, 32, 32), 10, batch_norm=True), "all", False, "row")
    assert [group.get("norm_axes") for group in rows] == [(1,), (1, 2, 3), None]
    with pytest.raises(ConfigError, match=r"optim.granularity=row: does not go with optim.include_bias=true"):
        lawn_groups(torch.nn.Linear(2, 2), "all", True, "row")


def test_muon_leaves_embeddings_and_the_output_layer_to_adamw():
    model = NCFMLP(10, 20, factors=4, layers=2, init="torch")
    groups = OPTIMIZERS["muon"](model, lr=0.01, betas=[0.9, 0.999], momentum=0.9, weight_decay=0.1).param_groups
    by_muon, apart, others = groups
    assert [g["use_fallback"] for g in groups] == [False, True, True]
    assert [tuple(p.shape) for p in by_muon["params"]] == [(8, 16), (4, 8)]
    assert [tuple(p.shape) for p in apart["params"]] == [(10, 8), (20, 8), (1, 4)]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert [g["nesterov"] for g in groups] == [True, False, False]
    assert all(p.ndim == 1 for p in others["params"])


def test_a_config_that_was_not_validated_is_one_line():
    for config in (OmegaConf.create({"seed": 0}), {"seed": 0}, None):
        with pytest.raises(ConfigError, match=r"a config of type \w+: pass what lawn.validation.validate makes of it"):
            train(config)


def test_variables_of_a_former_torchrun_do_not_make_a_rank(tiny, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert train(tiny("train.epochs=1"))["status"] == "done"


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(PACKAGES, "adamp", "no_such_package")
    with pytest.raises(ConfigError, match=r"optim=adamp: the package no_such_package is not installed; pip install"):
        optimizer_arguments(compose("optim=adamp"))


def test_divergence_is_a_result(tiny):
    config = tiny("optim=sgd", "optim.lr=1e20")
    result = train(config)
    assert result["status"] == "diverged"
    assert result["last"]["train_loss"] is None
    assert (directory(config) / "DONE").exists()
    json.loads((directory(config) / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN in JSON


def test_weights_that_are_lost_with_the_last_update_are_a_divergence(tiny):
    result = train(tiny("optim=sgd", "optim.lr=1e38", "train.epochs=1", "train.batch_size=200"))
    assert result["status"] == "diverged"
    assert result["last"]["train_loss"] is not None
    assert "test_accuracy" not in result["last"]
    assert result["divergence"]["step"] == 1


def test_divergence_before_the_switch_is_a_result_too(tiny):
    result = train(tiny("optim=sgd_lawn", "optim.lr=1e20", "train.batch_size=16", "optim.free_epochs=0.5"))
    assert result["status"] == "diverged"


def test_a_weight_that_is_zero_at_the_switch_is_one_line(tiny_data, tmp_path):
    keys = ("dataset=movielens100k", f"data_dir={tiny_data}", f"runs_dir={tmp_path}", "dataset.candidates=20")
    config = compose(*keys, "model=mf", "model.init_std=1e-30", "optim.free_epochs=0")
    with pytest.raises(RunError, match=r"^movielens100k-mf-adam_lawn-s0-\w+: cannot constrain .* its norm is 0.0;"):
        train(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=vgg19"], "model=vgg19: its CIFAR form takes 32 x 32 images, not 8 x 8"),
        (["eval.split=val", "dataset.val_fraction=0.001"], "dataset.val_fraction=0.001: no stratified split"),
        (["device=meta"], "device=meta: cannot be used"),
    ],
)
def test_what_only_the_data_can_tell_is_one_line(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        train(compose(f"runs_dir={tmp_path}", *overrides))
    assert "\n" not in str(error.value)


def test_a_resumed_run_lists_its_environments(tiny):
    config = tiny()
    train(config)
    first = json.loads((directory(config) / "env.json").read_text())
    (directory(config) / "DONE").unlink()
    train(config)
    assert json.loads((directory(config) / "env.json").read_text()) == {**first, "resumed": [first]}


@pytest.mark.parametrize("optim", ["adam_lawn", "adam"])
def test_a_resumed_run_is_fused_as_the_command_says(tiny, monkeypatch, optim):
    train(tiny(f"optim={optim}"))
    config = tiny(f"optim={optim}", "optim.fused=false")
    (directory(config) / "DONE").unlink()
    loaded = []
    load = Trainer.load_state_dict

    def spy(self, state):
        load(self, state)
        loaded.extend(self.optimizer.param_groups)

    monkeypatch.setattr(Trainer, "load_state_dict", spy)
    train(config)
    assert {group["fused"] for group in loaded} == {False}
    if optim == "adam_lawn":
        environment = json.loads((directory(config) / "env.json").read_text())
        assert environment["resumed"][-1]["constrained_step"] == "torch"


def test_another_runs_directory_is_refused(tiny, tmp_path):
    config = tiny(f"run_dir={tmp_path}/here")
    train(config)
    with pytest.raises(RunError, match=r"holds run .*; choose another \(seed is 0 there, 1 here\)$"):
        train(tiny(f"run_dir={tmp_path}/here", "seed=1", "train.checkpoint_seconds=9"))


def test_a_damaged_checkpoint_is_named(tiny, monkeypatch):
    config = tiny()
    train(config)
    path = directory(config)
    (path / "DONE").unlink()
    (path / "checkpoint.pt").write_bytes((path / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(RunError, match=r"checkpoint.pt: cannot be read .*delete checkpoint.pt to start over"):
        train(config)


def test_unwritable_directory(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train(tiny(f"run_dir={tmp_path}/file/run"))


def test_validation_split_names_its_columns(tiny):
    config = tiny("eval.split=val", "eval.every=3")
    result = train(config)
    assert "val_accuracy" in result["last"]
    assert "test_accuracy" not in result["last"]
    assert [bool(row["val_accuracy"]) for row in rows(config)] == [False, False, True, True]


def test_recommendation(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings())
    config = compose(
        "dataset=movielens100k", "train.epochs=30", "train.batch_size=100", "dataset.candidates=40", "model.factors=4",
        "optim.lr=0.01", f"data_dir={tmp_path}", f"runs_dir={tmp_path}/runs", "device=cpu",
    )  # fmt: skip
    result = train(config)
    assert result["status"] == "done"
    assert result["last"]["train_loss"] < 0.45  # the labels' own entropy is 0.5
    assert 0 <= result["last"]["test_ndcg10"] <= result["last"]["test_hr10"] <= 100
    assert len(result["warnings"]) == 3


def test_the_regularization_of_matrix_factorization_is_in_its_loss(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings())
    keys = ("dataset=movielens100k", "dataset.candidates=20", "model=mf", "model.factors=4", f"data_dir={tmp_path}")
    task = task_builder(compose(*keys, "model.regularization=0.1"))(CPU)
    users, items, labels = torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([1.0, 0.0])
    loss, margins = task.loss_and_margins(task.model, (users, items, labels))
    logits, penalty = task.model(users, items, with_penalty=True)
    assert penalty > 1e-3
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + penalty)
    torch.testing.assert_close(margins, logits * torch.tensor([1, -1]))


def test_too_few_candidates_are_a_warning(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings())
    for candidates, named in ((5, "HR@5 and HR@10 and HR@20"), (10, "HR@10 and HR@20"), (20, "HR@20"), (21, None)):
        config = compose(
            "dataset=movielens100k", "train.epochs=1", f"dataset.candidates={candidates}", "model.factors=4",
            f"data_dir={tmp_path}", f"runs_dir={tmp_path}/runs", "device=cpu",
        )  # fmt: skip
        found = [warning for warning in train(config)["warnings"] if "HR@" in warning]
        note = f"dataset.candidates={candidates}: for {named} all ranks, or all but the last, are hits; "
        assert found == ([f"{note}take more than 20 candidates"] if named else [])


def test_a_run_in_the_current_directory_has_a_name(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(tiny("run_dir=.", "diagnostics=on"))
    assert capsys.readouterr().out.startswith("here  epoch 1/4  train_loss")


def test_flops_of_a_linear_network(tiny):
    config = tiny()
    task = task_builder(config)(torch.device("cpu"))
    _, batch = next(task.dataset.train_batches(Batching(50), torch.Generator()))
    forward = 2 * (64 * 16 + 16 * 10)
    backward = 2 * (64 * 16 + 2 * 16 * 10)  # no gradient for the images
    assert flops_per_sample(task, task.model, batch) == forward + backward
    assert task.model[1].weight.device.type == "cpu"


def test_the_switch_comes_after_free_epochs_even_where_they_are_fractions(tiny):
    config = tiny("optim.free_epochs=1.5", "train.batch_size=20", "schedule.warmup_epochs=3.9")
    run = Trainer(config, task_builder(config)(torch.device("cpu")), World(CPU))
    assert run.optimizer.param_groups[0]["free_steps"] == 15
    assert (run.scheduler.warmup_steps, run.scheduler.total_steps) == (39, 40)
    config = tiny("optim.free_epochs=0.001")
    run = Trainer(config, task_builder(config)(torch.device("cpu")), World(CPU))
    assert run.optimizer.param_groups[0]["free_steps"] == 1  # only 0 means none


def test_epochs_are_rounded_to_the_nearest_update():
    assert [updates_in(epochs, 10, 50) for epochs in (0.0, 0.01, 0.14, 0.29, 2.07, 9.0)] == [0, 1, 1, 3, 21, 49]


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(tiny):
    """Also where the last update has fewer; the weights hardly move."""
    losses = [train(tiny("train.epochs=1", "optim.lr=1e-30", f"train.batch_size={size}")) for size in (200, 70)]
    assert losses[0]["last"]["train_loss"] == pytest.approx(losses[1]["last"]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("optim", ["adam_lawn", "schedule_free"])
def test_model_and_optimizer_are_in_the_mode_of_what_they_do(tiny, optim):
    if optim in PACKAGES:
        pytest.importorskip("schedulefree")
    config = tiny("train.epochs=2", "eval.every=1", f"optim={optim}")
    trainer = Trainer(config, task_builder(config)(CPU), World(CPU))
    modes = []

    def record(model, *_):
        if model is trainer.model:  # not its copy that counts operations
            (group,) = trainer.optimizer.param_groups
            modes.append((model.training, torch.is_grad_enabled(), group.get("train_mode", model.training)))

    trainer.model.register_forward_hook(record)
    for _ in range(2):
        trainer.train_epoch()
    assert [mode for mode, _ in groupby(modes)] == [(True, True, True), (False, False, False)] * 2


def test_outcomes_are_in_the_order_of_the_places(tiny):
    """A dataset that workers read may yield its images in another order."""
    config = tiny("train.epochs=1")
    trainer = Trainer(config, task_builder(config)(CPU), World(CPU))
    in_order = trainer._evaluation_rows(trainer.task.rows)
    trainer.task.dataset.eval_places = lambda rank, size: torch.arange(len(in_order)).flip(0)
    assert torch.equal(trainer._evaluation_rows(trainer.task.rows), in_order.flip(0))


def test_the_automatic_switch_follows_the_margins_of_each_update(tiny):
    config = tiny("train.epochs=1", "train.batch_size=90", "optim.free_epochs=auto")
    trainer, given = Trainer(config, task_builder(config)(CPU), World(CPU)), []
    trainer.onset.follow = lambda margins: given.append(len(margins))
    trainer.train_epoch()
    assert given == [90, 90, 20]


def test_the_learning_rate_of_an_epoch_is_that_of_its_first_update(tiny):
    config = tiny("train.epochs=4", "train.batch_size=50", "schedule.warmup_epochs=2", "optim.lr=0.01")
    train(config)  # 4 updates an epoch
    assert [float(row["lr"]) for row in rows(config)] == pytest.approx([0.01 / 9, 0.05 / 9, 0.01, 0.005])


def test_the_pace_of_a_run(tiny):
    config = tiny("train.epochs=3")
    trainer = Trainer(config, task_builder(config)(CPU), World(CPU))
    for _ in range(3):
        trainer.train_epoch()
    trainer.seconds["train"] = 1.5
    assert result_of(trainer)["samples_per_second"] == 2 * trainer.task.dataset.num_train
    trainer.seconds["train"] = 1e-9
    assert result_of(trainer)["peak_share"] == 1


def test_epoch_seeds_differ():
    seeds = {epoch_seed(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_device(tiny):
    with pytest.raises(ConfigError, match="device=warp: cannot be used"):
        train(tiny("device=warp"))


def test_a_failing_wandb_does_not_fail_the_run(tiny, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise ConnectionError("no server")

    monkeypatch.setattr(wandb, "init", refuse)
    assert train(tiny("logger=wandb"))["status"] == "done"
    assert "wandb: ConnectionError: no server; logging to it ends here" in capsys.readouterr().out


def test_wandb_gets_rows_and_result(tiny, monkeypatch):
    import wandb

    class Stub:
        def __init__(self) -> None:
            self.rows, self.summary, self.finished = [], {}, False

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            self.finished = True

    stub, given = Stub(), {}
    monkeypatch.setattr(wandb, "init", lambda **keys: given.update(keys) or stub)
    config = tiny("logger=wandb", "logger.mode=offline")
    train(config)
    assert [step for step, _ in stub.rows] == [1, 2, 3, 4]
    assert stub.finished
    assert stub.summary["status"] == "done"
    assert (given["mode"], given["resume"]) == ("offline", "allow")
    assert given["id"].startswith(f"{config_hash(config)}-")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # wandb's own
def test_wandb_offline_keeps_one_run_for_a_directory(tiny, monkeypatch):
    """The real wandb, without a network: stopped and resumed, it writes twice to one run."""
    config = tiny("logger=wandb", "logger.mode=offline", "train.checkpoint_seconds=0")
    train_epoch = Trainer.train_epoch

    def stop(self, *pause):
        if self.epoch == 2:
            raise PowerCutError
        return train_epoch(self, *pause)

    monkeypatch.setattr(Trainer, "train_epoch", stop)
    with pytest.raises(PowerCutError):
        train(config)
    monkeypatch.undo()
    assert train(config)["status"] == "done"
    folders = list((directory(config) / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    name = (directory(config) / "wandb_id").read_text().strip()
    assert all(folder.name.endswith(f"-{name}") for folder in folders)
    assert any(path for folder in folders for path in folder.glob("*.wandb"))


def test_the_loss_of_a_batch_that_is_far_larger_than_the_data(tiny):
    whole, huge = (train(tiny("train.epochs=2", f"train.batch_size={size}")) for size in (10**6, sys.maxsize))
    assert whole["last"]["train_loss"] == huge["last"]["train_loss"] > 0
