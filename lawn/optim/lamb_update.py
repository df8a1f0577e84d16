"""The update of LAMB (You et al. 2020, Algorithm 2), for all of its variants."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import rounding, sharding, slices, stages, sums
from lawn.optim.adam_lawn import moments
from lawn.optim.blocks import batch_elements, real
from lawn.optim.group_update import gradients


def lamb(
    optimizer: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    idle: list[Tensor],
    max_trust: float,
    trust_vectors: bool,
) -> stages.Pending | None:
    """Apply one step of LAMB to parameters that have gradients.

    The update of DTensors waits for the norms of whole tensors; it is returned. `idle` are trainable DTensors without a
    gradient on this rank, which take part in the sums as another rank may have a gradient. Raises TypeError for slices
    of DTensors.
    """
    sharded = [p for p in params if sharding.is_dtensor(p)] if sharding.any_dtensor(params) else []
    plain = [p for p in params if not sharding.is_dtensor(p)] if sharded else params
    for p in (*sharded, *idle):
        if _slice_axes(group.get(slices.KEY), p) is not None:
            slices.check_param(group[slices.KEY], p, "LAMB: ")
    for part in rounding.batches(plain, batch_elements(plain[0].device) if plain else 0):
        trusted = [trust_vectors or p.ndim >= 2 for p in part]
        with _moved(optimizer, group, part) as (weights, updates):
            norms = _norms(group, part, weights), _norms(group, part, updates)
            _apply(weights, updates, *norms, trusted, group["lr"], max_trust)
    if not sharded and not idle:
        return None
    waiting = ExitStack()
    weights, updates = waiting.enter_context(_moved(optimizer, group, sharded))
    trusted = [trust_vectors or p.ndim >= 2 for p in sharded]
    update_of = dict(zip(sharded, updates, strict=True))
    taking_part = {*sharded, *idle}
    members = [p for p in group["params"] if p in taking_part]  # in the same order on all ranks
    shards = real(sharding.local(members))
    moves = [update_of.get(p, shard.new_zeros(0)) for p, shard in zip(members, shards, strict=True)]

    def complete(reduced: Tensor) -> None:
        norms = dict(zip(members, reduced.sqrt(), strict=True))
        weight_norms, update_norms = ([norms[p][column] for p in sharded] for column in range(2))
        _apply(weights, updates, weight_norms, update_norms, trusted, group["lr"], max_trust)
        waiting.close()

    return stages.Pending(members, torch.stack([_squares(shards), _squares(moves)], 1), complete)


@contextmanager
def _moved(
    optimizer: Optimizer, group: dict[str, Any], params: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Update the moments; yield real views of the weights, local shards of DTensors, and LAMB's updates of them.

    Those in half precision are float32 copies, which are rounded at the end: squares and norms would leave the range of
    float16.
    """
    first, second, steps = moments(optimizer, params, group)
    lists = sharding.local(params), gradients(params), first, second
    with rounding.in_float32(optimizer, group, params, *lists, always=True) as (weights, grads, first, second):
        yield _updates(group, weights, grads, first, second, steps)


def _updates(
    group: dict[str, Any],
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Update the moments; return real views of the weights and LAMB's updates of them."""
    if not weights:  # a rank may have no gradient of a param group; torch refuses empty lists
        return [], []
    beta1, beta2 = group["betas"]
    first, second, grads, weights = map(real, (first, second, grads, weights))
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    # The counters are on the host, so reading them does not wait for the device.
    counts: list[Any] = [t.double() if torch.compiler.is_compiling() else t.item() for t in steps]
    roots = torch._foreach_sqrt(torch._foreach_div(second, [1 - beta2**t for t in counts]))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_mul_(roots, [1 - beta1**t for t in counts])
    updates = torch._foreach_div(first, roots)
    if group["weight_decay"]:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    return weights, list(updates)


def _apply(
    weights: list[Tensor],
    updates: list[Tensor],
    weight_norms: Sequence[Tensor],
    update_norms: Sequence[Tensor],
    trusted: list[bool],
    lr: float | Tensor,
    max_trust: float,
) -> None:
    """Apply updates, multiplied by their trust ratios where these are `trusted`."""
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr  # one of shape [1] would add an axis to a single number
    parts: dict[Any, list[Any]] = {}
    elements: dict[Any, int] = {}
    for w, r, w_norm, r_norm, trust in zip(weights, updates, weight_norms, update_norms, trusted, strict=True):
        kind = w.device, w.dtype, trust
        elements[kind] = elements.get(kind, 0) + w.numel()
        parts.setdefault((*kind, elements[kind] // batch_elements(w.device)), []).append((w, r, w_norm, r_norm))
    for (_, _, trust, _), members in parts.items():
        weights, updates, *norms = map(list, zip(*members, strict=True))
        moves: Sequence[Tensor]
        if trust:
            w_norms, r_norms = (torch.cat([norm.reshape(-1) for norm in each]) for each in norms)
            ratios = torch.where((w_norms > 0) & (r_norms > 0), w_norms / r_norms, 1.0).clamp(max=max_trust)
            rates = (ratios * lr).split([norm.numel() for norm in norms[0]])
            moves = _scaled(updates, [rate.view_as(norm) for rate, norm in zip(rates, norms[0], strict=True)])
        else:
            moves = torch._foreach_mul(updates, lr)
        torch._foreach_sub_(weights, moves)


def _scaled(tensors: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """Multiply each tensor by its factors, which are broadcast; on a GPU with as many kernels as for one tensor."""
    if not tensors[0].is_cuda or len(tensors) == 1:
        return [t * factor for t, factor in zip(tensors, factors, strict=True)]
    pairs = list(zip(tensors, factors, strict=True))
    flat = torch.cat([t.reshape(-1) for t in tensors]) * torch.cat([x.expand_as(t).reshape(-1) for t, x in pairs])
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _norms(group: dict[str, Any], params: list[Tensor], tensors: list[Tensor]) -> Sequence[Tensor]:
    """Compute the norms of one tensor for each parameter, those of its slices if its group has `norm_axes` for it."""
    slice_axes = [_slice_axes(group.get(slices.KEY), p) for p in params]
    if slice_axes.count(None) == len(params):
        return sums.norms(tensors)
    return [
        sums.norm(t) if axes is None else _slice_norms(t, axes) for t, axes in zip(tensors, slice_axes, strict=True)
    ]


def _slice_norms(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Compute the norm of each slice, in a shape that is broadcast with the tensor."""
    over = [axis for axis in range(t.ndim) if axis not in axes]
    if t.numel() <= sums.LARGE * slices.count(t, axes):
        return torch.linalg.vector_norm(t, dim=over, keepdim=True)
    return t.square().sum(over, keepdim=True).sqrt()


def _slice_axes(axes: slices.NormAxes, p: Tensor) -> tuple[int, ...] | None:
    """The slice axes of a parameter, which need not be constrained; None for one that has no slices of several numbers.

    A param group with `norm_axes` may have vectors beside its weights.
    """
    if not slices.fit(axes, p):
        return None
    found = slices.slice_axes(axes, p)
    return found if p.numel() > slices.count(p, found) else None


def _squares(tensors: list[Tensor]) -> Tensor:
    """Compute the square of each tensor's norm [tensors], in float64 on the CPU."""
    device = tensors[0].device
    dtype = torch.float64 if device.type == "cpu" else torch.promote_types(tensors[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, dtype)) for t in tensors]
    return torch.stack([norm.to(device, dtype) for norm in norms]) ** 2
