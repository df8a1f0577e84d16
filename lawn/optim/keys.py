"""The keys under which LAWN stores phase and norms in an optimizer (paper section 3).

They are in the optimizer's own state and param groups, where every tool that saves an optimizer finds them. State
follows its parameter, whether a checkpoint is keyed by name, by owner or by parameter:

    state[p]["lawn_norm"]   the norm c of the weight or of its block, as a float; 0.0 while the weight is free. With
                            `norm_axes` the norms of its slices, as a float64 tensor on the CPU

The key exists from the parameter's first update on, even if the optimizer keeps no state of that parameter. During a
step of a wrapped optimizer it does not exist, so that the optimizer finds the state as it left it. A float is saved and
loaded unchanged. torch would cast a tensor to the weight's dtype as it loads it, so it gets a list of floats instead.
Each param group has the keys:

    constrain     True constrains all parameters, False none, None those with two or more dimensions and more than one
                  element, or more than one in each slice
    blocks        None, or an int per parameter: constrained parameters with the same int share one norm
    free_steps    number of updates before the switch; None waits for a call of `constrain`
    steps         number of updates of the group so far
    switched      whether the group is in the second phase, in which each weight's norm is fixed at its next update at
                  the latest

The switch adds and removes no keys. Two more keys of a group exist only if they are used: `norm_axes`, the axes that a
norm runs over, for a norm for each slice of the constrained parameters (see `lawn.optim.slices`), and `rounding`. With
stochastic rounding the state of each half-precision parameter has `lawn_seed`, an int (see `lawn.optim.rounding`).
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lawn.optim import sharding, slices

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
Norm = float | Tensor  # of a parameter, 0.0 if it is not fixed; or one for each of its slices, all fixed
NORM = "lawn_norm"
DEFAULTS: Group = {"constrain": None, "blocks": None, "free_steps": None, "steps": 0, "switched": False}
KEYS = (*DEFAULTS, slices.KEY)
FLAT = "each with parts of several weights, which have no norm of their own; use fully_shard (FSDP2)"

RUN = {"steps", "switched"}  # what a group has done, which a group dict that was used for another optimizer still has


def check_free_steps(free_steps: Any, place: str = "") -> int | None:
    """Convert `free_steps` to an int or None. Raises ValueError for anything else and for negative numbers."""
    try:
        steps = None if free_steps is None else operator.index(free_steps)
    except TypeError:
        steps = -1
    if isinstance(free_steps, bool) or (steps is not None and steps < 0):
        raise ValueError(f"{place}free_steps must be a non-negative integer or None, got {free_steps!r}")
    return steps


def add_defaults(groups: list[Group], index: int, free_steps: int | None) -> None:
    """Add missing keys to param group `index`. Raises ValueError or TypeError as `check_group` does.

    A group that is added after the first step starts in the phase of the others, unless it has its own `free_steps`,
    which are counted from then on.
    """
    group = groups[index]
    check_group(group, index)
    for p, times in Counter[Tensor](group["params"]).items():
        if times > 1:  # torch only warns
            raise ValueError(f"{describe(group, index, p)} is there twice; list each parameter once")
    check_flat(p for p in group["params"] if p.requires_grad and constrains(group, p))
    if group.get("constrain") is not False and any(hasattr(p, "ds_id") for p in group["params"]):
        raise TypeError(f"param group {index} holds flat parameters of DeepSpeed's ZeRO, {FLAT}")
    phase: Group = {"free_steps": free_steps}
    if "free_steps" not in group:
        phase = _phase_of([each for each in groups if each is not group and "switched" in each]) or phase
    phase = {**DEFAULTS, **phase, **{key: group[key] for key in DEFAULTS if key in group}}
    group.update({**phase, "free_steps": check_free_steps(phase["free_steps"])})


def _phase_of(groups: list[Group]) -> Group:
    """Return the keys of the group that switches last, without those that have nothing to constrain if there are
    others; nothing before the first step.
    """
    if not any(group["steps"] or group["switched"] for group in groups):
        return {}
    last = max(_constraining(groups), key=_remaining)
    return {key: last[key] for key in ("free_steps", "steps", "switched")}


def _constraining(groups: list[Group]) -> list[Group]:
    """Return the groups with a parameter to constrain, or all if there are none."""
    found = [group for group in groups if any(not is_lazy(p) and constrains(group, p) for p in group["params"])]
    return found or groups


def _remaining(group: Group) -> float:
    """Return the number of updates until the group switches."""
    if group["switched"]:
        return -math.inf
    return math.inf if group["free_steps"] is None else group["free_steps"] - group["steps"]


def check_group(group: Group, index: int, label: str = "param group") -> None:
    """Raise ValueError or TypeError if LAWN does not support a param group."""
    constrain = group.get("constrain")
    if constrain is not None and not isinstance(constrain, bool):
        raise ValueError(f"{label} {index}: constrain={constrain!r}, but it must be True, False or None")
    if sharding.any_dtensor(group["params"]):
        for reason in filter(None, map(sharding.problem, group["params"])):
            raise TypeError(f"{label} {index} holds {reason}")
    if group.get("constrain") is not False and holds_flat(group):
        raise TypeError(
            f"{label} {index} holds flat parameters of FullyShardedDataParallel, {FLAT}, or constrain=False if the "
            "group has only biases and the like"
        )
    blocks = group.get("blocks")
    if blocks is not None:
        _check_blocks(group, f"{label} {index}: ")
    axes = group.get(slices.KEY)
    if axes is not None:
        slices.check(axes, f"{label} {index}: ")
        if blocks is not None:
            raise ValueError(
                f"{label} {index}: blocks (include_bias) join parameters to one norm, but {slices.KEY} divides each; "
                "use separate param groups"
            )
        for p in filter(partial(constrains, group), group["params"]):
            slices.check_param(axes, p, f"{label} {index}: ")
    if group.get("weight_decay") and any(constrains(group, p) for p in group["params"]):
        raise ValueError(
            f"{label} {index}: weight_decay={group['weight_decay']}, but LAWN replaces weight decay: "
            "set it to 0 there, or constrain=False to leave the group free"
        )


def _check_blocks(group: Group, place: str) -> None:
    """Raise ValueError unless `blocks` has an int for each parameter and joins only parameters that are constrained."""
    params, blocks = group["params"], list(group["blocks"])
    if len(blocks) != len(params) or not all(isinstance(key, Integral) for key in blocks):
        raise ValueError(f"{place}blocks must have an int for each of {len(params)} parameters")
    members = Counter(blocks)
    if group.get("constrain") is None and any(
        members[key] > 1 and not is_lazy(p) and p.ndim < 2 for key, p in zip(blocks, params, strict=True)
    ):
        raise ValueError(f"{place}blocks join a vector, which is free by default; set constrain=True in the group")


def holds_flat(group: Group) -> bool:
    """Whether FullyShardedDataParallel has flattened parameters of the group; its NO_SHARD keeps their shapes."""
    flat = [p for p in group["params"] if getattr(p, "_fsdp_flattened", False)]
    return bool(flat) and all(p.ndim < 2 for p in flat)


def has_weights(groups: list[Group]) -> bool:
    """Whether there are parameters with two or more dimensions."""
    return any(not is_lazy(p) and p.ndim >= 2 for group in groups for p in group["params"])


def check_not_flattened(groups: list[Group], had_weights: bool) -> None:
    """Raise TypeError if an optimizer that `had_weights` has none any more, but parameters of one dimension."""
    flat = [i for i, group in enumerate(groups) if group["params"] and group.get("constrain") is not False]
    if had_weights and flat and not has_weights(groups):
        raise TypeError(
            f"param group {flat[0]} holds flat parameters in the place of the weights that the optimizer was made "
            f"with, as those of DeepSpeed's ZeRO, {FLAT}, or ZeRO stage 0; constrain=False leaves a group free"
        )


def entries(state: Mapping[Any, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the states of parameters. An optimizer may keep other values beside them, as MADGRAD does."""
    return [(p, entry) for p, entry in state.items() if isinstance(p, Tensor)]


