"""The constrained updates on a GPU: all blocks of a parameter group in five kernel launches (six for the wrapper).

A table of addresses stands for the tensors; a program works on one chunk of one tensor. Sums go to one row for each
chunk and are added up by one program for each block, always in the same order: runs repeat bit for bit. Nothing is
read back by the host.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lawn.optim.cache import find_for_triton
from lawn.optim.update import Blocks

CHUNK = 4096
TILE = 1024  # rows of sums that a block's program adds at a time
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

find_for_triton()


@triton.jit
def _place(layout, numels, program, CHUNK: tl.constexpr):
    """Tensor of a program's chunk, its elements and which of them exist."""
    tensor = tl.load(layout + 2 * program)
    at = tl.load(layout + 2 * program + 1) + tl.arange(0, CHUNK)
    return tensor, at, at < tl.load(numels + tensor)


@triton.jit
def _gradient_sums(table, layout, numels, sums, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    g = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    tl.store(sums + 3 * program, tl.sum(w * w))
    tl.store(sums + 3 * program + 1, tl.sum(w * g))


@triton.jit
def _gradient_along(sums, blocks, along, TILE: tl.constexpr):
    block = tl.program_id(0)
    start, stop = tl.load(blocks + block), tl.load(blocks + block + 1)
    ww, wg = 0.0, 0.0
    for tile in range(start, stop, TILE):
        row = tile + tl.arange(0, TILE)
        ww += tl.sum(tl.load(sums + 3 * row, row < stop, 0.0))
        wg += tl.sum(tl.load(sums + 3 * row + 1, row < stop, 0.0))
    tl.store(along + block, tl.where(ww > 0, wg / ww, tl.where(ww == 0, 0.0, ww)))


@triton.jit
def _moments(
    table, layout, numels, owners, along, scales, sums, beta1, rest1, beta2, rest2, eps,
    ADAM: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    g = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    first = tl.load(table + 4 * tensor + 2).to(tl.pointer_type(DTYPE)) + at
    p = g - tl.load(along + block) * w
    r = beta1 * tl.load(first, there, 0.0).to(tl.float32) + rest1 * p
    tl.store(first, r.to(DTYPE), there)
    if ADAM:
        second = tl.load(table + 4 * tensor + 3).to(tl.pointer_type(DTYPE)) + at
        v = beta2 * tl.load(second, there, 0.0).to(tl.float32) + rest2 * p * p
        tl.store(second, v.to(DTYPE), there)
        # What is stored is what the move reads: in half precision the sums must be of the rounded moments.
        r = r.to(DTYPE).to(tl.float32) * tl.load(scales + 2 * block)
        r = r / (tl.sqrt(v.to(DTYPE).to(tl.float32)) * tl.load(scales + 2 * block + 1) + eps)
    else:
        r = r.to(DTYPE).to(tl.float32)
    tl.store(sums + 3 * program, tl.sum(w * w))
    tl.store(sums + 3 * program + 1, tl.sum(w * r))
    tl.store(sums + 3 * program + 2, tl.sum(r * r))


@triton.jit
def _coefficients(sums, blocks, norms, lr, coefficients, zero, TRUST: tl.constexpr, TILE: tl.constexpr):
    block = tl.program_id(0)
    start, stop = tl.load(blocks + block), tl.load(blocks + block + 1)
    ww, wr, rr = 0.0, 0.0, 0.0
    for tile in range(start, stop, TILE):
        row = tile + tl.arange(0, TILE)
        ww += tl.sum(tl.load(sums + 3 * row, row < stop, 0.0))
        wr += tl.sum(tl.load(sums + 3 * row + 1, row < stop, 0.0))
        rr += tl.sum(tl.load(sums + 3 * row + 2, row < stop, 0.0))
    along = wr / ww
    tangent = tl.maximum(rr - along * wr, 0.0)
    c = tl.load(norms + block)
    rate = tl.load(lr)
    if TRUST:
        rate = tl.where(tangent > 0, rate * c / tl.sqrt(tangent), rate)
    scale = c / tl.sqrt(ww + rate * rate * tangent)
    tl.store(coefficients + 2 * block, tl.where(ww == 0, 0.0, scale * (1 + rate * along)))
    tl.store(coefficients + 2 * block + 1, tl.where(ww == 0, 0.0, scale * rate))
    tl.store(zero + block, tl.where(ww == 0, 1, 0))


@triton.jit
def _move(
    table, layout, numels, owners, scales, coefficients, eps,
    ADAM: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    weight = tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at
    w = tl.load(weight, there, 0.0).to(tl.float32)
    r = tl.load(tl.load(table + 4 * tensor + 2).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    if ADAM:
        v = tl.load(tl.load(table + 4 * tensor + 3).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
        r = r * tl.load(scales + 2 * block) / (tl.sqrt(v) * tl.load(scales + 2 * block + 1) + eps)
    w = tl.load(coefficients + 2 * block) * w - tl.load(coefficients + 2 * block + 1) * r
    tl.store(weight, w.to(DTYPE), there)


@triton.jit
def _project(table, layout, numels, owners, along, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0)
    g = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    p = g - tl.load(along + tl.load(owners + tensor)) * w.to(tl.float32)
    tl.store(tl.load(table + 4 * tensor + 2).to(tl.pointer_type(DTYPE)) + at, w, there)
    tl.store(tl.load(table + 4 * tensor + 3).to(tl.pointer_type(DTYPE)) + at, p.to(DTYPE), there)


@triton.jit
def _difference_sums(table, layout, numels, sums, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    before = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    r = before - w
    tl.store(sums + 3 * program, tl.sum(before * before))
    tl.store(sums + 3 * program + 1, tl.sum(before * r))
    tl.store(sums + 3 * program + 2, tl.sum(r * r))


@triton.jit
def _retract(table, layout, numels, owners, coefficients, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _place(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    weight = tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at
    w = tl.load(weight, there, 0.0).to(tl.float32)
    before = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    w = tl.load(coefficients + 2 * block) * before - tl.load(coefficients + 2 * block + 1) * (before - w)
    tl.store(weight, w.to(DTYPE), there)


@dataclass(frozen=True)
class Layout:
    """What does not change from step to step, on the device."""

    layout: Tensor  # int64 [programs, 2]: tensor and first element of each program's chunk
    numels: Tensor  # int64 [tensors]
    owners: Tensor  # int64 [tensors]: block of each tensor
    blocks: Tensor  # int64 [blocks + 1]: the programs of block b are blocks[b] to blocks[b + 1]


@lru_cache(maxsize=64)
def _layout(numels: tuple[tuple[int, ...], ...], device: torch.device) -> Layout:
    programs: list[tuple[int, int]] = []
    starts, owners, tensor = [0], [], 0
    for block, sizes in enumerate(numels):
        for size in sizes:
            programs += [(tensor, at) for at in range(0, size, CHUNK)]
            owners.append(block)
            tensor += 1
        starts.append(len(programs))
    flat = [size for sizes in numels for size in sizes]
    made = (torch.tensor(values, dtype=torch.int64, device=device) for values in (programs, flat, owners, starts))
    return Layout(*made)


class _Launch:
    """The arguments that the kernels share, for blocks whose tensors are of one device and dtype."""

    def __init__(self, blocks: Blocks) -> None:
        like = blocks.weights[0]
        self.device, self.norms = like.device, blocks.norms
        numels = [w.numel() for w in blocks.weights]
        ends = accumulate(blocks.sizes)
        owned = tuple(tuple(numels[end - size : end]) for size, end in zip(blocks.sizes, ends, strict=True))
        self.fixed = _layout(owned, like.device)
        lists = [[t.data_ptr() for t in tensors] for tensors in blocks.lists]
        lists += [[0] * len(numels)] * (4 - len(lists))
        table = upload(torch.tensor(lists, dtype=torch.int64, device="cpu").T.contiguous(), like.device)
        self.chunks, self.each = (len(self.fixed.layout),), (len(blocks.sizes),)
        self.where = (table, self.fixed.layout, self.fixed.numels)
        self.kind = {"DTYPE": DTYPES[like.dtype], "CHUNK": CHUNK}
        self.sums = torch.empty(self.chunks[0], 3, device=like.device)
        self.zero = torch.empty(self.each[0], dtype=torch.int8, device=like.device)

    def gradient_along(self) -> Tensor:
        """w.g / w.w of each block, for the first two lists."""
        along = torch.empty(self.each[0], device=self.device)
        _gradient_sums[self.chunks](*self.where, self.sums, **self.kind)
        _gradient_along[self.each](self.sums, self.fixed.blocks, along, TILE=TILE)
        return along

    def coefficients(self, lr: float | Tensor, trust: bool) -> Tensor:
        """What each block keeps of w and takes of r, from the sums: [blocks, 2]."""
        made = torch.empty(self.each[0], 2, device=self.device)
        full = torch.full((), float(lr), device=self.device) if not isinstance(lr, Tensor) else lr
        rate = full.to(self.device, torch.float32)
        radii = upload(torch.tensor(self.norms, dtype=torch.float32, device="cpu"), self.device)
        _coefficients[self.each](self.sums, self.fixed.blocks, radii, rate, made, self.zero, TRUST=trust, TILE=TILE)
        return made


def _where_they_are(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the blocks, which need not be the current one."""

    @wraps(function)
    def launched(blocks: Blocks, *arguments: Any, **keys: Any) -> Any:
        device = blocks.weights[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return function(blocks, *arguments, **keys)

    return launched


@_where_they_are
def step(
    blocks: Blocks,
    scales: Tensor,
    lr: float | Tensor,
    *,
    first: tuple[float, float],
    second: tuple[float, float],
    eps: float,
    adam: bool,
    trust: bool,
) -> Tensor:
    """One update of all blocks, in place; returns which of them are zero, and left as they are [blocks].

    `first` and `second` are the factors of the old moment and of the new gradient; `scales` [2, blocks], on the host,
    the bias corrections of m, and of sqrt(v).
    """
    on = _Launch(blocks)
    corrections = upload(scales.T.float().contiguous(), on.device)
    along = on.gradient_along()
    _moments[on.chunks](
        *on.where, on.fixed.owners, along, corrections, on.sums, *first, *second, eps, ADAM=adam, **on.kind
    )
    coefficients = on.coefficients(lr, trust)
    _move[on.chunks](*on.where, on.fixed.owners, corrections, coefficients, eps, ADAM=adam, **on.kind)
    return on.zero


@_where_they_are
def project(blocks: Blocks) -> None:
    """For the wrapper, before the base optimizer's step. The lists are weights, gradients, `before` and `projected`:
    the weights are copied to `before`, the projected gradients written to `projected`."""
    on = _Launch(blocks)
    _project[on.chunks](*on.where, on.fixed.owners, on.gradient_along(), **on.kind)


@_where_they_are
def retract(blocks: Blocks) -> Tensor:
    """After it. The lists are weights and `before`: the update before - weights is projected, taken, and rescaled."""
    on = _Launch(blocks)
    _difference_sums[on.chunks](*on.where, on.sums, **on.kind)
    _retract[on.chunks](*on.where, on.fixed.owners, on.coefficients(1.0, False), **on.kind)
    return on.zero


def upload(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
