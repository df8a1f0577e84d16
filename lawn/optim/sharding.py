"""Sharded parameters (FSDP2, HSDP, tensor parallelism): the only module that knows torch's DTensor.

A rank holds a shard of each weight and updates it in place. It needs from other ranks only inner products over whole
weights: partial sums over the local shards, which `all_reduce` adds over the mesh dimensions that shard a weight.

torch.distributed.tensor is slow to import. A DTensor exists only if it is imported, so this module never imports it.
"""

import sys
from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}


def is_dtensor(t: Tensor | None) -> bool:
    """Whether a tensor is a DTensor."""
    if type(t) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def any_dtensor(tensors: list[Tensor]) -> bool:
    """Whether there is a DTensor; for plain tensors this takes hardly any time."""
    return not PLAIN.issuperset(map(type, tensors)) and any(map(is_dtensor, tensors))


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Replace each DTensor by the shard of this rank, which shares its memory. Call it without gradient recording."""
    return [_local(t) if is_dtensor(t) else t for t in tensors] if any_dtensor(tensors) else tensors


def problem(p: Tensor) -> str:
    """Say why a parameter cannot be updated; empty if it can."""
    if not is_dtensor(p):
        return ""
    partial = [placement for placement in _of(p).placements if placement.is_partial()]
    if partial:
        return (
            f"a DTensor with the placement {partial[0]!r}: its ranks hold terms of a reduction, and a norm needs its "
            "result; redistribute it to Shard or Replicate"
        )
    return ""


def gradient(p: Tensor) -> Tensor | None:
    """Return the gradient of a parameter for the shard of this rank; None if it has none.

    A DTensor gradient is redistributed to the placements of its parameter, in `p.grad`. Raises TypeError if a DTensor
    has a gradient that is none.
    """
    grad = p.grad
    if grad is None or not is_dtensor(p):
        return grad
    if not is_dtensor(grad) or _of(grad).device_mesh != _of(p).device_mesh:
        raise TypeError(
            f"a DTensor parameter of shape {tuple(p.shape)} has a gradient that is no DTensor of the same device mesh"
        )
    if _of(grad).placements != _of(p).placements:
        p.grad = grad = _of(grad).redistribute(_of(p).device_mesh, _of(p).placements)
    return _local(grad)


def same_shards(p: Tensor, t: Tensor) -> bool:
    """Whether a tensor is sharded as a parameter is, or both are plain tensors."""
    if not is_dtensor(p):
        return not is_dtensor(t)
    return is_dtensor(t) and _of(t).device_mesh == _of(p).device_mesh and _of(t).placements == _of(p).placements


def first_number(p: Tensor) -> int:
    """Return the index of the first random number of this rank's shard of a parameter; 0 for a plain tensor.

    Where a shard is a contiguous part of the whole tensor, it is the index of its first element, so that the numbers
    do not depend on the sharding. Other shards have numbers of their own.
    """
    if not is_dtensor(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = _of(p).device_mesh, _of(p).placements
    dims = _shard_dims(p)
    if all(type(placements[dim]).__name__ == "Shard" and placements[dim].dim == 0 for dim in dims):
        _, offset = compute_local_shape_and_global_offset(p.shape, mesh, placements)
        return offset[0] * (p.numel() // max(1, p.shape[0])) % 2**31 if p.ndim else 0
    place = 0
    for dim in dims:
        place = place * mesh.size(dim) + mesh.get_coordinate()[dim]
    return place * 0x9E3779B1 % 2**31


def all_reduce(params: list[Tensor], sums: Tensor) -> Tensor:
    """Add partial sums over the ranks that hold the other shards of each parameter.

    There is one collective for each mesh. It runs over the mesh dimensions that shard one of its parameters, never
    over those that replicate all. A parameter that is replicated over one of these dimensions is counted once.

    Args:
        params: parameters, the same on all ranks of a mesh. Those that are no DTensors keep their sums.
        sums: partial sums [params, terms] of this rank, zeros for an empty shard.

    Returns:
        Sums [params, terms] over whole parameters, the same bits on all ranks that share them.
    """
    dims = [_shard_dims(p) for p in params]
    rows: dict[Any, list[int]] = {}
    for row, (p, own) in enumerate(zip(params, dims, strict=True)):
        if own:
            rows.setdefault(_of(p).device_mesh, []).append(row)
    for mesh, members in rows.items():
        if mesh.get_coordinate() is None:  # this rank holds none of these parameters
            continue
        all_rows = len(members) == len(params)
        part = sums if all_rows else sums[members]
        part = _add_over(mesh, [dims[row] for row in members], part)
        if all_rows:
            return part
        sums = sums.index_put((torch.tensor(members, device=sums.device),), part)
    return sums


def _add_over(mesh: Any, shard_dims: list[tuple[int, ...]], sums: Tensor) -> Tensor:
    """Add the sums of parameters over one mesh."""
    dims = tuple(sorted(set().union(*shard_dims)))
    coordinate = mesh.get_coordinate()
    counted = [all(coordinate[dim] == 0 for dim in dims if dim not in own) for own in shard_dims]
    result = sums.to(mesh.device_type, copy=True)  # the shards may be on the host, and the process group on a device
    if not all(counted):
        result.masked_fill_(~torch.tensor(counted, device=result.device)[:, None], 0)
    for group in _groups(mesh, dims):
        torch.distributed.all_reduce(result, group=group)
    return result.to(sums.device)


def _groups(mesh: Any, dims: tuple[int, ...]) -> list[Any]:
    """Return the process groups that span the dimensions of a mesh: a single one if the dimensions have names."""
    if len(dims) == 1:
        return [mesh.get_group(dims[0])]
    if mesh.mesh_dim_names is None:
        return [mesh.get_group(dim) for dim in dims]
    names = tuple(mesh.mesh_dim_names[dim] for dim in dims)
    return [(mesh if len(dims) == mesh.ndim else mesh[names])._flatten().get_group()]


def _shard_dims(p: Tensor) -> tuple[int, ...]:
    """Return the mesh dimensions that shard a parameter."""
    if not is_dtensor(p):
        return ()
    return tuple(dim for dim, placement in enumerate(_of(p).placements) if not placement.is_replicate())


def _local(t: Tensor) -> Tensor:
    shard = _of(t).to_local()
    return shard if type(shard) is Tensor or not hasattr(shard, "wait") else shard.wait()  # AsyncCollectiveTensor


def _of(t: Tensor) -> Any:
    """The tensor as a DTensor, whose type is not known here."""
    return t
