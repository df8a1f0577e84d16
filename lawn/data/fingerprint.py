"""What data a run has read, in a few numbers: a run that goes on has to read the same again."""

import zlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor

Fingerprint = dict[str, int | str]  # counts by their names, and checksums


def checksum(*parts: Tensor | np.ndarray | Iterable[str]) -> str:
    """The CRC-32 of the values of tensors and arrays, in the order of their dimensions, and of names: 8 hex digits."""
    value = 0
    for part in parts:
        if isinstance(part, Tensor):
            part = part.cpu().numpy()
        elif not isinstance(part, np.ndarray):
            part = np.frombuffer("\0".join(part).encode("utf8", "surrogateescape"), np.uint8)
        value = zlib.crc32(np.ascontiguousarray(part).data, value)
    return f"{value:08x}"


def differences(then: Fingerprint, now: Fingerprint) -> str:
    """What is not as it was, in words; empty where all that both tell is the same."""
    return ", ".join(
        f"{name} {then[name]} then, {now[name]} now" for name in then if now.get(name, then[name]) != then[name]
    )
