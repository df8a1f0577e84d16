"""The paper's two figures."""

from dataclasses import replace

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.definitions.tables import (
    BARS,
    CURVES,
    DECAY,
    HEADLINE,
    PAIRS,
    PANELS,
    PAPER,
    RANGE,
    TABLE1,
    TABLE3,
    TABLE4,
)

_FIGURE1 = ("dataset=movielens100k", "model.bias=false", "train.batch_size=10000", "optim.lr=1e-3", "optim.eps=1e-8")
_SWITCH = PAPER["figure1"]["constrain_epoch"]

FIGURE1 = Experiment(
    "figure1",
    "Figure 1: attenuated logits against loss flattening, MovieLens-100k",
    (
        Cell("Adam without weight decay", (*_FIGURE1, "optim=adam", "optim.weight_decay=0"), epochs=(300, 60)),
        Cell(
            "Adam, logits attenuated, then fixed norms",
            (
                *_FIGURE1,
                "optim=adam_lawn",
                f"optim.free_epochs=${{scaled:{_SWITCH},300}}",
                f"train.logit_scale={PAPER['figure1']['logit_scale']}",
            ),
            epochs=(300, 60),
        ),
    ),
    (
        Measure("test_hr10", "test HR@10, %", curve="linear"),
        Measure("margin_p50", "median training margin, logits", curve="linear"),
        Measure("train_loss", "training loss, nats", 3, curve="log"),
    ),
    figure="epochs",
    pairs=(("Adam without weight decay", "Adam, logits attenuated, then fixed norms"),),
    notes=(
        f"A fully homogeneous network (no biases), batch 10k. After epoch {_SWITCH} of 300 (in proportion where the "
        "run is shorter) the output layer is multiplied by 0.2 and all norms are fixed. Until then both are the same "
        "run. The paper's curves are an image, so there are no numbers to compare with, and it names neither the "
        "learning rate nor the batch size.",
        CURVES,
    ),
)

_WATCHED = ("diagnostics=on", "diagnostics.updates=8", "diagnostics.samples=1000")
_INSIDE = (
    Measure("headline", "test accuracy or HR@10, %"),
    Measure("train_loss", "training loss, nats", 4),
    Measure("margin_p50", "median training margin, logits"),
    Measure("hessian_top", "top eigenvalue of the Hessian", -2),
    Measure("gradient_covariance", "trace of the gradients' covariance", -2),
)
_HOW = (
    "The Hessian of the training loss and the covariance of the samples' gradients (of one sample, not of a minibatch) "
    "are estimated on the same 1,000 training samples every {}; norms, angles and gradients of each weight are means "
    "over about 8 updates of each epoch. A single seed: an illustration, not a comparison of methods. Before commit "
    "3bbafd8 the tolerance of the Hessian's eigenvalue was so large that in single epochs it may be the second."
)
FLATTENING_DIGITS = Experiment(
    "flattening_digits",
    "Loss flattening inside two runs on digits",
    tuple(
        Cell(row, ("dataset=digits", f"optim={optim}", "optim.eps=1e-8", *_WATCHED, "eval.every=2"))
        for row, optim in (("Adam without weight decay", "adam"), ("Adam-LAWN", "adam_lawn"))
    ),
    _INSIDE,
    figure="diagnostics",
    notes=(
        "Adam and Adam-LAWN of the demo with diagnostics=on, and the same eps, so that they are the same run until the "
        f"norms are fixed. {_HOW.format('two epochs')}",
    ),
    seeds=1,
)
FLATTENING_MOVIELENS100K = Experiment(
    "flattening_movielens100k",
    "Loss flattening inside figure 1's two runs, MovieLens-100k",
    tuple(replace(cell, overrides=(*cell.overrides, *_WATCHED, "eval.every=10")) for cell in FIGURE1.cells),
    _INSIDE,
    figure="diagnostics",
    notes=(
        "The settings are those of figure 1, with diagnostics=on; the runs are others, and differ by rounding. "
        f"{_HOW.format('10 epochs')}",
    ),
    seeds=1,
)

_SHOWN = {*PAPER["figure2"]["panels"], "movielens100k"}
FIGURE2 = Experiment(
    "figure2",
    "Figure 2: Adam-LAWN against Adam with tuned weight decay over the batch size",
    tuple(
        cell
        for table in (TABLE3, TABLE4, TABLE1)
        for panel in PANELS
        for cell in table.cells
        if panel in _SHOWN and cell.value("dataset") == panel and cell.row in ("Adam, eps 1e-8", "Adam-LAWN")
    ),
    (HEADLINE,),
    figure="batch",
    pairs=PAIRS,
    of_tables=True,
    notes=(
        "The runs are those of tables 1, 3 and 4, and so is their tuning. The paper's figure has no panel for "
        "MovieLens-100k.",
        BARS,
        DECAY,
        "Adam's eps is 1e-8, LAWN's 1e-6, as in the paper: another difference between them.",
        "Holm's correction is over the comparisons of this page; that of table 4 is over more.",
        RANGE.format("of table 3 or 4"),
    ),
)
