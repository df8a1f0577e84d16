"""The equilibrium of weight decay: by hand, and by the recursion that it is the fixed point of."""

import math

import pytest
import torch

from lawn.diagnostics import equilibrium_angle, equilibrium_norm


@pytest.mark.parametrize(
    ("lr", "weight_decay", "momentum", "angle"),
    [
        (0.5, 1.0, 0.0, math.pi / 3),  # cosine 1 - 0.5
        (1.0, 1.0, 0.0, math.pi / 2),  # decay takes all of the weight: only the gradient is left
        (1.5, 0.5, 0.5, math.pi / 3),  # cosine 1 - 0.75 / 1.5
        (2.0, 1.0, 0.0, math.pi),
        (0.1, 0.0, 0.9, 0.0),
        (0.0, 0.1, 0.9, 0.0),
    ],
)
def test_angles_by_hand(lr, weight_decay, momentum, angle):
    assert equilibrium_angle(lr, weight_decay, momentum) == pytest.approx(angle)


def test_small_angles_are_those_of_the_paper():
    """sqrt(2 lr d / (1 + a)), which is exact in the limit only."""
    assert equilibrium_angle(0.1, 5e-4) == pytest.approx(1e-2, rel=1e-5)
    assert equilibrium_angle(0.095, 1e-3, 0.9) == pytest.approx(1e-2, rel=1e-5)
    assert equilibrium_angle(1e-9, 5e-4) == pytest.approx(1e-6, rel=1e-9)  # no cancellation
    assert equilibrium_angle(0.1, 1.0) / math.sqrt(0.2) == pytest.approx(1.0085, abs=1e-4)


def test_norms_by_hand():
    """Without momentum (1 - lr d)^2 R + lr^2 L / R = R: for lr = d = 1, R = L / R."""
    assert equilibrium_norm(1.0, 1.0, 16.0) == pytest.approx(2.0)  # R = 4
    assert equilibrium_norm(0.5, 1.0, 3.0) == pytest.approx(1.0)  # 1/4 R + 3/4 / R = R at R = 1
    assert equilibrium_norm(1.5, 0.5, 0.25, 0.5) == pytest.approx(1.0)  # 3/8 / (1/4 * 3/2)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [1e-2, 1e-1])
def test_the_fixed_point_of_torchs_sgd(momentum, rate):
    """Gradients of a given length that are orthogonal to all that went before: no expectation is needed."""
    lr, weight_decay, length = 0.5, rate / 0.5, 3.0
    steps = int(25 / rate)
    w = torch.nn.Parameter(torch.zeros(steps + 1, dtype=torch.float64))
    w.data[steps] = 1.0
    opt = torch.optim.SGD([w], lr=lr, weight_decay=weight_decay, momentum=momentum)
    for step in range(steps):
        w.grad = torch.zeros_like(w)
        w.grad[step] = length / w.detach().norm()
        before = w.detach().clone()
        opt.step()
    after = w.detach()
    angle = math.acos(float(before @ after / before.norm() / after.norm()))
    assert angle == pytest.approx(equilibrium_angle(lr, weight_decay, momentum), rel=1e-5)
    assert float(after.norm()) == pytest.approx(equilibrium_norm(lr, weight_decay, length**2, momentum), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.1, 1.0), r"momentum must be in \[0, 1\), got 1.0"),
        ((0.1, 0.1, -0.1), "momentum must be"),
        ((-0.1, 0.1), "lr must be finite and not negative, got -0.1"),
        ((math.nan, 0.1), "lr must be finite"),
        ((0.1, math.inf), "weight_decay must be finite"),
        ((3.0, 1.0), "lr \\* weight_decay must be at most 2, got 3"),
        ((4.0, 1.0, 0.5), "must be at most 3, got 4"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        equilibrium_angle(*arguments)
    lr, weight_decay, *momentum = arguments
    with pytest.raises(ValueError, match=message):
        equilibrium_norm(lr, weight_decay, 1.0, *momentum)


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 0.1, 1.0), (0.1, 0.0, 1.0), (0.1, 0.1, 0.0), (0.1, 0.1, math.nan), (0.1, 0.1, math.inf), (2.0, 1.0, 1.0)],
)
def test_no_equilibrium(arguments):
    with pytest.raises(ValueError, match="no equilibrium"):
        equilibrium_norm(*arguments)
