"""Norms fixed from initialization by a reparameterization (Hoffer et al. 2018): the baseline of the paper's section 3.

w = c v / ||v||, where v is trained by any optimizer and c = ||w|| at registration is a constant. The gradient with
respect to v is orthogonal to v and proportional to 1 / ||v||: under SGD ||v|| grows, and the steps of w get shorter.
LAWN constrains w itself, so there is no such decay.

Hoffer et al. bound each output channel. Here, as in LAWN, each weight tensor has one norm.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class BoundedNorm(nn.Module):
    """v to c v / ||v||, in the precision of c; the result has the shape and dtype of v. `norm` is c, 0-dim."""

    norm: Tensor

    def __init__(self, norm: Tensor) -> None:
        super().__init__()
        self.register_buffer("norm", norm)

    def forward(self, v: Tensor) -> Tensor:
        return (v * (self.norm / _norm(v))).to(v.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BoundedNorm":
        before = self.norm
        super()._apply(fn, recurse)
        if self.norm.dtype != before.dtype:  # model.bfloat16() casts buffers, and c would be off by up to 0.4 %
            self.norm = before.to(self.norm.device)
        return self


def bound_norms(model: nn.Module, select: Callable[[str], bool] | None = None) -> list[str]:
    """Fix the norm of each weight with two or more dimensions where it is, by reparameterization, in place.

    `select` says by qualified name which weights; default all. Returns their names. Values do not change, and v is
    the old Parameter object; make the optimizer afterwards all the same, since the order of parameters changes. A tied
    weight stays tied. The norms are part of `state_dict`.

    Raises ValueError, before anything is changed, when there is nothing to bind, or a weight is parametrized already,
    its norm is zero or not finite, or it is tied to a weight that is not selected.
    """
    places: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}  # of each weight: module, attribute, qualified name
    chosen: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        inside = "parametrizations" in path.split(".")
        for attribute, p in module._parameters.items():
            if p is None or p.ndim < 2 or not p.is_floating_point():
                continue
            name = f"{path}.{attribute}" if path else attribute
            places.setdefault(p, []).append((module, attribute, name))
            if not inside and (select is None or select(name)):
                chosen.setdefault(p, []).append(name)
    for module, attribute, name, _ in _parametrized(model):
        if getattr(module, attribute).ndim >= 2 and (select is None or select(name)):
            raise ValueError(f"{name} is parametrized already")
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
        for module, attribute, _ in places[p]:  # tied places share v and c
            _own_class(module)
            parametrize.register_parametrization(module, attribute, bound)
    return [name for names in chosen.values() for name in names]


def release(model: nn.Module) -> None:
    """Undo `bound_norms` in place: each weight becomes an ordinary parameter with its present value.

    Raises ValueError when another parametrization was registered on top of it.
    """
    bounded = [entry for entry in _parametrized(model) if any(isinstance(step, BoundedNorm) for step in entry[3])]
    for _, _, name, chain in bounded:
        if len(chain) > 1:
            raise ValueError(f"{name} has another parametrization: remove that first")
    for module, attribute, _, _ in bounded:
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def _parametrized(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """Module, attribute, qualified name and list of parametrizations of each parametrized tensor."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for attribute, chain in chains.items():
                yield module, attribute, f"{path}.{attribute}" if path else attribute, chain


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Parametrized weights are properties of a class that torch makes for the module, but its deepcopy shares it: to add
    or remove a property for one copy would do so for the others.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _norm(weight: Tensor) -> Tensor:
    """Frobenius norm in float32 (float64 for float64)."""
    return torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
