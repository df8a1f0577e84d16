"""The demo: loss flattening on real digits, and what decay and LAWN do about it."""

from experiments.spec import Cell, Column, Experiment

DEMO = Experiment(
    name="demo",
    title="Adam, Adam with decoupled weight decay and Adam-LAWN on scikit-learn's digits",
    cells=(
        Cell("Adam", ("dataset=digits", "optim=adam")),
        Cell("Adam + weight decay", ("dataset=digits", "optim=adamw")),
        Cell("Adam-LAWN", ("dataset=digits", "optim=adam_lawn")),
    ),
    columns=(
        Column("test_accuracy", "test accuracy, %", 2),
        Column("test_ece", "ECE", 4),
        Column("train_loss", "final training loss", -2),
        Column("margin_p50", "median margin", 2),
        Column("weight_norm", "weight norm", 2),
    ),
    seeds=3,
)
