"""Tuning curves: which grids are run for them."""

from dataclasses import replace

from experiments.definitions.spec import Cell, Experiment, Measure
from experiments.definitions.tables import PANELS, TABLE4

SHORT, FULL = (f"{PANELS['movielens100k']}, {schedule}" for schedule in ("short schedules", "the paper's schedules"))
# Columns whose grids are run for the whole schedule, too, and their rows.
CHECKED = {
    "batch 10k": ("SGD", "SGD-LAWN", "Adam, eps 1e-8", "Adam-LAWN", "LAMB", "LAMB-LAWN"),
    "batch 100k": ("SGD", "SGD-LAWN"),
    "batch 400k": ("SGD", "SGD-LAWN"),
}


def _whole(cell: Cell, panel: str, epochs: int) -> Cell:
    return replace(cell, panel=panel, epochs=(epochs,), paper=None, seeds=None, grid_only=True)


_CELLS = [cell for cell in TABLE4.cells if cell.panel == PANELS["movielens100k"]]
TUNING_CURVES = Experiment(
    "tuning_curves",
    "Tuning curves: the best of k random settings",
    (
        *(_whole(cell, SHORT, cell.epochs[-1]) for cell in _CELLS),
        *(_whole(cell, FULL, cell.epochs[0]) for cell in _CELLS if cell.row in CHECKED.get(cell.column, ())),
    ),
    (Measure("headline", "validation HR@10, %"),),
    figure="tuning",
    pairs=TABLE4.pairs,
    notes=(
        "The grids are those of table 4, of 48 settings each; eps tuned has 144. Short schedules have a tenth of the "
        "paper's epochs, 75 where it has 500.",
        "The short runs of LAMB-LAWN are older than commit 3d62b52, which gives a tangent component that is rounding "
        "error no trust ratio.",
    ),
)
