"""Rows: the algorithms of the literature as compositions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import OptionError
from ..hypergradient import Implicit, LinearSolver
from ..hypergradient.estimate import Estimator
from ..hypergradient.sample import Batch
from ..hypergradient.trees import Tree
from ..optim.projection import Projection
from ..policies import Constant, Policy
from .directions import Direction, Plain
from .fields import Field, Hypergradient, LinearSystem, LowerLoss, SecondLower
from .multipliers import Multiplier

__all__ = ["Row", "configure"]

CORRECTIONS = ("none", "tangent", "bracketed")
StepRule: TypeAlias = Policy[Any]  # each has a state of its own
NAMES = {"x": "upper", "y": "lower", "v": "linear system", "z": "lower copy"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An algorithm: estimator x lower schedule x step rules x directions x projection.

    The variables are x, y, v (the solution of H v = f_y that some methods track) and z (a second lower variable, of the
    value-function methods). All fields but the first three are options of `methods.run`.

    Attributes:
        name: Its name.
        summary: One line.
        source: Reference.
        assumes: Assumptions of its theory.
        order: Groups of variables, in their order within an iteration. The variables of a group move together, from the
            same point (Jacobi). "y,x" is y first, then x at the new y; "yvx" is all together.
        estimator: Estimator of the hypergradient.
        upper_step: Step rule of x (and of y, if `joint`); a number is a constant step.
        lower_step: Step rule of y (of z, if `joint`).
        auxiliary_step: Step rule of v or z; None for that of y. If only `lower_step` is given, and is constant, a
            constant `auxiliary_step` takes its value.
        upper_direction: Direction of x (and of y, if `joint`).
        lower_direction: Direction of y (of z, if `joint`).
        auxiliary_direction: Direction of v or z; None for that of y.
        lower_steps: T, number of steps of y and z in an iteration.
        auxiliary_steps: Number of steps of v in an iteration.
        lower: Field of y, whose gradient y descends along.
        lower_copy: Field of z.
        tolerance: The loops of `until` stop at ||gradient||^2 <= tolerance. None for 1 / iterations.
        until: Variables whose loop stops at that tolerance. Their number of steps is then a cap.
        cold: Variables whose step rule restarts in each iteration.
        start: Start of a variable in each iteration: {"z": "y"}, or {"y": "first"} (cold start).
        couplings: Variables whose states a step rule shares, for example {"v": "y", "x": "yv"} for S-TFBO.
        joint: x and y move along one direction, that of f + lambda q.
        multiplier: Rule of lambda.
        correction: "tangent": y also responds to the move of x, y += P C^T (x - x+), as in STABLE. "bracketed": the
            same times the lower step (the lecture's Algorithm 6).
        project: Convex set for x: `Box`, `Ball`, `Simplex` or a callable that moves a list of tensors in place.
        lower_bound: (x, lower batch) -> a lower bound of g there, for Polyak steps of y.
        clock: Argument of schedules: "iterations" k of the upper level, or "steps" of their own variable.
        solver: P of the upper search's tangent. None for that of the estimator, or CG.
        response: Response of y in an upper search: "tangent" is that of `BiSLS`, "step" that of `OneStepBiSLS`. The
            next attributes are their options; None stands for their defaults.
        response_steps: For response="step", the number of lower steps in each trial.
        baseline: For response="step", "paper" or "matched".
        carry: For response="tangent", whether y moves with x: "auto", True or False.
        curvature: For response="tangent", the tolerance of its check.
        momentum: Whether the step is along the mean of the hypergradients.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> own = dataclasses.replace(methods.row("stocbio"), name="own", estimator=methods.row("ba").estimator)
    >>> start, steps = (torch.tensor([4.0]), torch.tensor([0.0])), {"upper_step": 0.2, "lower_step": 0.5}
    >>> for direction in (methods.Plain(), methods.Momentum(0.5), methods.Adam(), methods.Storm(0.5)):
    ...     *_, last = methods.run(own, problem, *start, iterations=40, upper_direction=direction, **steps)
    ...     print(type(direction).__name__, round(float(last.x), 1))
    Plain 1.0
    Momentum 1.0
    Adam 0.9
    Storm 1.0
    >>> methods.row("saba").upper_direction, methods.row("vrbo").upper_direction
    (Saga(), Spider(period=10))
    """

    name: str
    summary: str
    source: str
    assumes: str
    order: str
    estimator: Estimator
    upper_step: StepRule
    lower_step: StepRule
    auxiliary_step: StepRule | None = None
    upper_direction: Direction = field(default_factory=Plain)
    lower_direction: Direction = field(default_factory=Plain)
    auxiliary_direction: Direction | None = None
    lower_steps: int = 1
    auxiliary_steps: int = 1
    lower: Field = field(default_factory=LowerLoss)
    lower_copy: Field = field(default_factory=SecondLower)
    tolerance: float | None = None
    until: str = ""
    cold: str = ""
    start: Mapping[str, str] = field(default_factory=dict)
    couplings: Mapping[str, str] = field(default_factory=dict)
    joint: bool = False
    multiplier: Multiplier | None = None
    correction: str = "none"
    project: Projection | None = None
    lower_bound: Callable[[Tree, Batch], float] | None = None
    clock: str = "iterations"
    solver: LinearSolver | None = None
    response: str = "tangent"
    response_steps: int | None = None
    baseline: str | None = None
    carry: str | bool | None = None
    curvature: float | None = None
    momentum: str | bool | None = None

    @property
    def groups(self) -> list[str]:
        """The groups of variables."""
        return self.order.split(",")

    @property
    def variables(self) -> str:
        """All variables, in order."""
        return self.order.replace(",", "")

    def given(self, *names: str) -> dict[str, Any]:
        """Return the options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def step_of(self, variable: str) -> StepRule:
        """Return the step rule of a variable."""
        level = self._level(variable)
        if level == "auxiliary" and self.auxiliary_step is not None:
            return self.auxiliary_step
        return self.upper_step if level == "upper" else self.lower_step

    def direction_of(self, variable: str) -> Direction:
        """Return the direction of a variable."""
        level = self._level(variable)
        if level == "auxiliary" and self.auxiliary_direction is not None:
            return self.auxiliary_direction
        return self.upper_direction if level == "upper" else self.lower_direction

    def _level(self, variable: str) -> str:
        """Return whose rules step a variable: those of the upper, the lower or the auxiliary level."""
        if variable == "x" or (variable == "y" and self.joint):
            return "upper"
        return "lower" if variable == "y" or self.joint else "auxiliary"

    def repeats(self, group: str) -> int:
        """Return how often a group steps in an iteration."""
        if len(group) > 1 or group == "x":
            return 1
        return self.auxiliary_steps if group == "v" else self.lower_steps

    def field_of(self, variable: str) -> Field:
        """Return the field of a variable."""
        return {
            "x": Hypergradient(self.estimator),
            "y": self.lower,
            "v": LinearSystem(),
            "z": self.lower_copy,
        }[variable]

    @property
    def inverse(self) -> LinearSolver | None:
        """P of the estimator, or None if it has none."""
        found: LinearSolver | None = getattr(self.estimator, "solver", None)
        return found

    def response_solver(self) -> LinearSolver | None:
        """Return P of the tangent, or None for the default, also for an estimator with one random term of a series."""
        if self.solver is None and isinstance(self.estimator, Implicit) and not self.estimator.solver.resamples:
            return self.estimator.solver
        return self.solver

    def __str__(self) -> str:
        """Return the composition, the cost of an iteration and the assumptions."""
        lines = [f"{self.name}: {self.summary}", f"  source     {self.source}", f"  estimator  {brief(self.estimator)}"]
        lines.append("  iteration  " + ", then ".join(self._group(group) for group in self.groups))
        for variable in self.variables:
            times = self.repeats(variable) if variable in self.groups else 1
            direction = self.direction_of(variable)
            cost = self.field_of(variable).cost + ("; twice, at two points" if direction.second_point else "")
            rule = self.step_of(variable)
            along = "" if isinstance(direction, Plain) else f" along {brief(direction)}"
            lines.append(f"  {variable:<10} {brief(rule)}{along}; {cost}" + (", each time" if times > 1 else ""))
        extra = ("multiplier", "project", "cold", "until", "start", "couplings")
        lines += [f"  {name:<10} {brief(value)}" for name in extra if (value := getattr(self, name))]
        if self.correction != "none":
            more = "1 JVP and the inverse's HVPs once more" if isinstance(self.estimator, Implicit) else "no product"
            lines.append(f"  correction y += P C^T (x - x+), {self.correction}; {more}")
        if any(hasattr(self.step_of(v), "first_trial") for v in self.variables):
            lines.append(
                "  searches   1 value of the searched loss per trial; at x also the response of y: " + self.response
            )
        return "\n".join([*lines, f"  assumes    {self.assumes}"])

    def _group(self, group: str) -> str:
        times = self.repeats(group)
        ends = bool(self.until) and group in self.until
        loop = ("at most " if ends else "") + (f"{times} x " if times > 1 else "")
        until = " until its gradient is small" if ends else ""
        return loop + " and ".join(f"{v} ({NAMES[v]})" for v in group) + (" at once" if len(group) > 1 else "") + until


def brief(value: object) -> str:
    """Return the text of a dataclass with the fields that are not at their defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(value)
    shown = []
    for f in dataclasses.fields(value):
        present = getattr(value, f.name)
        if f.name == "solver" or present != (
            f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        ):
            shown.append(f"{f.name}={brief(present) if dataclasses.is_dataclass(present) else repr(present)}")
    return f"{type(value).__name__}({', '.join(shown)})"


