"""What a cell of a table opens: its seeds, curves, hyperparameters and how they were chosen."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from experiments.definitions.spec import Measure
from experiments.planning.grid import Job
from experiments.record import Record
from experiments.reporting.charts import Chart, Subplot, curve
from experiments.reporting.outcomes import Outcome
from experiments.reporting.statistics import mean_and_error, mean_interval
from experiments.reporting.tuning_tables import described, format_setting, parts
from experiments.reporting.web.data import chart_data, number

CURVES = (("train_loss", "training loss, nats", "log"), ("margin_p50", "median training margin, logits", "linear"))
NORM = ("weight_norm", "norm of all weights", "linear")


def cell_key(outcome: Outcome, measures: Sequence[Measure]) -> str:
    """An identifier of a cell at its budget, the same on every page that shows the same numbers of it."""
    cell = outcome.cell
    parts = (
        cell.name,
        cell.overrides,
        cell.sweep,
        outcome.epochs,
        cell.grid_only,
        [measure.title for measure in measures],
    )
    return f"cell-{sha256(repr(parts).encode()).hexdigest()[:12]}"


def detail(
    outcome: Outcome, measures: Sequence[Measure], printed: str, gains: Sequence[str], command: str
) -> dict[str, Any]:
    """As plain data; `printed`: the paper's number as it is written, `gains`: sentences, `command` fills the cell."""
    return {
        "name": outcome.cell.name,
        "epochs": outcome.epochs,
        "paper_epochs": outcome.cell.epochs[0] if outcome.cell.epochs else None,
        "paper": printed,
        "difference": number(outcome.difference(measures[0])),
        "gains": list(gains),
        "measures": [_measured(outcome, measure) for measure in measures],
        "seeds": [_seed(record, measures) for record in outcome.records],
        "failed": outcome.failed,
        "setting": format_setting(outcome.setting),
        "tuning": described(outcome) if outcome.setting else [],
        "rungs": _rungs(outcome),
        "fill": command,
        "command": outcome.records[0].command if outcome.records else "",
        "machine": _machine([*outcome.records, *(record for _, record in outcome.tried)]),
        "curves": chart_data(_curves(outcome, measures)) if outcome.records and not outcome.failed else None,
    }


def _measured(outcome: Outcome, measure: Measure) -> dict[str, Any]:
    values = outcome.values(measure)
    low, high = mean_interval(values)
    mean, error = mean_and_error(values)
    return {
        "title": measure.title,
        "digits": measure.digits,
        "n": len(values),
        **{key: number(value) for key, value in (("mean", mean), ("error", error), ("low", low), ("high", high))},
    }


def _seed(record: Record, measures: Sequence[Measure]) -> dict[str, Any]:
    return {
        "seed": record.config["seed"],
        "values": [number(record.value(measure.key)) for measure in measures],
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


def _rungs(outcome: Outcome) -> list[dict[str, Any]]:
    """The budgets of the tuning, each with its runs."""
    recorded = {job.name: record for job, record in outcome.tried}
    full = "search" if outcome.tuning.short else "whole grid"
    titles = {"short": "whole grid", "full": full, "seeds": "other seeds"}
    rungs = []
    for part, jobs, chosen in parts(outcome):
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
        "chosen": bool(chosen) and job.setting == chosen,
    }


def _value(text: str) -> float | str:
    """Of a hyperparameter: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _curves(outcome: Outcome, measures: Sequence[Measure]) -> Chart:
    """Loss, headline metric, margin and norm over the epochs."""
    record = outcome.records[0]
    headline = f"{record.result['split']}_{record.result['headline']}"
    title = next((measure.title for measure in measures if measure.key == "headline"), headline)
    shown = [CURVES[0], (headline, title, "linear"), CURVES[1], NORM]
    recorded = [record.columns for record in outcome.records]
    return Chart(
        [
            [
                Subplot("", "epoch", title, [curve(outcome, key)], yscale=scale)
                for key, title, scale in shown
                if all(set(columns.get(key, ())) - {None} for columns in recorded)
            ]
        ]
    )
