"""What is shown of spherical motion dynamics on the Rayleigh quotient: tables, sentences and the figure of a record."""

from dataclasses import dataclass
from math import isnan, nan, sqrt
from typing import Any

import pandas as pd

from experiments.record import Record
from experiments.reporting.drawing import Drawing
from experiments.reporting.layout import Entry, Panel, format_mean
from experiments.reporting.simulations import Simulation, SimulationContent
from experiments.reporting.statistics import mean_and_error
from experiments.spherical_motion import measurements as smd
from experiments.spherical_motion.figure import draw
from lawn.diagnostics import equilibrium_angle, equilibrium_norm

SMALL = 0.1  # of an angle times sqrt((1 + a) / (1 - a))
ANGLE, TURN, NORM, COUNTED = "angle, rad", "angle of the mean cosine, rad", "norm", "norm, correlation counted"
EXCESS, CONVERGENCE = "limiting excess", "updates until 1/e of the way is left"
TITLES = {
    "equilibrium": "(a) Angle and norm at equilibrium, against the formulas",
    "correlated": "(a) The same with less and less noise: gradients that are alike from update to update",
    "angles": "(b) Limiting excess and convergence over the angular update",
    "drop": "(c, d) The learning rate drops by 10: under decay, and with a fixed norm",
}


@dataclass(frozen=True)
class Number:
    """A measured quantity, a value for each repeat, and what theory says; NaN where it says nothing."""

    part: str
    setting: str
    quantity: str
    values: list[float]
    theory: float = nan
    digits: int = 4

    @property
    def mean(self) -> float:
        return mean_and_error(self.values)[0]

    @property
    def error(self) -> float:
        """Relative, of the mean."""
        return self.mean / self.theory - 1

    @property
    def entries(self) -> list[str]:
        """Measured, theory, and the difference in per cent."""
        if not self.values:
            return ["", "", ""]
        theory = "" if isnan(self.theory) else f"{self.theory:.{self.digits}f}"
        return [format_mean(self.values, self.digits), theory, f"{100 * self.error:+.2f}" if theory else ""]


def show_record(record: Record) -> SimulationContent:
    make = {"equilibrium": _equilibrium, "correlated": _equilibrium, "angles": _angles, "drop": _drop}
    numbers = {
        part: [number for row in record.result[part] for number in make[part](part, row, record.config)]
        for part in TITLES
    }
    frame = pd.DataFrame(
        {
            "part": n.part,
            "setting": n.setting,
            "quantity": n.quantity,
            "n": len(n.values),
            "mean": n.mean,
            "standard_error": mean_and_error(n.values)[1],
            "theory": n.theory,
            "relative_error": n.error,
        }
        for part in numbers.values()
        for n in part
    )
    panels = [_panel(title, numbers[part]) for part, title in TITLES.items()]
    summary = [*_of_equilibrium(record, numbers), *_of_angles(numbers["angles"]), *_of_drop(record)]
    return SimulationContent(panels, summary, frame, Drawing(draw, record))


def _equilibrium(part: str, row: dict[str, Any], config: dict[str, Any]) -> list[Number]:
    lr, d, a = row["lr"], row["weight_decay"], row["momentum"]
    setting = f"lr {lr:g}, decay {d:g}, momentum {a:g}" + (f", noise {row['noise']:g}" if part == "correlated" else "")
    gradient, carried = (mean_and_error(row[name])[0] for name in ("unit_gradient", "carried"))
    return [
        Number(part, setting, ANGLE, row["angle"], equilibrium_angle(lr, d, a), 6),
        Number(part, setting, TURN, row["turn"], equilibrium_angle(lr, d, a), 6),
        Number(part, setting, NORM, row["norm"], equilibrium_norm(lr, d, gradient, a)),
        Number(part, setting, COUNTED, row["norm"], equilibrium_norm(lr, d, gradient + carried, a)),
    ]


def _angles(part: str, row: dict[str, Any], config: dict[str, Any]) -> list[Number]:
    a, angle = row["momentum"], mean_and_error(row["angle"])[0]
    given = (angle, a, row["noise"], config["dimension"])
    decay = "" if row["lawn"] else f", decay {row['weight_decay']:.3g}"
    setting = f"{_optimizer(row)}, lr {row['lr']:.3g}{decay}, momentum {a:g}"
    updates = [float(value) for value in row["updates"] or []]
    return [
        Number(part, setting, ANGLE, row["angle"], digits=6),
        Number(part, setting, EXCESS, row["excess"], smd.limiting_excess(*given)),
        Number(part, setting, CONVERGENCE, updates, smd.updates_to_converge(*given), 1),
    ]


