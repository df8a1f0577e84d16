"""Weight normalization with a bounded norm (Hoffer et al. 2018), a baseline of the paper's section 3."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lawn.optim import sums
from lawn.optim.checks import check_shapes_known


class BoundedNorm(nn.Module):
    """Parametrization w = c v / ||v||, computed in the precision of c.

    Args:
        norm: the norm c, a 0-dim tensor.
    """

    norm: Tensor

    def __init__(self, norm: Tensor) -> None:
        super().__init__()
        self.register_buffer("norm", norm)

    def forward(self, v: Tensor) -> Tensor:
        """Compute w with the shape and dtype of v."""
        return (v * (self.norm / _norm(v))).to(v.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BoundedNorm":
        before = self.norm
        super()._apply(fn, recurse)
        if self.norm.dtype != before.dtype:  # model.bfloat16() casts buffers, with errors of up to 0.4 %
            self.norm = before.to(self.norm.device)
        return self


def bound_norms(model: nn.Module, select: Callable[[str], bool] | None = None) -> list[str]:
    """Fix the norms of weights at their present values by reparameterization, in place.

    Each real weight with two or more dimensions and elements becomes w = c v / ||v||, where any optimizer trains v and
    c = ||w|| is constant. The gradient with respect to v is orthogonal to v and proportional to 1 / ||v||, so under SGD
    ||v|| grows and the updates of w become smaller. LAWN constrains w itself and has no such decay. Hoffer et al. bound
    the norm of each output channel; here, as in LAWN, each weight tensor has one norm.

    The values of the weights do not change, and v is the old Parameter object. Create the optimizer afterwards, because
    the order of parameters changes. Tied weights stay tied. The norms are part of `state_dict`.

    Args:
        model: model to change.
        select: predicate of qualified names that selects weights; None selects all.

    Returns:
        The qualified names of the weights whose norms are fixed.

    Raises:
        ValueError: if no weight is selected, a weight is lazy, parametrized, pruned or normalized already, its norm is
            zero or not finite, or it is tied to a weight that is not selected. The model does not change then.

    References:
        - Hoffer et al. 2018, [arXiv:1803.01814](https://arxiv.org/abs/1803.01814).
        - Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn.optim import bound_norms
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> bound_norms(layer)
        ['weight']
        >>> with torch.no_grad():
        ...     _ = layer.parametrizations.weight.original.copy_(torch.tensor([[0.0, 1.0]]))
        >>> layer.weight.detach()  # the norm stays 3 sqrt(2)
        tensor([[0.0000, 4.2426]])
    """
    check_shapes_known(model)
    places: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}  # module, attribute, qualified name
    chosen: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        inside = "parametrizations" in path.split(".")
        for attribute, p in module._parameters.items():
            if p is None or p.ndim < 2 or p.numel() == 1 or not p.is_floating_point():
                continue
            name = f"{path}.{attribute}" if path else attribute
            places.setdefault(p, []).append((module, attribute, name))
            if not inside and (select is None or select(name)):
                chosen.setdefault(p, []).append(name)
    for module, attribute, name, _ in _parametrized(model):
        if getattr(module, attribute).ndim >= 2 and (select is None or select(name)):
            raise ValueError(f"{name} is parametrized already")
    for names in chosen.values():
        for name in names:
            path, _, attribute = name.rpartition(".")
            weight = attribute.removesuffix("_orig").removesuffix("_v").removesuffix("_g")
            if weight != attribute and isinstance(vars(model.get_submodule(path)).get(weight), Tensor):
                raise ValueError(f"{name} is what {weight} is computed from, by pruning or normalization: remove that")
    if not chosen:
        raise ValueError("nothing to bind: no selected parameter has two or more dimensions")
    bounds = {}
    for p, names in chosen.items():
        rest = [name for _, _, name in places[p] if name not in names]
        if rest:
            raise ValueError(f"{names[0]} is tied to {rest[0]}, which is not selected: select both or neither")
        norm = _norm(p.detach())
        if not (torch.isfinite(norm) and norm > 0):
            raise ValueError(f"cannot fix the norm of {names[0]}: it is {norm.item()}")
        bounds[p] = BoundedNorm(norm)
    for p, bound in bounds.items():
        for module, attribute, _ in places[p]:  # tied weights share v and c
            _unshare_class(module)
            parametrize.register_parametrization(module, attribute, bound)
    return [name for names in chosen.values() for name in names]


def release(model: nn.Module) -> None:
    """Undo `bound_norms` in place: each weight becomes an ordinary parameter with its present value.

    Args:
        model: model to change.

    Raises:
        ValueError: if a weight has another parametrization besides that of `bound_norms`.

    Examples:
        >>> import torch
        >>> from lawn.optim import bound_norms, release
        >>> layer = torch.nn.Linear(2, 1)
        >>> names = bound_norms(layer)
        >>> release(layer)
        >>> type(layer.weight).__name__
        'Parameter'
    """
    bounded = [entry for entry in _parametrized(model) if any(isinstance(step, BoundedNorm) for step in entry[3])]
    for _, _, name, chain in bounded:
        if len(chain) > 1:
            raise ValueError(f"{name} has another parametrization: remove that first")
    for module, attribute, _, _ in bounded:
        _unshare_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def _parametrized(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """Yield module, attribute, qualified name and parametrizations of each parametrized tensor."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for attribute, chain in chains.items():
                yield module, attribute, f"{path}.{attribute}" if path else attribute, chain


def _unshare_class(module: nn.Module) -> None:
    """Give a parametrized module its own class.

    torch implements parametrized weights as properties of a class that it creates for the module. Deep copies of the
    module share this class, so a property that is added to or removed from one copy would change all of them.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _norm(weight: Tensor) -> Tensor:
    """Compute the Frobenius norm in float32, or float64 for float64 weights."""
    return sums.norm(weight, torch.promote_types(weight.dtype, torch.float32))
