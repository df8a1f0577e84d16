"""Equilibrium of weight decay and gradients for scale-invariant weights (Wan et al. 2021).

The gradient g of a scale-invariant weight w, for example of a layer with batch normalization, is orthogonal to w and
inversely proportional to its norm: ||g|| = sqrt(L) / ||w||, where L is the squared norm of the gradient at w / ||w||.
Gradients increase the norm of the weight and weight decay decreases it, until both effects cancel. Let w- and w+ be
the iterates before and after w. torch's SGD with learning rate eta, momentum a (no dampening, no Nesterov) and weight
decay d (added to the gradient) gives

    w+ = (1 + a - eta d) w - a w- - eta g,

and at equilibrium ||w+||^2 = ||w||^2 = R and w+.w = w.w- = R cos(theta). The inner product of the first equation with w
contains no g and gives cos(theta) = 1 - eta d / (1 + a) for any gradients. Its square contains L = R E||g||^2 and, with
momentum, E g.w-, which is zero for gradients that are uncorrelated between updates. Then
R^2 = eta L / (d (1 - a) (2 - eta d / (1 + a))).
"""

import math


def equilibrium_angle(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """Compute the angle between consecutive iterates of a scale-invariant weight at equilibrium.

    It is arccos(1 - lr d / (1 + a)). Wan et al. give its approximation for small angles, sqrt(2 lr d / (1 + a)), which
    is 0.8 % smaller at 0.45 radians. Without weight decay there is no equilibrium; the angle converges to 0.

    Args:
        lr: learning rate of SGD.
        weight_decay: weight decay d, added to the gradient.
        momentum: momentum a, without dampening and Nesterov.

    Returns:
        The angle in radians per update.

    Raises:
        ValueError: if `momentum` is not in [0, 1), `lr` or `weight_decay` is negative or not finite, or their product
            is too large for convergence.

    References:
        Wan et al. 2021, [arXiv:2006.08419](https://arxiv.org/abs/2006.08419).

    Examples:
        >>> from lawn.diagnostics import equilibrium_angle
        >>> round(equilibrium_angle(lr=0.1, weight_decay=5e-4, momentum=0.9), 6)
        0.007255
    """
    return 2 * math.asin(math.sqrt(_one_minus_cosine(lr, weight_decay, momentum) / 2))


def equilibrium_norm(lr: float, weight_decay: float, unit_gradient: float, momentum: float = 0.0) -> float:
    """Compute the norm of a scale-invariant weight at equilibrium.

    With momentum the result holds for gradients that are uncorrelated between updates. For other gradients it holds
    with L + 2 a E[g.b] ||w||^2 in place of L, where b is the momentum buffer before the update.

    Args:
        lr: learning rate of SGD.
        weight_decay: weight decay d, added to the gradient.
        unit_gradient: mean squared norm L of minibatch gradients at the weight scaled to norm 1, E ||g||^2 ||w||^2.
        momentum: momentum a, without dampening and Nesterov.

    Returns:
        The norm, in the unit of the weight.

    Raises:
        ValueError: as `equilibrium_angle` does, and if `lr`, `weight_decay` or `unit_gradient` is 0, because there is
            no equilibrium then.

    References:
        Wan et al. 2021, [arXiv:2006.08419](https://arxiv.org/abs/2006.08419).

    Examples:
        >>> from lawn.diagnostics import equilibrium_norm
        >>> round(equilibrium_norm(lr=0.1, weight_decay=5e-4, unit_gradient=1.0), 3)
        3.162
    """
    difference = _one_minus_cosine(lr, weight_decay, momentum)
    if not (lr > 0 and weight_decay > 0 and 0 < unit_gradient < math.inf):
        raise ValueError(
            "no equilibrium: lr, weight_decay and unit_gradient must be positive and finite, "
            f"got {lr}, {weight_decay} and {unit_gradient}"
        )
    if difference == 2:
        raise ValueError(f"no equilibrium: lr * weight_decay must be less than {2 * (1 + momentum):g}")
    return (lr * unit_gradient / (weight_decay * (1 - momentum) * (2 - difference))) ** 0.25


def _one_minus_cosine(lr: float, weight_decay: float, momentum: float) -> float:
    """Compute 1 - cos(theta), in [0, 2]."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    difference = lr * weight_decay / (1 + momentum)
    if difference > 2:
        raise ValueError(f"lr * weight_decay must be at most {2 * (1 + momentum):g}, got {lr * weight_decay:g}")
    return difference
