"""Tables and figures from records alone."""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import records
from experiments.spec import Experiment
from lawn.files import atomic, write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"


CURVES = (  # of the figure: field, axis label, scale
    ("train_loss", "training loss (cross entropy, nats)", "log"),
    ("margin_p50", "median training margin (logits)", "linear"),
    ("weight_norm", "norm of all weights", "linear"),
)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error of a single value is NaN."""
    array = np.asarray(values, float)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
    return float(array.mean()), float(error)


def show(values: list[float], digits: int) -> str:
    """'mean (standard error)', or 'mean' of a single value, or '' of none."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    form = f".{digits}f" if digits >= 0 else f".{-digits - 1}e"
    return f"{mean:{form}}" + ("" if np.isnan(error) else f" ({error:{form}})")


def table(experiment: Experiment, folder: Path = records.RECORDS) -> pd.DataFrame:
    """A row for each cell: the mean over seeds of every column with its standard error, and the records it is from.

    A diverged run makes its cell "Fail", a cell without runs is blank.
    """
    rows = []
    for cell in experiment.cells:
        found = records.read_all(experiment.configs(cell), folder)
        failed = any(record.result["status"] == "diverged" for record in found)
        row: dict[str, object] = {"": cell.label, "seeds": len(found)}
        for column in experiment.columns:
            values = [record.result["last"][column.key] for record in found if not failed]
            row[column.title] = "Fail" if failed else show(values, column.digits)
        row["records"] = [record.name for record in found]
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame, links: str) -> str:
    """A Markdown table; the records become links below `links`."""
    shown = frame.copy()
    shown["records"] = [
        " ".join(f"[{name.rsplit('-', 1)[1][:6]}]({links}/{name}.json)" for name in names) for names in frame["records"]
    ]
    head = "| " + " | ".join(map(str, shown.columns)) + " |"
    rule = "|" + " --- |" * len(shown.columns)
    body = ["| " + " | ".join(map(str, row)) + " |" for row in shown.itertuples(index=False)]
    return "\n".join([head, rule, *body])


def terminal(experiment: Experiment, frame: pd.DataFrame) -> str:
    """The same for a terminal, with its title and without the records."""
    return f"{experiment.title}; mean (standard error)\n\n{frame.drop(columns='records').to_string(index=False)}"


def provenance(experiment: Experiment, folder: Path = records.RECORDS) -> str:
    """What the numbers come from: a line with code versions and hardware, then the warnings of the runs, if any."""
    cells = {cell.label: records.read_all(experiment.configs(cell), folder) for cell in experiment.cells}
    found = [record for recorded in cells.values() for record in recorded]
    warned: dict[str, list[str]] = {}
    for label, recorded in cells.items():
        for warning in dict.fromkeys(w for record in recorded for w in record.result["warnings"]):
            warned.setdefault(warning, []).append(label)
    remarks = "".join(f"\n- {warning} ({', '.join(labels)})" for warning, labels in warned.items())
    versions = sorted({(r.environment["git"] or "no git")[:10] for r in found})
    dirty = " with uncommitted changes" if any(r.environment["dirty"] for r in found) else ""
    machines = sorted({f"{r.environment['cores']}-core {r.environment['cpu']}" for r in found})
    packages = sorted({f"torch {r.environment['packages']['torch']}" for r in found})
    source = f"{len(found)} runs; code {', '.join(versions)}{dirty}; {', '.join(packages)}; {', '.join(machines)}."
    return source + (f"\n\nWarnings of the runs:\n{remarks}" if remarks else "")


def figure(experiment: Experiment, path: Path, folder: Path = records.RECORDS) -> None:
    """Curves over epochs, mean over seeds with the range of the seeds shaded; a dot marks where LAWN
    fixes the norms. A cell with a diverged run is left out, as "Fail" in the table says.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "lawn"})
    drawing, axes = plt.subplots(1, len(CURVES), figsize=(3.6 * len(CURVES), 3.1), layout="constrained")
    for cell, style in zip(experiment.cells, cycle(("-", "--"))):
        found = records.read_all(experiment.configs(cell), folder)
        if not found or any(record.result["status"] == "diverged" for record in found):
            continue
        constrained = found[0].history["constrained"].to_numpy()
        for axis, (field, _, _) in zip(axes, CURVES, strict=True):
            curves = np.stack([record.history[field].to_numpy(float) for record in found])
            epochs = found[0].history["epoch"].to_numpy()
            mean = curves.mean(0)
            (line,) = axis.plot(epochs, mean, style, label=cell.label)
            axis.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
            if constrained.any():
                switch = max(0, int(constrained.argmax()) - 1)  # the last point of the free phase
                axis.plot(epochs[switch], mean[switch], "o", color=line.get_color(), markersize=5)
    for axis, (_, label, scale) in zip(axes, CURVES, strict=True):
        axis.set(xlabel="epoch", ylabel=label, yscale=scale if axis.lines else "linear")
    if axes[0].lines:
        axes[0].legend(frameon=False)
    for suffix in (".png", ".svg"):
        with atomic(path.with_suffix(suffix)) as temporary:
            drawing.savefig(temporary, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(drawing)


def write(experiment: Experiment, results: Path = RESULTS) -> str:
    """Write results/NAME.md and the figure; returns the table for a terminal."""
    folder = results / "runs"
    frame = table(experiment, folder)
    figure(experiment, results / experiment.name, folder)
    text = (
        f"# {experiment.title}\n\n"
        f"Mean over seeds (standard error); the last epoch, nothing selected on test.\n\n{markdown(frame, 'runs')}\n\n"
        f"{provenance(experiment, folder)}\n\n![curves]({experiment.name}.png)\n"
    )
    write_text(results / f"{experiment.name}.md", text)
    return terminal(experiment, frame)


def embed(page: Path, experiments: Iterable[Experiment], results: Path = RESULTS) -> None:
    """Renew what stands in a page between `<!-- table NAME -->` (with links to the records) or `<!-- output NAME -->`
    (as the terminal shows it) and `<!-- end -->`."""
    text = page.read_text()
    for experiment in experiments:
        frame = table(experiment, results / "runs")
        source = provenance(experiment, results / "runs")
        contents = {
            "table": f"{markdown(frame, 'results/runs')}\n\n{source}",
            "output": f"```text\n{terminal(experiment, frame)}\n```",
        }
        for kind, content in contents.items():
            begin = f"<!-- {kind} {experiment.name} -->\n"
            head, found, rest = text.partition(begin)
            if found:
                text = f"{head}{begin}{content}\n{rest[rest.index('<!-- end -->') :]}"
    write_text(page, text)
