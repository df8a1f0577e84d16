"""Figure of the diagnostics of runs, from their metrics.csv."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cycler import cycler
from pandas.api.types import is_numeric_dtype

from lawn.errors import WRITTEN_AGAIN, RunError
from lawn.plotting import Axes, Figure, rc_context

PANELS = (  # column of metrics.csv, or the prefix of one column per weight; label; scale of the axis
    ("train_loss", "training loss, nats", "log"),
    ("margin_p50", "margin (10, 50, 90 %), logits", "linear"),
    ("norm/", "norm of a weight", "log"),
    ("gradient_norm/", "norm of its gradient", "log"),
    ("radial/", "|cos| of gradient and weight", "linear"),
    ("angle/", "angle of an update, rad", "log"),
    ("effective_lr/", "effective learning rate", "log"),
    ("hessian_top", "top eigenvalue of the Hessian", "log"),
    ("gradient_covariance", "trace of gradients' covariance", "log"),
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
}
COLUMNS = 3


def read_metrics(path: Path) -> pd.DataFrame:
    """Read metrics.csv of a run directory.

    Args:
        path: run directory.

    Returns:
        A table with one row per epoch.

    Raises:
        RunError: if the file cannot be read, lacks epochs of a finished run, or is another table (some spreadsheets
            write semicolons).
    """
    file = path / "metrics.csv"
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory")
    try:
        text = file.read_text("utf8")
        rows = pd.read_csv(io.StringIO(text))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error}); {WRITTEN_AGAIN}") from error
    if not {"epoch", "train_loss"} <= set(rows) or not (rows.empty or all(map(is_numeric_dtype, rows.dtypes))):
        raise RunError(f"{file}: is no table of numbers, as the run has written it; {WRITTEN_AGAIN}")
    if not text.endswith("\n") or list(rows["epoch"]) != list(range(1, len(rows) + 1)):
        raise RunError(f"{file}: is not whole; {WRITTEN_AGAIN}")
    if (path / "DONE").exists() and len(rows) != (epochs := _epochs_of(path)):
        raise RunError(f"{file}: has {len(rows)} of {epochs} epochs; {WRITTEN_AGAIN}")
    return rows


def _epochs_of(path: Path) -> int:
    """The number of epochs of a finished run."""
    file = path / "result.json"
    try:
        return int(json.loads(file.read_text("utf8"))["last"]["epoch"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); {WRITTEN_AGAIN}") from error


def read(path: Path) -> pd.DataFrame:
    """Read metrics.csv of a run with `diagnostics=on`; raises RunError for other runs, and before the first epoch."""
    rows = read_metrics(path)
    if rows.empty:
        raise RunError(f"{path}: has not finished an epoch yet")
    if not any(name.startswith("angle/") for name in rows):
        raise RunError(f"{path}: is not of a run with diagnostics=on")
    return rows


def draw(runs: dict[str, pd.DataFrame]) -> Figure:
    """Draw each measured quantity over the epochs, with one color per run.

    For quantities of weights, thin lines are those of each weight and a thick line is their geometric mean (arithmetic
    mean for cosines). A dotted line marks the first epoch at whose end the norms are fixed.

    Args:
        runs: tables of metrics by name of the run.

    Returns:
        The figure.
    """
    measured = [panel for panel in PANELS if any(_columns(rows, panel[0]) for rows in runs.values())]
    shown = measured or PANELS  # empty panels without measurements
    rows_of_panels = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.7 * rows_of_panels + 0.4), layout="constrained")
    axes = figure.subplots(rows_of_panels, COLUMNS, squeeze=False).flat
    for axis, (key, title, scale) in zip(axes, shown, strict=False):
        for i, (name, rows) in enumerate(runs.items()):
            _line(axis, rows, key, f"C{i}", name)
        axis.set(xlabel="epoch", ylabel=title, yscale=scale)
    for axis in list(figure.axes)[len(shown) :]:
        axis.remove()
    lines = {str(line.get_label()): line for line in figure.axes[0].lines if line.get_label() in runs}
    if lines:
        figure.legend(list(lines.values()), list(lines), frameon=False, ncols=3, loc="outside upper center")
    return figure


def save(runs: dict[str, pd.DataFrame], path: Path) -> None:
    """Write the figure as PNG.

    Args:
        runs: tables of metrics by name of the run.
        path: file to write.
    """
    with rc_context(STYLE):
        draw(runs).savefig(path, format="png", dpi=150)


def _line(axis: Axes, rows: pd.DataFrame, key: str, color: str, name: str) -> None:
    columns = _columns(rows, key)
    found = rows.dropna(subset=columns, how="all")
    if found.empty:
        return
    linear = key in ("radial/", "margin_p50")
    values = found[columns].astype(float)
    if not linear:
        values = values.where(values > 0)  # the other axes are logarithmic
    if len(columns) > 1:
        for column in columns:
            axis.plot(found["epoch"], values[column], color=color, linewidth=0.6, alpha=0.35)
    mean = values.mean(axis=1) if linear else np.exp(np.log(values).mean(axis=1))
    axis.plot(found["epoch"], mean, color=color, linewidth=1.6, label=name)
    if key == "margin_p50" and "margin_p10" in rows:
        axis.fill_between(
            found["epoch"], found["margin_p10"], found["margin_p90"], color=color, alpha=0.15, linewidth=0
        )
    switched = rows.loc[rows["constrained"] == 1, "epoch"]
    if len(switched):
        axis.axvline(switched.iloc[0], color=color, linewidth=0.8, linestyle=":")


def _columns(rows: pd.DataFrame, key: str) -> list[str]:
    return [name for name in rows if name.startswith(key)] if key.endswith("/") else [key] if key in rows else []
