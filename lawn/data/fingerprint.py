"""Fingerprints of the data of a run: a resumed run has to read the same data."""

import zlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor

Fingerprint = dict[str, int | str]  # counts by their names, and checksums


def checksum(*parts: Tensor | np.ndarray | Iterable[str]) -> str:
    """The CRC-32 (8 hex digits) of the values of tensors and arrays, in row-major order, and of names."""
    value = 0
    for part in parts:
        if isinstance(part, Tensor):
            part = part.cpu().numpy()
        elif not isinstance(part, np.ndarray):
            part = np.frombuffer("\0".join(part).encode("utf8", "surrogateescape"), np.uint8)
        value = zlib.crc32(np.ascontiguousarray(part).data, value)
    return f"{value:08x}"


def differences(recorded: Fingerprint, current: Fingerprint, then: str = "then", now: str = "now") -> str:
    """The entries of both fingerprints that differ, as text; empty if there are none."""
    changed = [name for name in recorded if current.get(name, recorded[name]) != recorded[name]]
    return ", ".join(f"{name} {recorded[name]} {then}, {current[name]} {now}" for name in changed)