def _drop(part: str, row: dict[str, Any], config: dict[str, Any]) -> list[Number]:
    """A setting for each window; soon after the drop the excess is on its way, for which there is no formula here."""
    a, drop = row["momentum"], smd.Drop(**config["drop"])
    old = equilibrium_angle(row["lr"], drop.weight_decay, a)
    new = equilibrium_angle(row["lr"] * drop.factor, drop.weight_decay, a)
    window = smd.windows(drop)["soon"]
    soon = [smd.angle_after(drop, a, update - drop.at) for update in range(window.start, window.stop)]
    angles = {"before": old, "soon": sum(soon) / len(soon), "late": new}
    if row["lawn"]:
        angles |= dict.fromkeys(("soon", "late"), old * drop.factor)
    numbers = []
    for when, angle in angles.items():
        setting = f"{_optimizer(row)}, momentum {a:g}, {when}"
        excess = smd.limiting_excess(angle, a, row["noise"], config["dimension"])
        numbers += [
            Number(part, setting, ANGLE, row["angle_in"][when], angle, 5),
            Number(part, setting, "excess", row["excess_in"][when], nan if when == "soon" else excess, 5),
        ]
    return numbers


def _panel(title: str, numbers: list[Number]) -> Panel:
    """A row for each setting; of each quantity what was measured, and beside it theory where there is any."""
    settings, quantities = (list(dict.fromkeys(getattr(n, key) for n in numbers)) for key in ("setting", "quantity"))
    at = {(n.setting, n.quantity): n for n in numbers}
    heads = {q: [q, f"{q}: theory", f"{q}: error, %"] for q in quantities}
    used = {q: [any(at[s, q].entries[i] for s in settings) for i in range(3)] for q in quantities}
    if COUNTED in used:
        used[TURN] = [False] * 3  # in the sentences
        used[COUNTED][0] = False  # is in the norm's column
    columns = [head for q in quantities for head, use in zip(heads[q], used[q], strict=True) if use]
    rows = []
    for setting in settings:
        texts = [t for q in quantities for t, use in zip(at[setting, q].entries, used[q], strict=True) if use]
        rows.append((setting, [Entry(text) for text in texts]))
    return Panel(title, columns, rows)


def _of_equilibrium(record: Record, numbers: dict[str, list[Number]]) -> list[str]:
    grid, less = numbers["equilibrium"], numbers["correlated"]
    angle, turn, norm, counted = (_worst(grid, q) for q in (ANGLE, TURN, NORM, COUNTED))
    rows = record.result["equilibrium"]
    small = [sqrt(2 * row["lr"] * row["weight_decay"] / (1 + row["momentum"])) for row in rows]
    limit = max(abs(mean_and_error(row["angle"])[0] / form - 1) for row, form in zip(rows, small, strict=True))
    plain = [n.error for n in less if "momentum 0," in n.setting and n.quantity in (ANGLE, NORM)]
    off = _worst(less, NORM)
    at = {n.quantity: n for n in less if n.setting == off.setting}
    return [
        f"(a) In all {len(rows)} settings of the grid the angle is within {_percent(angle.error)} of "
        f"arccos(1 - lr d / (1 + a)) (largest deviation: {angle.setting}), the norm within {_percent(norm.error)} of "
        f"its formula ({norm.setting}). Of sqrt(2 lr d / (1 + a)), the form for small angles, the angle is within "
        f"{_percent(limit)}.",
        "The remaining deviation of the norm is not noise: with momentum the formula takes the gradients of different "
        "updates for uncorrelated. With their correlation counted, as measured, the norm is within "
        f"{_percent(counted.error)}. The rest is that the norm fluctuates, at large angles with momentum: the angle "
        f"whose cosine is E w.w+ / E w.w, which is what the formula is of, is within {_percent(turn.error)}.",
        f"So the norm's formula fails where gradients are alike from update to update: at {off.setting} it is off by "
        f"{100 * off.error:+.0f} % ({100 * at[COUNTED].error:+.1f} % with the correlation counted), the angle, which "
        f"does not depend on the gradients, by {100 * at[ANGLE].error:+.1f} %. Without momentum both hold within "
        f"{_percent(max(plain, key=abs))} whatever the noise.",
    ]


def _of_angles(numbers: list[Number]) -> list[str]:
    angles = {n.setting: n.mean for n in numbers if n.quantity == ANGLE}
    small = {s: smd.effective_angle(angle, float(s.rpartition(" ")[2])) <= SMALL for s, angle in angles.items()}
    lines = []
    for quantity, what in (
        (EXCESS, "the limiting excess is"),
        (CONVERGENCE, "the rate of convergence, 1 / updates, corrected for the warmup of the momentum buffer, is"),
    ):
        own = [n for n in numbers if n.quantity == quantity and n.values]
        if not own:
            continue  # every excess has ended too high
        of = {name: [n.error for n in own if n.setting.startswith(f"{name},") and small[n.setting]] for name in NAMES}
        found = "; ".join(f"{name} {_range(errors)} in {len(errors)} settings" for name, errors in of.items() if errors)
        lines.append(
            f"(b) At small angles {what} proportional to the angular update: one line for decay and for fixed norms, "
            f"with momentum higher by sqrt((1 + a) / (1 - a)). Difference of the {quantity} from it, where the angle "
            f"times this factor is at most {SMALL}: {found or 'no setting'}; in all {len(own)} settings "
            f"{_range([n.error for n in own])}."
        )
    lines.append(
        "What does not agree there: towards large angles the excess saturates (it cannot exceed the range of the "
        "quotient), and no rate is given where it ends above half of its start; where few updates are enough, each "
        "repeat gets there by its noise rather than by the theory's mean. SGD-LAWN takes the tangent part of its "
        "buffer alone: with momentum 0.9 its angle grows less than in proportion to the learning rate, and at large "
        "angles its excess is below the line."
    )
    return lines


