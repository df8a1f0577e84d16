"""What an optimizer under LAWN takes from a state dict that it loads, and what it keeps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lawn.optim.keys import DEFAULTS, NORM, RUN, Group, State, check_free_steps, check_group, entries


def complete_state_dict(saved: dict[str, Any], groups: list[Group], keys: list[str]) -> dict[str, Any]:
    """Add to a state dict the `keys` of param groups that it lacks, with their values in `groups`.

    The state dict of another optimizer lacks them. `blocks` and names are always taken from `groups`, since they depend
    on the order in which parameters were given. Raises ValueError if a group cannot be constrained as it was saved, or
    names are in another order.
    """
    old = saved["param_groups"]
    if len(old) != len(groups):
        return saved  # torch raises the error
    _check_order(old, groups)
    merged_groups = []
    for index, (loaded, group, own) in enumerate(zip(old, groups, kept(groups, old, keys), strict=True)):
        if "target_norms" in loaded:
            raise ValueError("an earlier version of LAWN wrote this checkpoint, with norms by position")
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        merged = {**own, **loaded, **names, "blocks": group.get("blocks")}
        check_group({**merged, "params": group["params"]}, index, "the loaded param group")
        merged_groups.append({**merged, "free_steps": check_free_steps(merged["free_steps"])})
    state = {
        key: {**entry, NORM: entry[NORM].tolist()}
        for key, entry in saved["state"].items()
        if isinstance(entry, dict) and isinstance(entry.get(NORM), Tensor)
    }
    return {**saved, "state": {**saved["state"], **state}, "param_groups": merged_groups}


def _check_order(loaded: list[Group], groups: list[Group]) -> None:
    """Raise ValueError if named parameters come in another order, unless the state dict is by name, as those of DCP."""
    if any(isinstance(key, str) for group in loaded for key in group["params"]):
        return
    names, own = ([name for group in each for name in group.get("param_names") or []] for each in (loaded, groups))
    if names != own and sorted(names) == sorted(own):
        other, name = next(pair for pair in zip(names, own, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"the checkpoint has the parameters in another order: {other!r} where the optimizer has {name!r}, but "
            "torch loads state by position; give them in that order"
        )


def kept(groups: list[Group], loaded: list[Group], keys: Iterable[str]) -> list[Group]:
    """Return the `keys` that param groups keep as they load others; if those have no phase, updates count anew."""
    anew = not any(RUN & each.keys() for each in loaded)
    found = []
    for group in groups:
        own = {key: group[key] for key in keys if key in group}
        found.append({**own, **{key: DEFAULTS[key] for key in RUN if anew and group.get("steps")}})
    return found


def restore_norms(state: State) -> None:
    """Store the norms as floats, and those of slices as float64 tensors, after loading, in each state that exists."""
    for _, entry in entries(state):
        if entry:
            norm = entry.get(NORM, 0.0)
            if isinstance(norm, list | tuple):
                entry[NORM] = torch.tensor(norm, dtype=torch.float64, device="cpu")
            elif isinstance(norm, Tensor) and norm.ndim:
                entry[NORM] = norm.to("cpu", torch.float64)
            else:
                entry[NORM] = float(norm)
