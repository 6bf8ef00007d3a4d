"""The conduct that all optimizers of this package share: options, groups, state, records, warnings."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import AdaptiveBilevelWarning, ClosureError, NonFiniteError, OptionError, TensorError
from ..policies import Outcome, Record, _options
from .direction import DIRECTIONS, Descent, adam, metric, sgd
from .evaluations import Evaluations
from .guard import Closure, Guard, RandomState, Workspace
from .scalars import inner, on_host

__all__ = ["AdaptiveOptimizer", "Sample", "options_of"]

_WARNED = {
    Outcome.search_failed: "Parameters are as before. Often the gradient is not that of the loss which the closure "
    "returns, or the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give lower_bound= a number that the loss never falls below.",
    Outcome.no_descent: "The direction does not descend on the searched function; see optimizer.record.",
}


class Sample(NamedTuple):
    """The last sample that an optimizer stepped on, to be evaluated again by the level above.

    Attributes:
        closure: The closure.
        random: Random state before it was evaluated.
        step_size: The step that was taken on it.
    """

    closure: Closure
    random: RandomState
    step_size: float


class AdaptiveOptimizer(torch.optim.Optimizer):
    """A policy as a `torch.optim.Optimizer`; the concrete rules derive from it.

    `param_groups[i]["lr"]` scales the bound (or first trial) of the rule, so schedulers act on it; left out, it is 1
    and `param_groups[i]["scale"]` holds the bound (or first trial) that the rule found. Groups with different lr share
    one step: group i moves by step * lr_i / lr_0. All other options are the same for all groups.

    Attributes:
        record: The last step's `Record`; None before.
        evaluations: Every oracle call so far.
        sample: The last sample stepped on; None before.
    """

    _rule: ClassVar[type[Any]]
    """The policy that a subclass steps by; its options are those of the subclass by the same names."""
    mixes_momentum: ClassVar[bool] = False
    """Whether the step's momentum is not the direction's affair, see `adaptive_bilevel.optim.momentum`."""
    takes_offers: ClassVar[bool] = True
    """Whether the next step decides between two starting points, see `offer`."""

    def __init__(self, params: ParamsT, lr: float | None, options: dict[str, Any]) -> None:
        self._callables = {name: value for name, value in options.items() if callable(value)}
        defaults = {name: "callable" if callable(value) else value for name, value in options.items()}
        self._check_lr(lr)
        if lr is None and options["lower_bound"] is None:
            raise OptionError(
                f"{type(self).__name__}(lr=None, lower_bound=None): without a lower bound of the loss the step cannot "
                "be found from the problem; give one of the two"
            )
        self._set_options(options)
        super().__init__(params, {"lr": lr, **defaults})
        self._prepare()

    def _check_lr(self, lr: Any) -> None:
        _options.positive(type(self).__name__, "lr", lr, optional=True)

    def _set_options(self, options: dict[str, Any]) -> None:
        owner = type(self).__name__
        _options.choice(owner, "direction", options["direction"], DIRECTIONS, or_callable=True)
        betas = options["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_decay, betas))):
            raise OptionError(f"{owner}(betas={betas!r}): betas must be two numbers in [0, 1)")
        _options.non_negative(owner, "eps", options["eps"])
        _options.count(owner, "max_skips", options["max_skips"])
        self._policy = self._make_policy(options)
        self._options = options

    def _make_policy(self, options: dict[str, Any]) -> Any:
        names = {field.name for field in dataclasses.fields(self._rule)}
        given = {name: value for name, value in options.items() if name in names}
        # The bound or first trial goes to each step, from param_groups. A rule that could not find one, for want of a
        # lower bound, wants a number at construction too.
        given["start" if "start" in names else "bound"] = 1.0 if options["lower_bound"] is None else None
        return self._rule(**given)

    def _prepare(self) -> None:
        """Set what is not saved."""
        self._workspace = Workspace()
        self._warned: dict[int, int] = {}
        self._skips: Any = 0
        self._looks = 0
        self._offered = False
        self.record: Record | None = None
        self.evaluations = Evaluations.single()
        self.sample: Sample | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep: everything but closures, counts and scratch memory."""
        return {**super().__getstate__(), "_callables": self._callables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from `__getstate__` or a `state_dict`, options included; missing group entries get their defaults."""
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
        self._offered = any("offered" in saved for saved in self.state.values())

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
        given = param_group.get("lr", self.defaults["lr"])
        if self.param_groups:
            first = self.param_groups[0]
            lr, scale = (first["lr"] if given is None else given), first["scale"]
            automatic = first["automatic"]
        else:
            lr, scale, automatic = (1.0, 0.0, True) if given is None else (given, 1.0, False)
        if not (isinstance(lr, Real) and float(lr) >= 0.0):
            raise OptionError(f"{owner}: a parameter group has lr={lr!r}; lr must be a number at or above 0")
        super().add_param_group({"scale": scale, "automatic": automatic, "step_size": 0.0, **param_group, "lr": lr})
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

    @property
    def _rule_saved(self) -> dict[str, Any]:
        state: dict[Any, Any] = self.state  # torch types the keys as tensors
        saved: dict[str, Any] = state.get("policy", {})
        return saved

    def _rule_state(self) -> Any:
        initial, saved = self._policy.init(), self._rule_saved
        return type(initial)(**{name: saved[name] for name in initial._fields if name in saved})

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
        reference = self._reference_lr()
        lrs = [float(g["lr"]) for g in self.param_groups]
        return [1.0 if lr == reference else lr / reference for lr in lrs]

    def _with_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Return the parameters that have a gradient, their gradients, and their groups' lr_i / lr_0."""
        factors = [w for g, w in zip(self.param_groups, self._factors(), strict=True) for _ in g["params"]]
        kept = [(p, g, w) for p, g, w in zip(params, grads, factors, strict=True) if g is not None]
        for _, g, _ in kept:
            if g.layout is not torch.strided:
                refuse_unsupported(type(self).__name__, g, "gradient")
        return [p for p, _, _ in kept], [g for _, g, _ in kept], [w for _, _, w in kept]

    def _sample_bound(self, lower_bound: Any) -> Any:
        """Return a lower bound that was given to a step, or raise."""
        if not isinstance(lower_bound, Tensor):
            _options.finite(f"{type(self).__name__}.step", "lower_bound", lower_bound, optional=True)
        return lower_bound

    def _descent(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Descent:
        direction = self._options["direction"]
        if callable(direction):
            made: Descent = direction(params, grads, self.state)
            return made
        if direction == "sgd":
            return sgd()
        group = self.param_groups[0]  # read at each step: schedulers that cycle momentum write to it
        if self.mixes_momentum:
            return metric(params, grads, self.state, group["betas"][1], group["eps"])
        return adam(params, grads, self.state, group["betas"], group["eps"])

    # ------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, guard: Guard, closure: Closure, params: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Return loss and gradients on the sample; first decide about an offered starting point."""
        offered = self._take_offer(params)
        if offered is None:
            self.evaluations.upper.gradients += 1
            return guard.gradient(closure, params)
        guard.copy()
        torch._foreach_copy_(params, offered)
        there = guard.value(closure)
        guard.put_back()
        loss, grads = guard.gradient(closure, params, guard.entry)
        self.evaluations.upper.values += 1
        self.evaluations.upper.gradients += 1
        elsewhere, here = on_host(there, loss)
        if elsewhere < here or (here != here and elsewhere == elsewhere):
            torch._foreach_copy_(params, offered)
            guard.rebase()
            loss, grads = guard.gradient(closure, params, guard.entry)
            self.evaluations.upper.gradients += 1
        return loss, grads

    def offer(self, points: Sequence[Tensor]) -> None:
        """Offer another starting point for the next step, copies of all parameters in order.

        The next `step(closure)` evaluates the loss here and there, on its own first sample, and starts from the better
        one. The level above calls this with the point before its prediction. Parameters that somebody has changed in
        the meantime (a cold start) void the offer.
        """
        params = self._parameters()
        for p, point in zip(params, points, strict=True):
            self.state[p] = {**self.state[p], "offered": point}
        self._save_rule_state(self._rule_state(), offered_at=self._fingerprint(params))
        self._offered = True

    def _fingerprint(self, params: Sequence[Tensor]) -> float:
        """Return ||params||^2: it tells whether somebody moved them, in whichever way (versions do not count .data)."""
        return float(inner([p.detach() for p in params], [p.detach() for p in params]))

    def _take_offer(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        if not self._offered:
            return None
        if self._saved("offered_at", math.nan) != self._fingerprint(params):
            self._drop_offer()
            return None
        saved = [self.state.get(p, {}) for p in params]
        return [s["offered"] if "offered" in s else p.detach().clone() for p, s in zip(params, saved, strict=True)]

    def _drop_offer(self) -> None:
        if not self._offered:
            return
        for p in self._parameters():
            if "offered" in self.state.get(p, {}):
                self.state[p] = {k: v for k, v in self.state[p].items() if k != "offered"}
        keys: dict[Any, Any] = self.state
        keys["policy"] = {k: v for k, v in self._rule_saved.items() if k != "offered_at"}
        self._offered = False

    # ------------------------------------------------------------------------------------------ conclusion

    def _bound(self) -> dict[str, Any]:
        """Return what the policy is told: lr is its bound (or first trial), or scales one that it finds by itself."""
        return {"scale" if self.param_groups[0]["automatic"] else "bound": self._reference_lr()}

    def _conclude(self, record: Record, state: Any) -> None:
        """Keep the record, tell what should be told, and count what may not go on."""
        self.record = record
        on_device = isinstance(record.step_size, Tensor)
        scale = state.found if self.param_groups[0]["automatic"] else 1.0
        for group, factor in zip(self.param_groups, self._factors(), strict=True):
            if on_device:
                moved = record.step_size > 0
                group["scale"] = torch.where(moved, scale, group["scale"])
                group["step_size"] = torch.where(moved, record.step_size * factor, group["step_size"])
            elif record.step_size > 0.0:
                group["scale"] = scale
                group["step_size"] = record.step_size * factor
        if on_device:
            # Looked at rarely, since looking waits for the device.
            self._skips = torch.where(record.outcome == int(Outcome.non_finite), self._skips + 1, 0)
            self._looks += 1
            if self._looks % self._options["max_skips"] == 0:
                self._refuse_skips(int(self._skips))
            return
        outcome = Outcome(int(record.outcome))
        self._skips = self._skips + 1 if outcome is Outcome.non_finite else 0
        if outcome in _WARNED:
            self._warn(outcome, f"{outcome.sentence}. {_WARNED[outcome]}")
        self._refuse_skips(self._skips)

    def _refuse_skips(self, skips: int) -> None:
        if skips >= self._options["max_skips"]:
            raise NonFiniteError(
                f"{type(self).__name__}: {skips} steps in a row met a loss or gradient that is not finite; nothing "
                f"has moved since. Look at the data and the loss, or raise max_skips={self._options['max_skips']}"
            )

    def _warn(self, key: int, message: str) -> None:
        """Warn at the 1st, 10th, 100th, ... time."""
        times = self._warned[key] = self._warned.get(key, 0) + 1
        if times in (1, 10, 100, 1000) or times % 10000 == 0:
            warnings.warn(f"{type(self).__name__} (time {times}): {message}", AdaptiveBilevelWarning, stacklevel=6)

    def __repr__(self) -> str:
        """Return the options and the last step."""
        options = {"lr": self.param_groups[0]["lr"], **self._options}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        last = "" if self.record is None else f"; {self.record.describe()}"
        return f"{type(self).__name__}({listed}{last})"


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options among a constructor's ``locals()``: all but self, params and lr."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "lr", "__class__")}


def _is_decay(beta: Any) -> bool:
    return isinstance(beta, Real) and 0.0 <= float(beta) < 1.0


def refuse_unsupported(owner: str, tensor: Tensor, what: str = "parameter") -> None:
    """Raise for tensors that no step size makes sense for."""
    if tensor.is_complex() or tensor.layout is not torch.strided or not tensor.is_floating_point():
        kind = "complex" if tensor.is_complex() else str(tensor.layout if tensor.is_floating_point() else tensor.dtype)
        raise TensorError(
            f"{owner}: a {what} of shape {tuple(tensor.shape)} is {kind}; only dense real floating-point tensors "
            "can be stepped (for an embedding, pass sparse=False; view complex tensors as real)"
        )


def require_closure(owner: str, closure: Any) -> Closure:
    """Return the closure, or raise where there is none to evaluate."""
    if not callable(closure):
        raise ClosureError(
            f"{owner}.step(closure={closure!r}): the rule evaluates the loss, so step needs a closure that returns it, "
            "e.g. optimizer.step(lambda: loss_fn(model(x), y))"
        )
    return closure  # type: ignore[no-any-return]


def tainted(loss: Tensor, other_loss: Tensor | float, other_gradient: Sequence[Tensor]) -> Tensor:
    """Return the loss that the step size comes from; not finite if that which the step goes along is not.

    In the 2-sample form the two come from different samples. Nothing is looked at here, so no device is waited for.
    """
    return loss + 0.0 * (other_loss + inner(other_gradient, other_gradient))


def slope_of(grads: Iterable[Tensor], directions: Iterable[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the slope <g, d> over all groups."""
    return inner(list(grads), list(directions), factors)


def gradients_of(chosen: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients of some of the parameters, zeros where there is none."""
    by_id = {id(p): g for p, g in zip(params, grads, strict=True)}
    return [torch.zeros_like(p) if (g := by_id[id(p)]) is None else g for p in chosen]