def forget_removed(known: dict[Tensor, Any], groups: list[Group]) -> None:
    """Remove the entries of parameters that have left the param groups, which would keep them in memory."""
    for p in known.keys() - {p for group in groups for p in group["params"]}:
        del known[p]


def without_run(group: Group) -> Group:
    """Return a copy of a param group that begins with the free phase."""
    return {key: value for key, value in group.items() if key not in RUN}


def free_norm(group: Group, p: Tensor) -> Norm:
    """Return what the state of a parameter without fixed norms holds."""
    axes = slice_axes(group, p)
    return 0.0 if axes is None else torch.zeros(slices.count(p, axes), dtype=torch.float64, device="cpu")


def fixed_norm(entry: dict[str, Any] | None) -> Norm:
    """Return the norm that the state of a parameter holds; 0.0 if none is fixed."""
    norm = (entry or {}).get(NORM, 0.0)
    if entry and isinstance(norm, Tensor) and norm.device.type != "cpu":  # Lightning moves all state as it loads it
        entry[NORM] = norm = norm.cpu()
    return norm if not isinstance(norm, Tensor) or norm.any() else 0.0


def is_fixed(norm: Norm) -> bool:
    """Whether this is a fixed norm."""
    return isinstance(norm, Tensor) or norm != 0.0


