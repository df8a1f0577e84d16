"""What step hooks need: the closure of a step, and to tell a step from those of parent classes inside it."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

OPTIMIZER_FILE = sys.modules[Optimizer.__module__].__file__  # torch runs step hooks in this file


def calls_hooks(optimizer: object) -> bool:
    """Whether this is a torch optimizer that has initialized itself as one."""
    return hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")


def hook_owners(optimizer: Optimizer) -> list[object]:
    """The objects whose methods are called before a step."""
    return [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step, of which the first is the optimizer."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


class StepNesting:
    """Tells the step that a user calls from those of parent classes inside it, for which torch runs hooks as well.

    Call it from step hooks.
    """

    def __init__(self) -> None:
        self._step: FrameType | None = None  # frame of the current step

    def begin(self) -> bool:
        """Whether the step that begins is not inside another one. A step that has raised is not current."""
        call = _frame_of_step()
        frame: FrameType | None = sys._getframe()
        while self._step is not None and frame is not None:
            if frame is self._step and frame is not call:
                return False
            frame = frame.f_back
        self._step = call
        return True

    def end(self) -> bool:
        """Whether the step that ends is not inside another one."""
        if _frame_of_step() is not self._step:
            return False
        self._step = None
        return True


def _frame_of_step() -> FrameType | None:
    """Return the frame in which torch runs the hooks of a step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != OPTIMIZER_FILE:
        frame = frame.f_back
    return frame
