"""native.c through ctypes: built once for each machine with its C compiler, left out where there is none."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
REAL = {torch.float32: ("float", "sqrtf"), torch.float64: ("double", "sqrt")}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_ARRAY, _SIZES = POINTER(c_void_p), POINTER(c_int64)
SIGNATURES = {
    "adam": (c_int, *[_ARRAY] * 4, _SIZES, *[c_double] * 7, c_int),
    "sgd": (c_int, *[_ARRAY] * 3, _SIZES, *[c_double] * 3),
    "project": (c_int, *[_ARRAY] * 4, _SIZES),
    "retract": (c_int, *[_ARRAY] * 2, _SIZES, c_double),
}


def library(fused: bool | None, *lists: list[Tensor]) -> ctypes.CDLL | None:
    """The compiled functions, if `fused` allows them and they can work on these lists of tensors; None otherwise.

    They take tensors of one dtype, float32 or float64, on the CPU, without gaps, where the tensors at one position of
    all lists have the same strides. With `fused=True` a missing compiler is worth a warning.
    """
    if fused is False:
        return None
    dtype = lists[0][0].dtype
    if dtype not in REAL or not alike(*lists):
        return None
    if any(t.dtype != dtype or not t.is_cpu for tensors in lists for t in tensors):
        return None
    compiled = _build(dtype)
    if compiled is None and fused:
        warnings.warn("no C compiler that works: the fused update falls back to the plain one", stacklevel=3)
    return compiled


def alike(*lists: list[Tensor]) -> bool:
    """Whether tensors without gaps lie in memory alike at each position, so that addresses can be counted through."""
    for first, *others in zip(*lists, strict=True):
        if not (first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))):
            return False
        strides = first.stride()
        if any(t.stride() != strides and _strides(t) != _strides(first) for t in others):
            return False
    return True


def _strides(t: Tensor) -> list[int]:
    """Without dimensions of length one, whose stride means nothing."""
    return [stride for stride, length in zip(t.stride(), t.shape, strict=True) if length > 1]


def pointers(*lists: list[Tensor]) -> tuple[object, ...]:
    """The leading arguments of every function: how many tensors a list has, the addresses of each list, the sizes."""
    count = len(lists[0])
    addresses = [(c_void_p * count)(*[t.data_ptr() for t in tensors]) for tensors in lists]
    return count, *addresses, (c_int64 * count)(*[t.numel() for t in lists[0]])


@cache
def _build(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    real, sqrt = REAL[dtype]
    names = (f"-DREAL={real}", f"-DSQRT={sqrt}")
    key = hashlib.sha256("\0".join((SOURCE.read_text(), compiler, *FLAGS, *names, _processor())).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lawn"
    path = folder / f"native-{real}-{key[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / path.name
                command = [compiler, *FLAGS, *names, str(SOURCE), "-o", str(built), "-lm"]
                # With OpenMP the threads are torch's own pool, which is loaded already; else one thread does it.
                if subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=120).returncode != 0:
                    subprocess.run(command, capture_output=True, timeout=120, check=True)
                built.replace(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, signature in SIGNATURES.items():
        getattr(loaded, name).argtypes = signature
        getattr(loaded, name).restype = None
    return loaded


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk must not serve another kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