def is_constrained(groups: list[Group]) -> bool:
    """Whether a param group is in its second phase; those without a parameter to constrain count if all are."""
    return any(group.get("switched") for group in _constraining(groups))


def is_due(group: Group) -> bool:
    """Whether the group's next update is constrained."""
    return bool(group["switched"]) or (group["free_steps"] is not None and group["steps"] >= group["free_steps"])


def remove_keys(optimizer: Optimizer) -> None:
    """Remove LAWN's keys from the param groups and the state."""
    for group in optimizer.param_groups:
        for key in KEYS:
            group.pop(key, None)
    for _, entry in entries(optimizer.state):
        entry.pop(NORM, None)


def check_flat(params: Iterable[Tensor]) -> None:
    """Raise TypeError for a tensor subclass that cannot be flattened, as the weights of some quantized training.

    Updates flatten weights, and compiled code would write beyond their memory.
    """
    for p in params:
        if type(p) in sharding.PLAIN or sharding.is_dtensor(p) or is_lazy(p):
            continue
        try:
            is_flat = p.detach().reshape(-1).shape == (p.numel(),)
        except Exception:  # subclasses raise many types for what they do not have
            is_flat = False
        if not is_flat:
            raise TypeError(f"weights of type {type(p).__name__} cannot be flattened, as their updates need it")


def describe(group: Group, index: int, p: Tensor) -> str:
    """Describe a parameter for an error message."""
    position = next(i for i, q in enumerate(group["params"]) if q is p)
    names = group.get("param_names") or []
    if position < len(names):
        return f"parameter '{names[position]}'"
    return f"parameter {position} of param group {index} (shape {tuple(p.shape)})"


def constrains(group: Group, p: Tensor) -> bool:
    """Whether parameter `p` of the group is constrained in the second phase."""
    constrain, axes = group.get("constrain"), group.get(slices.KEY)
    if constrain is not None or p.ndim < 2:
        return bool(constrain) and p.numel() > 0
    if group.get("blocks") is not None:
        return p.numel() > 0
    # A single number on a fixed norm has no direction in which it could move.
    return p.numel() > (1 if axes is None else slices.count(p, slices.slice_axes(axes, p)))


def is_trained(p: Tensor) -> bool:
    """Whether a parameter gets gradients, or has one given by the caller, for example of an evolution strategy."""
    return p.requires_grad or p.grad is not None


def slice_axes(group: Group, p: Tensor) -> tuple[int, ...] | None:
    """Return the slice axes of a parameter whose slices have a norm each; None if it is free or has a single norm."""
    axes = group.get(slices.KEY)
    return slices.slice_axes(axes, p) if axes is not None and constrains(group, p) else None
