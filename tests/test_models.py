import numpy as np
import pytest
import torch

from lawn.errors import ConfigError
from lawn.models import ncf
from lawn.models.mf import MF
from lawn.models.mlp import mlp
from lawn.models.ncf import NCFMLP
from lawn.models.resnet import resnet50
from lawn.models.vgg import VGG19
from lawn.train import run as train


def test_mlp_is_fully_homogeneous():
    model = mlp((1, 4, 4), 3, widths=[8, 5])
    images = torch.randn(2, 1, 4, 4)
    before = model(images)
    for p in model.parameters():
        p.data *= 2
    torch.testing.assert_close(model(images), before * 2**3)


@pytest.mark.parametrize(
    ("model", "layers", "inputs"),
    [
        (NCFMLP(10, 20, factors=4, layers=3, init="he2017", bias=False), 5, (torch.arange(6), torch.arange(6))),
        (VGG19((3, 32, 32), 10, batch_norm=False, bias=False), 17, (torch.randn(2, 3, 32, 32),)),
    ],
)
def test_fully_homogeneous_options(model, layers, inputs):
    model = model.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    before = model(*inputs)
    for p in model.parameters():
        p.data *= 1.1
    assert before.abs().max() > 0
    torch.testing.assert_close(model(*inputs), before * 1.1**layers)


def test_ncf_sizes():
    model = NCFMLP(10, 20, factors=8, layers=3, init="he2017")
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (10, 32), (20, 32), (32, 64), (16, 32), (8, 16), (1, 8)
    ]  # fmt: skip
    assert model.user.weight.std() < 0.015
    assert NCFMLP(10, 20, factors=8, layers=3, init="torch").user.weight.std() > 0.5


def test_ncf_is_the_concatenation_for_small_and_large_batches(monkeypatch):
    model = NCFMLP(10, 20, factors=4, layers=2, init="torch").double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    users, items = torch.randint(10, (200,)), torch.randint(20, (200,))
    pair = torch.cat([model.user.weight[users], model.item.weight[items]], dim=1)
    expected = model.score(model.hidden(pair)).squeeze(1)

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), list(model.parameters()), retain_graph=True)

    whole = model(users, items)  # tables smaller than the batch: projected first
    split = torch.cat([model(u, i) for u, i in zip(users.split(5), items.split(5), strict=True)])
    monkeypatch.setattr(ncf, "CPU_ROWS", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes: list[int] = []
    model.score.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    parts = model(users, items)
    assert sizes == [64, 64, 64, 8]
    for got in (whole, split, parts):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(got), gradients(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(ncf, "CPU_ROWS", 14)  # for both threads fewer than the rows of both tables
    model(users, items)
    assert sizes[4:] == [200]


def test_vgg19():
    model = VGG19((3, 32, 32), 10, batch_norm=True)
    assert sum(p.numel() for p in model.parameters()) == 20_035_018
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 16
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in VGG19((3, 32, 32), 10, batch_norm=False).modules())
    with pytest.raises(ConfigError, match="32 x 32"):
        VGG19((1, 8, 8), 10, batch_norm=True)


def test_resnet50_begins_as_the_identity_of_its_blocks():
    model = resnet50((3, 64, 64), 7)
    gains = [p for name, p in model.named_parameters() if name.endswith("bn3.weight")]
    assert len(gains) == 16
    assert all((gain == 0).all() for gain in gains)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_mf_learns_as_rendle_et_al_update_it():
    """Their loop over samples, in NumPy."""
    rate, decay = 0.1, 0.02
    torch.manual_seed(0)
    model = MF(4, 5, factors=3, init_std=0.5, regularization=decay).double()
    p, q = model.user.weight.detach().numpy().copy(), model.item.weight.detach().numpy().copy()
    by_user, by_item, bias = np.zeros(4), np.zeros(5), 0.0
    rng = np.random.default_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(50):
        u, i, label = rng.integers(4), rng.integers(5), float(rng.integers(2))
        optimizer.zero_grad()
        logits, penalty = model(torch.tensor([u]), torch.tensor([i]), with_penalty=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([label]).double())
        (loss + penalty).backward()
        optimizer.step()
        gap = label - 1 / (1 + np.exp(-(bias + by_user[u] + by_item[i] + p[u] @ q[i])))
        p[u], q[i] = p[u] + rate * (gap * q[i] - decay * p[u]), q[i] + rate * (gap * p[u] - decay * q[i])
        by_user[u] += rate * (gap - decay * by_user[u])
        by_item[i] += rate * (gap - decay * by_item[i])
        bias += rate * (gap - decay * bias)
    for got, expected in (
        (model.user.weight, p), (model.item.weight, q), (model.user_bias, by_user), (model.item_bias, by_item),
        (model.bias, np.array(bias)),
    ):  # fmt: skip
        torch.testing.assert_close(got.detach(), torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_the_penalty_of_a_batch_is_the_mean_of_its_samples():
    model = MF(4, 5, factors=3, init_std=1.0, regularization=0.3).double()
    users, items = torch.tensor([0, 0, 3]), torch.tensor([1, 1, 4])
    logits, penalty = model(users, items, with_penalty=True)
    each = [model(u, i, with_penalty=True) for u, i in zip(users.split(1), items.split(1), strict=True)]
    torch.testing.assert_close(penalty, torch.stack([own for _, own in each]).mean())
    torch.testing.assert_close(logits, model(users, items))
    torch.testing.assert_close(logits, torch.cat([own for own, _ in each]))


@pytest.mark.parametrize(
    "model",
    [
        MF(4, 5, factors=3, init_std=1.0),
        NCFMLP(4, 5, factors=4, layers=3, init="torch"),
        NCFMLP(4, 5, factors=4, layers=1, init="torch", bias=False),
    ],
)
def test_scores_of_all_items_are_those_of_the_pairs(model):
    for p in model.parameters():
        torch.nn.init.normal_(p)
    users = torch.tensor([2, 0, 2])
    pairs = model(users.repeat_interleave(5), torch.arange(5).repeat(3))
    torch.testing.assert_close(model.all_scores(users), pairs.view(3, 5))


@pytest.mark.parametrize("key", ["optim=muon", "train.logit_scale=0.5"])
def test_what_needs_an_output_layer_refuses_mf(tiny_data, tmp_path, key):
    keys = (
        "dataset=movielens100k",
        "dataset.candidates=20",
        "model=mf",
        f"data_dir={tiny_data}",
        f"run_dir={tmp_path}",
    )
    lawn = () if key == "optim=muon" else ("optim=adam_lawn", "optim.free_epochs=1")
    with pytest.raises(ConfigError, match=f"{key}: the model has no linear layer"):
        train(*keys, *lawn, key, "train.epochs=2", "device=cpu")
