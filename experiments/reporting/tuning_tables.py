"""How the hyperparameters of cells were chosen, in tables and words."""

from collections.abc import Sequence

import pandas as pd

from experiments.planning import search
from experiments.planning.grid import Job
from experiments.reporting.cell_results import CellResult, place
from experiments.reporting.layout import Table, format_plain

HEAD = (
    *("", "", "chosen", "mean of its seeds; of the next best, %", "place in the short search"),
    *("found by the full run", "runs: short + full + other seeds", "epochs trained", "at an end of the grid"),
)


def protocol(selection: str) -> str:
    """How hyperparameters are chosen, in words."""
    split = "the validation split" if selection == "val" else "the TEST split, as the paper most likely did"
    biased = "" if selection == "val" else "; the numbers are biased upwards"
    return (
        f"Hyperparameters are chosen on {split}, in the same way for both sides of a comparison: the whole grid for "
        f"the shorter schedule; then, for the whole schedule, {search.num_trials(search.AXES)} runs, or "
        f"{2 * search.BEST} for each hyperparameter where there are more than {search.AXES}, of the best and their "
        "neighbours, or the whole grid where there is no shorter schedule; then the best "
        f"{search.BEST} with {len(search.CONFIRMING_SEEDS)} more seeds. "
        f"The best mean wins; a setting that diverges or collapses for a seed loses{biased}."
    )


def grids(found: Sequence[CellResult]) -> list[str]:
    """The settings that were tried, a line for each preset and budget."""
    lines: dict[str, None] = {}
    for result in found:
        if result.study is None or not result.tried:
            continue
        for grid in filter(None, (result.study.shorter, result.study.grid)):
            axes = "; ".join(f"{axis} {', '.join(map(format_plain, values))}" for axis, values in grid.axes.items())
            epochs = grid.config.train.epochs
            lines[f"`sweep={result.cell.sweep}`, {epochs} epochs: {axes}"] = None
    return list(lines)


def table(found: Sequence[CellResult]) -> Table | None:
    """A row for each cell whose hyperparameters have been chosen."""
    rows = [_row(result) for result in found if result.setting]
    return Table(HEAD, rows) if rows else None


def described(result: CellResult) -> list[tuple[str, str]]:
    """How the hyperparameters of a cell were chosen: what is said, and of what."""
    return [(head, text) for head, text in zip(HEAD[3:], _row(result)[3:], strict=True) if text]


def _row(result: CellResult) -> list[str]:
    study, tuning = result.study, result.tuning
    assert study is not None
    assert tuning.chosen is not None
    recorded = {job.name: record for job, record in result.tried}
    scores: dict[tuple[str, ...], list[float]] = {job.setting: [] for job in tuning.confirming}
    for job in (*tuning.full, *tuning.confirming):
        if job.setting in scores:
            scores[job.setting].append(recorded[job.name].headline)
    best = search.mean(scores.pop(result.setting))
    others = [search.mean(values) for values in scores.values() if search.is_stable(values)]
    counts = " + ".join(str(len(jobs)) for jobs in (tuning.short, tuning.full, tuning.confirming) if jobs)
    diverged = sum(record.diverged for record in recorded.values())
    at_zero = sum(record.headline == 0 for record in recorded.values())
    return [
        place(result.cell.panel, result.cell.column),
        result.cell.row,
        format_setting(result.setting),
        f"{best:.2f}" + (f"; {max(others):.2f}" if others else ""),
        _standing(result) if tuning.short else "",
        _found(result) if tuning.short else "",
        counts + (f", {diverged} diverged" if diverged else "") + (f", {at_zero} at 0 %" if at_zero else ""),
        f"{sum(record.result['last']['epoch'] for record in recorded.values()):,}",  # fewer of those that diverged
        ", ".join(_ends(study.grid.axes, tuning.chosen)),
    ]


def format_setting(setting: tuple[str, ...]) -> str:
    """Hyperparameters as they are read: lr 0.01, free_epochs 7.5."""
    pairs = (override.split("=", 1) for override in setting)
    return ", ".join(f"{key.split('.')[1]} {format_plain(value)}" for key, value in pairs)


def _standing(result: CellResult) -> str:
    """The place of the chosen setting among those of the shorter schedule."""
    assert result.study is not None
    assert result.tuning.chosen is not None
    recorded = {job.name: record.headline for job, record in result.tried}
    points = result.study.grid.points
    scores = {point: recorded[job.name] for point, job in zip(points, result.tuning.short, strict=True)}
    order = search.ranked(points, scores.get)
    chosen = result.tuning.chosen
    return f"{order.index(chosen) + 1} of {len(order)}" if chosen in order else "beyond its grid"


def _found(result: CellResult) -> str:
    """Which run for the whole schedule found the chosen setting: after one of the last, a longer search may improve."""
    settings = [job.setting for job in result.tuning.full]
    return f"{settings.index(result.setting) + 1} of {len(settings)}"


def _ends(axes: dict[str, list[str]], point: search.Point) -> list[str]:
    """The hyperparameters that lie at an end of the grid, or beyond it."""
    places = [(key.split(".")[1], index, len(values)) for (key, values), index in zip(axes.items(), point, strict=True)]
    return [
        key if index in (0, length - 1) else f"{key} beyond"
        for key, index, length in places
        if length > 1 and not 0 < index < length - 1
    ]


def parts(result: CellResult) -> list[tuple[str, list[Job], tuple[str, ...]]]:
    """The runs of the tuning: for the shorter schedule, for the whole one, and with other seeds; each part with the
    setting in it of the point that was chosen, empty beyond its grid or before there is one."""
    tuning = result.tuning
    points = result.study.grid.points if result.study is not None and tuning.short else []
    short = next((job.setting for p, job in zip(points, tuning.short, strict=True) if p == tuning.chosen), ())
    return [
        ("short", tuning.short, short),
        ("full", tuning.full, result.setting),
        ("seeds", tuning.confirming, result.setting),
    ]


def frame(found: Sequence[CellResult]) -> pd.DataFrame:
    """Every run that chose hyperparameters: a row each."""
    rows = []
    for result in found:
        recorded = {job.name: record for job, record in result.tried}
        for part, jobs, chosen in parts(result):
            for job in jobs:
                record = recorded.get(job.name)
                if record is None:
                    continue
                rows.append(
                    {
                        "panel": result.cell.panel,
                        "column": result.cell.column,
                        "row": result.cell.row,
                        "part": part,
                        "epochs": record.config["train"]["epochs"],
                        "seed": record.config["seed"],
                        **dict(override.split("=", 1) for override in job.setting),
                        "status": record.result["status"],
                        f"{record.result['split']}_{record.result['headline']}": record.headline,
                        "train_loss": record.result["last"].get("train_loss"),
                        "chosen": job.setting == chosen,
                        "hash": record.hash,  # with which its name ends
                    }
                )
    return pd.DataFrame(rows)
