"""MovieLens-1M beside the literature: numbers of other methods and other authors on the same split."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments import definitions
from experiments.definitions.matrix_factorization import MATRIX_FACTORIZATION
from experiments.definitions.spec import Measure
from experiments.record import Record
from experiments.records import Store
from experiments.reporting.cell_results import CellResult, at_place, cell_results, paper
from experiments.reporting.layout import Table, format_mean
from experiments.reporting.references import METRICS, REFERENCES

PANEL, COLUMN = "MovieLens-1M", "batch 10k"  # of table 4
HEAD = (
    *("", "HR@10, %", "NDCG@10, %", "HR@10 among all items, %", "NDCG@10 among all items, %"),
    *("LAWN's paper, HR@10", "others, HR@10", "others, NDCG@10", "source"),
)

CAPTION = (
    "On the split and the 99 candidates of He et al. 2017; ours at the last epoch, mean (standard error, number of "
    "seeds), those of others with their own settings, for example other numbers of factors. NCF MLP: the rows of the "
    "table above at batch 10k. Dot products: [matrix_factorization](matrix_factorization.md) and "
    "[references](references.md). All items: those that the user is not trained on. The order among sampled candidates "
    "need not be the order among all items ([Krichene & Rendle 2020](https://doi.org/10.1145/3394486.3403226))."
)


def literature_table(store: Store, found: Sequence[CellResult], selection: str) -> Table | None:
    """A row for each method, from the cells of table 4 and the records of the other methods; None without any."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(definitions.__file__).with_name("literature.yaml")))
    ours = {o.cell.row: o for o in at_place(found, PANEL, COLUMN)}
    ours |= {o.cell.row: o for o in cell_results(MATRIX_FACTORIZATION, store, selection)}
    references = REFERENCES.record(store.runs.parent)
    rows = [_row(row, loaded["sources"], ours.get(row.get("here", "")), references) for row in loaded["rows"]]
    return Table(HEAD, rows) if any(row[1] for row in rows) else None


def _row(row: dict[str, Any], sources: dict[str, str], ours: CellResult | None, references: Record | None) -> list[str]:
    numbers = [""] * len(METRICS)
    links: list[str] = []
    if ours is not None and ours.records:
        numbers = [format_mean(ours.values(Measure(f"test_{metric}", "")), 2) for metric in METRICS]
        if ours.failed:
            numbers[0] = "Fail"
        links = [f"[{record.config['seed']}]({record.link})" for record in ours.records]
    elif references is not None and row.get("here") in references.result["metrics"]:
        repeats = references.result["metrics"][row["here"]]
        numbers = [format_mean([repeat[metric] for repeat in repeats], 2) for metric in METRICS]
        links = [f"[record](simulations/{references.name}.json)"]
    if links:
        numbers[0] += f" <sup>{' '.join(links)}</sup>"
    of_paper = "" if ours is None or isnan(paper(ours.cell)) else f"{paper(ours.cell):.2f}"
    printed = [f"{row[metric]:g}" if metric in row else "" for metric in ("hr10", "ndcg10")]
    return [row["method"], *numbers, of_paper, *printed, sources.get(row.get("source", ""), "")]
