"""Matrix factorization on MovieLens-1M with the settings of Rendle et al. 2020, to compare the tables' numbers with."""

from experiments.definitions.spec import Cell, Experiment, Measure

_BATCH, _RATE = 5000, 0.002  # Rendle et al. update after each sample; a batch of small steps is their sum

MATRIX_FACTORIZATION = Experiment(
    "matrix_factorization",
    "Matrix factorization on MovieLens-1M",
    (
        Cell(
            "Matrix factorization, SGD",
            (
                *("dataset=movielens1m", "dataset.negatives=8", "model=mf", f"train.batch_size={_BATCH}"),
                *("optim=sgd", f"optim.lr={_BATCH * _RATE:g}", "optim.momentum=0", "optim.weight_decay=0"),
                *("schedule=constant", "schedule.warmup_epochs=0"),
            ),
            epochs=(256,),
            all_items=True,
        ),
    ),
    (
        Measure("headline", "test HR@10, %"),
        Measure("test_ndcg10", "NDCG@10, %"),
        Measure("test_hr10_all", "HR@10 among all items, %"),
        Measure("test_ndcg10_all", "NDCG@10 among all items, %"),
    ),
    notes=(
        "A dot product with biases, 191 factors (Rendle et al. count the bias as the 192nd), rate 0.002, "
        "regularization 0.005, 8 negatives, standard deviation 0.1, 256 epochs, as Rendle et al. 2020 chose them on a "
        "validation split. They update after each sample. Here the mean loss of 5,000 samples is multiplied by 5,000 "
        "times the rate, which adds their steps up at the same weights. They draw negatives among all items; here they "
        "are items that the user is not trained on.",
    ),
)
