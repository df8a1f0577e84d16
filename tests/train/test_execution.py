import copy
import json
import re

import pytest
import torch

from lawn import AdamLAWN
from lawn.config import TrainConfig
from lawn.data.batching import Batching
from lawn.errors import ConfigError
from lawn.identity import config_hash
from lawn.models.mlp import mlp
from lawn.models.ncf import NCFMLP
from lawn.models.vgg import VGG19
from lawn.optim import cpu_kernels
from lawn.task import task_builder
from lawn.train import train
from lawn.train.batchnorm import refuse_single_values
from lawn.train.distributed import World, init_on_one_machine
from lawn.train.execution import Execution, constrained_step
from lawn.train.run_directory import RunDirectory
from lawn.train.throughput import flops_per_sample, peak_flops
from lawn.train.trainer import Trainer
from tests.helpers import FIXTURES, compose, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        vgg = VGG19((3, 32, 32), 10, batch_norm=True)
        ncf = NCFMLP(5, 5, factors=4, layers=3, init="torch")
        digits = mlp((1, 8, 8), 10, widths=[8])
    return {"vgg": vgg, "ncf": ncf, "mlp": digits}


@pytest.mark.parametrize(
    ("name", "device", "updates", "keys", "expected"),
    [
        ("vgg", CPU, 9999, {}, Execution("fp32", True, "off", False)),
        ("ncf", CPU, 9999, {}, Execution("fp32", False, "off", False, adaptive_threads=True)),
        ("vgg", GPU, 9999, {}, Execution("bf16", True, "default", False)),
        ("vgg", GPU, 10, {}, Execution("bf16", True, "off", False)),
        ("vgg", GPU, 9999, {"sync_batchnorm": True}, Execution("bf16", True, "off", False)),
        ("ncf", GPU, 9999, {}, Execution("fp32", False, "reduce-overhead", False)),
        ("ncf", GPU, 9999, {"micro_batch_size": 50}, Execution("fp32", False, "default", False)),
        ("ncf", GPU, 9999, {"precision": "tf32", "compile": "off"}, Execution("tf32", False, "off", False)),
        ("mlp", GPU, 10, {}, Execution("tf32", False, "off", False)),
        ("vgg", CPU, 10, {"channels_last": False, "compile": "default"}, Execution("fp32", False, "default", False)),
        ("vgg", GPU, 9999, {"deterministic": True}, Execution("bf16", True, "off", True)),
    ],
)
def test_what_is_not_set_is_chosen_by_device_and_model(monkeypatch, networks, name, device, updates, keys, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert Execution.choose(TrainConfig(**keys), networks[name], device, updates) == expected


def test_a_gpu_without_bf16_computes_in_fp32(monkeypatch, networks):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert Execution.choose(TrainConfig(), networks["vgg"], GPU, 10).precision == "fp32"


def test_bf16_rounds_products_and_not_weights(tiny, tmp_path):
    keys = ("train.epochs=4", "optim.lr=0.02", "optim.free_epochs=1")
    plain, rounded = tiny(*keys), tiny(*keys, "train.precision=bf16")
    first, second = train(plain), train(rounded)
    assert RunDirectory(plain).path != RunDirectory(rounded).path  # another run, by its hash
    record = json.loads((RunDirectory(rounded).path / "env.json").read_text())
    assert record["execution"] == {
        "precision": "bf16",
        "channels_last": False,
        "compile": "off",
        "deterministic": False,
        "adaptive_threads": False,
    }
    assert record["ranks"] == 1
    weights = torch.load(RunDirectory(rounded).path / "checkpoint.pt", weights_only=True)["model"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert second["last"]["train_loss"] == pytest.approx(first["last"]["train_loss"], rel=0.05)
    assert second["last"]["train_loss"] != first["last"]["train_loss"]


def test_speed_is_not_part_of_a_runs_name(tiny):
    names = {
        RunDirectory(tiny(*keys)).path
        for keys in ((), ("train.devices=2",), ("train.compile=default",), ("optim.fused=false",))
    }
    assert len(names) == 1
    assert RunDirectory(tiny("train.micro_batch_size=5")).path not in names


def test_layout_goes_with_the_weights(networks):
    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    laid_out, same = Execution("fp32", True, "off", False).to_memory_format((images, labels))
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, images)
    assert same is labels
    assert Execution("fp32", False, "off", False).to_memory_format((images, labels))[0] is images


def test_gradients_lie_in_memory_as_their_weights():
    """torch's fused steps count through both alike, and say nothing where they are not."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    how = Execution("fp32", True, "off", False)
    how.prepare(model, CPU)
    for _ in range(2):  # the second adds to the first
        (images,) = how.to_memory_format((torch.rand(2, 3, 3, 3),))
        model(images).sum().backward()
    assert not model[0].weight.is_contiguous()
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_the_peak_leaves_the_settings_of_products_alone():
    before = torch.get_float32_matmul_precision()
    assert peak_flops(CPU, "fp32") > 0
    assert torch.get_float32_matmul_precision() == before


def test_moments_are_resumed_in_the_layout_of_the_weights(tiny):
    """A checkpoint of another layout, as before a change of train.channels_last."""
    config = tiny("optim=adam")
    run, resumed = (Trainer(config, task_builder(config)(CPU), World(CPU)) for _ in range(2))
    run.train_epoch()
    state = copy.deepcopy(run.state_dict())
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()
    resumed.load_state_dict(state)
    assert resumed.train_epoch() == run.train_epoch()


def test_flops_are_counted_without_the_other_ranks(tiny, tmp_path):
    config = tiny()
    task = task_builder(config)(CPU)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.SyncBatchNorm(64), torch.nn.Linear(64, 10))
    batch = (torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    with init_on_one_machine("cpu", 0, 1, str(tmp_path / "store")):
        assert flops_per_sample(task, model, batch) == 3 * 2 * 640
    assert model.training


@pytest.mark.slow
def test_compiled_or_not_the_run_is_the_same(tiny, tmp_path):
    keys = ("train.epochs=3", "optim.free_epochs=1")
    plain, compiled = (tiny(*keys, f"train.compile={how}", f"run_dir={tmp_path}/{how}") for how in ("off", "default"))
    first, second = train(plain), train(compiled)
    assert second["last"]["train_loss"] == pytest.approx(first["last"]["train_loss"], rel=1e-4)
    assert second["last"]["test_accuracy"] == pytest.approx(first["last"]["test_accuracy"], abs=0.6)


def test_the_deterministic_switch_is_torchs_own_and_ends_with_the_run(tiny, monkeypatch):
    """An operation that cannot be is refused while it is on; it names no other run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = tiny("train.deterministic=true")
    assert config_hash(config) == config_hash(tiny())
    run = Trainer(config, task_builder(config)(CPU), World(CPU))
    assert run.execution.deterministic
    assert torch.are_deterministic_algorithms_enabled()
    assert run.train_epoch()["train_loss"] is not None
    Trainer(tiny(), task_builder(config)(CPU), World(CPU))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def restored():
    """The switch is the whole process's."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("kind", [("dataset=cifar10", "dataset.limit=8"), ("dataset=movielens100k",)])
def test_every_network_has_deterministic_operations(tiny_data, tmp_path, kind):
    keys = (*kind, *FIXTURES[kind[0].partition("=")[2]], f"data_dir={tiny_data}", "device=cpu", "train.epochs=1")
    config = compose(*keys, f"runs_dir={tmp_path}", "train.deterministic=true")
    assert train(config)["status"] == "done"


def test_deterministic_runs_are_not_compiled():
    with pytest.raises(ConfigError, match=r"train.compile=default: does not go with train.deterministic; choose off"):
        compose("train.compile=default", "train.deterministic=true")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (("train.batch_size=1",), "train.batch_size=1: one of the 9 samples"),
        (
            ("train.batch_size=4", "train.micro_batch_size=1"),
            "train.batch_size=4, train.micro_batch_size=1: one of the",
        ),
        (("train.batch_size=4",), "train.batch_size=4: one of the 9 samples of an epoch is left alone"),
    ],
)
def test_a_sample_alone_is_refused_where_batch_norm_sees_single_values(tiny_data, tmp_path, keys, told):
    """ResNet-50 makes 1 x 1 maps of 32 x 32 pixels."""
    dataset = ("dataset=imagenet", *FIXTURES["imagenet"], "dataset.limit=9", f"data_dir={tiny_data}", "device=cpu")
    config = compose(*dataset, *keys, "train.epochs=1", f"runs_dir={tmp_path}")
    with pytest.raises(ConfigError, match=re.escape(told)):
        train(config)


def test_a_sample_alone_is_fine_elsewhere(tiny_data):
    """Where its maps are larger, or there is no batch norm."""
    for name, keys in (("imagenet", ("dataset.image_size=64",)), ("imagenet", ("model=mlp", "model.widths=[8]"))):
        config = compose(f"dataset={name}", *FIXTURES[name], *keys, "dataset.limit=9", f"data_dir={tiny_data}")
        task = task_builder(config)(torch.device("cpu"))
        (_, batch), *_ = task.dataset.train_batches(Batching(4), torch.Generator().manual_seed(0))
        refuse_single_values(task, task.model, batch, Batching(4))


def test_synchronized_batch_norm_may_see_a_sample_of_each_rank(tiny_data):
    config = compose("dataset=imagenet", *FIXTURES["imagenet"], "dataset.limit=8", f"data_dir={tiny_data}")
    task = task_builder(config)(torch.device("cpu"))
    (_, batch), *_ = task.dataset.train_batches(Batching(4), torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="left alone"):
        refuse_single_values(task, task.model, batch, Batching(4, rank=0, world_size=4))
    synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
    refuse_single_values(task, synchronized, batch, Batching(4, rank=0, world_size=4))


def test_steps_that_are_not_compiled_are_a_warning(tiny, monkeypatch, capsys):
    """They are slower, and round differently."""
    weight = [torch.nn.Parameter(torch.ones(2, 2))]
    assert constrained_step(torch.optim.Adam(weight)) == {}
    assert constrained_step(AdamLAWN(weight)) == {"constrained_step": "native"}
    monkeypatch.setattr(cpu_kernels, "build", lambda dtype: (None, "no C compiler was found"))
    assert constrained_step(AdamLAWN(weight, fused=False)) == {"constrained_step": "torch"}
    assert capsys.readouterr().out == ""
    config = tiny("train.epochs=1")
    train(config)
    told = "constrained steps are not compiled, so they are slower and round differently: no C compiler was found"
    assert f"warning: {told}\n" in capsys.readouterr().out
    assert json.loads((RunDirectory(config).path / "env.json").read_text())["constrained_step"] == "torch"


@pytest.mark.slow
def test_without_a_home_the_run_is_the_same(tmp_path):
    keys = ("dataset=digits", "dataset.limit=200", "model.widths=[16]", "train.epochs=3", "device=cpu")
    for name, environment in {"a": {}, "b": {"HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}}.items():
        done = run(*keys, "optim=adam_lawn", f"run_dir={tmp_path}/{name}", **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "warning" not in done.stdout
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == (tmp_path / "b" / "metrics.csv").read_bytes()
