"""Errors before a run starts: combinations that the mathematics does not allow, each with its reason."""

from __future__ import annotations

from ..bilevel.options import BASELINES
from ..errors import OptionError
from ..hypergradient import Amortised, Implicit, ValueFunction
from ..hypergradient.estimate import Responding
from ..optim.projection import as_projection
from ..policies import SLS, SLSB, DecSPS, Envelope, validation
from .directions import Adam, Plain, Saga
from .row import CORRECTIONS, NAMES, Row

__all__ = ["check"]

POLYAK = (Envelope, DecSPS)
SEARCHES = (SLS, SLSB)
OF_TANGENT = ("carry", "curvature")
OF_STEP = ("baseline", "response_steps")


def check(row: Row) -> None:
    """Reject what cannot work.

    Raises:
        OptionError: With the reason and what to do instead.
    """
    _check_values(row)
    _check_search_options(row)
    for variable in row.variables:
        _check_step(row, variable)
    _check_path(row)
    for variable in row.variables:
        direction = row.direction_of(variable)
        if isinstance(direction, Saga) and variable == "x" and not row.estimator.splits:
            _refuse(
                row,
                "x",
                f"Saga keeps a table per summand, so the estimate has to be a sum over samples, and {row.estimator} is "
                "not: use Amortised()",
            )
        if direction.second_point and row.estimator.needs_path:
            _refuse(
                row,
                variable,
                f"{direction} takes the gradient at a second point, and {row.estimator} differentiates through the "
                "lower loop that led to the first: use Implicit(...) or Amortised()",
            )


def _check_values(row: Row) -> None:
    owner = "methods.run"
    for name, value in (("lower_steps", row.lower_steps), ("auxiliary_steps", row.auxiliary_steps)):
        validation.count(owner, name, value)
    validation.choice(owner, "correction", row.correction, CORRECTIONS)
    validation.choice(owner, "response", row.response, ("tangent", "step"))
    if row.baseline is not None:
        validation.choice(owner, "baseline", row.baseline, BASELINES)
    validation.choice(owner, "clock", row.clock, ("iterations", "steps"))
    validation.positive(owner, "tolerance", row.tolerance, optional=True)
    as_projection(owner, row.project)
    _check_parts(row)
    if (
        not isinstance(row.order, str)
        or not row.variables
        or set(row.variables) - set("xyvz")
        or not row.variables.isalpha()
    ):
        raise OptionError(f"methods.run(order={row.order!r}): name groups of x, y, v, z, such as 'y,x' or 'yvx'")
    repeated = len(set(row.variables)) != len(row.variables)
    if repeated or not {"x", "y"} <= set(row.variables) or not all(row.groups):
        raise OptionError(f"methods.run(order={row.order!r}): x and y must occur once, and nothing twice")
    if isinstance(row.estimator, Amortised) and "v" not in row.variables:
        raise OptionError(f"methods.run(order={row.order!r}): Amortised() uses v, so v must be stepped; e.g. 'yvx'")
    if isinstance(row.estimator, ValueFunction) and ("z" not in row.variables or row.multiplier is None):
        raise OptionError(
            f"methods.run(order={row.order!r}): ValueFunction() uses z and lambda, so z must be stepped and a "
            "multiplier= be given"
        )
    if row.correction != "none" and not (
        isinstance(row.estimator, Responding) and any({"x", "y"} <= set(g) for g in row.groups)
    ):
        raise OptionError(
            f"methods.run(correction={row.correction!r}): the correction needs the inverse of an Implicit(...) or "
            "Averaged(...) estimator, and x and y in one group"
        )


def _check_parts(row: Row) -> None:
    """Reject what is no estimator, direction, multiplier or field at all."""
    if isinstance(row.estimator, type) or not hasattr(row.estimator, "needs_path"):
        raise OptionError(
            f"methods.run(estimator={row.estimator!r}): pass an estimator of adaptive_bilevel.hypergradient, such as "
            "Implicit(), Amortised() or Unroll()"
        )
    for name in ("upper_direction", "lower_direction", "auxiliary_direction"):
        direction = getattr(row, name)
        absent = direction is None and name == "auxiliary_direction"
        if not absent and (isinstance(direction, type) or not hasattr(direction, "certifies")):
            raise OptionError(
                f"methods.run({name}={direction!r}): pass methods.Plain(), Momentum(), Adam(), Storm(), "
                "Spider() or Saga()"
            )
    if row.multiplier is not None and not callable(getattr(row.multiplier, "before", None)):
        raise OptionError(f"methods.run(multiplier={row.multiplier!r}): pass methods.Growth(), Balance() or Ascent()")
    for name in ("lower", "lower_copy"):
        if isinstance(getattr(row, name), type) or not hasattr(getattr(row, name), "cost"):
            raise OptionError(
                f"methods.run({name}={getattr(row, name)!r}): pass methods.LowerLoss(), PenalisedLoss() or "
                "SecondLower()"
            )
    if not set(row.start) <= set("yz") or not set(row.start.values()) <= {"first", "y", "z"}:
        raise OptionError(f"methods.run(start={row.start!r}): give {{'y': 'first'}} or {{'z': 'y'}}")
    if row.solver is not None and not isinstance(row.estimator, Implicit) and not isinstance(row.upper_step, SEARCHES):
        raise OptionError(
            f"methods.run(solver={row.solver!r}): {row.estimator} solves nothing, and x is not searched; leave it out, "
            "or give estimator=Implicit(solver)"
        )


