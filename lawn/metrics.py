"""Metrics in two steps: a row of numbers for each sample, then what the rows of all samples come to.

Rows may be computed in any batches and on any number of processes; joined, they give the same metrics. All
percentages are 0 to 100.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ECE_BINS = 15
TOP_KS = (5, 10, 20)


def classification_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [B, K] and classes [B], float64 [B, 5]: confidence, whether the answer is right, whether the class is
    among the best five, negative log-likelihood, Brier score."""
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    of_label = log_p.gather(1, labels[:, None])
    ahead = (~(log_p < of_label)).sum(dim=1) - 1  # ties are ahead; the label itself is not
    known = of_label[:, 0].isfinite()  # where the network has diverged, no answer is right
    brier = (p - F.one_hot(labels, logits.shape[1])).square().sum(dim=1)
    columns = confidence, (predicted == labels) & known, (ahead < 5) & known, -of_label[:, 0], brier
    return torch.stack([column.double() for column in columns], dim=1)


def classification_metrics(rows: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy (%), expected calibration error with bins of equal width and of equal size
    (fractions), negative log-likelihood (nats), Brier score (0 to 2: summed over classes)."""
    confidence, correct, top5, nll, brier = rows.T
    return {
        "accuracy": 100 * correct.mean().item(),
        "top5": 100 * top5.mean().item(),
        "ece": calibration_error(confidence, correct).item(),
        "adaptive_ece": adaptive_calibration_error(confidence, correct).item(),
        "nll": nll.mean().item(),
        "brier": brier.mean().item(),
    }


def calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Expected calibration error, 15 bins of equal width, lower edge exclusive, upper inclusive (Guo et al. 2017)."""
    index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, device=confidence.device, dtype=confidence.dtype)
    return gaps.index_add_(0, index, confidence - correct).abs().sum() / len(confidence)


def adaptive_calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """The same over 15 bins of as many samples each, to within one (Nguyen & O'Connor 2015; Mukhoti et al. 2020).

    Of samples with equal confidence the wrong answers come first, so that their order does not matter.
    """
    order = correct.argsort(stable=True)
    order = order[confidence[order].argsort(stable=True)]
    gaps = (confidence - correct)[order].tensor_split(ECE_BINS)
    return torch.stack([gap.sum().abs() for gap in gaps]).sum() / len(confidence)


def ranks(scores: Tensor, items: Tensor) -> Tensor:
    """World, from 0, of the held-out items among their candidates: scores and items [B, 1 + C], the held-out item
    first; int64 [B]. A tie counts as a loss, so does a NaN; a candidate that is the held-out item does not count."""
    ahead = ~(scores[:, 1:] < scores[:, :1]) & (items[:, 1:] != items[:, :1])
    return ahead.sum(dim=1)


def ranking_metrics(ranks: Tensor) -> dict[str, float]:
    """HR@k and NDCG@k (%): with one relevant item, NDCG is 1 / log2(rank + 2) inside the top k, rank from 0."""
    gain = 1 / torch.log2(ranks.double() + 2)
    hits = {k: (ranks < k).double() for k in TOP_KS}
    ratios = {f"hr{k}": 100 * hit.mean().item() for k, hit in hits.items()}
    return ratios | {f"ndcg{k}": 100 * (gain * hit).mean().item() for k, hit in hits.items()}
