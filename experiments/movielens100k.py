"""MovieLens-100k at batch 10k with every optimizer: the defaults of `python run.py dataset=movielens100k`."""

from experiments.spec import Cell, Column, Experiment

MOVIELENS100K = Experiment(
    name="movielens100k",
    title="NCF on MovieLens-100k, 60 epochs at batch 10k, hyperparameters tuned on the validation split",
    cells=tuple(
        Cell(label, ("dataset=movielens100k", f"optim={optim}"))
        for label, optim in (
            ("SGD", "sgd"),
            ("SGD-LAWN", "sgd_lawn"),
            ("Adam", "adam"),
            ("Adam + weight decay", "adamw"),
            ("Adam-LAWN", "adam_lawn"),
        )
    ),
    columns=(
        Column("test_hr10", "test HR@10, %", 2),
        Column("test_ndcg10", "test NDCG@10, %", 2),
        Column("train_loss", "final training loss", 3),
        Column("margin_p50", "median margin", 2),
        Column("weight_norm", "weight norm", 1),
    ),
    seeds=3,
)
