"""Best-of-k curves of the grids that are complete."""

from experiments.record import Record
from experiments.reporting.cell_results import CellResult
from experiments.reporting.statistics import BestOf, best_of

Best = dict[tuple[str, str, str], BestOf]  # by panel, column and row


def best_of_curves(found: list[CellResult]) -> list[tuple[CellResult, BestOf]]:
    """The complete grids with their curves."""
    complete = [result for result in found if result.tried and len(result.tried) == len(result.tuning.full)]
    return [(result, best_of([score(record) for _, record in result.tried])) for result in complete]


def best_by_place(curves: list[tuple[CellResult, BestOf]]) -> Best:
    """The result of `best_of_curves`, to look up."""
    return {(o.cell.panel, o.cell.column, o.cell.row): curve for o, curve in curves}


def score(record: Record) -> float:
    """The headline metric; 0 for a setting that diverged, as of a model that recommends nothing."""
    return 0.0 if record.diverged else record.headline
