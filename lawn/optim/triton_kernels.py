"""Triton kernels of the constrained updates; `lawn.optim.update` documents the functions.

An update of all blocks of a param group takes six kernel launches (seven for the wrapper). The kernels read the tensors
through a table of addresses, and each program processes one chunk of one tensor. Each chunk's sums form a row, and one
program per block adds the rows in a fixed order, so runs are reproducible bit for bit. The host reads nothing back.
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

from lawn.optim.blocks import Blocks

CHUNK = 4096
TILE = 1024  # rows of sums that a program adds at a time
WRITES_WEIGHTS = ("adam", "sgd", "retract", "move", "combine")
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _locate(layout, numels, program, CHUNK: tl.constexpr):
    """Return the tensor of a program's chunk, the indices of its elements, and a mask of those that exist."""
    tensor = tl.load(layout + 2 * program)
    at = tl.load(layout + 2 * program + 1) + tl.arange(0, CHUNK)
    return tensor, at, at < tl.load(numels + tensor)


@triton.jit
def _gradient_sums(table, layout, numels, sums, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _locate(layout, numels, program, CHUNK)
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
    tensor, at, there = _locate(layout, numels, program, CHUNK)
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
        # The move reads the stored moments, so in half precision the sums use the rounded ones too.
        r = r.to(DTYPE).to(tl.float32) * tl.load(scales + 2 * block)
        r = r / (tl.sqrt(v.to(DTYPE).to(tl.float32)) * tl.load(scales + 2 * block + 1) + eps)
    else:
        r = r.to(DTYPE).to(tl.float32)
    tl.store(sums + 3 * program, tl.sum(w * w))
    tl.store(sums + 3 * program + 1, tl.sum(w * r))
    tl.store(sums + 3 * program + 2, tl.sum(r * r))


@triton.jit
def _coefficients(sums, blocks, norms, lr, coefficients, zero, again, TRUST: tl.constexpr, TILE: tl.constexpr):
    block = tl.program_id(0)
    start, stop = tl.load(blocks + block), tl.load(blocks + block + 1)
    ww, wr, rr = 0.0, 0.0, 0.0
    for tile in range(start, stop, TILE):
        row = tile + tl.arange(0, TILE)
        ww += tl.sum(tl.load(sums + 3 * row, row < stop, 0.0))
        wr += tl.sum(tl.load(sums + 3 * row + 1, row < stop, 0.0))
        rr += tl.sum(tl.load(sums + 3 * row + 2, row < stop, 0.0))
    along = wr / ww
    tangent = rr - along * wr
    tangent = tl.where(tangent < 4 * 1.1920929e-7 * rr, 0.0, tangent)  # NEGLIGIBLE of update.py
    c = tl.load(norms + block)
    rate = tl.load(lr)
    if TRUST:
        rate = tl.where(tangent > 0, rate * c / tl.sqrt(tangent), rate)
    square = ww + rate * rate * tangent
    scale = c / tl.sqrt(square)
    tl.store(coefficients + 2 * block, tl.where(ww == 0, 0.0, scale * (1 + rate * along)))
    tl.store(coefficients + 2 * block + 1, tl.where(ww == 0, 0.0, scale * rate))
    tl.store(zero + block, tl.where(ww == 0, 1, 0))
    tl.store(again + block, tl.where((ww > 0) & (rate * rate * rr > 8 * square), 1, 0))  # CANCELLATION of update.py


@triton.jit
def _rescale(
    table, layout, numels, owners, sums, blocks, norms, again,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rescale the blocks that are marked to their norms; `sums` has w.w of each chunk. Other blocks are not read."""
    program = tl.program_id(0)
    tensor, at, _ = _locate(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    marked = tl.load(again + block) == 1
    there = at < tl.where(marked, tl.load(numels + tensor), 0)
    start = tl.load(blocks + block)
    stop = tl.where(marked, tl.load(blocks + block + 1), start)
    ww = 0.0
    for tile in range(start, stop, TILE):
        row = tile + tl.arange(0, TILE)
        ww += tl.sum(tl.load(sums + 3 * row, row < stop, 0.0))
    weight = tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at
    w = tl.load(weight, there, 0.0).to(tl.float32)
    factor = tl.load(norms + block) / tl.sqrt(tl.where(ww > 0, ww, 1.0))
    tl.store(weight, (w * factor).to(DTYPE), there)


@triton.jit
def _stochastic(w, at, stream):
    """Round to bfloat16 as `lawn.optim.rounding.stochastic` does."""
    x = (at.to(tl.int32) + stream).to(tl.uint32, bitcast=True)
    for _ in tl.static_range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B
    x = (x >> 16) ^ x
    bits = w.to(tl.uint32, bitcast=True) + (x & 0xFFFF)
    return tl.where(w == w, ((bits >> 16) << 16).to(tl.float32, bitcast=True), w)


@triton.jit
def _move(
    table, layout, numels, owners, scales, coefficients, eps, streams, sums,
    STOCHASTIC: tl.constexpr, ADAM: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, at, there = _locate(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    weight = tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at
    w = tl.load(weight, there, 0.0).to(tl.float32)
    r = tl.load(tl.load(table + 4 * tensor + 2).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    if ADAM:
        v = tl.load(tl.load(table + 4 * tensor + 3).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
        r = r * tl.load(scales + 2 * block) / (tl.sqrt(v) * tl.load(scales + 2 * block + 1) + eps)
    w = tl.load(coefficients + 2 * block) * w - tl.load(coefficients + 2 * block + 1) * r
    tl.store(sums + 3 * program, tl.sum(tl.where(there, w * w, 0.0)))
    if STOCHASTIC:
        w = _stochastic(w, at, tl.load(streams + tensor))
    tl.store(weight, w.to(DTYPE), there)


@triton.jit
def _block_sums(sums, blocks, result, COLUMN: tl.constexpr, TILE: tl.constexpr):
    block = tl.program_id(0)
    start, stop = tl.load(blocks + block), tl.load(blocks + block + 1)
    first, second = 0.0, 0.0
    for tile in range(start, stop, TILE):
        row = tile + tl.arange(0, TILE)
        first += tl.sum(tl.load(sums + 3 * row + COLUMN, row < stop, 0.0))
        second += tl.sum(tl.load(sums + 3 * row + COLUMN + 1, row < stop, 0.0))
    tl.store(result + 2 * block, first)
    tl.store(result + 2 * block + 1, second)


@triton.jit
def _project(table, layout, numels, owners, along, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _locate(layout, numels, program, CHUNK)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0)
    g = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    p = g - tl.load(along + tl.load(owners + tensor)) * w.to(tl.float32)
    tl.store(tl.load(table + 4 * tensor + 2).to(tl.pointer_type(DTYPE)) + at, w, there)
    tl.store(tl.load(table + 4 * tensor + 3).to(tl.pointer_type(DTYPE)) + at, p.to(DTYPE), there)


@triton.jit
def _difference_sums(table, layout, numels, sums, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _locate(layout, numels, program, CHUNK)
    w = tl.load(tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    before = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    r = before - w
    tl.store(sums + 3 * program, tl.sum(before * before))
    tl.store(sums + 3 * program + 1, tl.sum(before * r))
    tl.store(sums + 3 * program + 2, tl.sum(r * r))


@triton.jit
def _retract(table, layout, numels, owners, coefficients, sums, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, at, there = _locate(layout, numels, program, CHUNK)
    block = tl.load(owners + tensor)
    weight = tl.load(table + 4 * tensor).to(tl.pointer_type(DTYPE)) + at
    w = tl.load(weight, there, 0.0).to(tl.float32)
    before = tl.load(tl.load(table + 4 * tensor + 1).to(tl.pointer_type(DTYPE)) + at, there, 0.0).to(tl.float32)
    w = tl.load(coefficients + 2 * block) * before - tl.load(coefficients + 2 * block + 1) * (before - w)
    tl.store(sums + 3 * program, tl.sum(tl.where(there, w * w, 0.0)))
    tl.store(weight, w.to(DTYPE), there)


@dataclass(frozen=True)
class _Layout:
    """The division of blocks into chunks, on the device. It is the same in every step."""

    chunks: Tensor  # int64 [programs, 2]: tensor and first element of each program's chunk
    numels: Tensor  # int64 [tensors]
    owners: Tensor  # int64 [tensors]: block of each tensor
    starts: Tensor  # int64 [blocks + 1]: the programs of block b are starts[b] to starts[b + 1]


@lru_cache(maxsize=64)
def _layout(block_numels: tuple[tuple[int, ...], ...], counts: tuple[int, ...], device: torch.device) -> _Layout:
    """Divide blocks of tensors with these numbers of elements, or with `counts` each tensor's slices, into chunks."""
    if counts:
        block_numels = tuple((n // k,) for (n,), k in zip(block_numels, counts, strict=True) for _ in range(k))
    chunks: list[tuple[int, int]] = []
    starts, owners, tensor = [0], [], 0
    for block, numels in enumerate(block_numels):
        for numel in numels:
            chunks += [(tensor, start) for start in range(0, numel, CHUNK)]
            owners.append(block)
            tensor += 1
        starts.append(len(chunks))
    numels_of_all = [numel for numels in block_numels for numel in numels]
    values = (chunks, numels_of_all, owners, starts)
    return _Layout(*(torch.tensor(value, dtype=torch.int64, device=device) for value in values))


class _Launch:
    """The grids and arguments that kernels share, for blocks of one device and dtype."""

    def __init__(self, blocks: Blocks) -> None:
        like = blocks.weights[0]
        self.device, self.blocks = like.device, blocks
        numels = [w.numel() for w in blocks.weights]
        ends = accumulate(blocks.sizes)
        block_numels = tuple(tuple(numels[end - size : end]) for size, end in zip(blocks.sizes, ends, strict=True))
        self.layout = _layout(block_numels, tuple(blocks.counts), like.device)
        lists = [[t.data_ptr() for t in tensors] for tensors in blocks.lists]
        lists += [[0] * len(numels)] * (4 - len(lists))
        addresses, streams = torch.tensor(lists, dtype=torch.int64, device="cpu").T, blocks.streams
        if blocks.slice_axes:  # each slice is a tensor and a block
            _, offsets, owners = blocks.slice_places()
            addresses = addresses[owners] + offsets[:, None] * like.itemsize
            streams = None if streams is None else streams[owners] + offsets.int()
        table = upload(addresses.contiguous(), like.device)
        self.streams = None if streams is None else upload(streams, like.device)
        self.chunk_grid, self.block_grid = (len(self.layout.chunks),), (len(blocks),)
        self.tensors = (table, self.layout.chunks, self.layout.numels)
        self.constants = {"DTYPE": DTYPES[like.dtype], "CHUNK": CHUNK}
        self.sums = torch.empty(self.chunk_grid[0], 3, device=like.device)
        self.zero, self.again = torch.empty(2, self.block_grid[0], dtype=torch.int8, device=like.device)

    def start(self, kernel: Any, *arguments: Any, **keys: Any) -> None:
        """Launch a kernel on all chunks; there are none if all tensors are empty shards."""
        if self.chunk_grid[0]:
            kernel[self.chunk_grid](*self.tensors, *arguments, **keys, **self.constants)

    def block_sums(self, column: int) -> Tensor:
        """Add two columns of the rows of sums: [blocks, 2]."""
        result = torch.empty(self.block_grid[0], 2, device=self.device)
        _block_sums[self.block_grid](self.sums, self.layout.starts, result, COLUMN=column, TILE=TILE)
        return result

    def gradient_along(self) -> Tensor:
        """Compute w.g / w.w of each block from the first two lists: [blocks]."""
        along = torch.empty(self.block_grid[0], device=self.device)
        self.start(_gradient_sums, self.sums)
        _gradient_along[self.block_grid](self.sums, self.layout.starts, along, TILE=TILE)
        return along

    def coefficients(self, lr: float | Tensor, trust: bool) -> Tensor:
        """Compute the factors of w and r in the update from the sums: [blocks, 2]; mark blocks for `rescale`."""
        result = torch.empty(self.block_grid[0], 2, device=self.device)
        full = torch.full((), float(lr), device=self.device) if not isinstance(lr, Tensor) else lr
        rate = full.to(self.device, torch.float32)
        self.norms = upload(self.blocks.norm_of_each(torch.float32), self.device)
        arguments = self.norms, rate, result, self.zero, self.again
        _coefficients[self.block_grid](self.sums, self.layout.starts, *arguments, TRUST=trust, TILE=TILE)
        return result

    def rescale(self) -> None:
        """Rescale the marked blocks to their norms, whose weights have just been written."""
        self.start(_rescale, self.layout.owners, self.sums, self.layout.starts, self.norms, self.again, TILE=TILE)


def _on_device_of_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch kernels on the device of the blocks, which need not be the current device."""

    @wraps(function)
    def launched(blocks: Blocks, *arguments: Any, **keys: Any) -> Any:
        device = blocks.weights[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            result = function(blocks, *arguments, **keys)
        if function.__name__ in WRITES_WEIGHTS:
            blocks.count_as_changed()
        return result

    return launched


@_on_device_of_blocks
def adam(
    blocks: Blocks,
    corrections: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    trust: bool,
) -> Tensor:
    factors = betas[0], 1 - betas[0], betas[1], 1 - betas[1]
    return _step(blocks, corrections, lr, factors, eps, trust=trust)


@_on_device_of_blocks
def sgd(blocks: Blocks, *, lr: float | Tensor, momentum: float) -> Tensor:
    corrections = torch.ones(2, len(blocks), device="cpu")
    return _step(blocks, corrections, lr, (momentum, 1.0, 0.0, 0.0), 0.0, trust=False)


def _step(
    blocks: Blocks,
    corrections: Tensor,
    lr: float | Tensor,
    factors: tuple[float, float, float, float],
    eps: float,
    *,
    trust: bool,
) -> Tensor:
    """Update all blocks. `factors` multiply the first moment, its gradient, the second moment and its gradient."""
    launch = _Launch(blocks)
    scales = upload(corrections.T.float().contiguous(), launch.device)
    along = launch.gradient_along()
    launch.start(_moments, launch.layout.owners, along, scales, launch.sums, *factors, eps, ADAM=bool(blocks.second))
    _write_weights(launch, scales, launch.coefficients(lr, trust), eps)
    launch.rescale()
    return launch.zero


def _write_weights(launch: _Launch, scales: Tensor, coefficients: Tensor, eps: float) -> None:
    """Apply the update from the stored moments, by the coefficients [blocks, 2] of the weights and the update."""
    owners, stochastic = launch.layout.owners, launch.streams is not None
    streams = launch.streams if stochastic else owners
    keys = {"STOCHASTIC": stochastic, "ADAM": bool(launch.blocks.second)}
    launch.start(_move, owners, scales, coefficients, eps, streams, launch.sums, **keys)


@_on_device_of_blocks
def project(blocks: Blocks) -> None:
    launch = _Launch(blocks)
    launch.start(_project, launch.layout.owners, launch.gradient_along())


@_on_device_of_blocks
def retract(blocks: Blocks) -> Tensor:
    launch = _Launch(blocks)
    launch.start(_difference_sums, launch.sums)
    launch.start(_retract, launch.layout.owners, launch.coefficients(1.0, False), launch.sums)
    launch.rescale()
    return launch.zero


# The stages of an update of sharded weights


@_on_device_of_blocks
def products(blocks: Blocks) -> Tensor:
    launch = _Launch(blocks)
    launch.start(_gradient_sums, launch.sums)
    return launch.block_sums(0)


@_on_device_of_blocks
def advance(
    blocks: Blocks, along: Tensor, scales: Tensor, factors: tuple[float, float, float, float], eps: float
) -> Tensor:
    launch = _Launch(blocks)
    columns = upload(scales.T.float().contiguous(), launch.device)
    owners, share = launch.layout.owners, along.float().contiguous()
    launch.start(_moments, owners, share, columns, launch.sums, *factors, eps, ADAM=bool(blocks.second))
    return launch.block_sums(1)


@_on_device_of_blocks
def move(blocks: Blocks, keep: Tensor, take: Tensor, scales: Tensor, eps: float) -> None:
    launch = _Launch(blocks)
    columns = upload(scales.T.float().contiguous(), launch.device)
    _write_weights(launch, columns, torch.stack([keep, take], 1).float(), eps)


@_on_device_of_blocks
def tangents(blocks: Blocks, along: Tensor) -> None:
    launch = _Launch(blocks)
    launch.start(_project, launch.layout.owners, along.float().contiguous())


@_on_device_of_blocks
def differences(blocks: Blocks) -> Tensor:
    launch = _Launch(blocks)
    launch.start(_difference_sums, launch.sums)
    return launch.block_sums(1)


@_on_device_of_blocks
def combine(blocks: Blocks, keep: Tensor, take: Tensor) -> None:
    launch = _Launch(blocks)
    launch.start(_retract, launch.layout.owners, torch.stack([keep, take], 1).float(), launch.sums)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for the device."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
