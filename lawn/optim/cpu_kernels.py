"""cpu_kernels.c through ctypes: built once for each machine with its C compiler, left out where there is none."""

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
from ctypes import POINTER, c_double, c_int, c_int64, c_uint8, c_void_p
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawn.optim.cache import caches

SOURCE = Path(__file__).with_name("cpu_kernels.c")
REAL = {torch.float32: ("float", "sqrtf"), torch.float64: ("double", "sqrt")}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # where code is built for one process, after TMPDIR
_TENSORS, _INTS, _DOUBLES = POINTER(c_void_p), POINTER(c_int64), POINTER(c_double)
_BLOCKS = (c_int64, _INTS, _INTS, _DOUBLES, POINTER(c_uint8))
SIGNATURES = {
    "adam": (*_BLOCKS, *[_TENSORS] * 4, *[_DOUBLES] * 2, *[c_double] * 4, c_int),
    "sgd": (*_BLOCKS, *[_TENSORS] * 3, *[c_double] * 2),
    "project": (*_BLOCKS, *[_TENSORS] * 4),
    "retract": (*_BLOCKS, *[_TENSORS] * 2),
}


class CPUKernels:
    """The functions of cpu_kernels.c for tensors of one dtype.

    `lists` are weights and what an update has beside them, block after block; `sizes` says how many tensors each block
    has, `norms` what its norm is. The functions return which blocks are zero [blocks], or None where none is.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, signature in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = signature, None

    def adam(
        self,
        lists: Sequence[list[Tensor]],
        sizes: list[int],
        norms: list[float],
        scales: Tensor,  # float64 [2, blocks]: bias corrections of m, and of sqrt(v)
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        trust: bool,
    ) -> Tensor | None:
        corrections = [(c_double * len(sizes))(*row) for row in scales.tolist()]
        return self._call("adam", lists, sizes, norms, *corrections, lr, beta1, beta2, eps, trust)

    def sgd(
        self, lists: Sequence[list[Tensor]], sizes: list[int], norms: list[float], lr: float, momentum: float
    ) -> Tensor | None:
        return self._call("sgd", lists, sizes, norms, lr, momentum)

    def project(self, lists: Sequence[list[Tensor]], sizes: list[int]) -> None:
        self._call("project", lists, sizes, [0.0] * len(sizes))

    def retract(self, lists: Sequence[list[Tensor]], sizes: list[int], norms: list[float]) -> Tensor | None:
        return self._call("retract", lists, sizes, norms)

    def _call(
        self, name: str, lists: Sequence[list[Tensor]], sizes: list[int], norms: list[float], *more: object
    ) -> Tensor | None:
        blocks, count = len(sizes), len(lists[0])
        addresses = [(c_void_p * count)(*[t.data_ptr() for t in tensors]) for tensors in lists]
        numels = (c_int64 * count)(*[t.numel() for t in lists[0]])
        starts = (c_int64 * (blocks + 1))(0, *accumulate(sizes))
        zero = (c_uint8 * blocks)()
        getattr(self._library, name)(blocks, starts, numels, (c_double * blocks)(*norms), zero, *addresses, *more)
        return torch.tensor(list(zero), dtype=torch.bool) if any(zero) else None


def library(fused: bool | None, *lists: list[Tensor]) -> CPUKernels | None:
    """The compiled functions, if `fused` allows them and they can work on these lists of tensors; None otherwise.

    They take tensors of one dtype, float32 or float64, on the CPU, without gaps, where the tensors at one position of
    all lists have the same strides. With `fused=True` it is worth a warning where they cannot be built.
    """
    if fused is False:
        return None
    dtype = lists[0][0].dtype
    if dtype not in REAL or any(t.dtype != dtype or not t.is_cpu for tensors in lists for t in tensors):
        return None
    if not alike(*lists):
        return None
    compiled, problem = build(dtype)
    if compiled is None and fused:
        warnings.warn(f"the fused update falls back to the plain one: {problem}", stacklevel=3)
    return compiled


def alike(*lists: list[Tensor]) -> bool:
    """Whether tensors without gaps lie in memory alike at each position, so that addresses can be counted through."""
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
    """Without dimensions of length one, whose stride means nothing."""
    return [stride for stride, length in zip(t.stride(), t.shape, strict=True) if length > 1]


@cache
def build(dtype: torch.dtype) -> tuple[CPUKernels | None, str]:
    """The functions; where there are none, why, and what helps. They are looked for in the caches and built there, or,
    where none can be written, in a temporary folder for this process alone."""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler was found; install gcc or clang, or name one in CC"
    real, sqrt = REAL[dtype]
    command = [compiler, *FLAGS, f"-DREAL={real}", f"-DSQRT={sqrt}", str(SOURCE), "-lm"]
    parts = (SOURCE.read_text("ascii"), compiler, *FLAGS, real, sqrt, _processor())
    name = f"native-{real}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    problems: dict[str, object] = {}  # and the first place that had it
    try:
        for folder in caches():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return _kept(folder, name) or _built(folder, name, command), ""
            except (OSError, subprocess.CalledProcessError) as error:
                problems.setdefault(_reason(error), folder)
        for place in dict.fromkeys(filter(None, (os.environ.get("TMPDIR"), *TEMPORARY))):
            try:
                with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as scratch:
                    return _built(Path(scratch), name, command), ""
            except (OSError, subprocess.CalledProcessError) as error:
                problems.setdefault(_reason(error), place)
    except subprocess.TimeoutExpired as error:
        return None, f"{compiler} was not done after {error.timeout:.0f} s; name another compiler in CC"
    reasons = "; ".join(f"{place}: {reason}" for reason, place in problems.items())
    return None, f"{compiler} made nothing that works ({reasons}); set XDG_CACHE_HOME to a folder with room"


def _kept(folder: Path, name: str) -> CPUKernels | None:
    """What was built before, if it is whole: its name ends with its checksum, since to load a part can be fatal."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            if path.stem.endswith(f"-{_checksum(path)}"):
                return CPUKernels(path)
    return None


def _built(folder: Path, name: str, command: list[str]) -> CPUKernels:
    """Raises OSError or subprocess.SubprocessError where that fails."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "native.so"
        how: dict[str, Any] = {"capture_output": True, "timeout": 120, "env": {**os.environ, "TMPDIR": scratch}}
        # With OpenMP the threads are torch's own pool, which is loaded already; else one thread does it.
        if subprocess.run([*command, "-o", str(made), "-fopenmp"], **how).returncode != 0:
            subprocess.run([*command, "-o", str(made)], check=True, **how)
        native = CPUKernels(made)
        with suppress(OSError):  # something else has that name: it serves this process alone
            made.replace(folder / f"{name}-{_checksum(made)}.so")
        return native


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return error.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {error.returncode}"
    return error.strerror or str(error)


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk must not serve another kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
