"""LAWN on any torch optimizer, through step hooks."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lawn.optim import dispatch, keys, loading, phase, stages
from lawn.optim.blocks import Blocks
from lawn.optim.checks import check_spelling
from lawn.optim.group_update import GroupUpdate, gradients, sum_products
from lawn.optim.step_hooks import StepNesting, closure_of, with_closure
from lawn.optim.stored_weights import StoredWeights
from lawn.optim.substitutes import HiddenNorms, ProjectedGradients, buffers, version
from lawn.optim.wrapped import check_group, check_loaded, check_saved, check_wrappable
from lawn.optim.zero_check import ZeroCheck


class LAWN:
    """LAWN on any torch optimizer, which keeps its type and its `step`.

    In a constrained step the optimizer receives projected gradients. Its change of each weight is projected on the
    tangent space at the weight before the step, and the result is rescaled to the weight's norm. For optimizers that
    compute an update from the history of a weight's gradients (SGD, Adam, Lion, Muon) this is Algorithm 1. An optimizer
    that divides its update by a norm (LAMB) computes the norm before the projection.

    Phase and norms are stored in the optimizer's `state_dict`. LAWN keeps two copies of the constrained weights in
    memory. The optimizer rounds a weight before LAWN rescales it, so bfloat16 weights keep their norms only to about
    0.4 %, the resolution of the type; the optimizers of this package round once and are more precise. To copy or pickle
    the pair, copy this object, because torch does not copy an optimizer's hooks.

    Args:
        optimizer: any torch optimizer. Groups with constrained parameters must have no weight decay (`lambd` of ASGD is
            one too, and is not refused, as its default is 1e-4).
        free_steps: number of updates before the switch; 0 constrains from the start, None waits for `constrain`.
        fused: whether compiled code may be used: None where it is available, True with a warning where it cannot be
            built, False never.

    Raises:
        TypeError: if `optimizer` has no hooks (it is not a torch optimizer), is a ZeroRedundancyOptimizer or saves its
            state in another way than torch's `state_dict`, or has parameters that `LAWNOptimizer` refuses with this
            error.
        ValueError: if `optimizer` is a LAWN optimizer already, `free_steps` is invalid, constrained parameters have
            weight decay, a key of a param group is nearly one of LAWN's or is `rounding`, a hyperparameter has the name
            of one of LAWN's keys, the step is `differentiable`, or norms of slices were loaded in half precision
            before. The optimizer does not change then.

    References:
        Gupta et al. 2021, section 3, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn import LAWN
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.RMSprop([w], lr=0.1)
        >>> lawn = LAWN(optimizer, free_steps=0)
        >>> w[0, 0].backward()
        >>> optimizer.step()
        >>> lawn.constrained, round(w.norm().item(), 4)
        (True, 5.0)
    """

    def __init__(self, optimizer: Optimizer, free_steps: int | None = None, *, fused: bool | None = None) -> None:
        free_steps = keys.check_free_steps(free_steps)
        check_wrappable(optimizer, LAWN)
        before = [dict(group) for group in optimizer.param_groups]
        trained = any(entry and entry.get("step") != 0 for _, entry in keys.entries(optimizer.state))
        for index, group in enumerate(before):
            if group["params"] and keys.RUN & group.keys() and not trained:  # another optimizer may have the dict
                begun = group.get("steps") or not group.get("switched")  # else loaded: `constrain` before any update
                optimizer.param_groups[index] = keys.without_run(group) if begun else dict(group)
        try:
            for index in range(len(before)):
                _add_defaults(optimizer, index, free_steps)
            check_saved(optimizer)
        except (TypeError, ValueError):
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(old)
            raise
        self._set(optimizer, free_steps, fused)
        self._attach()

    def _set(
        self, optimizer: Optimizer, free_steps: int | None, fused: bool | None, known: phase.KnownBlocks | None = None
    ) -> None:
        self.optimizer = optimizer
        self._free_steps = free_steps
        self._fused = fused
        self._known = dict(known or {})
        self._zero_check = ZeroCheck()
        self._stored_weights = StoredWeights(optimizer)
        self._groups = list(optimizer.param_groups)  # a load makes new ones
        self._had_weights = keys.has_weights(self._groups)
        self._before: dict[Tensor, Tensor] = {}  # buffers of weights before the step
        self._gradients = ProjectedGradients()
        self._norms = HiddenNorms(optimizer)
        self._group_updates: list[GroupUpdate] | None = None  # of the current step
        self._dummy = self._waits = False  # of the current step: makes only state; waits for its closure
        self._nesting = StepNesting()
        self._hooks: list[Any] = []

    def _attach(self) -> None:
        optimizer = self.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
            optimizer.register_state_dict_pre_hook(lambda _: self._prepare_added()),
            optimizer.register_state_dict_post_hook(self._norms.add_to_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._complete_state_dict),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        # This hook runs first, so that others find the caller's gradients and may clear them.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._hooks[1].id, last=False)
        loading.restore_norms(optimizer.state)  # the optimizer may have state already

    def __getstate__(self) -> dict[str, Any]:
        self._norms.show()
        known = self._known  # a copy has the same parameters
        arguments = {"optimizer": self.optimizer, "free_steps": self._free_steps, "fused": self._fused, "known": known}
        return {"arguments": arguments, "attached": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(**state["arguments"])
        if state["attached"]:
            self._attach()

    def __copy__(self) -> Any:
        raise TypeError("a shallow copy would put LAWN on the same optimizer twice; use copy.deepcopy")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LAWN has no {name!r}: it wraps an optimizer; use the wrapped optimizer instead")

    @property
    def constrained(self) -> bool:
        """Whether weight norms are fixed, that is whether a param group is in its second phase."""
        return keys.is_constrained(self.optimizer.param_groups)

    def constrain(self, *, again: bool = False) -> None:
        """Fix the norm of each constrained weight at its present value; see `LAWNOptimizer.constrain`.

        Args:
            again: whether to replace norms that are fixed already.

        Raises:
            ValueError: as `LAWNOptimizer.constrain` does, and after `detach`.
        """
        if not self._hooks:
            raise ValueError("LAWN was detached from the optimizer")
        self._prepare()
        phase.constrain(self.optimizer, self._known, again=again)

    def detach(self) -> None:
        """Remove LAWN's hooks and keys from the optimizer, which then trains without constraints."""
        if not self._hooks:
            return  # detached before; the keys may be those of another LAWN
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._norms.forget()
        keys.remove_keys(self.optimizer)

    def _complete_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._prepare()
        check_loaded(optimizer, state_dict["param_groups"])
        known = {key for group in optimizer.param_groups for key in group} - {"params", "param_names"}
        return loading.complete_state_dict(state_dict, optimizer.param_groups, sorted(known))

    def _load(self, optimizer: Optimizer) -> None:
        self._known = {}
        self._zero_check = ZeroCheck()
        self._groups = list(optimizer.param_groups)
        loading.restore_norms(optimizer.state)

    def _prepare(self) -> None:
        self._norms.show()  # after a step that raised
        self._prepare_added()

    def _prepare_added(self) -> None:
        groups = self.optimizer.param_groups
        pairs = list(zip(groups, self._groups, strict=False))
        if pairs and all(_is_loaded(group, before) for group, before in pairs):  # without hooks, as by bitsandbytes
            check_loaded(self.optimizer, groups)
            for group, each in zip(groups, loading.kept(self._groups, groups, keys.KEYS), strict=False):
                group.update({**each, **group})
            self._load(self.optimizer)
        for index, group in enumerate(groups):
            if "switched" not in group:
                _add_defaults(self.optimizer, index, self._free_steps)
                self._had_weights |= keys.has_weights([group])
        self._groups = list(groups)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
    def _begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._nesting.begin():
            return None
        self._gradients.drop_used()  # after a step that raised
        self._gradients.restore()
        self._group_updates, self._waits = None, False
        self._prepare()
        keys.check_not_flattened(self.optimizer.param_groups, self._had_weights)
        # GradScaler expects a fused optimizer to skip a step whose gradients overflowed.
        found_inf = getattr(self.optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf.item())
        closure = closure_of(args, kwargs)
        self._dummy = closure is None and phase.is_dummy(self.optimizer)
        phase.check_capture()
        if skipped or self._dummy:
            self._norms.hide()
            return None
        self._stored_weights.begin(self.optimizer)
        if closure is None:
            self._project()
            self._norms.hide()
            self._keep_norms()
            return None
        self._norms.hide()
        self._waits = True
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        versions = list(map(version, params))

        def projecting() -> Any:  # the closure computes the gradients inside the step
            if self._group_updates is None and versions != list(map(version, params)):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} changes the weights before it calls the closure, as sharpness-"
                    "aware optimizers do, but LAWN measures them there; put LAWN on its base optimizer"
                )
            self._waits = False
            self._gradients.restore()
            with self._on_spheres():
                loss = closure()
                with self._norms.shown_inside_step():
                    self._project()
            self._keep_norms()
            return loss

        return with_closure(args, kwargs, projecting)

    @torch._disable_dynamo
    @torch.no_grad()
    def _project(self) -> None:
        """Replace gradients by projected ones.

        A closure may run several times in a step. The first call stores the weights before the step.
        """
        first, count = self._group_updates is None, len(self._before)
        if first:
            self._prepare_added()  # the closure may have added a group
            self._zero_check.check_pending()
            self._group_updates = phase.begin_step(self.optimizer, self._known, self._fused)
        group_updates = self._group_updates or []
        for single in chain.from_iterable(group.split_by_device_and_dtype() for group in group_updates):
            params = single.params
            grads = gradients(params)
            before = buffers(self._before, params, params) if first else list(map(torch.empty_like, params))
            projected = self._gradients.buffers(params, grads)
            lists = params, single.sizes, single.norms, grads, before, projected
            blocks = Blocks(*lists, slice_axes=single.slice_axes)
            dispatch.backend(blocks, self._fused).project(blocks)
            self._gradients.replace(params, projected)
        parts = [part for group in group_updates for part in group.sharded if part.params]
        if not first:  # the closure may have moved the weights; `sums` stay those of the weights before the step
            parts = [replace(part) for part in parts]
            sum_products(parts, self._fused, all_blocks=True)
        for part in parts:
            params = part.params
            before = buffers(self._before, params, params) if first else list(map(torch.empty_like, params))
            projected = self._gradients.buffers(params, params)
            stages.project(part, before, projected, self._fused)
            self._gradients.replace(params, projected)
        if len(self._before) > count:  # perhaps in the place of others
            keys.forget_removed(self._before, self.optimizer.param_groups)
            self._gradients.forget_removed(self.optimizer.param_groups)

    @contextmanager
    def _on_spheres(self) -> Iterator[None]:
        """In the body, a step that asks for the loss again finds it on the spheres, where it would end now.

        Otherwise a line search would compare losses of weights that the end of the step rescales.
        """
        moved = {p: p.detach().clone() for group in self._group_updates or [] for p in group.norms_by_param()}
        with torch.no_grad():
            self._retract()
        yield
        with torch.no_grad():
            for p, weight in moved.items():
                p.copy_(weight)

    def _keep_norms(self) -> None:
        """Keep the norms that the step has fixed: after an error, the weights may have others."""
        for group_update in self._group_updates or []:
            for p, c in group_update.norms_by_param().items():
                self._norms.fix(p, c)

    @torch._disable_dynamo
    @torch.no_grad()
    def _end(self, *arguments: Any) -> None:
        if not self._nesting.end():
            return
        self._norms.show()
        if self._waits:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} does not call the closure of a step, so LAWN has projected no "
                "gradients; compute them before the step, and call it without a closure"
            )
        state = self.optimizer.state
        if self._dummy:
            for group in self.optimizer.param_groups:
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    state[p].setdefault(keys.NORM, keys.free_norm(group, p))
        self._stored_weights.end(self.optimizer)
        results = self._retract()
        for group_update in self._group_updates or []:
            group_update.record(state)
        self._gradients.restore(getattr(self.optimizer, "grad_scale", None))  # which GradScaler sets
        for part, zero in results:
            self._zero_check.check(part, zero)

    def _retract(self) -> list[tuple[GroupUpdate, Tensor | None]]:
        """Complete the updates of constrained weights; returns what the zero check needs."""
        results: list[tuple[GroupUpdate, Tensor | None]] = []
        pending: list[tuple[GroupUpdate, stages.Pending]] = []
        for group_update in self._group_updates or []:
            for single in group_update.split_by_device_and_dtype():
                before = [self._before[p] for p in single.params]
                lists = single.params, single.sizes, single.norms
                blocks = Blocks(*lists, first=before, slice_axes=single.slice_axes)
                results.append((single, dispatch.backend(blocks, self._fused).retract(blocks)))
            for part in group_update.sharded:
                before = [self._before[p] for p in part.params]
                if before:
                    pending.append((part, stages.retract(part, before, self._fused)))
        return [*results, *stages.finish(pending)]


def _is_loaded(group: keys.Group, before: keys.Group) -> bool:
    """Whether a param group replaces another one with the same parameters."""
    params, others = group["params"], before["params"]
    return group is not before and len(params) == len(others) and all(map(operator.is_, params, others))


def _add_defaults(optimizer: Optimizer, index: int, free_steps: int | None) -> None:
    """Check a param group of a wrapped optimizer, and add LAWN's keys."""
    group = optimizer.param_groups[index]
    others = [key for key in group if key not in optimizer.defaults]
    check_spelling(others, index, {*keys.KEYS} - keys.RUN)
    check_group(optimizer, group, f"param group {index}: ")
    keys.add_defaults(optimizer.param_groups, index, free_steps)