OPTIONS = {f.name for f in dataclasses.fields(Row)} - {"name", "summary", "source", "assumes"}


def configure(row: Row, options: Mapping[str, object]) -> Row:
    """Return the row with some of its parts replaced.

    Raises:
        OptionError: There is no such part, or a value is of the wrong kind.
    """
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in OPTIONS:
            raise OptionError(f"methods.run({name}=...): no such option; there are {', '.join(sorted(OPTIONS))}")
    for level in ("upper", "lower", "auxiliary"):
        name = f"{level}_step"
        if name in given:
            given[name] = _step_rule(name, given[name])
    if "solver" in given and "estimator" not in given and isinstance(row.estimator, Implicit):
        given["estimator"] = Implicit(given["solver"])
    follows = isinstance(given.get("lower_step"), Constant) and isinstance(row.auxiliary_step, Constant)
    if follows and "auxiliary_step" not in given:
        given["auxiliary_step"] = given["lower_step"]
    return dataclasses.replace(row, **given)


def _step_rule(name: str, value: object) -> StepRule | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Constant(bound=float(value))
    if value is None and name == "auxiliary_step":
        return None
    if (
        isinstance(value, type)
        or not callable(getattr(value, "propose", None))
        or not callable(getattr(value, "init", None))
    ):
        raise OptionError(
            f"methods.run({name}={value!r}): pass a step size, or a policy such as policies.SLS() (an instance, not an "
            "optimizer)"
        )
    found: StepRule = value  # type: ignore[assignment]
    return found
