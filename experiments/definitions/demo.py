"""The demo: loss flattening on real digits, and what decay and LAWN do about it."""

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.definitions.tables import CURVES

DEMO = Experiment(
    "demo",
    "Adam, Adam with decoupled weight decay and Adam-LAWN on scikit-learn's digits",
    (
        Cell("Adam", ("dataset=digits", "optim=adam")),
        Cell("Adam + weight decay", ("dataset=digits", "optim=adamw")),
        Cell("Adam-LAWN", ("dataset=digits", "optim=adam_lawn")),
    ),
    (
        Measure("test_accuracy", "test accuracy, %"),
        Measure("test_ece", "ECE", 4),
        Measure("train_loss", "final training loss, nats", -2, curve="log"),
        Measure("margin_p50", "median training margin, logits", curve="linear"),
        Measure("weight_norm", "norm of all weights", curve="linear"),
    ),
    figure="epochs",
    notes=(CURVES,),
)
