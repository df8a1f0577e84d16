"""Evaluation metrics in two steps: per-sample results, then metrics of all samples.

The results of each sample do not depend on the other samples. Those of any batches and processes can be concatenated.
Percentages are between 0 and 100.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ECE_BINS = 15
TOP_KS = (5, 10, 20)


def classification_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the results of each sample for `classification_metrics`.

    Args:
        logits: logits [B, K].
        labels: classes [B].

    Returns:
        A float64 tensor [B, 5] with the columns confidence, top-1 correct, top-5 correct, negative log-likelihood
            (nats) and Brier score. Of classes with equal logits top-1 predicts the first; for top-5 they all rank
            before the label, so that a network that has collapsed has no hits. Where the logits are not finite, no
            prediction is correct.

    Examples:
        >>> import torch
        >>> from lawn.metrics import classification_rows
        >>> classification_rows(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0])).round(decimals=4)
        tensor([[0.7500, 1.0000, 1.0000, 0.2877, 0.1250]], dtype=torch.float64)
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    label_log_p = log_p.gather(1, labels[:, None])
    better = (~(log_p < label_log_p)).sum(dim=1) - 1  # ties count, the label itself does not
    finite = label_log_p[:, 0].isfinite()
    brier = (p - F.one_hot(labels, logits.shape[1])).square().sum(dim=1)
    columns = confidence, (predicted == labels) & finite, (better < 5) & finite, -label_log_p[:, 0], brier
    return torch.stack([column.double() for column in columns], dim=1)


def classification_metrics(rows: Tensor) -> dict[str, float]:
    """Compute the metrics of a classifier.

    Args:
        rows: results [N, 5] of `classification_rows`.

    Returns:
        Top-1 accuracy `accuracy` and top-5 accuracy `top5` (%), expected calibration error with bins of equal width
            `ece` and of equal size `adaptive_ece` (fractions), mean negative log-likelihood `nll` (nats) and mean Brier
            score `brier` (0 to 2, summed over classes).

    Examples:
        >>> import torch
        >>> from lawn.metrics import classification_metrics, classification_rows
        >>> logits = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
        >>> metrics = classification_metrics(classification_rows(logits, torch.tensor([0, 1])))
        >>> metrics["accuracy"], metrics["ece"], metrics["nll"], metrics["brier"]
        (50.0, 0.5, 50.0, 1.0)
    """
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
    """Compute the expected calibration error with 15 bins of equal width.

    A bin excludes its lower edge and includes its upper edge.

    Args:
        confidence: probability [N] of the predicted class.
        correct: whether the prediction is correct [N], as floats.

    Returns:
        The error as a fraction, a 0-dim tensor.

    Raises:
        ValueError: if the shapes are others.

    References:
        Guo et al. 2017, section 2, [arXiv:1706.04599](https://arxiv.org/abs/1706.04599).

    Examples:
        >>> import torch
        >>> from lawn.metrics import calibration_error
        >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([1.0, 0.0]))
        tensor(0.2500)
    """
    index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, device=confidence.device, dtype=torch.float64)
    error = gaps.index_add_(0, index, _gaps(confidence, correct)).abs().sum() / len(confidence)
    return error.to(confidence.dtype)


def adaptive_calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the expected calibration error with 15 bins of equal size.

    The sizes of bins differ by at most one sample. Among samples of equal confidence the incorrect ones come first, so
    the result does not depend on their order.

    Args:
        confidence: probability [N] of the predicted class.
        correct: whether the prediction is correct [N], as floats.

    Returns:
        The error as a fraction, a 0-dim tensor.

    Raises:
        ValueError: if the shapes are others.

    References:
        - Nguyen & O'Connor 2015, [arXiv:1508.05154](https://arxiv.org/abs/1508.05154).
        - Mukhoti et al. 2020, [arXiv:2002.09437](https://arxiv.org/abs/2002.09437).

    Examples:
        >>> import torch
        >>> from lawn.metrics import adaptive_calibration_error
        >>> adaptive_calibration_error(torch.tensor([0.75, 0.5]), torch.tensor([1.0, 0.0]))
        tensor(0.3750)
    """
    order = correct.argsort(stable=True)
    order = order[confidence[order].argsort(stable=True)]
    gaps = _gaps(confidence, correct)[order].tensor_split(ECE_BINS)
    return (torch.stack([gap.sum().abs() for gap in gaps]).sum() / len(confidence)).to(confidence.dtype)


