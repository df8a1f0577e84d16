import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, ndcg_score, top_k_accuracy_score
from torch import nn
from torch.nn.utils import parametrizations

from lawn import losses, metrics
from lawn.diagnostics import binary_margin, multiclass_margin, weight_norm
from lawn.optim import bound_norms


def random_case(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return metrics.classification_metrics(metrics.classification_rows(logits, labels))


@given(count=st.integers(1, 60), classes=st.integers(2, 9), seed=st.integers(0, 9999))
@settings(deadline=None)
def test_classification_against_independent_computations(count, classes, seed):
    logits, labels = random_case(count, classes, seed)
    got = evaluate(logits, labels)
    p = torch.softmax(logits.double(), 1).numpy()
    p /= p.sum(1, keepdims=True)
    y = labels.numpy()
    confidence, correct = p.max(1), (p.argmax(1) == y).astype(float)
    assert got["accuracy"] == pytest.approx(100 * correct.mean())
    assert got["nll"] == pytest.approx(log_loss(y, p, labels=range(classes)), rel=1e-5, abs=1e-6)
    brier = brier_score_loss(y, p, labels=range(classes), scale_by_half=False)
    assert got["brier"] == pytest.approx(brier, rel=1e-5, abs=1e-6)
    assert got["top5"] == pytest.approx(
        100 * (top_k_accuracy_score(y, p, k=5, labels=range(classes)) if classes > 5 else 1.0)
    )
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in pairwise(edges):  # Guo et al. 2017, bin by bin
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert got["ece"] == pytest.approx(ece, abs=1e-5)
    adaptive = 0.0
    for part in np.array_split(np.lexsort((correct, logits.softmax(1).numpy().max(1))), 15):
        if len(part):
            adaptive += len(part) / count * abs(correct[part].mean() - confidence[part].mean())
    assert got["adaptive_ece"] == pytest.approx(adaptive, abs=1e-5)


def test_calibration_by_hand():
    """Two answers of confidence 0.9 in one bin, one of them right: |0.9 - 0.5| = 0.4. Fifteen bins of equal size hold
    one each, the wrong one first: (0.9 + 0.1) / 2 = 0.5."""
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1]]))
    for labels in ([0, 1], [1, 0]):
        got = evaluate(logits, torch.tensor(labels))
        assert got["ece"] == pytest.approx(0.4, abs=1e-6)
        assert got["adaptive_ece"] == pytest.approx(0.5, abs=1e-6)
        assert got["accuracy"] == 50
        assert got["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.9**2) / 2, abs=1e-6)


def test_adaptive_bins_hold_as_many_samples_each():
    """30 samples, two for each bin: the surest pair is (0.99 right, 0.98 wrong), all others are as sure as right."""
    confidence = torch.cat([torch.full((28,), 0.5), torch.tensor([0.98, 0.99])]).double()
    correct = torch.tensor([0.0, 1.0] * 14 + [0.0, 1.0]).double()
    # The 28 samples of confidence 0.5 are sorted wrong answers first: seven bins of -1.0 and seven of +1.0 in sum.
    expected = (14 * 1.0 + abs(0.98 + 0.99 - 1)) / 30
    assert metrics.adaptive_calibration_error(confidence, correct).item() == pytest.approx(expected)
    shuffled = torch.randperm(30)
    assert metrics.adaptive_calibration_error(confidence[shuffled], correct[shuffled]).item() == pytest.approx(expected)


@given(count=st.integers(2, 40), cut=st.integers(1, 39), seed=st.integers(0, 9999))
@settings(deadline=None)
def test_metrics_of_any_parts_in_any_order_are_those_of_the_whole(count, cut, seed):
    logits, labels = random_case(count, 4, seed)
    cut = min(cut, count - 1)
    parts = [metrics.classification_rows(logits[part], labels[part]) for part in (slice(cut, None), slice(cut))]
    assert metrics.classification_metrics(torch.cat(parts)) == pytest.approx(evaluate(logits, labels))


def rank(scores: torch.Tensor, items: torch.Tensor | None = None) -> dict[str, float]:
    others = torch.arange(scores.shape[1]).expand_as(scores) if items is None else items
    return metrics.ranking_metrics(metrics.ranks(scores, others))


def test_ranking_by_hand():
    scores = torch.zeros(4, 100)
    scores[0, 0] = 1  # rank 0
    scores[1, 1:10], scores[1, 0] = 2, 1  # rank 9: the last hit of the ten
    scores[2, 1:11], scores[2, 0] = 2, 1  # rank 10: one of the twenty
    # user 3: all tied with the held-out item, a miss
    got = rank(scores)
    assert (got["hr5"], got["hr10"], got["hr20"]) == (25, 50, 75)
    assert got["ndcg5"] == pytest.approx(100 / 4)
    assert got["ndcg10"] == pytest.approx(100 * (1 + 1 / math.log2(11)) / 4)
    assert got["ndcg20"] == pytest.approx(100 * (1 + 1 / math.log2(11) + 1 / math.log2(12)) / 4)


@given(seed=st.integers(0, 9999))
@settings(deadline=None, max_examples=25)
def test_ndcg_is_that_of_scikit_learn(seed):
    scores = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    relevance = np.zeros((6, 30))
    relevance[:, 0] = 1
    assert rank(scores)["ndcg10"] == pytest.approx(100 * ndcg_score(relevance, scores.numpy(), k=10))


def test_the_held_out_item_is_not_ranked_against_itself():
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    items = torch.tensor([[7, 7, 3], [7, 8, 3]])
    assert metrics.ranks(scores, items).tolist() == [0, 1]


def test_scores_that_are_not_numbers_are_no_hits():
    assert rank(torch.full((1, 100), torch.nan))["hr10"] == 0
    scores = torch.arange(100.0).flip(0)[None].clone()
    scores[0, 50:] = torch.nan
    assert rank(scores)["hr20"] == 0
    for classes in (3, 10):
        got = evaluate(torch.full((2, classes), torch.nan), torch.tensor([0, 1]))
        assert (got["accuracy"], got["top5"]) == (0, 0)
    assert evaluate(torch.zeros(2, 10), torch.tensor([0, 1]))["top5"] == 0  # ties are no hits


def test_margins_by_hand():
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert multiclass_margin(logits, torch.tensor([1, 0])).tolist() == [2.0, -3.0]
    assert binary_margin(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64])
