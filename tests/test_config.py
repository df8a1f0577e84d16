import pytest

from lawn.config import GROUPS
from lawn.errors import ConfigError
from lawn.identity import config_hash, identity, run_name
from lawn.optimizers import OPTIMIZERS, optimizer_arguments
from lawn.task import TASKS, task_builder
from lawn.train import prepare
from lawn.train.logger import LOGGERS, logger_builder
from tests.helpers import ROOT, compose

MEMBERS = [
    (group, path.stem) for group in (*GROUPS, "sweep") for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]
DATASETS = [name for task in TASKS for name in task.datasets]


@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_every_member_composes_and_its_arguments_fit(group, member):
    dataset = {
        "ncf_mlp": "movielens100k",
        "mf": "movielens100k",
        "bce": "movielens100k",
        "vgg19": "cifar10",
        "resnet50": "imagenet",
    }
    overrides = [f"dataset={dataset[member]}"] if member in dataset else []
    config = compose(*overrides, f"{group}={member}")
    task_builder(config)
    optimizer_arguments(config)
    logger_builder(config)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(
    "optim", [pytest.param(o, marks=[pytest.mark.slow] * (o not in ("adam", "adam_lawn"))) for o in sorted(OPTIMIZERS)]
)
def test_every_dataset_goes_with_every_optimizer_and_a_single_epoch(dataset, optim):
    config = compose(f"dataset={dataset}", f"optim={optim}", "train.epochs=1")
    task_builder(config)
    optimizer_arguments(config)


def test_groups_and_code_name_the_same_members():
    files = {group: {member for g, member in MEMBERS if g == group} for group in GROUPS}
    assert files["optim"] == set(OPTIMIZERS)
    assert files["dataset"] == {name for task in TASKS for name in task.datasets}
    assert files["model"] == {name for task in TASKS for name in task.models}
    assert files["loss"] == {name for task in TASKS for name in task.losses}
    assert files["logger"] == set(LOGGERS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.free_epochs=400", "train.epochs=300"], "optim.free_epochs=400: must be below train.epochs=300"),
        (["optim.lr=0"], "optim.lr=0.0: must be a finite number above 0"),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite"),
        (["optim.lr=inf"], "optim.lr=inf: must be a finite"),
        (["train.epochs=0"], "train.epochs=0: must be"),
        (["train.batch_size=-1"], "train.batch_size=-1: must be"),
        (["schedule.warmup_epochs=100"], "schedule.warmup_epochs=100: must be below train.epochs=100"),
        (["eval.split=tset"], "eval.split=tset: must be one of test, val"),
        (["optim.betas=[0.9]"], "optim.betas=.*: must be two numbers"),
        (["optim.betas=[0.9,1]"], "optim.betas=.*: must be two numbers"),
        (["model.widths=[0]"], "model.widths=.*: must be positive"),
        (["dataset.val_fraction=1"], "dataset.val_fraction=1.0: must be below 1"),
        (["+optim.lrr=1"], "optim.lrr: no such key; optim takes name, lr"),
        (["+foo=1"], "foo: no such key; the config takes dataset"),
        (["seed=-1"], "seed=-1: must be"),
        (["optim.lr=???"], "optim.lr: needs a value"),
        (["schedule.name=cosine"], "schedule.name=cosine: must be one of linear, constant"),
        (["optim=sgd", "optim.momentum=0", "optim.nesterov=true"], "optim.nesterov=True: needs optim.momentum"),
        (["train.logit_scale=0"], "train.logit_scale=0: must be from 1e-6 to 1"),
        (["train.logit_scale=0.2", "optim=adam"], "train.logit_scale=0.2: needs a LAWN optimizer"),
        (["optim.scope=last"], "optim.scope=last: must be one of all, final_homogeneous"),
        (["optim.granularity=filter"], "optim.granularity=filter: must be one of tensor, row"),
        (["loss=label_smoothing", "loss.smoothing=1"], "loss.smoothing=1.0: must be below 1"),
        (["loss=focal", "loss.gamma=-1"], "loss.gamma=-1.0: must be"),
        (["dataset=pinterest", "dataset.prefix=../x"], r"dataset.prefix='../x': must be a plain name"),
        (["dataset=pinterest", "dataset.prefix=..."], r"dataset.prefix='...': must be a plain name"),
        (["seed=99999999999999999999"], "seed=99999999999999999999: must be below"),
        (["dataset.seed=5000000000"], "dataset.seed=5000000000: must be below"),
        (["optim.free_epochs=100"], "optim.free_epochs=100: must be below train.epochs=100, or the constrained phase"),
        (["optim=adam_cpr", "optim.warm_start_epochs=100"], "optim.warm_start_epochs=100: must be below"),
        (["optim.betas=[-0.1,0.9]"], "optim.betas=.*: must be two numbers"),
        (["train.logit_scale=1.1"], "train.logit_scale=1.1: must be from 1e-6 to 1"),
        (["train.compile=reduce-overhead", "train.micro_batch_size=8"], "does not go with train.micro_batch_size"),
        (["train.compile=default", "train.sync_batchnorm=true"], "does not go with train.sync_batchnorm"),
        (["dataset.val_fraction=0"], "dataset.val_fraction=0.0: must be a finite number above 0"),
    ],
)
def test_bad_values_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        prepare(compose(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.free_epochs=0", "optim.betas=[0,0]", "train.logit_scale=1", "schedule.warmup_epochs=0"],
        ["optim.free_epochs=99", "train.logit_scale=1e-6", "schedule.warmup_epochs=99"],
        ["optim=adam_cpr", "optim.warm_start_epochs=99"],
        ["train.devices=2", "train.batch_size=2"],
        ["train.compile=default", "train.micro_batch_size=8"],
        ["train.compile=off", "train.sync_batchnorm=true", "train.deterministic=true"],
    ],
)
def test_values_at_their_bounds_are_taken(overrides):
    compose(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.momentum=0.9"],
            "optim.momentum=0.9: does not apply to optim=adam_lawn, which takes lr, betas, eps, free",
        ),
        (["optim.weight_decay=0.1"], "optim.weight_decay=0.1: does not apply to optim=adam_lawn"),
        (["optim=sgd", "optim.free_epochs=1"], "optim.free_epochs=1.0: does not apply to optim=sgd"),
        (["optim=adam", "optim.scope=all"], "optim.scope=all: does not apply to optim=adam"),
        (["optim.betas=null"], "optim.betas: optim=adam_lawn needs a value"),
    ],
)
def test_keys_that_do_not_apply(overrides, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_arguments(compose(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=vgg19", "dataset=movielens100k"],
            "model=vgg19: does not fit dataset=movielens100k; choose from ncf_mlp",
        ),
        (["loss=bce"], "loss=bce: does not fit dataset=digits; choose from cross_entropy"),
        (["dataset=movielens100k", "dataset.limit=5"], "dataset.limit=5: does not apply to dataset=movielens100k"),
        (["loss.gamma=2"], "loss.gamma=2.0: does not apply to loss=cross_entropy, which takes no keys"),
        (["loss=focal", "loss.gamma=null"], "loss.gamma: loss=focal needs a value"),
        (["dataset=pinterest", "dataset.prefix=null"], "dataset.prefix: dataset=pinterest needs a value"),
        (["model.factors=5"], "model.factors=5: does not apply to model=mlp, which takes widths"),
    ],
)
def test_members_that_do_not_fit(overrides, message):
    with pytest.raises(ConfigError, match=message):
        task_builder(compose(*overrides))


