"""The one loop body behind all rows: what an iteration does with the variables of a row."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import OptionError, warn
from ..evaluation.vectors import Vector, add, dot
from ..hypergradient.estimate import Estimate, Point, Visit
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Sample
from ..optim.projection import as_projection
from ..policies import Context, GradientNormState, Outcome, Record, State
from ..policies.scalars import resolution
from .batches import Pair, Source
from .checks import SEARCHES
from .directions import Directed, Sampled
from .fields import Gradient
from .problem import Variable
from .row import NAMES, Row
from .search import UpperSearch

__all__ = ["Driver"]


_TOLD = {
    Outcome.search_failed: "Its next search starts as the last one did; often the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give the policy a lower_bound= that the loss never falls below.",
    Outcome.no_descent: "Its direction does not descend on the sampled loss.",
}


class Driver:
    """Runs iterations of a row, one at a time.

    Args:
        row: The composition, checked.
        oracle: The problem.
        upper: How x is arranged.
        source: Where batches come from.
        point: Where to start.
        fresh: Whether each lower step draws its own batch.
        seed: Seed of all random numbers.
        tolerance: Of the loops that end by it.

    Attributes:
        point: Where the variables are.
        count: k, the number of iterations so far.
        taken: The records of this iteration's steps, by variable.
        seen: The last gradients of this iteration, by variable.
        stepped: What was last stepped along, by variable.
    """

    def __init__(
        self,
        row: Row,
        oracle: Oracle,
        upper: Variable,
        source: Source,
        point: Point,
        *,
        fresh: bool,
        seed: int,
        tolerance: float,
    ) -> None:
        self._row, self._oracle, self._upper, self._source = row, oracle, upper, source
        self._fresh, self._tolerance = fresh, tolerance
        self._project = as_projection("methods.run", row.project)
        self.point = point._replace(x=self._projected(point.x))
        self._first = point.y
        self._fields = {variable: row.field_of(variable) for variable in row.variables}
        self._rules = {variable: row.step_of(variable).init() for variable in row.variables}
        self._directions: dict[str, dict[str, Any]] = {variable: {} for variable in row.variables}
        self._offered: Vector | None = None
        self._lower_step = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._told: set[object] = set()
        # Where y moves together with x, there is no next lower step to take a prediction back.
        carry = row.carry if "x" in row.groups else False
        searches = isinstance(row.upper_step, SEARCHES)
        self._search = UpperSearch(row, oracle, self.point, carry=carry) if searches else None
        self.count = 0
        self.taken: dict[str, list[Record]] = {}
        self.seen: dict[str, Gradient] = {}
        self.stepped: dict[str, Vector] = {}

    def iterate(self) -> Sample:
        """Step all groups of the row once, and return the last sample; `advance` then ends the iteration."""
        self.taken = {variable: [] for variable in self._row.variables}
        self.seen, self.stepped = {}, {}
        sample = self._sample(self._source.draw())
        for group in self._row.groups:
            sample = self._group(group, sample)
        return sample

    def _group(self, group: str, sample: Sample) -> Sample:
        """Step the variables of a group, and return the last sample."""
        row = self._row
        if group == "y":
            self.point = self.point._replace(path=())
        for variable in group:
            if variable in row.start:
                begin = self._first if row.start[variable] == "first" else getattr(self.point, row.start[variable])
                self.point = _put(self.point, variable, begin)
            if variable in row.cold:
                self._rules[variable] = row.step_of(variable).init()
        repeats, ends = row.repeats(group), bool(row.until) and set(group) <= set(row.until)
        for t in range(repeats + ends):
            if self._fresh and group in ("y", "z") and t > 0:
                sample = self._sample(self._source.draw())._replace(upper=sample.upper, upper_id=sample.upper_id)
            if "x" in group and row.multiplier is not None:
                self.point = self.point._replace(multiplier=row.multiplier.before(self._oracle, self.point, sample))
            if group == "y" and self._offered is not None:
                self._choose(sample)
            # x first: its graph then also gives the gradient of y.
            found = {v: self._fields[v](self._oracle, self.point, sample) for v in reversed(group)}
            self.seen.update(found)
            if ends and all(dot(g.total, g.total) <= self._tolerance for g in found.values()):
                break
            if t == repeats:
                self._warn_cap(group)
                break
            self._move(group, found, sample)
        return sample

    def _choose(self, sample: Sample) -> None:
        """Go back to where y was before the upper search carried it, or not, as `AdaptiveOptimizer.offer` tells."""
        assert self._offered is not None
        stay, self._offered = self.point._replace(y=self._offered), None
        here, there = (float(self._oracle.lower_value(self.point.x, point.y, sample)) for point in (self.point, stay))
        if here < there:
            gradient = self._fields["y"](self._oracle, stay, sample)
            directed = self._row.direction_of("y")(self._directions["y"], self._sampled("y", gradient, stay, sample))
            stepped = add(stay.y, directed.stepped, -self._lower_step)
            there = float(self._oracle.lower_value(self.point.x, stepped, sample))
        if there <= here or math.isnan(here):
            self.point = stay

    def _move(self, group: str, found: dict[str, Gradient], sample: Sample) -> None:
        """Step all variables of a group from the present point."""
        old: Point = self.point
        shared: dict[str, State] = {}
        if "x" in group:
            self._from = old
        for variable in group:
            if variable == "x" and self._search is not None:
                self._search_upper(found["x"], sample)
                continue
            record, directed = self._step(variable, found[variable], old, sample, shared)
            self.taken[variable].append(record)
            if not record.moved:
                continue
            moved = add(getattr(old, variable), directed.stepped, -float(record.step_size))
            self.stepped[variable] = directed.stepped
            self.point = _put(self.point, variable, self._projected(moved) if variable == "x" else moved)
            if group == "y":
                self._lower_step = float(record.step_size)
                if self._row.estimator.needs_path:
                    self.point = self.point._replace(path=(*self.point.path, Visit(old.y, self._lower_step, sample)))
        if "x" in group and self._row.correction != "none" and "y" in group:
            self._correct(old, found["x"].estimate, sample)

    def _step(
        self, variable: str, gradient: Gradient, old: Point, sample: Sample, shared: dict[str, State]
    ) -> tuple[Record, Directed]:
        """Ask direction and step rule of a variable; their states advance unless something is not finite."""
        row, policy = self._row, self._row.step_of(variable)
        directed = row.direction_of(variable)(
            self._directions[variable], self._sampled(variable, gradient, old, sample)
        )
        state = self._rules[variable]
        if row.clock == "iterations" and hasattr(state, "count"):
            state = state._replace(count=self.count)
        trial, rounding, low = None, None, None
        if isinstance(policy, SEARCHES):
            objective, value = gradient.objective, getattr(old, variable)
            assert objective is not None
            trial, rounding = (lambda a: objective(add(value, directed.along, -a))), resolution(value[0])
        if variable == "y" and row.lower_bound is not None:
            low = float(row.lower_bound(self._upper.arrange(old.x), sample.lower))
        slope = dot(directed.gradient, directed.along)
        states = [shared[other] for other in row.couplings.get(variable, "") if other in shared]
        coupled = [s for s in states if isinstance(s, GradientNormState)] or None
        context = Context(gradient.loss, slope, trial, low, coupled, rounding=rounding)
        record, after = policy.propose(state, context)
        outcome = Outcome(int(record.outcome))
        self._tell(variable, outcome)
        shared[variable] = after
        if outcome is not Outcome.non_finite:
            self._rules[variable] = after
            if outcome is not Outcome.zero_gradient:
                self._directions[variable] = directed.state
        return record, directed

    def _search_upper(self, gradient: Gradient, sample: Sample) -> None:
        assert self._search is not None and gradient.estimate is not None
        searched = self._search.go(self.point, gradient.estimate, sample, self._lower_step)
        self.taken["x"].append(searched.record)
        self.stepped["x"] = gradient.total
        self.point = self.point._replace(x=searched.x, y=searched.y)
        self._offered = searched.offered

    def _correct(self, old: Point, estimate: Estimate | None, sample: Sample) -> None:
        """Let y answer to the move of x: y*(x - d) = y*(x) + P C^T d to first order."""
        if not all(record.moved for record in self.taken["x"]):
            return
        estimator: Any = self._row.estimator
        assert estimate is not None
        move = add(old.x, self.point.x, -1.0)
        answer = estimator.respond(self._oracle, old, sample, move, estimate.memory)
        factor = self.last_step("y") if self._row.correction == "bracketed" else 1.0
        if math.isfinite(dot(answer, answer)):
            self.point = self.point._replace(y=add(self.point.y, answer, factor))

    def advance(self, sample: Sample) -> None:
        """Carry over to the next iteration what estimators and multipliers remember."""
        estimate = self.seen["x"].estimate
        assert estimate is not None
        keep: dict[str, Any] = {"path": ()}
        if all(record.outcome != Outcome.non_finite for record in self.taken["x"]):
            keep["memory"] = estimate.memory
            if getattr(getattr(self._row.estimator, "solver", None), "warm_start", False):
                keep["v"] = estimate.v
        if self._row.multiplier is not None:
            keep["multiplier"] = self._row.multiplier.after(self.count, self._oracle, self._from, sample)
        self.point = self.point._replace(**keep)
        self.count += 1
        self._oracle.forget()

    def _sample(self, pair: Pair) -> Sample:
        seed = int(torch.randint(2**62, (), generator=self._generator))
        solver = getattr(self._row.estimator, "solver", None)
        products: tuple[Any, ...] = ()
        if self._fresh and getattr(solver, "resamples", False):
            products = tuple(self._source.draw().lower for _ in range(getattr(solver, "steps", 1)))
        return Sample(pair.upper, pair.lower, seed, pair.upper_id, pair.lower_id, products)

    def _sampled(self, variable: str, gradient: Gradient, point: Point, sample: Sample) -> Sampled:
        full = self._source.full
        everything = None if full is None else sample._replace(upper=full.upper, lower=full.lower, products=())

        def again(there: Point, on: Sample) -> Vector:
            return self._fields[variable](self._oracle, there, on).total

        return Sampled(gradient, point, sample, again, everything, self.count)

    def _projected(self, x: Vector) -> Vector:
        if self._project is None:
            return x
        copies = [t.clone() for t in x]
        with torch.no_grad():
            self._project(copies)
        return tuple(copies)

    def last_step(self, variable: str) -> float:
        """Return the last step size of a variable in this iteration, 0 if it took none."""
        taken = self.taken[variable]
        return float(taken[-1].step_size) if taken else 0.0

    def _tell(self, variable: str, outcome: Outcome) -> None:
        """Warn of what training survives, once for each variable."""
        if outcome not in _TOLD or (variable, outcome) in self._told:
            return
        self._told.add((variable, outcome))
        warn(
            f"methods.run({self._row.name!r}), step of {variable} ({NAMES[variable]}): {outcome.sentence}. "
            f"{_TOLD[outcome]} (said once)"
        )

    def _warn_cap(self, group: str) -> None:
        if "cap" in self._told:
            return
        self._told.add("cap")
        warn(
            f"methods.run({self._row.name!r}): {self._row.repeats(group)} steps of {group} did not bring its squared "
            f"gradient norm to tolerance={self._tolerance:.3g}; raise lower_steps= or auxiliary_steps=, or the "
            "tolerance (said once)"
        )

    # ------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Return all that the next iterations depend on: tensors, numbers and strings in dicts, lists and tuples."""
        counts = self._oracle.evaluations
        return {
            "count": self.count,
            "point": self.point._asdict(),
            "first": self._first,
            "rules": {name: state._asdict() for name, state in self._rules.items()},
            "directions": dict(self._directions),
            "offered": self._offered,
            "lower_step": self._lower_step,
            "generator": self._generator.get_state(),
            "batches": self._source.state_dict(),
            "evaluations": {"upper": dict(vars(counts.upper)), "lower": dict(vars(counts.lower))},
            "search": None if self._search is None else self._search.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state.

        Raises:
            OptionError: It is that of variables of other shapes.
        """
        point = Point(**state["point"])
        for name, mine in (("x", self.point.x), ("y", self.point.y)):
            shapes = [tuple(t.shape) for t in getattr(point, name)]
            if shapes != [tuple(t.shape) for t in mine]:
                raise OptionError(
                    f"methods.run(resume=...): {name} was saved with shapes {shapes}, and now has "
                    f"{[tuple(t.shape) for t in mine]}"
                )
        self.point, self._first, self._offered = point, state["first"], state["offered"]
        self.count, self._lower_step = state["count"], state["lower_step"]
        self._rules = {name: type(rule)(**state["rules"][name]) for name, rule in self._rules.items()}
        self._directions = dict(state["directions"])
        self._generator.set_state(state["generator"])
        self._source.load_state_dict(state["batches"])
        for name, counts in state["evaluations"].items():
            vars(getattr(self._oracle.evaluations, name)).update(counts)
        if self._search is not None:
            self._search.load_state_dict(state["search"])
        self._oracle.forget()


def _put(point: Point, variable: str, value: Vector) -> Point:
    changed: dict[str, Any] = {variable: value}
    return point._replace(**changed)