def test_binary_labels_of_any_dtype(dtype):
    logits, labels = torch.tensor([2.0, 2.0]), torch.tensor([1, 0])
    assert binary_margin(logits, labels.to(dtype)).tolist() == [2.0, -2.0]
    loss = losses.binary_focal(gamma=2.0)
    assert loss(logits, labels.to(dtype)) == loss(logits, labels.float())


@pytest.mark.parametrize("error", [metrics.calibration_error, metrics.adaptive_calibration_error])
def test_calibration_errors_of_many_samples(error):
    """Half precision stops at 256 in a sum of ones, float32 at 2^24."""
    confidence = torch.full((10_000,), 0.75, dtype=torch.bfloat16)
    found = error(confidence, torch.zeros(10_000, dtype=torch.float64))
    assert (found.item(), found.dtype) == (0.75, torch.bfloat16)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.calibration_error(torch.ones(4), torch.ones(1)),
        lambda: metrics.adaptive_calibration_error(torch.ones(4), torch.ones(4, 1)),
        lambda: metrics.ranks(torch.ones(4, 3), torch.ones(1, 3)),
        lambda: metrics.ranks_among_all(torch.ones(4, 3), torch.tensor([1]), torch.zeros(4, 3, dtype=torch.bool)),
        lambda: metrics.ranks_among_all(torch.ones(4, 3), torch.ones(4).long(), torch.zeros(3, dtype=torch.bool)),
        lambda: losses.focal(gamma=1.0)(torch.ones(4, 3), torch.tensor([1])),
        lambda: losses.focal(gamma=1.0)(torch.ones(4), torch.ones(4).long()),
    ],
)
def test_other_shapes_are_refused(call):
    """One value would count for all, without an error."""
    with pytest.raises(ValueError, match=r"^need .* got \[4"):
        call()


def test_margins_of_other_shapes_are_refused():
    """Broadcasting would give wrong ones in silence."""
    with pytest.raises(ValueError, match=r"got logits \[4, 1\] and labels \[4\]"):
        binary_margin(torch.ones(4, 1), torch.ones(4))
    for logits, labels in (((4, 1), (4,)), ((4, 3), (4, 1)), ((4,), (4,)), ((4, 3), (3,))):
        with pytest.raises(ValueError, match=r"need logits \[B, K\] of K >= 2 classes"):
            multiclass_margin(torch.ones(logits), torch.zeros(labels, dtype=torch.long))


def test_weight_norm_leaves_out_vectors():
    model = nn.ParameterList([torch.full((2, 2), 1.0), torch.full((3,), 9.0), torch.full((1, 5), 2.0).bfloat16()])
    assert weight_norm(model).item() == pytest.approx(math.sqrt(4 + 20))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weight_norm_of_a_parametrized_layer_changes_nothing(wrap):
    layer = wrap(nn.Linear(30, 20))
    model = nn.Sequential(layer, nn.Dropout()).train()
    model(torch.ones(1, 30))
    layer.eval()
    expected = layer.weight.norm().item()
    layer.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert weight_norm(model).item() == pytest.approx(expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_weight_norm_is_of_the_weights_that_the_model_computes_with():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    model.append(nn.Linear(3, 4, bias=False))
    model[2].weight = model[0].weight  # tied: counts once
    before = weight_norm(model).item()
    assert before == pytest.approx(math.hypot(*(p.norm().item() for p in model.parameters())))
    bound_norms(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert weight_norm(model).item() == pytest.approx(before)


@given(seed=st.integers(0, 9999), users=st.integers(1, 6), items=st.integers(2, 9))
@settings(deadline=None)
def test_ranks_among_all_items_are_counted_one_by_one(seed, users, items):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (users, items)).astype(float)  # with ties
    scores[rng.random(scores.shape) < 0.1] = math.nan
    held = rng.integers(items, size=users)
    excluded = rng.random(scores.shape) < 0.3
    got = metrics.ranks_among_all(torch.from_numpy(scores), torch.from_numpy(held), torch.from_numpy(excluded))
    for user in range(users):
        ahead = 0
        for item in range(items):
            if item != held[user] and not excluded[user, item] and not scores[user, item] < scores[user, held[user]]:
                ahead += 1
        assert got[user] == ahead
