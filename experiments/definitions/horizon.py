"""How the order of the optimizers and their best hyperparameters move with the number of epochs, on MovieLens-1M."""

from dataclasses import replace

from experiments.definitions.spec import Cell, Experiment
from experiments.definitions.tables import BARS, DECAY, HR10, PAIRS, PANELS, TABLE4

_GRID_EPOCHS, _EPOCHS, _LONGEST = 15, (15, 30, 60, 120), 300
_LONG_ROWS = ("Adam, eps 1e-8", "Adam-LAWN")
_COMPARED = [
    cell
    for cell in TABLE4.cells
    if (cell.panel, cell.column) == (PANELS["movielens1m"], "batch 10k") and cell.row != "Adam, eps tuned"
]


def _after(cell: Cell, epochs: int) -> Cell:
    grid_epochs = None if epochs == _GRID_EPOCHS else _GRID_EPOCHS
    paper = cell.paper if epochs == _LONGEST else None
    return replace(cell, column=f"{epochs} epochs", epochs=(epochs,), grid_epochs=grid_epochs, paper=paper, seeds=None)


HORIZON = Experiment(
    "horizon",
    "The number of epochs: NCF on MovieLens-1M, batch 10k",
    tuple(
        _after(cell, epochs)
        for epochs in (*_EPOCHS, _LONGEST)
        for cell in _COMPARED
        if epochs < _LONGEST or cell.row in _LONG_ROWS
    ),
    (HR10,),
    figure="horizon",
    pairs=PAIRS,
    notes=(
        "Each number of epochs is a complete schedule, tuned by itself: for 15 epochs the whole grid, for more epochs "
        "a search that starts from it. The runs of 60 and 300 epochs are also those of table 4.",
        DECAY,
        BARS,
    ),
)
