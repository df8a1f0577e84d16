"""Recommenders without our training loop, to compare the tables' numbers with: popularity, and iALS of `implicit`.

Both are matrix factorizations: popularity is a bias of each item. They are evaluated as the models of `run.py` are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from scipy.sparse import csr_matrix

from lawn.compose import compose
from lawn.data.interactions import Interactions
from lawn.models.mf import MF
from lawn.packages import check_installed
from lawn.task import Recommendation, task_builder


@dataclass(frozen=True)
class Settings:
    dataset: str = "movielens1m"
    factors: int = 192
    iterations: int = 16
    alphas: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)  # weights of interactions; that of all other pairs is 1
    regularizations: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0)
    seeds: int = 3


def run(settings: Settings, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate both on the test split; iALS with the weight and regularization that are best on the validation split.

    Raises ConfigError without the package `implicit`.
    """
    check_installed("implicit", "references", "'.[references]'")

    def load(split: str, factors: int) -> tuple[Recommendation, MF]:
        task = task_builder(
            compose(
                *(f"dataset={settings.dataset}", "model=mf", f"model.factors={factors}", f"eval.split={split}"),
                *overrides,
            )
        )(torch.device("cpu"))
        assert isinstance(task, Recommendation)
        assert isinstance(task.model, MF)
        for parameter in task.model.parameters():
            torch.nn.init.zeros_(parameter)
        return task, task.model

    task, model = load("test", 1)
    data: Any = task.dataset
    with torch.no_grad():
        model.item_bias.copy_(data.items.bincount(minlength=data.num_items))
    popularity = evaluate(task, model)
    task, model = load("val", settings.factors)
    grid = []
    for alpha, regularization in product(settings.alphas, settings.regularizations):
        fit_ials(model, task.dataset, settings, alpha, regularization, seed=0)
        grid.append({"alpha": alpha, "regularization": regularization, "hr10": evaluate(task, model)["hr10"]})
    best = max(grid, key=lambda point: point["hr10"])
    task, model = load("test", settings.factors)
    repeats = []
    for seed in range(settings.seeds):
        fit_ials(model, task.dataset, settings, best["alpha"], best["regularization"], seed)
        repeats.append(evaluate(task, model))
    metrics = {"popularity": [popularity], "ials": repeats}
    return {"status": "done", "metrics": metrics, "grid": grid, "chosen": best, "warnings": task.warnings}


@torch.no_grad()
def fit_ials(model: MF, data: Any, settings: Settings, alpha: float, regularization: float, seed: int) -> None:
    """Set the embeddings of the model by iALS (Hu et al. 2008) on the training interactions."""
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    assert isinstance(data, Interactions)
    ones = torch.ones(len(data.users)).numpy()
    seen = csr_matrix((ones, (data.users.numpy(), data.items.numpy())), shape=(data.num_users, data.num_items))
    with threadpool_limits(1, "blas"):  # as implicit asks for: its own threads call it
        solver = AlternatingLeastSquares(
            settings.factors,
            regularization,
            alpha,
            iterations=settings.iterations,
            random_state=seed,
            use_gpu=False,
            num_threads=torch.get_num_threads(),
        )
        solver.fit(seen, show_progress=False)
    model.user.weight.copy_(torch.from_numpy(solver.user_factors))
    model.item.weight.copy_(torch.from_numpy(solver.item_factors))


@torch.no_grad()
def evaluate(task: Recommendation, model: MF) -> dict[str, float]:
    """HR@10 and NDCG@10 among the candidates, and among all items."""
    found: dict[str, float] = {}
    for suffix, ranks_of in {"": task.rows, "_all": task.all_items_ranks}.items():
        ranks = torch.cat([ranks_of(model, batch) for batch in task.dataset.eval_batches()])
        metrics = task.metrics(ranks)
        found |= {f"{name}{suffix}": metrics[name] for name in ("hr10", "ndcg10")}
    return found
