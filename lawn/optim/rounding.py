"""Stochastic rounding of updated weights to half precision.

A value between two numbers of the weight's dtype is rounded to either, such that the result equals the value in
expectation. Small updates, which rounding to nearest would lose, then act on average.

The random numbers come from a hash with a counter. The update of a parameter has a stream, which depends on the seed in
the parameter's state and on the number of updates of its group; element i uses number i of the stream. A resumed run
therefore draws the same numbers, and neither batches nor kernels nor devices matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, count

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import sharding
from lawn.optim.keys import Group, entries

KEY = "rounding"  # of a param group
SEED = "lawn_seed"  # of a parameter's state
MODES = ("nearest", "stochastic")
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32


def check(mode: object, place: str = "") -> None:
    """Raise ValueError for an unknown mode; `place` says where it was given."""
    if mode not in MODES:
        raise ValueError(f"{place}rounding must be 'nearest' or 'stochastic', got {mode!r}")


def is_stochastic(group: Group, p: Tensor) -> bool:
    """Whether updates of a parameter of the group are rounded stochastically."""
    return group.get(KEY, "nearest") == "stochastic" and p.dtype in DROPPED_BITS


def make_seeds(optimizer: Optimizer, group: Group, params: list[Tensor]) -> None:
    """Store a seed in the state of each parameter that needs one and has none: its position in the optimizer.

    All ranks of a distributed run then have the same seeds. Where another parameter has that seed, as after a param
    group was removed, the next number that none has is taken.
    """
    missing = [p for p in params if is_stochastic(group, p) and SEED not in optimizer.state[p]]
    if missing:
        position = {p: i for i, p in enumerate(p for each in optimizer.param_groups for p in each["params"])}
        taken = {entry.get(SEED) for _, entry in entries(optimizer.state)}
        for p in missing:
            seed = next(number for number in count(position[p]) if number not in taken)
            optimizer.state[p][SEED] = seed
            taken.add(seed)


def streams(optimizer: Optimizer, group: Group, params: list[Tensor]) -> Tensor | None:
    """Compute the stream of each parameter for the group's next update.

    Args:
        optimizer: the optimizer, whose state has or receives the seeds.
        group: the param group.
        params: parameters of one dtype.

    Returns:
        Streams [params] as int32, on the host, or None if the parameters are rounded to nearest. Those of a DTensor are
        of the shard of this rank.
    """
    if not params or not is_stochastic(group, params[0]):
        return None
    other = next((p.dtype for p in params if p.dtype != params[0].dtype), None)
    if other is not None:
        raise ValueError(
            f"rounding='stochastic' needs blocks of one dtype, but a weight of {params[0].dtype} shares its norm with "
            f"a parameter of {other}; give them one dtype, or separate param groups"
        )
    make_seeds(optimizer, group, params)
    seeds = torch.tensor([optimizer.state[p][SEED] for p in params], dtype=torch.int32, device="cpu")
    starts = torch.tensor([sharding.first_number(p) for p in params], dtype=torch.int32, device="cpu")
    return _hash(_hash(seeds + 1) + group["steps"]) + starts


def stochastic(values: Tensor, dtype: torch.dtype, streams: Tensor, numels: list[int]) -> Tensor:
    """Round values stochastically.

    Args:
        values: float32 values [elements] of tensors one after the other.
        dtype: bfloat16 or float16.
        streams: stream of each tensor [tensors].
        numels: number of elements of each tensor.

    Returns:
        Values [elements] in float32 that `dtype` represents exactly. Infinity and NaN do not change.
    """
    starts = torch.tensor([0, *accumulate(numels)][:-1], device="cpu")
    offsets = (streams - starts).to(values.device, torch.int32)
    if len(numels) > 1:
        lengths = torch.tensor(numels, device="cpu").to(values.device)
        offsets = offsets.repeat_interleave(lengths, output_size=len(values))
    numbers = _hash(torch.arange(len(values), dtype=torch.int32, device=values.device).add_(offsets))
    dropped = DROPPED_BITS[dtype]
    noise = numbers.bitwise_and_((1 << dropped) - 1)
    rounded = (values.view(torch.int32) + noise).bitwise_and_(-1 << dropped).view(torch.float32)
    if dtype == torch.float16:  # its subnormal numbers are multiples of 2^-24
        multiples = (values * 2.0**24 + noise * 2.0**-dropped).floor_()
        rounded = torch.where(values.abs() < 2.0**-14, multiples * 2.0**-24, rounded)
    return torch.where(values.isnan(), values, rounded)


def parts(
    group: Group, params: list[Tensor], idle: list[Tensor], limit: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Divide the parameters of a free update that may need float32 copies into parts of one dtype.

    Args:
        group: the param group.
        params: its free parameters with gradients.
        idle: trainable DTensors without gradients. With DTensors there is one part for each dtype, so that all ranks
            have the same parts.
        limit: number of elements of a part, which a single parameter may exceed.

    Yields:
        The parameters and the idle ones of each part.
    """
    if group.get(KEY, "nearest") == "nearest":
        yield params, idle
        return
    if idle or any(map(sharding.is_dtensor, params)):
        for dtype in sorted({p.dtype for p in (*params, *idle)}, key=str):
            yield [p for p in params if p.dtype == dtype], [p for p in idle if p.dtype == dtype]
        return
    for part in batches(params, limit):
        yield part, []


def batches(params: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Divide parameters into batches of one dtype and at most `limit` elements, which a single one may exceed."""
    part: list[Tensor] = []
    elements = 0
    for p in sorted(params, key=lambda p: str(p.dtype)):
        if part and (p.dtype != part[0].dtype or elements + p.numel() > limit):
            yield part
            part, elements = [], 0
        part.append(p)
        elements += p.numel()
    if part:
        yield part


@contextmanager
def in_float32(
    optimizer: Optimizer,
    group: Group,
    params: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    *state: list[Tensor],
    always: bool = False,
) -> Iterator[tuple[list[Tensor], ...]]:
    """Let a free update that rounds stochastically work on float32 copies, and round them at the end.

    Args:
        optimizer: the optimizer.
        group: the param group.
        params: parameters of one part, see `parts`.
        weights: the parameters, or the local shards of DTensors.
        grads: gradients of the weights.
        *state: lists of the state, which is always rounded to nearest.
        always: whether an update that rounds to nearest works on copies, too, of the tensors in half precision.

    Yields:
        Weights, gradients and lists of the state: the given lists if the parameters are rounded to nearest and
        `always` is False.
    """
    own = streams(optimizer, group, params)
    if own is None and not always:
        yield weights, grads, *state
        return
    copies = tuple(
        [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors] for tensors in (weights, grads, *state)
    )
    yield copies
    for tensors, updated in zip(state, copies[2:], strict=True):
        _write(tensors, updated)
    if own is None:
        _write(weights, copies[0])
        return
    numels = [w.numel() for w in weights]
    rounded = stochastic(torch.cat([t.reshape(-1) for t in copies[0]]), weights[0].dtype, own, numels)
    torch._foreach_copy_(weights, [t.view(w.shape) for t, w in zip(rounded.split(numels), weights, strict=True)])


def _write(tensors: list[Tensor], updated: list[Tensor]) -> None:
    """Copy updated tensors to those that they are copies of."""
    pairs = [(t, new) for t, new in zip(tensors, updated, strict=True) if new is not t]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [new for _, new in pairs])


def _hash(x: Tensor) -> Tensor:
    """Hash int32 numbers, whose products overflow to 32 bits."""
    for _ in range(2):
        x = (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x).mul_(0x45D9F3B)
    return (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)
