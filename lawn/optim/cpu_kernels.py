"""Compiles cpu_kernels.c once per machine with the C compiler that it finds, and calls it through ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, c_double, c_int, c_int64, c_uint8, c_void_p, cast
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawn.optim.blocks import Blocks
from lawn.optim.cache import cache_directories
from lawn.optim.sharding import PLAIN

SOURCE = Path(__file__).with_name("cpu_kernels.c")
WRITES_WEIGHTS = ("adam", "sgd", "retract", "adam_move", "sgd_move", "combine")
DTYPES = {torch.float32: ("float", "sqrtf"), torch.float64: ("double", "sqrt")}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # tried after TMPDIR where no cache can be written
_TENSORS, _INTS, _DOUBLES = POINTER(c_void_p), POINTER(c_int64), POINTER(c_double)
_LAYOUT = (c_int64, _INTS, _INTS)
_BLOCKS = (*_LAYOUT, _DOUBLES, POINTER(c_uint8))
SIGNATURES = {
    "adam": (*_BLOCKS, *[_TENSORS] * 4, *[_DOUBLES] * 2, *[c_double] * 4, c_int),
    "sgd": (*_BLOCKS, *[_TENSORS] * 3, *[c_double] * 2),
    "project": (*_LAYOUT, *[_TENSORS] * 4),
    "retract": (*_BLOCKS, *[_TENSORS] * 2),
    "products": (*_LAYOUT, *[_TENSORS] * 2, _DOUBLES),
    "adam_advance": (*_LAYOUT, *[_TENSORS] * 4, *[_DOUBLES] * 7),
    "adam_move": (*_LAYOUT, *[_TENSORS] * 4, *[_DOUBLES] * 5),
    "sgd_advance": (*_LAYOUT, *[_TENSORS] * 3, *[_DOUBLES] * 3),
    "sgd_move": (*_LAYOUT, *[_TENSORS] * 3, *[_DOUBLES] * 2),
    "tangents": (*_LAYOUT, *[_TENSORS] * 4, _DOUBLES),
    "differences": (*_LAYOUT, *[_TENSORS] * 2, _DOUBLES),
    "combine": (*_LAYOUT, *[_TENSORS] * 2, *[_DOUBLES] * 2),
}


class CPUKernels:
    """The functions of cpu_kernels.c for one dtype; `lawn.optim.update` documents them.

    Args:
        path: the compiled library.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, signature in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = signature, None

    def adam(
        self,
        blocks: Blocks,
        corrections: Tensor,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        trust: bool,
    ) -> Tensor | None:
        return self._update("adam", blocks, *corrections, float(lr), *betas, eps, trust)

    def sgd(self, blocks: Blocks, *, lr: float | Tensor, momentum: float) -> Tensor | None:
        return self._update("sgd", blocks, float(lr), momentum)

    def project(self, blocks: Blocks) -> None:
        self._call("project", blocks)

    def retract(self, blocks: Blocks) -> Tensor | None:
        return self._update("retract", blocks)

    def products(self, blocks: Blocks) -> Tensor:
        return self._sums("products", blocks)

    def advance(
        self,
        blocks: Blocks,
        along: Tensor,
        scales: Tensor,
        factors: Sequence[float | Tensor],
        eps: float | Tensor,
    ) -> Tensor:
        """As `update.advance`, but the numbers may be tensors [blocks]."""
        if blocks.second:
            numbers = (_of_each(blocks, number) for number in (factors[0], factors[2], eps))
            return self._sums("adam_advance", blocks, along, *scales, *numbers)
        return self._sums("sgd_advance", blocks, along, _of_each(blocks, factors[0]))

    def move(self, blocks: Blocks, keep: Tensor, take: Tensor, scales: Tensor, eps: float | Tensor) -> None:
        """As `update.move`, but `eps` may be a tensor [blocks]."""
        if blocks.second:
            self._call("adam_move", blocks, keep, take, *scales, _of_each(blocks, eps))
        else:
            self._call("sgd_move", blocks, keep, take)

    def tangents(self, blocks: Blocks, along: Tensor) -> None:
        self._call("tangents", blocks, along)

    def differences(self, blocks: Blocks) -> Tensor:
        return self._sums("differences", blocks)

    def combine(self, blocks: Blocks, keep: Tensor, take: Tensor) -> None:
        self._call("combine", blocks, keep, take)

    def _update(self, name: str, blocks: Blocks, *arguments: object) -> Tensor | None:
        """Call a function that updates blocks of these norms and marks those that are zero."""
        count = len(blocks)
        zero = (c_uint8 * count)()
        norms = blocks.norm_of_each() if blocks.slice_axes else (c_double * count)(*map(float, blocks.norms))
        self._call(name, blocks, *arguments, first=(norms, zero))
        return torch.tensor(list(zero), dtype=torch.bool, device="cpu") if 1 in bytes(zero) else None

    def _sums(self, name: str, blocks: Blocks, *arguments: object) -> Tensor:
        """Call a function that computes two sums for each block: [blocks, 2]."""
        sums = torch.empty(len(blocks), 2, dtype=torch.float64, device="cpu")
        self._call(name, blocks, *arguments, sums)
        return sums

    def _call(self, name: str, blocks: Blocks, *arguments: object, first: tuple[object, ...] = ()) -> None:
        count, tensor_count = len(blocks), len(blocks.weights)
        lists: list[Any] = [[t.data_ptr() for t in tensors] for tensors in blocks.lists]
        starts: Any
        numels: Any
        if blocks.slice_axes:  # each slice is a tensor and a block
            starts = torch.arange(count + 1, device="cpu")
            numels, offsets, owners = blocks.slice_places()
            offsets = offsets * blocks.weights[0].itemsize
            lists = [torch.tensor(addresses, device="cpu")[owners] + offsets for addresses in lists]
        else:
            starts = (c_int64 * (count + 1))(0, *accumulate(blocks.sizes))
            numels = (c_int64 * tensor_count)(*[w.numel() for w in blocks.weights])
            lists = [(c_void_p * tensor_count)(*addresses) for addresses in lists]
        values = [starts, numels, *first, *lists, *arguments]
        values = [v.double().contiguous() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
        function = getattr(self._library, name)
        kinds = function.argtypes[1:]
        pointers = [cast(v.data_ptr(), k) if isinstance(v, Tensor) else v for v, k in zip(values, kinds, strict=True)]
        function(count, *pointers)
        if name in WRITES_WEIGHTS:
            blocks.count_as_changed()


def _of_each(blocks: Blocks, number: float | Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number
    return torch.full((len(blocks),), number, dtype=torch.double, device="cpu")


def load(lists: Sequence[list[Tensor]], *, warn: bool = False) -> CPUKernels | None:
    """Load the compiled functions if they can update these lists of tensors.

    They take tensors of one dtype, float32 or float64, on the CPU, with the memory layout that `same_layout` requires.

    Args:
        lists: weights and the other lists of tensors of an update.
        warn: whether to warn where the functions would fit but cannot be built.

    Returns:
        The functions, or None.
    """
    dtype = lists[0][0].dtype
    if dtype not in DTYPES or any(t.dtype != dtype or not t.is_cpu for tensors in lists for t in tensors):
        return None
    if not same_layout(*lists) or any(type(t) not in PLAIN for tensors in lists for t in tensors):
        return None  # a subclass may have no memory of its own
    if torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() > 2:
        return None  # the threads add their sums in the order in which they end
    kernels, problem = build(dtype)
    if kernels is None and warn:
        warnings.warn(f"the fused update falls back to the plain one: {problem}", stacklevel=3)
    return kernels


def same_layout(*lists: list[Tensor]) -> bool:
    """Whether the tensors at each position of all lists are dense and have the same strides.

    A kernel can then step through their memory with one index.
    """
    for first, *others in zip(*lists, strict=True):
        if any(t.shape != first.shape for t in others):
            return False
        if first.is_contiguous():
            if all(t.is_contiguous() for t in others):
                continue
        elif not (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)):
            return False
        strides = _strides(first)
        if any(_strides(t) != strides for t in others):
            return False
    return True


def _strides(t: Tensor) -> list[int]:
    """Strides of the dimensions longer than one; the others have no meaning."""
    return [stride for stride, length in zip(t.stride(), t.shape, strict=True) if length > 1]


@cache
def build(dtype: torch.dtype) -> tuple[CPUKernels | None, str]:
    """Load the functions from a cache directory, or build them there.

    Where no cache can be written, they are built in a temporary directory for this process.

    Returns:
        The functions and an empty string, or None and the reason with a remedy.
    """
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler was found; install gcc or clang, or name one in CC"
    real, sqrt = DTYPES[dtype]
    command = [compiler, *FLAGS, f"-DREAL={real}", f"-DSQRT={sqrt}", str(SOURCE), "-lm"]
    parts = (SOURCE.read_text("ascii"), compiler, *FLAGS, real, sqrt, _processor())
    name = f"cpu_kernels-{real}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    problems: dict[str, object] = {}  # reason: the first directory that gave it
    try:
        for folder in cache_directories():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return _load_cached(folder, name) or _compile(folder, name, command), ""
            except (OSError, subprocess.CalledProcessError) as error:
                problems.setdefault(_reason(error), folder)
        for place in dict.fromkeys(filter(None, (os.environ.get("TMPDIR"), *TEMPORARY))):
            try:
                with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as scratch:
                    return _compile(Path(scratch), name, command), ""
            except (OSError, subprocess.CalledProcessError) as error:
                problems.setdefault(_reason(error), place)
    except subprocess.TimeoutExpired as error:
        return None, f"{compiler} was not done after {error.timeout:.0f} s; name another compiler in CC"
    reasons = "; ".join(f"{place}: {reason}" for reason, place in problems.items())
    return None, f"{compiler} made nothing that works ({reasons}); set XDG_CACHE_HOME to a folder with room"


def _load_cached(folder: Path, name: str) -> CPUKernels | None:
    """Load a library whose checksum is the one in its name: a damaged library could end the process."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            if path.stem.endswith(f"-{_checksum(path)}"):
                return CPUKernels(path)
    return None


def _compile(folder: Path, name: str, command: list[str]) -> CPUKernels:
    """Compile the library and move it to the cache. Raises OSError or subprocess.SubprocessError."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "cpu_kernels.so"
        options: dict[str, Any] = {"capture_output": True, "timeout": 120, "env": {**os.environ, "TMPDIR": scratch}}
        # OpenMP uses torch's threads, which are loaded already. Without OpenMP the kernels run in one thread.
        if subprocess.run([*command, "-o", str(made), "-fopenmp"], **options).returncode != 0:
            subprocess.run([*command, "-o", str(made)], check=True, **options)
        kernels = CPUKernels(made)
        with suppress(OSError):  # a directory of that name: this process keeps the library
            made.replace(folder / f"{name}-{_checksum(made)}.so")
        return kernels


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return error.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {error.returncode}"
    return error.strerror or str(error)


def _processor() -> str:
    """Describe what -march=native depends on, so that machines which share a cache do not share libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
