"""The demo: loss flattening on real digits, and what decay and LAWN do about it."""

from experiments.spec import Cell, Experiment

DEMO = Experiment(
    name="demo",
    title="Adam, Adam with decoupled weight decay and Adam-LAWN on scikit-learn's digits",
    cells=(
        Cell("Adam", ("dataset=digits", "optim=adam")),
        Cell("Adam + weight decay", ("dataset=digits", "optim=adamw")),
        Cell("Adam-LAWN", ("dataset=digits", "optim=adam_lawn")),
    ),
    seeds=3,
)
