"""Spherical motion dynamics on the Rayleigh quotient: the model, the numbers, the record and its page."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch

from experiments import __main__ as command
from experiments.reporting import simulations
from experiments.reporting.cell_results import mean_and_error
from experiments.spherical_motion import measurements as smd
from experiments.spherical_motion.page import SMD_RAYLEIGH
from experiments.spherical_motion.rayleigh import (
    Point,
    Trajectories,
    angle,
    eigenvalues,
    excess,
    flow_time,
    gradient,
    noise_gradient,
    noisy_products,
)
from lawn.diagnostics import equilibrium_angle, equilibrium_norm
from lawn.train import provenance
from tests.experiments.helpers import unfolded
from tests.helpers import ROOT

TINY = replace(
    smd.SHORT,
    seed=1,
    dimension=8,
    equilibrium=smd.Equilibrium(lr=(0.3,), weight_decay=(0.3,), momentum=(0.0, 0.9), repeats=2, steps=100),
    correlated=smd.Correlated(noise=(0.3, 0.03), momentum=(0.0, 0.9), repeats=2, steps=100),
    angles=smd.Angles(angle=(0.1, 0.4), momentum=(0.0, 0.9), repeats=2, steps=200),
    drop=smd.Drop(momentum=(0.0, 0.9), weight_decay=0.04, repeats=4, at=100, steps=500),
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def symmetric(n: int) -> torch.Tensor:
    """Of Gaussian numbers: variance 1 off the diagonal, 2 on it."""
    drawn = torch.randn(n, n, dtype=torch.float64, generator=generator())
    return (drawn + drawn.T) / math.sqrt(2)


def test_the_gradient_is_autograds():
    matrix = torch.diag(eigenvalues(7)) + 0.3 * symmetric(7)
    w = torch.randn(5, 7, dtype=torch.float64, generator=generator(), requires_grad=True)
    ((w * (w @ matrix)).sum(1) / w.square().sum(1)).sum().backward()
    ours = gradient(w.detach(), w.detach() @ matrix)
    torch.testing.assert_close(ours, w.grad, rtol=1e-12, atol=1e-12)


def test_the_scale_of_the_weight_is_invariant():
    w = torch.randn(5, 7, dtype=torch.float64, generator=generator())
    matrix = symmetric(7)
    g = gradient(w, w @ matrix)
    assert (w * g).sum(1).abs().max() < 1e-13
    torch.testing.assert_close(gradient(10 * w, 10 * w @ matrix), g / 10)
    torch.testing.assert_close(excess(10 * w, eigenvalues(7)), excess(w, eigenvalues(7)))


def test_the_noise_is_that_of_random_symmetric_matrices():
    """Drawn without the matrix the gradient has the covariance of one drawn with it, 4 s^2 (1 - ww') at norm 1."""
    n, many, s = 4, 40_000, 0.5
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    drawn = torch.randn(many, n, n, dtype=torch.float64, generator=generator())
    explicit = s * (drawn + drawn.mT) / math.sqrt(2) @ w
    ours = noisy_products(w.expand(many, n), torch.zeros(n, dtype=torch.float64), torch.tensor([[s]]), generator())
    square = w @ w
    expected = 4 * s**2 * (torch.eye(n) - torch.outer(w, w) / square) / square
    for image in (explicit, ours):
        torch.testing.assert_close(gradient(w.expand(many, n), image).T.cov(), expected, rtol=0, atol=0.03 * s**2)
    assert float(expected.trace() * square) == pytest.approx(noise_gradient(s, n))


def test_angles_of_any_size():
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    for expected in (1e-9, 1e-3, 1.0, 3.0):
        b = 5 * torch.tensor([[math.cos(expected), math.sin(expected)]], dtype=torch.float64)
        assert float(angle(a, b)) == pytest.approx(expected, rel=1e-6)


def test_gradient_flow_takes_the_time_that_it_is_said_to():
    """Small steps without noise, on the quotient itself."""
    trajectories = Trajectories([Point(lr=1e-3, momentum=0.0, noise=0.0)], [1.0], 1, 8, generator(), lawn=True)
    risks = [float(trajectories.step().excess) for _ in range(1000)]
    steps = next(step for step, risk in enumerate(risks) if risk <= risks[0] / math.e)
    assert steps * 1e-3 == pytest.approx(flow_time(8), rel=1e-2)


@pytest.fixture(scope="module")
def grid():
    points = [Point(lr, a, 0.3, d) for lr, d, a in product((0.1, 0.2, 0.4), (0.03, 0.08, 0.2), (0.0, 0.5, 0.9))]
    return smd.at_equilibrium(points, start=1.5, repeats=4, steps=2000, dimension=32, generator=generator())


def test_angle_and_norm_are_within_3_percent_of_the_formulas(grid):
    """Angles from 0.056 to 0.4, with the optimizer of torch."""
    assert len(grid) == 27
    for row in grid:
        lr, d, a = row["lr"], row["weight_decay"], row["momentum"]
        mean = {key: mean_and_error(row[key])[0] for key in ("angle", "turn", "norm", "unit_gradient", "carried")}
        assert mean["angle"] == pytest.approx(equilibrium_angle(lr, d, a), rel=0.03)
        assert mean["angle"] == pytest.approx(math.sqrt(2 * lr * d / (1 + a)), rel=0.03)
        assert mean["turn"] == pytest.approx(equilibrium_angle(lr, d, a), rel=0.015)
        assert mean["norm"] == pytest.approx(equilibrium_norm(lr, d, mean["unit_gradient"], a), rel=0.03)
        counted = equilibrium_norm(lr, d, mean["unit_gradient"] + mean["carried"], a)
        assert mean["norm"] == pytest.approx(counted, rel=0.015)


def test_less_noise_makes_the_norm_of_momentum_smaller_than_its_formula():
    """Not the angle, and not without momentum."""
    points = [Point(0.3, a, 0.03, 0.03) for a in (0.0, 0.9)]
    for row in smd.at_equilibrium(points, 1.0, repeats=4, steps=1500, dimension=32, generator=generator()):
        a = row["momentum"]
        mean = {key: mean_and_error(row[key])[0] for key in ("angle", "norm", "unit_gradient", "carried")}
        off = mean["norm"] / equilibrium_norm(0.3, 0.03, mean["unit_gradient"], a) - 1
        assert off < -0.1 if a else abs(off) < 0.005
        assert mean["norm"] == pytest.approx(
            equilibrium_norm(0.3, 0.03, mean["unit_gradient"] + mean["carried"], a), rel=0.01
        )
        assert mean["angle"] == pytest.approx(equilibrium_angle(0.3, 0.03, a), rel=0.02)


@pytest.fixture(scope="module")
def drops():
    settings = replace(smd.FULL, drop=smd.Drop(momentum=(0.0,), weight_decay=0.04, repeats=24, at=200, steps=1000))
    return [smd.after_drop(settings, lawn, generator())[0] for lawn in (False, True)]


def test_decay_overshoots_when_the_learning_rate_drops(drops):
    """To a tenth of the angle, of which then all but sqrt(10) is lost again, and the risk with it."""
    row, _ = drops
    turned = {when: mean_and_error(values)[0] for when, values in row["angle_in"].items()}
    assert turned["before"] == pytest.approx(equilibrium_angle(0.5, 0.04), rel=0.03)
    assert turned["first"] == pytest.approx(turned["before"] / 10, rel=0.1)  # a single update of 24 weights
    assert turned["late"] == pytest.approx(equilibrium_angle(0.05, 0.04), rel=0.03)
    (low, low_error), (late, late_error) = (mean_and_error(row["excess_in"][when]) for when in ("soon", "late"))
    assert late - low > 5 * math.hypot(low_error, late_error)
    assert low < mean_and_error(row["excess_in"]["before"])[0] / 4


def test_fixed_norms_do_not(drops):
    _, row = drops
    turned = {when: mean_and_error(values)[0] for when, values in row["angle_in"].items()}
    assert turned["late"] == pytest.approx(turned["soon"], rel=0.02)
    assert turned["soon"] < turned["before"] / 9
    (low, low_error), (late, late_error) = (mean_and_error(row["excess_in"][when]) for when in ("soon", "late"))
    assert late < low + 3 * math.hypot(low_error, late_error)
    assert row["off"]["arctangent"] < 1e-12
    assert 0 < row["off"]["tangent"] < 0.05


def test_the_angle_of_fixed_norms_by_hand():
    """arctan(lr ||r|| / c) from the very first update, with r = b - w (w.b) / c^2 and b = a b + g."""
    lr, a, c = 0.3, 0.9, 2.0
    trajectories = Trajectories([Point(lr, a, 0.3)], [c], 3, 6, generator(), lawn=True)
    b = torch.zeros_like(trajectories.weights)
    for _ in range(5):
        before = trajectories.weights.clone()
        seen = trajectories.step()
        b = a * b + trajectories.gradients  # which is tangent already
        r = b - before * (before * b).sum(1, keepdim=True) / c**2
        expected = torch.atan(lr * r.norm(dim=1) / c)
        torch.testing.assert_close(seen.angle, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(trajectories.weights.norm(dim=1), torch.full((3,), c, dtype=torch.float64))
        torch.testing.assert_close(trajectories.buffers, b)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulation") / "results"
    replace(SMD_RAYLEIGH, settings=TINY).execute(folder)
    return folder


@pytest.fixture
def results(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "results")


@pytest.fixture
def call(monkeypatch, capsys, results):
    """Exit code, output and errors of a command line; the simulation's settings are small, and recorded."""
    monkeypatch.setitem(command.SIMULATIONS, "smd_rayleigh", replace(SMD_RAYLEIGH, settings=TINY))
    monkeypatch.setattr(command, "EXPERIMENTS", {name: command.EXPERIMENTS[name] for name in ("demo", "figure1")})

    def run(*arguments: str) -> tuple[int, str, str]:
        code = command.main([*arguments, "--results", str(results)])
        return code, *capsys.readouterr()

    return run


def test_the_figure_is_drawn(call, results, tmp_path):
    page = simulations.simulation_page(command.SIMULATIONS["smd_rayleigh"], results)
    page.figure().savefig(tmp_path / "figure.svg")
    assert "<path" in (tmp_path / "figure.svg").read_text()


def test_the_page_comes_from_the_record_alone(call, results):
    (path,) = (results / "simulations").glob("*.json")
    stamp = path.stat().st_mtime_ns
    code, out, _ = call("run", "smd_rayleigh")
    assert (code, path.stat().st_mtime_ns) == (0, stamp)  # it is there, so nothing was run
    assert str(results / "smd_rayleigh.md") in out
    page = (results / "smd_rayleigh.md").read_text()
    assert f"[The record](simulations/{path.name})" in page
    assert "record of each seed" not in page
    for suffix in ("md", "csv", "tex", "svg"):
        (results / f"smd_rayleigh.{suffix}").unlink()
    assert call("report", "smd_rayleigh")[0] == 0
    assert (results / "smd_rayleigh.md").read_text() == page
    assert (results / "smd_rayleigh.svg").exists()
    content = json.loads(path.read_text())
    content["result"]["equilibrium"][0]["norm"] = [123.0, 125.0]
    path.write_text(json.dumps(content))
    page = simulations.simulation_page(command.SIMULATIONS["smd_rayleigh"], results)
    assert "124.0000 (1.0000, n=2)" in {entry.ours for _, row in page.panels[0].rows for entry in row}


def test_the_index_shows_it_beside_the_others(call, results):
    assert call("report")[0] == 0
    index = unfolded((results / "index.html").read_text())
    assert '<a href="#smd_rayleigh">Spherical motion dynamics</a>' in index
    (path,) = (results / "simulations").glob("*.json")
    assert f'href="simulations/{path.name}"' in index
    assert index.count('id="image-') == 1


def test_nothing_recorded(call, results):
    shutil.rmtree(results / "simulations")
    code, out, _ = call("plan", "smd_rayleigh")
    assert code == 0
    assert "0/1 0:03:00" in out
    assert call("report")[0] == 0
    assert "No runs yet." in (results / "smd_rayleigh.md").read_text()
    assert not (results / "smd_rayleigh.svg").exists()


def test_the_plan_knows_what_is_done(call):
    code, out, _ = call("plan", "smd_rayleigh", "figure1")
    assert code == 0
    assert "1/1 0:00:00" in out
    assert "3 cells, 7 runs, 1 done" in out


@pytest.mark.parametrize("damage", ["half", "part", "kind", "curve", "config", "packages", "cpu"])
def test_a_damaged_record_is_refused_in_one_line(call, results, damage, drawn_figures):
    (path,) = (results / "simulations").glob("*.json")
    text = path.read_text()
    content = json.loads(text)
    if damage == "part":
        del content["result"]["angles"]
    if damage == "kind":
        content["result"]["drop"][0]["excess_in"] = None
    if damage == "curve":
        content["result"]["drop"][0]["angle"] = []
    if damage == "config":
        content["config"]["seed"] = 2
    if damage in ("packages", "cpu"):
        del content["environment"][damage]
    path.write_text(text[: len(text) // 2] if damage == "half" else json.dumps(content))
    code, _, err = call("report", "smd_rayleigh")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {path}: ")
    assert ("its config does not match its name" if damage == "config" else "damaged record") in err


@pytest.mark.parametrize(("option", "value"), [("--only", "lr=1"), ("--set", "data_dir=x")])
def test_options_of_runs_do_not_apply(call, option, value):
    code, _, err = call("run", "smd_rayleigh", option, value)
    assert code == 2
    assert err == f"error: {option}: smd_rayleigh is a simulation, without runs of run.py; leave it out\n"


def test_uncommitted_code_is_visible(monkeypatch, tmp_path):
    small = replace(SMD_RAYLEIGH, settings=TINY, run=lambda settings: {"seconds": 0})
    asked = []

    def git(root, *arguments):
        asked.append(arguments)
        if "--show-toplevel" in arguments:
            return str(root)
        if arguments[0] == "ls-files":
            return "lawn/train/provenance.py"
        return "a" * 40 if arguments[0] == "rev-parse" else " M experiments/spherical_motion/measurements.py" * dirty

    monkeypatch.setattr(provenance, "_git", git)
    for dirty in (False, True):
        record = small.execute(tmp_path)
        assert record.code == "a" * 10 + (" with uncommitted changes" if dirty else "")
        assert record.environment["dirty"] is dirty
    assert ("status", "--porcelain", "--", "lawn", "experiments") in asked


def test_the_committed_record_is_of_these_settings_and_agrees():
    record = SMD_RAYLEIGH.record(ROOT / "results")
    assert record is not None
    assert record.environment["dirty"] is False
    for row in record.result["equilibrium"]:
        lr, d, a = row["lr"], row["weight_decay"], row["momentum"]
        gradient_square = mean_and_error(row["unit_gradient"])[0]
        assert mean_and_error(row["angle"])[0] == pytest.approx(equilibrium_angle(lr, d, a), rel=0.03)
        assert mean_and_error(row["norm"])[0] == pytest.approx(equilibrium_norm(lr, d, gradient_square, a), rel=0.03)
