"""Options, parameter groups and saved state of a policy that is a `torch.optim.Optimizer`.

How options are kept: a concrete optimizer's constructor makes frozen dataclasses of its arguments, its records, and
hands them to `PolicyOptimizer`, ``super().__init__(params, lr, rule=policies.SLS(...), conduct=Conduct(...))``, and
further ones by any other name. Each record becomes the attribute of its name, so that the rest of the code reads
``self.rule.c`` or ``self.conduct.direction``. All fields of all records together are ``defaults``, as plain values
("callable" for functions), and so are entries of ``param_groups``; where two records have a field of one name, it is
the last record's. Loading a state puts the entries of ``param_groups[0]`` back into the records
(`dataclasses.replace`, which validates them again); functions stay those of the optimizer that loads. After both, the
policy is made: `_make_policy` returns `rule` itself, unless an optimizer derives its policy from several records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from ..errors import OptionError, TensorError
from ..evaluation.guard import Workspace
from ..evaluation.tensors import refuse_unsupported
from ..policies import Policy, State, validation
from ..policies.scalars import Scalar
from ..policies.search import Search
from .direction import Gradient
from .group_options import refuse_lr, refuse_options
from .hooks import Hooked
from .options import CALLABLE, Conduct, is_plain, merged, on_numbers, refuse_unused_moments, replaced
from .saved_state import fit, packed, unpacked

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["PolicyOptimizer"]

_LR = ("bound", "start")
"""Fields of a rule that lr is in the place of: it goes to each step, from ``param_groups``."""


class PolicyOptimizer(Hooked):
    """What an optimizer whose steps come from a policy keeps, and how it is saved, copied and put on other tensors.

    Attributes:
        rule: The record that the policy is made from, mostly a policy, without bound or start.
        conduct: The record of the options that all optimizers have.
        policy: The policy in use.
    """

    _absent: ClassVar[tuple[str, ...]] = _LR
    """Fields of the records that are no options of the class."""

    rule: Any
    conduct: Conduct
    policy: Policy[State]

    def __init__(
        self,
        params: ParamsT,
        lr: float | None,
        rule: DataclassInstance,
        conduct: Conduct,
        **records: DataclassInstance,
    ) -> None:
        self._check_lr(lr)
        self._set_records({"rule": rule, "conduct": conduct, **records})
        options = self._options()
        if lr is None and options["lower_bound"] is None and not isinstance(self.policy, Search):
            raise OptionError(
                f"{type(self).__name__}(lr=None, lower_bound=None): without a lower bound of the loss a Polyak step "
                "cannot be found from the problem; give one of the two, or use a search (SLS, BiSLS)"
            )
        self._refuse_unused()
        self._callables: dict[str, object] = {name: value for name, value in options.items() if not is_plain(value)}
        defaults = {name: value if is_plain(value) else CALLABLE for name, value in options.items()}
        super().__init__(params, {"lr": validation.plain(lr), **defaults})
        self._prepare()

    def _check_lr(self, lr: float | None) -> None:
        validation.positive(type(self).__name__, "lr", lr, optional=True)

    def _refuse_unused(self) -> None:
        """Reject options that nothing reads. At construction only: schedulers write betas that nothing reads, too."""
        refuse_unused_moments(type(self).__name__, self.conduct)

    def _options(self) -> dict[str, object]:
        """Return all options by name, functions included."""
        return merged(self._records.values(), self._absent)

    def _set_records(self, records: dict[str, DataclassInstance]) -> None:
        """Set the records, or none of them if the policy cannot be made."""
        before = self.__dict__.get("_records", {})
        self._records = records
        self.__dict__.update(records)
        try:
            self.policy = self._make_policy(on_numbers(type(self).__name__, self.rule))
        except BaseException:
            self._records = before
            self.__dict__.update(before)
            raise
        self._initial = self.policy.init()

    def _make_policy(self, rule: Any) -> Policy[State]:
        """Return the policy of these records; rule: the record `rule`, its functions with values that are numbers."""
        made: Policy[State] = rule
        return made

    def _prepare(self) -> None:
        """Set what is not saved; derived classes add theirs."""
        self._workspace = Workspace()

    def _restored(self) -> None:
        """Set what follows from saved state."""

    def __getstate__(self) -> StateDict:
        """Return what copying and pickling keep: everything but closures, counts and scratch memory."""
        return {**super().__getstate__(), "_callables": self._callables, "_records": self._records}

    def __setstate__(self, state: StateDict) -> None:
        """Restore from `__getstate__` or a `state_dict`, options included; missing group entries get their defaults."""
        if any("automatic" not in group for group in state["param_groups"]):
            raise OptionError(
                f"{type(self).__name__}.load_state_dict: the state is that of another optimizer, whose step sizes say "
                f"nothing here; leave it out, and make a new {type(self).__name__}"
            )
        mine = {**self.__dict__, **state}  # a state_dict has no records: they are those of the optimizer that loads
        saved = state["param_groups"][0]
        values = {name: saved.get(name, value) for name, value in mine["defaults"].items() if name != "lr"}
        for name, value in values.items():
            if isinstance(value, str) and value == CALLABLE:
                if name not in mine["_callables"]:
                    raise OptionError(
                        f"{type(self).__name__}({name}={self._options()[name]!r}): the saved optimizer had a callable "
                        f"{name}, which is not saved; give the same one to the optimizer that loads"
                    )
                values[name] = mine["_callables"][name]
        records = mine["_records"]
        self._set_records(replaced(records, {**values, **dict.fromkeys(_LR)}))
        super().__setstate__({name: value for name, value in state.items() if name != "_records"})
        self.defaults.pop("differentiable", None)  # torch adds it, though it is no option here
        for group in self.param_groups:
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, 1.0 if name == "lr" and value is None else value)
            group.setdefault("unscheduled_lr", group["lr"])
        if "_workspace" not in self.__dict__:
            self._prepare()
        self._restored()

    def add_param_group(self, param_group: StateDict) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: "params" and, optionally, "lr"; left out, lr is that of the optimizer or of the first group.

        Raises:
            OptionError: lr is out of range, or another option differs from the optimizer's, or is none.
            TensorError: A parameter is complex, sparse or not floating-point.
        """
        owner = type(self).__name__
        refuse_options(owner, param_group, self.defaults)
        given = param_group.get("lr", self.defaults["lr"])
        if self.param_groups:
            first = self.param_groups[0]
            lr, scale = (first["lr"] if given is None else given), first["scale"]
            automatic = first["automatic"]
        else:
            lr, scale, automatic = (1.0, 0.0, True) if given is None else (given, 1.0, False)
        refuse_lr(owner, lr, self._check_lr)
        lr = validation.plain(lr)
        super().add_param_group(
            {"scale": scale, "automatic": automatic, "step_size": 0.0, "unscheduled_lr": lr, **param_group, "lr": lr}
        )
        try:
            for p in self.param_groups[-1]["params"]:
                refuse_unsupported(owner, p)
        except TensorError:
            del self.param_groups[-1]
            raise

    def replace_parameters(self, params: Iterable[Tensor]) -> None:
        """Step on other tensors from now on, one for each of the present ones, in order; all state stays.

        For code that puts new tensors in the place of a model's parameters.

        Raises:
            TensorError: They are not as many, or not of the same shapes and dtypes.
        """
        old, new = self._parameters(), list(params)
        if [(p.shape, p.dtype, p.device) for p in old] != [(p.shape, p.dtype, p.device) for p in new]:
            raise TensorError(
                f"{type(self).__name__}.replace_parameters: shapes {[tuple(p.shape) for p in new]} in the place of "
                f"{[tuple(p.shape) for p in old]}; each present tensor needs one of the same shape, dtype and device"
            )
        for p in new:
            refuse_unsupported(type(self).__name__, p)
        renamed = {id(p): q for p, q in zip(old, new, strict=True)}
        for group in self.param_groups:
            group["params"] = [renamed[id(p)] for p in group["params"]]
        state = self._entries()
        moved = [(renamed.get(id(key), key), value) for key, value in state.items()]
        state.clear()
        state.update(moved)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> StateDict:
        """Return what is saved: plain numbers, words and tensors, whatever a scheduler has written into the groups."""
        saved: StateDict = super().state_dict()
        for group in saved["param_groups"]:
            group.update({name: validation.plain(value) for name, value in group.items() if name != "params"})
        return packed(saved)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned, also with names in the place of parameters' numbers."""
        known = unpacked(state_dict, type(self).__name__)
        super().load_state_dict(known)
        fit(self.state, self._parameters(), known)

    def _is_prepared_only(self, closure: object) -> bool:
        """Return whether a step is asked for nothing, as ``torch.distributed.checkpoint`` does."""
        if closure is not None or self.state or self._reference_lr() != 0.0:
            return False
        return all(p.grad is None or not p.grad.any() for p in self._parameters())

    def _entries(self) -> dict[object, StateDict]:
        """Return the state: entries of parameters, and of words, for which torch has no type."""
        return self.state  # type: ignore[return-value]

    @property
    def _rule_saved(self) -> StateDict:
        saved: StateDict = self.state.get("policy", {})  # type: ignore[call-overload]
        return saved

    def _rule_state(self) -> State:
        initial = self._initial
        return initial._make(map(self._rule_saved.get, initial._fields, initial))

    def _save_rule_state(self, state: State, **more: Scalar) -> None:
        # A new dictionary each time: the old one may be part of a state_dict that the user holds.
        self._entries()["policy"] = {**self._rule_saved, **state._asdict(), **more}

    def _saved(self, name: str, default: Scalar) -> Scalar:
        return self._rule_saved.get(name, default)

    # ------------------------------------------------------------------------------------------ parameters

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rates(self) -> list[float]:
        """Return the lr of each group, which a scheduler may have written."""
        lrs = [float(g["lr"]) for g in self.param_groups]
        for lr in lrs:
            if not 0.0 <= lr < math.inf:
                refuse_lr(type(self).__name__, lr, self._check_lr)
        return lrs

    def _reference_lr(self) -> float:
        """Return lr_0: that of the first group whose lr is not 0."""
        return next((lr for lr in self._rates() if lr != 0.0), 0.0)

    def _schedule(self) -> tuple[float, float]:
        """Return lr_0 without what a scheduler has taken from it, and the part of that which it has left."""
        for lr, group in zip(self._rates(), self.param_groups, strict=True):
            if lr != 0.0:
                whole = max(lr, float(group["unscheduled_lr"]))
                return whole, lr / whole
        return 0.0, 1.0

    def _factors(self) -> list[float]:
        """Return lr_i / lr_0 of each group."""
        lrs = self._rates()
        if len(lrs) == 1:
            return [1.0]
        reference = next((lr for lr in lrs if lr != 0.0), 0.0)
        return [1.0 if lr == reference else lr / reference for lr in lrs]

    def _each_factor(self) -> list[float]:
        """Return lr_i / lr_0 of each parameter's group."""
        factors: list[float] = []
        for group, factor in zip(self.param_groups, self._factors(), strict=True):
            factors += [factor] * len(group["params"])
        return factors

    def _with_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Gradient:
        """Return the parameters that have a gradient, their gradients, and their groups' lr_i / lr_0."""
        factors = self._each_factor()
        active, kept = list(params), [g for g in grads if g is not None]
        if len(kept) < len(grads):
            active = [p for p, g in zip(params, grads, strict=True) if g is not None]
            factors = [w for w, g in zip(factors, grads, strict=True) if g is not None]
        for g in kept:
            if g.layout is not torch.strided:
                refuse_unsupported(type(self).__name__, g, "gradient")
        return Gradient(active, kept, factors)
