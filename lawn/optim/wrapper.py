"""LAWN stacked on any optimizer, through its step hooks."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import keys, phase, update
from lawn.optim.base import LAWNOptimizer
from lawn.optim.zero_check import ZeroCheck

HOOKED = sys.modules[Optimizer.__module__].__file__


class LAWN:
    """Makes `optimizer` train on fixed weight norms once constrained; it keeps its type and is stepped as before.

    Args:
        optimizer: any torch optimizer; its weight decay must be 0 in the groups that have constrained parameters.
        free_steps: updates before the switch; 0 constrains from the start, None waits for `constrain()`.
        fused: compiled projection on the CPU; None where it is possible, False never.

    In a constrained step the optimizer sees the projected gradient, and what it did to each weight is projected on
    the tangent space where the step began, then rescaled. For optimizers that update a weight from its gradient's
    history (SGD, Adam, Lion, Muon, ...) that is Algorithm 1. One that scales its update by a norm of its own (LAMB)
    measures it before the projection. Phase and norms are in the optimizer's own state_dict.

    The optimizer rounds the weight before it is rescaled, so bfloat16 weights keep their norm only to about 0.4 %,
    the resolution of the type; the optimizers of this package, which round once, do better.

    To copy or pickle the pair, copy this object: torch's own copy of an optimizer has no hooks.

    Costs two copies of the constrained weights in memory.
    """

    def __init__(self, optimizer: Optimizer, free_steps: int | None = None, *, fused: bool | None = None) -> None:
        free_steps = keys.checked_steps(free_steps)
        if not hasattr(optimizer, "_optimizer_load_state_dict_post_hooks"):
            raise TypeError(
                f"{type(optimizer).__name__} is no torch optimizer, or never initialized itself as one, and calls no "
                "hooks; put LAWN on the optimizer inside it"
            )
        zero = sys.modules.get("torch.distributed.optim")
        if zero is not None and isinstance(optimizer, getattr(zero, "ZeroRedundancyOptimizer", ())):
            raise TypeError("put LAWN on the optimizer inside ZeroRedundancyOptimizer, its `optim`")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if isinstance(optimizer, LAWNOptimizer) or any(isinstance(getattr(h, "__self__", None), LAWN) for h in hooks):
            raise ValueError("the optimizer is a LAWN optimizer already")
        before = [dict(group) for group in optimizer.param_groups]
        try:
            for index in range(len(before)):
                keys.prepare(optimizer.param_groups, index, free_steps)
        except (TypeError, ValueError):
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(old)
            raise
        self._attach(optimizer, free_steps, fused)

    def _attach(self, optimizer: Optimizer, free_steps: int | None, fused: bool | None) -> None:
        self.optimizer = optimizer
        self._free_steps = free_steps
        self._fused = fused
        self._watch = ZeroCheck()
        self._before: dict[Tensor, Tensor] = {}  # weights where the step began; kept, to be used again
        self._projected: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor | None] = {}  # the caller's, while the optimizer sees projected ones
        self._parts: list[phase.GroupUpdate] | None = None  # of the step that is under way
        self._skipped = self._dummy = False  # what that step is, if it is no update
        self._step: FrameType | None = None  # the call of `step` that it is
        self._inner = 0  # calls of parents' steps inside it
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
            optimizer.register_state_dict_pre_hook(lambda _: self._prepare_added()),
            optimizer.register_load_state_dict_pre_hook(self._complete),
            optimizer.register_load_state_dict_post_hook(self._restore),
        ]
        # What others do after a step finds the caller's gradients, and may clear them.
        after: Any = optimizer._optimizer_step_post_hooks
        after.move_to_end(self._hooks[1].id, last=False)
        keys.restore(optimizer.state)  # where an optimizer has made its state in its constructor, or has loaded it

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "free_steps": self._free_steps, "fused": self._fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attach(**state)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LAWN has no {name!r}: it is no optimizer, but works on one; step, save and pass that")

    @property
    def constrained(self) -> bool:
        """Whether weight norms are fixed: whether a param group is in its second phase."""
        return keys.is_constrained(self.optimizer.param_groups)

    def constrain(self, *, again: bool = False) -> None:
        """Fix the norm of every constrained weight at its present value; see `LAWNOptimizer.constrain`."""
        if not self._hooks:
            raise ValueError("LAWN was detached from the optimizer")
        self._prepare_added()
        phase.constrain(self.optimizer, again=again)

    def detach(self) -> None:
        """Leave the optimizer as it was before, free and without what LAWN keeps in its groups and state."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        keys.forget(self.optimizer)

    def _complete(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._prepare_added()
        return keys.completed(state_dict, optimizer.param_groups, list(keys.DEFAULTS))

    def _restore(self, optimizer: Optimizer) -> None:
        self._watch = ZeroCheck()
        keys.restore(optimizer.state)

    def _prepare_added(self) -> None:
        groups = self.optimizer.param_groups
        for index, group in enumerate(groups):
            if "switched" not in group:
                keys.prepare(groups, index, self._free_steps)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._is_inner():
            self._inner += 1
            return None
        self._give_back()  # a step that raised may have left projected gradients
        self._parts = None
        # GradScaler leaves it to a fused optimizer to skip a step that has overflowed.
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf.item())
        self._dummy = phase.is_dummy(self.optimizer)
        phase.refuse_capture()
        self._prepare_added()
        if self._skipped or self._dummy:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._project()
            return None

        def projecting() -> Any:  # the gradients come into being inside the step
            self._give_back()
            loss = closure()
            self._project()
            return loss

        if len(args) > 1:
            return (args[0], projecting, *args[2:]), kwargs
        return args, {**kwargs, "closure": projecting}

    @torch._disable_dynamo
    @torch.no_grad()
    def _project(self) -> None:
        """Show the optimizer projected gradients. Each evaluation of a closure has its own; the step begins where the
        first one is made."""
        first = self._parts is None
        if first:
            self._parts = self._watch.begin(self.optimizer)
        for part in [kind for whole in self._parts or [] for kind in whole.kinds()]:
            grads = phase.gradients(part.params)
            before = self._scratch(self._before, part.params) if first else list(map(torch.empty_like, part.params))
            projected = self._scratch(self._projected, grads, part.params)
            blocks = update.Blocks(part.params, part.sizes, part.norms, grads, [], [])
            update.project(blocks, before, projected, self._fused)
            for p, tangent in zip(part.params, projected, strict=True):
                self._gradients[p] = p.grad
                p.grad = tangent

    @torch._disable_dynamo
    @torch.no_grad()
    def _end(self, *arguments: Any) -> None:
        if self._inner:
            self._inner -= 1
            return
        self._step = None
        state = self.optimizer.state
        if self._dummy:
            for p in (p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None):
                state[p].setdefault(keys.NORM, 0.0)
        seen = []
        for index, part in enumerate(self._parts or []):
            for kind in part.kinds():
                blocks = update.Blocks(kind.params, kind.sizes, kind.norms, [], [], [])
                before = [self._before[p] for p in kind.params]
                seen.append((kind, index, update.retract(blocks, before, self._fused)))
            part.record(state)
        self._give_back()
        for kind, index, zero in seen:
            self._watch.look(kind, index, zero)

    def _is_inner(self) -> bool:
        """Whether this is the `step` of a parent class, which torch hooks as well, called by the one that is under way.
        One that has raised is no longer under way."""
        call = _call_of_step()
        frame: FrameType | None = sys._getframe()
        while self._step is not None and frame is not None:
            if frame is self._step and frame is not call:
                return True
            frame = frame.f_back
        self._step, self._inner = call, 0
        return False

    @staticmethod
    def _scratch(kept: dict[Tensor, Tensor], like: list[Tensor], of: list[Tensor] | None = None) -> list[Tensor]:
        """Tensors like these, one for each parameter, used again as long as they fit."""
        for p, t in zip(of or like, like, strict=True):
            old = kept.get(p)
            if old is None or old.shape != t.shape or old.dtype != t.dtype or old.device != t.device:
                kept[p] = torch.empty_like(t)
        return [kept[p] for p in of or like]

    def _give_back(self) -> None:
        for p, grad in self._gradients.items():
            if p.grad is self._projected.get(p):  # else the caller has put another there since
                p.grad = grad
        self._gradients.clear()


def _call_of_step() -> FrameType | None:
    """The call of torch's that runs the hooks of a step, this one of them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != HOOKED:
        frame = frame.f_back
    return frame