def _of_drop(record: Record) -> list[str]:
    drop = smd.Drop(**record.config["drop"])
    lines = []
    for row in record.result["drop"]:
        angle = {when: f"{mean_and_error(values)[0]:.4f}" for when, values in row["angle_in"].items()}
        risk = {when: mean_and_error(values) for when, values in row["excess_in"].items()}
        excess = {when: f"{mean:.5f} ({error:.5f})" for when, (mean, error) in risk.items()}
        setting = f"{_optimizer(row)}, momentum {row['momentum']:g}"
        if row["lawn"]:
            lines.append(
                f"(d) {setting}: at the drop the angle goes at once from {angle['before']} to {angle['first']} rad; "
                f"soon after it is {angle['soon']}, at the end {angle['late']}. The excess goes from "
                f"{excess['before']} to {excess['soon']} and {excess['late']}. At each of {drop.steps} updates of "
                f"{drop.repeats} weights the angle is arctan(lr ||r|| / c) to {row['off']['arctangent']:.0e}; "
                f"lr ||r|| / c itself is at most {_percent(row['off']['tangent'])} more."
            )
            continue
        times = mean_and_error(row["angle_in"]["before"])[0] / mean_and_error(row["angle_in"]["late"])[0]
        lines.append(
            f"(c) {setting}, with decay: at the drop the angle falls at once from {angle['before']} to "
            f"{angle['first']} rad, then climbs to {angle['late']}, {times:.2f} times less than before "
            f"(sqrt({1 / drop.factor:g}) = {sqrt(1 / drop.factor):.2f}). The excess falls from {excess['before']} to "
            f"{excess['soon']} soon after it and is {excess['late']} at the end, "
            f"{risk['late'][0] / risk['soon'][0]:.1f} times as much; "
            f"the time scale of that, (1 - a) / (4 lr d), is {drop.scale():.0f} updates."
        )
    lines.append(
        "So what a lower learning rate gains under decay is partly lost again while the norm shrinks to its new "
        "equilibrium; with a fixed norm it stays. A smaller angle is not better in itself: it also learns more slowly, "
        "as (b) shows."
    )
    return lines


NAMES = ("SGD", "SGD-LAWN")


def _optimizer(row: dict[str, Any]) -> str:
    return NAMES[row["lawn"]]


def _worst(numbers: list[Number], quantity: str) -> Number:
    return max((n for n in numbers if n.quantity == quantity), key=lambda n: abs(n.error))


def _percent(value: float) -> str:
    return f"{100 * abs(value):.2g} %"


def _range(errors: list[float]) -> str:
    return f"{100 * min(errors):+.0f} to {100 * max(errors):+.0f} %"


SMD_RAYLEIGH = Simulation(
    "smd_rayleigh",
    "Spherical motion dynamics: weight decay and fixed norms on a noisy Rayleigh quotient",
    smd.FULL,
    smd.SHORT,
    smd.run,
    show_record,
    "Mean (standard error, number of repeats); a repeat has a start and noise of its own.",
    notes=(
        "The model: w'Aw / w'w from noisy samples of A, invariant to the scale of w as a normalized layer is. A has 32 "
        "eigenvalues (16 with --short), 0 and the others evenly from 0.5 to 1.5; its samples differ from it by noise "
        "times a symmetric matrix of Gaussian numbers. The excess is what w'Aw / w'w is above the smallest of them.",
        "Theory of angle and norm: Wan et al. 2021, arXiv 2006.08419, for SGD with learning rate lr, momentum a and "
        "decay d as torch.optim.SGD has them. The norm's formula is given L, the mean squared gradient at norm 1, as "
        "measured. Theory of excess and convergence: that of small angles "
        "(experiments/spherical_motion/measurements.py).",
        "The optimizers are torch.optim.SGD and this project's SGDLAWN. In (a) the norm starts 1.5 times too large, in "
        "(c) 3 times. We measure the last half of the updates in (a) and (b); in (c) and (d) the last fifth before "
        "the drop, a fifth to two fifths of the time scale after it (soon), and the last updates (late). The record "
        "has the settings of each part.",
    ),
    seconds=(180.0, 5.0),
)