def test_a_schedule_free_optimizer_brings_its_schedule():
    assert compose("optim=schedule_free").schedule.name == "constant"
    assert compose("optim=schedule_free", "schedule=linear").schedule.name == "linear"
    assert compose("optim=adam").schedule.name == "linear"


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("gamma", [0.5, 2, 5])
def test_focal_loss_goes_with_every_dataset(dataset, gamma):
    task_builder(compose(f"dataset={dataset}", "loss=focal", f"loss.gamma={gamma}"))


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("loss", ["label_smoothing", "flooding"])
def test_the_other_losses_of_the_paper_go_with_every_dataset(dataset, loss):
    task_builder(compose(f"dataset={dataset}", f"loss={loss}"))


def test_the_hash_is_of_what_defines_the_run():
    base = compose()
    for elsewhere in (
        "device=cpu",
        "data_dir=x",
        "runs_dir=x",
        "run_dir=x",
        "logger=wandb",
        "train.checkpoint_seconds=1",
    ):
        assert config_hash(compose(elsewhere)) == config_hash(base)
    for other in ("seed=1", "optim.lr=0.5", "train.epochs=7", "eval.split=val", "dataset.limit=9", "diagnostics=on"):
        assert config_hash(compose(other)) != config_hash(base)
    folders, val = ("dataset=imagenet",), ("eval.split=val",)
    shards = (*folders, "dataset.shards=x")
    assert config_hash(compose(*shards)) == config_hash(compose(*folders))
    assert config_hash(compose(*shards, *val)) != config_hash(compose(*folders, *val))  # other images are held out
    assert "diagnostics" not in identity(base)
    assert config_hash(compose("optim.betas=[-0.0,0.9]")) == config_hash(compose("optim.betas=[0,0.9]"))
    assert run_name(base) == f"digits-mlp-adam_lawn-s0-{config_hash(base)}"
    assert all(
        v is not None for section in identity(base).values() if isinstance(section, dict) for v in section.values()
    )


@pytest.mark.parametrize("shards", ["pipe:cat $FOLDER/{00..09}.tar", "https://host/$x/00.tar"])
def test_commands_and_urls_are_no_paths(shards):
    assert compose("dataset=imagenet", f"dataset.shards='{shards}'").dataset.shards == shards
