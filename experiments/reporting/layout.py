"""Tables of text, and the format of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from experiments.definitions.spec import Measure
from experiments.record import Record
from experiments.reporting.cell_results import CellResult
from experiments.reporting.statistics import Comparison, mean_and_error

SPLITS = {"val": "validation", "test": "test"}  # as pages call them


@dataclass(frozen=True)
class Entry:
    """The text of one place of a table, and the cell and measure that it is of, if any."""

    ours: str  # "mean (standard error, n)", "Fail", or nothing
    paper: str = ""  # the paper's number, "Fail", or nothing
    difference: str = ""
    marked: bool = False
    records: Sequence[Record] = ()
    result: CellResult | None = None
    measure: Measure | None = None


@dataclass(frozen=True)
class Panel:
    """A table of numbers, a row for each method."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]


@dataclass(frozen=True)
class Table:
    """Any other table."""

    head: Sequence[str]
    rows: list[list[str]]


def format_mean(values: list[float], digits: int) -> str:
    """'mean (standard error, n)', or 'mean (n=1)' of a single value, or '' of none."""
    if not values:
        return ""
    (mean, error), text = mean_and_error(values), number_format(digits)
    return f"{mean:{text}} (n=1)" if len(values) == 1 else f"{mean:{text}} ({error:{text}}, n={len(values)})"


def number_format(digits: int) -> str:
    """The format of a number with so many digits after the point; negative: significant ones, in powers of ten."""
    return f".{digits}f" if digits >= 0 else f".{-digits - 1}e"


def format_signed(number: float) -> str:
    """Three significant digits with the sign; nothing for NaN."""
    return "" if isnan(number) else f"{number:+#.3g}".rstrip(".")


def format_interval(comparison: Comparison) -> str:
    low, high = comparison.interval()
    return f"{format_signed(low)} to {format_signed(high)}"


def format_plain(number: str) -> str:
    """A number as short as it can be; any other value as it is."""
    try:
        return f"{float(number):g}"
    except ValueError:
        return number
