"""Experiments as data: the cells of a table or the curves of a figure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lawn.errors import ConfigError


@dataclass(frozen=True)
class PaperResult:
    """The number that the paper prints in a cell."""

    value: float | None  # None: "Fail"
    error: float | None = None  # standard error; the upper end where the paper gives a range, None where it is silent


@dataclass(frozen=True)
class Cell:
    """A number of a table, the mean of runs."""

    row: str
    overrides: tuple[str, ...]  # of run.py, without train.epochs where there are budgets
    panel: str = ""  # the dataset, where a table has several
    column: str = ""
    epochs: tuple[int, ...] = ()  # budgets: the paper's, then a shorter one; empty: the dataset's own
    grid_epochs: int | None = None  # of the grid that a search starts from; None: the shortest budget
    sweep: str | None = None  # preset below conf/sweep which its hyperparameters are chosen from; None: all are given
    paper: PaperResult | None = None  # None: the paper has no such cell
    seeds: int | None = None  # number of final runs; None: that of the experiment
    grid_only: bool = False  # only run every point of the grid once
    whole_grid: bool = False  # search on the whole grid for the whole schedule, without a shorter one
    all_items: bool = False  # final runs also rank all items

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.panel, self.column, self.row)))

    def budgets(self, index: int = 0) -> tuple[int, ...]:
        """The budget at an index, then the shorter ones; the last is that of the grid that a search starts from."""
        shortest = () if self.grid_epochs is None else (self.grid_epochs,)
        return (*self.epochs[index:], *shortest)

    def value(self, key: str) -> str:
        """The value of one of its overrides. Raises KeyError."""
        return dict(override.split("=", 1) for override in self.overrides)[key]


@dataclass(frozen=True)
class Measure:
    """A field of a run's last epoch and its format; `headline` is the headline metric of the task."""

    key: str
    title: str
    digits: int = 2  # after the point; negative: that many significant digits, in powers of ten
    curve: str | None = None  # in a figure over epochs: linear or log, the scale of its axis
    smaller_is_better: bool = False

    @property
    def sign(self) -> int:
        """1, or -1 where smaller is better."""
        return -1 if self.smaller_is_better else 1


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    cells: tuple[Cell, ...]
    measures: tuple[Measure, ...]
    # "epochs": curves of every cell; "batch", "horizon": the first measure over the batch size, or over the epochs of a
    # run, by panel; "diagnostics": what diagnostics=on measures, of each cell's first run.
    figure: str | None = None
    compared_row: str | None = None  # a row to be compared with the best of the others, in every column
    pairs: tuple[tuple[str, str], ...] = ()  # rows to compare: a method, and what LAWN makes of it
    notes: tuple[str, ...] = ()  # what the reader has to know
    of_tables: bool = False  # whether its cells are those of tables, whose pages tell how they were tuned
    beside_literature: bool = False  # whether the page has the numbers of others on MovieLens-1M
    seeds: int = 3

    def only(self, filters: Iterable[str]) -> "Experiment":
        """The cells that have all of these overrides. Raises ConfigError when there are none."""
        cells = tuple(cell for cell in self.cells if set(filters) <= set(cell.overrides))
        if not cells:
            known = sorted({override for cell in self.cells for override in cell.overrides})
            raise ConfigError(f"--only {' '.join(filters)}: {self.name} has no such cell; its cells are {known}")
        return replace(self, cells=cells)
