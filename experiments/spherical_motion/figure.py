"""The figure of spherical motion dynamics: six panels from one record."""

from typing import Any

import numpy as np

from experiments.record import Record
from experiments.reporting.statistics import mean_and_error
from experiments.spherical_motion import measurements as smd
from lawn.diagnostics import equilibrium_angle, equilibrium_norm
from lawn.plotting import Axes, Figure, Line2D

COLORS = {0.0: "C0", 0.5: "C2", 0.9: "C1"}  # by momentum
MARKERS = {0.0: "o", 0.5: "s", 0.9: "^"}
DECAY, LAWN = "C0", "C3"


def draw(record: Record) -> Figure:
    figure = Figure(figsize=(10.8, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    _equilibrium(axes[0, 0], axes[1, 0], record.result["equilibrium"])
    _angles(axes[0, 1], axes[1, 1], record)
    _drop(axes[0, 2], axes[1, 2], record)
    return figure


def _equilibrium(angles: Axes, norms: Axes, rows: list[dict[str, Any]]) -> None:
    """Measured over formula: their standard errors are smaller than the markers."""
    worst = {"angle": 0.0, "norm": 0.0}
    for axis, name in ((angles, "angle"), (norms, "norm")):
        ends = []
        for row in rows:
            lr, d, a = row["lr"], row["weight_decay"], row["momentum"]
            gradient = mean_and_error(row["unit_gradient"])[0]
            theory = equilibrium_angle(lr, d, a) if name == "angle" else equilibrium_norm(lr, d, gradient, a)
            mean = mean_and_error(row[name])[0]
            worst[name] = max(worst[name], abs(mean / theory - 1))
            ends.append(theory)
            axis.plot(theory, mean, MARKERS[a], color=COLORS[a], markersize=5, fillstyle="none", zorder=3)
        line = np.array([min(ends) / 1.3, max(ends) * 1.3])
        axis.plot(line, line, color="0.6", linewidth=1)
        axis.set(xscale="log", yscale="log")
        note = f"{len(rows)} settings of lr, d and a;\nlargest deviation {100 * worst[name]:.1f} %"
        axis.text(0.97, 0.05, note, transform=axis.transAxes, ha="right", va="bottom", fontsize=8)
    angles.set(
        title="(a) Angle at equilibrium",
        xlabel="arccos(1 - lr d / (1 + a)), radians per update",
        ylabel="measured angle, radians per update",
    )
    norms.set(title="(a) Norm at equilibrium", xlabel="norm by the formula", ylabel="measured norm ‖w‖")
    angles.legend(handles=[_key(a) for a in sorted({row["momentum"] for row in rows})], frameon=False)


def _angles(rates: Axes, risks: Axes, record: Record) -> None:
    n = record.config["dimension"]
    rows = record.result["angles"]
    noise = rows[0]["noise"]
    for row in rows:
        a = row["momentum"]
        angle, (risk, error) = mean_and_error(row["angle"])[0], mean_and_error(row["excess"])
        style: dict[str, Any] = {"color": COLORS[a], "markersize": 5, "capsize": 2, "zorder": 3}
        style |= {"fmt": "x"} if row["lawn"] else {"fmt": MARKERS[a], "fillstyle": "none"}
        risks.errorbar(angle, risk, error, **style)
        if row["updates"]:
            updates, spread = mean_and_error(row["updates"])
            rates.errorbar(angle, 1 / updates, spread / updates**2, **style)
    ends = np.array([min(mean_and_error(row["angle"])[0] for row in rows) / 1.2, 0.5])
    for a in sorted({row["momentum"] for row in rows}):
        risks.plot(ends, [smd.limiting_excess(x, a, noise, n) for x in ends], ":", color=COLORS[a], linewidth=1)
        many = np.geomspace(ends[0], ends[1], 50).tolist()
        speed = [1 / smd.updates_to_converge(x, a, noise, n) for x in many]
        rates.plot(many, speed, ":", color=COLORS[a], linewidth=1)
    for axis in (rates, risks):
        axis.set(xscale="log", yscale="log", xlabel="measured angle, radians per update", xlim=(ends[0] / 1.1, 0.55))
    risks.set_ylim(top=2)
    rates.set(title="(b) Rate of convergence", ylabel="1 / updates until 1/e of the way is left")
    risks.set(title="(b) Limiting risk", ylabel="excess of the quotient at the end")
    handles = [
        Line2D([], [], color="0.3", marker="o", fillstyle="none", linestyle="", label="SGD with decay"),
        Line2D([], [], color="0.3", marker="x", linestyle="", label="SGD-LAWN, norm fixed"),
        Line2D([], [], color="0.3", linestyle=":", label="theory, small angles"),
    ]
    risks.legend(handles=handles, frameon=False, loc="lower right", fontsize=8)


def _drop(angles: Axes, risks: Axes, record: Record) -> None:
    """Without momentum; the bands are two standard errors."""
    part = smd.Drop(**record.config["drop"])
    momentum = part.momentum[0]
    updates = np.arange(0, part.steps, part.bin) + part.bin / 2
    for row in record.result["drop"]:
        if row["momentum"] != momentum:
            continue
        color = LAWN if row["lawn"] else DECAY
        label = "SGD-LAWN, norm fixed" if row["lawn"] else "SGD with decay"
        for axis, name in ((angles, "angle"), (risks, "excess")):
            mean, error = np.array(row[name]), np.array(row[f"{name}_error"])
            axis.plot(updates, mean, color=color, linewidth=1.2, label=label)
            axis.fill_between(updates, mean - 2 * error, mean + 2 * error, color=color, alpha=0.25, linewidth=0)
    late = np.arange(part.at, part.steps)
    predicted = [smd.angle_after(part, momentum, float(update - part.at)) for update in late]
    angles.plot(late, predicted, ":", color="black", linewidth=1.5, label="theory of the relaxation")
    for axis in (angles, risks):
        axis.axvline(part.at, color="0.6", linewidth=0.8, zorder=0)
        axis.set(yscale="log", xlabel="update", xlim=(0, part.steps))
    angles.set(title="(c, d) Learning rate / 10: angle", ylabel="angle, radians per update")
    risks.set(title="(c, d) Learning rate / 10: risk", ylabel="excess of the quotient")
    angles.legend(frameon=False, loc="upper right")
    risks.legend(frameon=False, loc="upper right")


def _key(momentum: float) -> Line2D:
    color, marker = COLORS[momentum], MARKERS[momentum]
    label = f"momentum {momentum:g}"
    return Line2D([], [], color=color, marker=marker, fillstyle="none", linestyle="", markersize=5, label=label)
