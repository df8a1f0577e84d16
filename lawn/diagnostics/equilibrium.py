"""Where weight decay takes a scale-invariant weight: "spherical motion dynamics" (Wan et al. 2021, arXiv 2006.08419).

The gradient g of a scale-invariant weight w, one followed by batch norm for example, is orthogonal to it and shrinks
with its norm: ||g|| = sqrt(L) / ||w||, where L is the squared gradient at w / ||w||. So gradients lengthen the weight,
decay shortens it, and the norm settles where both cancel. For torch.optim.SGD with learning rate eta, momentum a
(dampening 0, no Nesterov) and weight_decay d (added to the gradient),

    w+ = (1 + a - eta d) w - a w- - eta g,        ||w+||^2 = ||w||^2 = R  and  w+.w = w.w- = R cos(theta).

The product with w has no g in it, and gives cos(theta) = 1 - eta d / (1 + a), whatever the gradients are. The square
has g in L = R E||g||^2, and where a > 0 in E g.w-, which is zero for gradients that are not correlated over the
updates; then R^2 = eta L / (d (1 - a) (2 - eta d / (1 + a))).
"""

import math


def equilibrium_angle(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """Angle between consecutive iterates at equilibrium, in radians per update.

    It is arccos(1 - lr d / (1 + a)), for small angles sqrt(2 lr d / (1 + a)) as Wan et al. write it, which at 0.45 is
    0.8 % less. 0 without decay: there is no equilibrium then, the angle falls for ever.
    Raises ValueError where momentum is not in [0, 1), lr or weight_decay is negative or not finite, or their product
    is too large to converge.
    """
    return 2 * math.asin(math.sqrt(_turn(lr, weight_decay, momentum) / 2))


def equilibrium_norm(lr: float, weight_decay: float, unit_gradient: float, momentum: float = 0.0) -> float:
    """Norm of the weight at equilibrium, in the weight's own unit.

    `unit_gradient` is L = E||g||^2 of minibatch gradients at the weight scaled to norm 1, that is E ||g||^2 ||w||^2.
    With momentum it holds for gradients that are not correlated over the updates; with the buffer b of the update
    before, L + 2 a E (g.b) ||w||^2 in place of L holds for all.
    Raises ValueError as `equilibrium_angle` does, and where lr, weight_decay or unit_gradient is 0: no equilibrium.
    """
    turn = _turn(lr, weight_decay, momentum)
    if not (lr > 0 and weight_decay > 0 and 0 < unit_gradient < math.inf):
        raise ValueError(
            "no equilibrium: lr, weight_decay and unit_gradient must be positive and finite, "
            f"got {lr}, {weight_decay} and {unit_gradient}"
        )
    if turn == 2:
        raise ValueError(f"no equilibrium: lr * weight_decay must be less than {2 * (1 + momentum):g}")
    return (lr * unit_gradient / (weight_decay * (1 - momentum) * (2 - turn))) ** 0.25


def _turn(lr: float, weight_decay: float, momentum: float) -> float:
    """1 less the cosine of the angle, in [0, 2]."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    turn = lr * weight_decay / (1 + momentum)
    if turn > 2:
        raise ValueError(f"lr * weight_decay must be at most {2 * (1 + momentum):g}, got {lr * weight_decay:g}")
    return turn
