"""Options, parameter groups and saved state of a policy that is a `torch.optim.Optimizer`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..errors import OptionError, TensorError
from ..evaluation.guard import Workspace
from ..evaluation.tensors import refuse_unsupported
from ..policies import validation
from .direction import DIRECTIONS

__all__ = ["PolicyOptimizer", "options_of"]

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


class PolicyOptimizer(torch.optim.Optimizer):
    """What an optimizer whose steps come from a policy keeps, and how it is saved, copied and put on other tensors."""

    _rule: ClassVar[type[Any]]
    """The policy that a subclass steps by; its options are those of the subclass by the same names."""

    def __init__(self, params: ParamsT, lr: float | None, options: dict[str, Any]) -> None:
        self._callables = {name: value for name, value in options.items() if callable(value)}
        self._check_lr(lr)
        if lr is None and options["lower_bound"] is None:
            raise OptionError(
                f"{type(self).__name__}(lr=None, lower_bound=None): without a lower bound of the loss the step cannot "
                "be found from the problem; give one of the two"
            )
        self._set_options(options)
        defaults = {name: "callable" if callable(value) else value for name, value in self._options.items()}
        super().__init__(params, {"lr": validation.plain(lr), **defaults})
        self._prepare()

    def _check_lr(self, lr: Any) -> None:
        validation.positive(type(self).__name__, "lr", lr, optional=True)

    def _set_options(self, options: dict[str, Any]) -> None:
        owner = type(self).__name__
        validation.choice(owner, "direction", options["direction"], DIRECTIONS, or_callable=True)
        betas = options["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_decay, betas))):
            raise OptionError(f"{owner}(betas={betas!r}): betas must be two numbers in [0, 1)")
        validation.non_negative(owner, "eps", options["eps"])
        validation.count(owner, "max_skips", options["max_skips"])
        schedules = {n: _Numbers(owner, n, v) for n, v in options.items() if callable(v) and n != "direction"}
        self._policy = self._make_policy({**options, **schedules})
        self._options = {name: validation.plain(value) for name, value in options.items()}

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `step` as torch does, for hooks and profilers; without them past that wrapper.

        A profiler's record that nobody reads costs a fifth of an evaluation of a small model.
        """
        observed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: PolicyOptimizer, *args: Any, **kwargs: Any) -> Any:
            return (observed if self._is_observed() else func)(self, *args, **kwargs)

        return step

    def _is_observed(self) -> bool:
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_GLOBAL_HOOKS)
        return any(hooks) or torch.autograd._profiler_enabled()

    def _make_policy(self, options: dict[str, Any]) -> Any:
        names = {field.name for field in dataclasses.fields(self._rule)}
        given = {name: value for name, value in options.items() if name in names}
        # The bound or first trial goes to each step, from param_groups. A rule that could not find one, for want of a
        # lower bound, wants a number at construction too.
        given["start" if "start" in names else "bound"] = 1.0 if options["lower_bound"] is None else None
        return self._rule(**given)

    def _prepare(self) -> None:
        """Set what is not saved; derived classes add theirs."""
        self._workspace = Workspace()

    def _restored(self) -> None:
        """Set what follows from saved state."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep: everything but closures, counts and scratch memory."""
        return {**super().__getstate__(), "_callables": self._callables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from `__getstate__` or a `state_dict`, options included; missing group entries get their defaults."""
        if any("automatic" not in group for group in state["param_groups"]):
            raise OptionError(
                f"{type(self).__name__}.load_state_dict: the state is that of another optimizer, whose step sizes say "
                f"nothing here; leave it out, and make a new {type(self).__name__}"
            )
        defaults = state.get("defaults", self.__dict__.get("defaults", {}))
        callables = state.get("_callables", self.__dict__.get("_callables", {}))
        options = {name: state["param_groups"][0].get(name, value) for name, value in defaults.items() if name != "lr"}
        for name, value in options.items():
            if isinstance(value, str) and value == "callable":
                if name not in callables:
                    raise OptionError(
                        f"{type(self).__name__}({name}={self._options[name]!r}): the saved optimizer had a callable "
                        f"{name}, which is not saved; give the same one to the optimizer that loads"
                    )
                options[name] = callables[name]
        self._set_options(options)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, though it is no option here
        for group in self.param_groups:
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, 1.0 if name == "lr" and value is None else value)
        if "_workspace" not in self.__dict__:
            self._prepare()
        self._restored()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: "params" and, optionally, "lr"; left out, lr is that of the optimizer or of the first group.

        Raises:
            OptionError: lr is out of range, or another option differs from the optimizer's.
            TensorError: A parameter is complex, sparse or not floating-point.
        """
        owner = type(self).__name__
        for name, value in self.defaults.items():
            if name != "lr" and param_group.get(name, value) != value:
                raise OptionError(
                    f"{owner}: a parameter group has {name}={param_group[name]!r} where the optimizer has {value!r}; "
                    "one rule steps all groups, so they may only differ in lr"
                )
        remedies = {"weight_decay": "add the penalty to the loss, where the search sees it", "momentum": "leave it out"}
        for name, remedy in remedies.items():
            if param_group.get(name):
                raise OptionError(
                    f"{owner}: a parameter group has {name}={param_group[name]!r}, which no rule here has; {remedy}"
                )
        given = param_group.get("lr", self.defaults["lr"])
        if self.param_groups:
            first = self.param_groups[0]
            lr, scale = (first["lr"] if given is None else given), first["scale"]
            automatic = first["automatic"]
        else:
            lr, scale, automatic = (1.0, 0.0, True) if given is None else (given, 1.0, False)
        if not (isinstance(lr, Real) and float(lr) >= 0.0):
            raise OptionError(f"{owner}: a parameter group has lr={lr!r}; lr must be a number at or above 0")
        super().add_param_group(
            {"scale": scale, "automatic": automatic, "step_size": 0.0, **param_group, "lr": validation.plain(lr)}
        )
        try:
            for p in self.param_groups[-1]["params"]:
                refuse_unsupported(owner, p)
        except TensorError:
            del self.param_groups[-1]
            raise

    def rebind(self, params: Iterable[Tensor]) -> None:
        """Step on other tensors from now on, one for each of the present ones, in order; all state stays.

        For code that puts new tensors in the place of a model's parameters.

        Raises:
            TensorError: They are not as many, or not of the same shapes and dtypes.
        """
        old, new = self._parameters(), list(params)
        if [(p.shape, p.dtype, p.device) for p in old] != [(p.shape, p.dtype, p.device) for p in new]:
            raise TensorError(
                f"{type(self).__name__}.rebind: shapes {[tuple(p.shape) for p in new]} in the place of "
                f"{[tuple(p.shape) for p in old]}; each present tensor needs one of the same shape, dtype and device"
            )
        for p in new:
            refuse_unsupported(type(self).__name__, p)
        renamed = {id(p): q for p, q in zip(old, new, strict=True)}
        for group in self.param_groups:
            group["params"] = [renamed[id(p)] for p in group["params"]]
        state: dict[Any, Any] = self.state
        moved = [(renamed.get(id(key), key), value) for key, value in state.items()]
        state.clear()
        state.update(moved)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved: plain numbers, words and tensors, whatever a scheduler has written into the groups."""
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            group.update({name: validation.plain(value) for name, value in group.items() if name != "params"})
        return saved

    @property
    def _rule_saved(self) -> dict[str, Any]:
        state: dict[Any, Any] = self.state  # torch types the keys as tensors
        saved: dict[str, Any] = state.get("policy", {})
        return saved

    def _rule_state(self) -> Any:
        initial = self._policy.init()
        return initial._make(map(self._rule_saved.get, initial._fields, initial))

    def _save_rule_state(self, state: Any, **more: Any) -> None:
        keys: dict[Any, Any] = self.state
        # A new dictionary each time: the old one may be part of a state_dict that the user holds.
        keys["policy"] = {**self._rule_saved, **state._asdict(), **more}

    def _saved(self, name: str, default: Any) -> Any:
        return self._rule_saved.get(name, default)

    # ------------------------------------------------------------------------------------------ parameters

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _reference_lr(self) -> float:
        """Return lr_0: that of the first group whose lr is not 0."""
        return next((float(g["lr"]) for g in self.param_groups if float(g["lr"]) != 0.0), 0.0)

    def _factors(self) -> list[float]:
        """Return lr_i / lr_0 of each group."""
        lrs = [float(g["lr"]) for g in self.param_groups]
        reference = next((lr for lr in lrs if lr != 0.0), 0.0)
        return [1.0 if lr == reference else lr / reference for lr in lrs]

    def _each_factor(self) -> list[float]:
        """Return lr_i / lr_0 of each parameter's group."""
        factors: list[float] = []
        for group, factor in zip(self.param_groups, self._factors(), strict=True):
            factors += [factor] * len(group["params"])
        return factors

    def _with_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Return the parameters that have a gradient, their gradients, and their groups' lr_i / lr_0."""
        factors = self._each_factor()
        active, kept = list(params), [g for g in grads if g is not None]
        if len(kept) < len(grads):
            active = [p for p, g in zip(params, grads, strict=True) if g is not None]
            factors = [w for w, g in zip(factors, grads, strict=True) if g is not None]
        for g in kept:
            if g.layout is not torch.strided:
                refuse_unsupported(type(self).__name__, g, "gradient")
        return active, kept, factors


class _Numbers:
    """A schedule of the user's, with values that are Python's numbers (or tensors): the state is kept plain."""

    def __init__(self, owner: str, name: str, function: Any) -> None:
        self._owner, self._name, self._function = owner, name, function

    def __call__(self, k: Any) -> Any:
        value = self._function(k)
        try:
            return value if isinstance(value, Tensor) else float(value)
        except (TypeError, ValueError):
            raise OptionError(
                f"{self._owner}({self._name}={self._function!r}): it returned {value!r} for k={k}; it must return a "
                "number"
            ) from None


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options among a constructor's ``locals()``: all but self, params and lr."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "lr", "__class__")}


def _is_decay(beta: Any) -> bool:
    return isinstance(beta, Real) and 0.0 <= float(beta) < 1.0
