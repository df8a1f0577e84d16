"""Metrics as sums over samples: add the sums of any split of the data, then finish. All percentages are 0 to 100."""

import torch
from torch import Tensor
from torch.nn import functional as F

ECE_BINS = 15
TOP_K = 10


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums over a batch of logits [B, K] and classes [B].

    `bins` [15, 3] holds count, summed confidence and correct answers for each of 15 equal-width confidence bins
    (lower edge exclusive, upper inclusive; Guo et al. 2017).
    """
    confidence, predicted = F.softmax(logits.float(), dim=1).max(dim=1)
    correct = (predicted == labels).float()
    index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    bins = torch.zeros(ECE_BINS, 3, device=logits.device, dtype=torch.float64)
    bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, correct], dim=1).double())
    return {
        "count": torch.tensor(len(labels), device=logits.device, dtype=torch.float64),
        "correct": correct.sum(dtype=torch.float64),
        "nll": F.cross_entropy(logits.float(), labels, reduction="sum").double(),
        "bins": bins,
    }


def classification_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy (%), expected calibration error (fraction) and negative log-likelihood (nats)."""
    gap = (sums["bins"][:, 1] - sums["bins"][:, 2]).abs().sum()
    return {
        "accuracy": float(100 * sums["correct"] / sums["count"]),
        "ece": float(gap / sums["count"]),
        "nll": float(sums["nll"] / sums["count"]),
    }


def ranking_sums(scores: Tensor) -> dict[str, Tensor]:
    """Sums over users of scores [B, 1 + C], the held-out item first. A tie counts as a loss; so does a NaN."""
    rank = (~(scores[:, 1:] < scores[:, :1])).sum(dim=1)
    hit = rank < TOP_K
    gain = torch.where(hit, 1 / torch.log2(rank + 2.0), 0.0)
    return {
        "count": torch.tensor(len(scores), device=scores.device, dtype=torch.float64),
        "hits": hit.sum(dtype=torch.float64),
        "gain": gain.sum(dtype=torch.float64),
    }


def ranking_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """HR@10 and NDCG@10 (%): with one relevant item, NDCG is 1 / log2(rank + 2) inside the top 10, rank from 0."""
    return {
        f"hr{TOP_K}": float(100 * sums["hits"] / sums["count"]),
        f"ndcg{TOP_K}": float(100 * sums["gain"] / sums["count"]),
    }


def add(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + total[key] for key, value in part.items()} if total else part
