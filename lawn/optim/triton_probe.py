"""Whether Triton can build and launch a kernel here."""

import torch
import triton
import triton.language as tl

from lawn.optim.cache import ensure_triton_cache

ensure_triton_cache()


@triton.jit
def _write(pointer):
    tl.store(pointer, 1.0)


_known: dict[torch.device, str] = {}


def problem(device: torch.device) -> str:
    """Try to launch a kernel on a device; return the reason why it fails, empty where it does not.

    Triton builds its launchers with a C compiler, which many container images for running torch lack, and supports
    fewer GPUs than torch does.
    """
    if device not in _known:
        target = torch.empty(1, device=device)
        if type(target) is not torch.Tensor:
            return "Triton cannot launch a kernel on tensors without memory"
        _known[device] = _launch(target)
    return _known[device]


def _launch(target: torch.Tensor) -> str:
    try:
        with torch.cuda.device_of(target):
            _write[(1,)](target)
    except Exception as error:  # of the compiler, the linker, the driver or Triton, each with a type of its own
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        return f"Triton cannot launch a kernel on {target.device} ({reason}); it needs a C compiler, such as gcc"
    return ""