def _gaps(confidence: Tensor, correct: Tensor) -> Tensor:
    """Confidence minus correctness [N], in float64: float32 adds nothing to a sum beyond 2^24."""
    if confidence.ndim != 1 or correct.shape != confidence.shape:
        raise ValueError(f"need a confidence for each prediction, got {[*confidence.shape]} and {[*correct.shape]}")
    return confidence.double() - correct.double()


def ranks(scores: Tensor, items: Tensor) -> Tensor:
    """Rank the held-out item of each user among its candidates.

    Args:
        scores: scores [B, 1 + C] of the held-out item, which comes first, and of the candidates.
        items: item ids [B, 1 + C]. Candidates with the id of the held-out item do not count.

    Returns:
        Ranks [B] from 0, as int64. Candidates with equal or NaN scores rank before the held-out item.

    Raises:
        ValueError: if the shapes are others.

    Examples:
        >>> import torch
        >>> from lawn.metrics import ranks
        >>> ranks(torch.tensor([[0.5, 0.9, 0.5, 0.1]]), torch.tensor([[7, 3, 4, 5]]))
        tensor([2])
    """
    if items.shape != scores.shape:
        raise ValueError(f"need a score for each item, got {[*scores.shape]} and {[*items.shape]}")
    better = ~(scores[:, 1:] < scores[:, :1]) & (items[:, 1:] != items[:, :1])
    return better.sum(dim=1)


def ranks_among_all(scores: Tensor, held: Tensor, excluded: Tensor) -> Tensor:
    """Rank the held-out item of each user among all items.

    Args:
        scores: scores [B, I] of all items.
        held: id [B] of the held-out item.
        excluded: items [B, I] that do not count, as those that the user is trained on.

    Returns:
        Ranks [B] from 0, as int64. Items with equal or NaN scores rank before the held-out item.

    Raises:
        ValueError: if the shapes are others.

    References:
        Krichene & Rendle 2020, "On Sampled Metrics for Item Recommendation": metrics on sampled candidates can order
        recommenders differently from metrics on all items.

    Examples:
        >>> import torch
        >>> from lawn.metrics import ranks_among_all
        >>> excluded = torch.tensor([[False, True, False, False]])
        >>> ranks_among_all(torch.tensor([[0.5, 0.9, 0.5, 0.1]]), torch.tensor([0]), excluded)
        tensor([1])
    """
    if held.shape != scores.shape[:1] or excluded.shape != scores.shape:
        raise ValueError(
            f"need scores [B, I], items [B] and a mask [B, I], got {[*scores.shape]}, {[*held.shape]} and "
            f"{[*excluded.shape]}"
        )
    better = ~(scores < scores.gather(1, held[:, None])) & ~excluded
    return better.scatter(1, held[:, None], False).sum(dim=1)


def ranking_metrics(ranks: Tensor) -> dict[str, float]:
    """Compute HR@k and NDCG@k for k = 5, 10 and 20.

    With one relevant item, NDCG@k is 1 / log2(rank + 2) for ranks below k, and 0 for others.

    Args:
        ranks: ranks [N] from 0.

    Returns:
        `hr5`, `hr10`, `hr20`, `ndcg5`, `ndcg10` and `ndcg20` (%).

    References:
        He et al. 2017, section 4.1, [arXiv:1708.05031](https://arxiv.org/abs/1708.05031).

    Examples:
        >>> import torch
        >>> from lawn.metrics import ranking_metrics
        >>> metrics = ranking_metrics(torch.tensor([0, 6]))
        >>> metrics["hr5"], metrics["hr10"], round(metrics["ndcg10"], 2)
        (50.0, 100.0, 66.67)
    """
    gain = 1 / torch.log2(ranks.double() + 2)
    hits = {k: (ranks < k).double() for k in TOP_KS}
    ratios = {f"hr{k}": 100 * hit.mean().item() for k, hit in hits.items()}
    return ratios | {f"ndcg{k}": 100 * (gain * hit).mean().item() for k, hit in hits.items()}
