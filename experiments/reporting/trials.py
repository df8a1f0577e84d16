"""Best-of-k curves of the grids that are complete."""

from experiments.record import Record
from experiments.reporting.outcomes import Outcome
from experiments.reporting.statistics import BestOf, best_of

Best = dict[tuple[str, str, str], BestOf]  # by panel, column and row


def best_of_curves(found: list[Outcome]) -> list[tuple[Outcome, BestOf]]:
    """The complete grids with their curves."""
    complete = [outcome for outcome in found if outcome.tried and len(outcome.tried) == len(outcome.tuning.full)]
    return [(outcome, best_of([score(record) for _, record in outcome.tried])) for outcome in complete]


def best_by_place(curves: list[tuple[Outcome, BestOf]]) -> Best:
    """The result of `best_of_curves`, to look up."""
    return {(o.cell.panel, o.cell.column, o.cell.row): curve for o, curve in curves}


def score(record: Record) -> float:
    """The headline metric; 0 for a setting that diverged, as of a model that recommends nothing."""
    return 0.0 if record.diverged else record.headline
