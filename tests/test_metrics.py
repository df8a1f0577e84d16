import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from lawn import metrics
from lawn.diagnostics import binary_margin, multiclass_margin, weight_norm


def random_case(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


@given(count=st.integers(1, 60), classes=st.integers(2, 7), seed=st.integers(0, 9999))
@settings(deadline=None)
def test_classification_against_independent_computations(count, classes, seed):
    logits, labels = random_case(count, classes, seed)
    got = metrics.classification_metrics(metrics.classification_sums(logits, labels))
    p = torch.softmax(logits.double(), 1).numpy()
    y = labels.numpy()
    assert got["accuracy"] == pytest.approx(100 * (p.argmax(1) == y).mean())
    assert got["nll"] == pytest.approx(
        log_loss(y, p / p.sum(1, keepdims=True), labels=range(classes)), rel=1e-5, abs=1e-6
    )
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in pairwise(edges):  # Guo et al. 2017, bin by bin
        inside = (p.max(1) > low) & (p.max(1) <= high)
        if inside.any():
            ece += inside.mean() * abs((p.argmax(1) == y)[inside].mean() - p.max(1)[inside].mean())
    assert got["ece"] == pytest.approx(ece, abs=1e-5)


def test_ece_by_hand():
    """Two answers of confidence 0.9 in one bin, one of them right: |0.9 - 0.5| = 0.4."""
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1]]))
    got = metrics.classification_metrics(metrics.classification_sums(logits, torch.tensor([0, 1])))
    assert got["ece"] == pytest.approx(0.4, abs=1e-6)
    assert got["accuracy"] == 50


@given(count=st.integers(2, 40), cut=st.integers(1, 39), seed=st.integers(0, 9999))
@settings(deadline=None)
def test_sums_of_parts_are_the_sums_of_the_whole(count, cut, seed):
    logits, labels = random_case(count, 4, seed)
    cut = min(cut, count - 1)
    whole = metrics.classification_metrics(metrics.classification_sums(logits, labels))
    parts = metrics.add({}, metrics.classification_sums(logits[:cut], labels[:cut]))
    parts = metrics.add(parts, metrics.classification_sums(logits[cut:], labels[cut:]))
    assert metrics.classification_metrics(parts) == pytest.approx(whole)


def test_ranking_by_hand():
    scores = torch.zeros(4, 100)
    scores[0, 0] = 1  # rank 0
    scores[1, 1:10], scores[1, 0] = 2, 1  # rank 9: the last hit
    scores[2, 1:11], scores[2, 0] = 2, 1  # rank 10: a miss
    # user 3: all tied with the held-out item, a miss
    got = metrics.ranking_metrics(metrics.ranking_sums(scores))
    assert got["hr10"] == 50
    assert got["ndcg10"] == pytest.approx(100 * (1 + 1 / math.log2(11)) / 4)


def test_scores_that_are_not_numbers_are_no_hits():
    scores = torch.full((1, 100), torch.nan)
    assert metrics.ranking_metrics(metrics.ranking_sums(scores))["hr10"] == 0
    scores = torch.arange(100.0).flip(0)[None].clone()
    scores[0, 50:] = torch.nan
    assert metrics.ranking_metrics(metrics.ranking_sums(scores))["hr10"] == 0


def test_margins_by_hand():
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert multiclass_margin(logits, torch.tensor([1, 0])).tolist() == [2.0, -3.0]
    assert binary_margin(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])).tolist() == [2.0, -2.0]


def test_weight_norm_leaves_out_vectors():
    parameters = [torch.full((2, 2), 1.0), torch.full((3,), 9.0), torch.full((1, 5), 2.0, dtype=torch.bfloat16)]
    assert weight_norm(parameters).item() == pytest.approx(math.sqrt(4 + 20))