def _check_search_options(row: Row) -> None:
    """Reject options of the upper search that do not apply to this one."""
    searched = isinstance(row.upper_step, SEARCHES)
    if not searched:
        given = row.given("momentum", *OF_TANGENT, *OF_STEP) | ({"response": "step"} if row.response == "step" else {})
        for name, value in given.items():
            raise OptionError(
                f"methods.run({name}={value!r}): x is not searched, it has upper_step={row.upper_step!r}; leave {name} "
                "out, or give upper_step=policies.SLS()"
            )
        return
    stepped = row.response == "step"
    other = "tangent" if stepped else "step"
    for name, value in row.given(*(OF_TANGENT if stepped else OF_STEP)).items():
        raise OptionError(
            f"methods.run({name}={value!r}, response={row.response!r}): an option of response={other!r} only; leave "
            "one of the two out"
        )
    if row.carry is True and "x" not in row.groups:
        raise OptionError(
            f"methods.run(carry=True, order={row.order!r}): y moves together with x, so there is no next lower step "
            "that starts from a predicted y; leave carry out, or give order='y,x'"
        )
    if not stepped:
        return
    if row.solver is not None and row.inverse != row.solver:
        raise OptionError(
            f"methods.run(solver={row.solver!r}, response='step'): this response solves no linear system, and the "
            f"estimator is {row.estimator}; leave solver out, or give estimator=Implicit(solver)"
        )
    if isinstance(row.momentum, str):
        raise OptionError(
            f"methods.run(momentum={row.momentum!r}, response='step'): an option of response='tangent' only; give True "
            "or False, or leave it out"
        )
    if isinstance(row.upper_step, SLS) and row.upper_step.max_step is not None:
        raise OptionError(
            f"methods.run(upper_step={row.upper_step!r}, response='step'): no trial is above the start anyway; leave "
            "max_step out"
        )


def _check_path(row: Row) -> None:
    if not row.estimator.needs_path:
        return
    groups = row.groups
    if "y" not in groups or groups.index("y") > next(i for i, g in enumerate(groups) if "x" in g):
        raise OptionError(
            f"methods.run(order={row.order!r}): {row.estimator} differentiates through the lower loop, which therefore "
            "must come before x, in a group of its own: 'y,x'"
        )
    if not isinstance(row.lower_direction, Plain):
        _refuse(row, "y", f"{row.estimator} differentiates through plain lower steps; use direction Plain()")


def _check_step(row: Row, variable: str) -> None:
    policy, direction = row.step_of(variable), row.direction_of(variable)
    search = isinstance(policy, SEARCHES)
    if not search and not isinstance(policy, POLYAK):
        return
    rule = f"{type(policy).__name__}"
    if not direction.certifies:
        what = "Armijo's condition may fail for every step" if search else "Polyak's ratio says nothing about the step"
        _refuse(
            row,
            variable,
            f"{type(direction).__name__}'s direction is no gradient of the sampled loss, so {what}: {rule} needs "
            "Plain(), Momentum() or Adam(); with this direction use Constant(...) or GradientNorm(...)",
        )
    if row.joint and variable in "xy":
        _refuse(
            row,
            variable,
            "x and y move along one joint direction, whose multiplier changes with the point: there is no one loss "
            f"that a step of {NAMES[variable]} alone could be judged by. Use Constant(...) or GradientNorm(...), or "
            "the row 'f2sa'",
        )
    if variable == "x" and search:
        if isinstance(row.estimator, ValueFunction):
            _refuse(
                row,
                variable,
                "with z held fixed, g(x, y) - g(x, z) lies below g(x, y) - min_z g(x, z), so a decrease of it "
                "certifies nothing; use Constant(...) or GradientNorm(...)",
            )
        if not isinstance(direction, (Plain, Adam)):
            _refuse(row, variable, "the upper search knows the directions Plain() and Adam()")
        if row.response == "step" and row.lower_steps < 1:
            _refuse(row, variable, "response='step' repeats the last lower step, and there is none")
    if not isinstance(policy, POLYAK):
        return
    unbounded = policy.lower_bound is None and not (variable == "y" and row.lower_bound is not None)
    if unbounded:
        _refuse(
            row,
            variable,
            f"{rule}(lower_bound=None): a Polyak step needs a lower bound of the loss; give one, "
            + ("or lower_bound=(x, batch) -> bound to run, " if variable == "y" else "")
            + "or take a search (SLS)",
        )
    if variable == "v":
        _refuse(
            row,
            variable,
            f"R(v) = <v, H v>/2 - <v, f_y> is below 0 at its minimum and has no known lower bound, which {rule} needs",
        )
    if variable == "x" and isinstance(row.estimator, ValueFunction):
        _refuse(
            row,
            variable,
            f"f + lambda (g(x, y) - g(x, z)) has no known lower bound (z is not exact), which {rule} "
            "needs; use Constant(...) or GradientNorm(...)",
        )


def _refuse(row: Row, variable: str, reason: str) -> None:
    raise OptionError(f"methods.run({row.name!r}), step of {variable} ({NAMES[variable]}): {reason}")
