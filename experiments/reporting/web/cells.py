"""What a cell of a table opens: its seeds, curves, hyperparameters and how they were chosen."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from experiments.definitions.spec import Experiment, Measure
from experiments.planning.grid import Job
from experiments.record import Record
from experiments.reporting.cell_results import CellResult
from experiments.reporting.charts import Chart, Subplot, curve
from experiments.reporting.layout import SPLITS
from experiments.reporting.statistics import mean_and_error, mean_interval
from experiments.reporting.tuning_tables import described, format_setting, parts
from experiments.reporting.web.data import chart_data, number

CURVES = (("train_loss", "training loss, nats", "log"), ("margin_p50", "median training margin, logits", "linear"))
NORM = ("weight_norm", "norm of all weights", "linear")
DIGITS = 12  # of numbers that are rounded once more where they are shown, as those of the tables are


def cell_key(result: CellResult, experiment: Experiment, printed: str) -> str:
    """An identifier of a cell at its budget, the same on every page that shows the same numbers of it and compares it
    with the same rows; `printed`: the paper's number as it is written."""
    cell = result.cell
    parts = (
        cell.name,
        cell.overrides,
        cell.sweep,
        result.epochs,
        cell.grid_only,
        [measure.title for measure in experiment.measures],
        [base for base, rival in experiment.pairs if rival == cell.row],
        printed,
    )
    return f"cell-{sha256(repr(parts).encode()).hexdigest()[:12]}"


def detail(
    result: CellResult, measures: Sequence[Measure], printed: str, gains: Sequence[str], command: str
) -> dict[str, Any]:
    """As plain data; `printed`: the paper's number as it is written, `gains`: sentences, `command` fills the cell."""
    return {
        "name": result.cell.name,
        "epochs": result.epochs,
        "paper_epochs": result.cell.epochs[0] if result.cell.epochs else None,
        "paper": printed,
        "difference": number(result.difference(measures[0]), DIGITS),
        "gains": list(gains),
        "measures": [_measured(result, measure) for measure in measures],
        "seeds": [_seed(record, measures) for record in result.records],
        "failed": result.failed,
        "setting": format_setting(result.setting),
        "tuning": described(result) if result.setting else [],
        "rungs": _rungs(result),
        "split": tuned_on([result]),
        "fill": command,
        "command": result.records[0].command if result.records else "",
        "machine": _machine([*result.records, *(record for _, record in result.tried)]),
        "curves": chart_data(_curves(result, measures)) if result.records and not result.failed else None,
    }


def tuned_on(results: Sequence[CellResult]) -> str:
    """The split on which the runs that choose hyperparameters were evaluated."""
    return SPLITS[next((record.result["split"] for result in results for _, record in result.tried), "val")]


def _measured(result: CellResult, measure: Measure) -> dict[str, Any]:
    values = result.values(measure)
    low, high = mean_interval(values)
    mean, error = mean_and_error(values)
    return {
        "title": measure.title,
        "digits": measure.digits,
        "n": len(values),
        **{
            key: number(value, DIGITS)
            for key, value in (("mean", mean), ("error", error), ("low", low), ("high", high))
        },
    }


def _seed(record: Record, measures: Sequence[Measure]) -> dict[str, Any]:
    return {
        "seed": record.config["seed"],
        "values": [number(record.value(measure.key), DIGITS) for measure in measures],
        "status": record.result["status"],
        "record": record.name,
        "file": record.file,
        "code": record.code,
    }


def _machine(records: Sequence[Record]) -> dict[str, list[str]]:
    return {
        "code": list(dict.fromkeys(record.code for record in records)),
        "packages": sorted({package for record in records for package in record.packages}),
        "hardware": sorted({machine for record in records for machine in record.machines}),
    }


def _rungs(result: CellResult) -> list[dict[str, Any]]:
    """The budgets of the tuning, each with its runs."""
    recorded = {job.name: record for job, record in result.tried}
    full = "search" if result.tuning.short else "whole grid"
    titles = {"short": "whole grid", "full": full, "seeds": "other seeds"}
    rungs = []
    for part, jobs, chosen in parts(result):
        done = [(job, recorded[job.name]) for job in jobs if job.name in recorded]
        if done:
            epochs = done[0][1].config["train"]["epochs"]
            rungs.append(
                {
                    "title": f"{titles[part]}, {epochs} epochs, {len(done)} of {len(jobs)} runs",
                    "axes": [override.partition("=")[0].split(".")[1] for override in done[0][0].setting],
                    "runs": [_tried(job, record, chosen) for job, record in done],
                    "seeds": part == "seeds",
                }
            )
    return rungs


def _tried(job: Job, record: Record, chosen: tuple[str, ...]) -> dict[str, Any]:
    return {
        "values": [_value(override.partition("=")[2]) for override in job.setting],
        "seed": record.config["seed"],
        "score": number(record.headline),
        "chosen": job.setting == chosen,
    }


def _value(text: str) -> float | str:
    """Of a hyperparameter: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _curves(result: CellResult, measures: Sequence[Measure]) -> Chart:
    """Loss, headline metric, margin and norm over the epochs."""
    record = result.records[0]
    headline = f"{record.result['split']}_{record.result['headline']}"
    title = next((measure.title for measure in measures if measure.key == "headline"), headline)
    shown = [CURVES[0], (headline, title, "linear"), CURVES[1], NORM]
    recorded = [record.columns for record in result.records]
    return Chart(
        [
            [
                Subplot("", "epoch", title, [curve(result, key)], yscale=scale)
                for key, title, scale in shown
                if all(set(columns.get(key, ())) - {None} for columns in recorded)
            ]
        ]
    )
