"""The one loop body behind all rows: what an iteration does with the variables of a row."""

from __future__ import annotations

import math

import torch

from ..evaluation.vectors import Vector, add, dot
from ..hypergradient.estimate import Estimate, Point, Responding, Visit
from ..hypergradient.oracle import Oracle
from ..hypergradient.sample import Batch, Sample
from ..optim.projection import as_projection
from ..optim.slope_rounding import most_ratio
from ..policies import Context, GradientNormState, Outcome, Record, State
from ..policies.armijo import polyak_ratio
from ..policies.bounded import reach
from ..policies.scalars import resolution
from .batches import Pair, Source
from .checks import POLYAK, SEARCHES
from .directions import Directed
from .notices import Notices
from .problem import Variable
from .row import Row
from .search import UpperSearch
from .state import PlainData, RunState, load_counts, saved_counts
from .stepper import Stepper, Steppers

__all__ = ["Driver"]


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
        state: Where the run is; its steppers have what this iteration did.
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
        self.state = RunState(
            point=point._replace(x=self._projected(point.x)),
            first=point.y,
            steppers={name: Stepper(row, name) for name in row.variables},
            generator=torch.Generator().manual_seed(seed),
        )
        self._notices = Notices(row.name)
        self._search = UpperSearch(row, oracle, self.state.point) if isinstance(row.upper_step, SEARCHES) else None

    def iterate(self) -> Sample:
        """Step all groups of the row once, and return the last sample; `advance` then ends the iteration."""
        for stepper in self._steppers.values():
            stepper.begin()
        sample = self._sample(self._source.draw())
        for group in self._row.groups:
            sample = self._group(group, sample)
        return sample

    @property
    def _steppers(self) -> Steppers:
        return self.state.steppers

    def _group(self, group: str, sample: Sample) -> Sample:
        """Step the variables of a group, and return the last sample."""
        row, state, steppers = self._row, self.state, [self._steppers[name] for name in group]
        if group == "y":
            state.point = state.point._replace(path=())
        for name in group:
            self._begin(name)
        repeats, ends = row.repeats(group), bool(row.until) and set(group) <= set(row.until)
        for t in range(repeats + ends):
            if self._fresh and group in ("y", "z") and t > 0:
                sample = self._sample(self._source.draw())._replace(upper=sample.upper, upper_id=sample.upper_id)
            if "x" in group and row.multiplier is not None:
                multiplier = row.multiplier.before(self._oracle, state.point, sample)
                state.point = state.point._replace(multiplier=multiplier)
            # x first: its graph then also gives the gradient of y.
            for stepper in reversed(steppers):
                stepper.look(self._oracle, state.point, sample)
            if ends and all(stepper.within(self._tolerance) for stepper in steppers):
                break
            if t == repeats:
                self._notices.cap(group, repeats, self._tolerance)
                break
            self._move(group, sample)
        return sample

    def _begin(self, name: str) -> None:
        """Put a variable where its loop starts."""
        row, state = self._row, self.state
        if name in row.start:
            there = row.start[name]
            state.point = _put(state.point, name, state.first if there == "first" else getattr(state.point, there))
        if name in row.cold:
            self._steppers[name].restart()

    def _move(self, group: str, sample: Sample) -> None:
        """Step all variables of a group from the present point."""
        state, old = self.state, self.state.point
        shared: dict[str, State] = {}
        if "x" in group:
            self._from = old
        for name in group:
            stepper = self._steppers[name]
            if name == "x" and self._search is not None:
                self._search_upper(self._search, stepper, sample)
                continue
            record, directed = self._step(stepper, old, sample, shared)
            stepper.taken.append(record)
            if not record.moved:
                continue
            moved = add(getattr(old, name), directed.stepped, -float(record.step_size))
            stepper.stepped = directed.stepped
            state.point = _put(state.point, name, self._projected(moved) if name == "x" else moved)
            if group == "y":
                state.lower_step = float(record.step_size)
                if self._row.estimator.needs_path:
                    visit = Visit(old.y, state.lower_step, sample)
                    state.point = state.point._replace(path=(*state.point.path, visit))
        if "x" in group and "y" in group and self._row.correction != "none":
            self._correct(old, self._estimate, sample)

    def _step(self, stepper: Stepper, old: Point, sample: Sample, shared: dict[str, State]) -> tuple[Record, Directed]:
        """Ask direction and step rule of a variable; their states advance unless something is not finite."""
        row, policy, gradient = self._row, stepper.policy, stepper.seen
        assert gradient is not None
        directed = stepper.directed(self._oracle, gradient, old, sample, self._full(sample), self.state.count)
        rule = stepper.rule
        if row.clock == "iterations" and hasattr(rule, "count"):
            rule = rule._replace(count=self.state.count)
        trial, rounding, low = None, None, None
        if isinstance(policy, SEARCHES):
            objective, value = gradient.objective, getattr(old, stepper.name)
            assert objective is not None
            trial, rounding = (lambda a: objective(add(value, directed.along, -a))), resolution(value[0])
        if stepper.name == "y" and row.lower_bound is not None:
            low = float(row.lower_bound(self._upper.arrange(old.x), sample.lower))
        slope = dot(directed.gradient, directed.along)
        states = [shared[other] for other in row.couplings.get(stepper.name, "") if other in shared]
        coupled = [s for s in states if isinstance(s, GradientNormState)] or None
        cap = self._reach(gradient.loss, slope, directed, old, sample) if stepper.name == "x" else None
        most = most_ratio(gradient.loss, slope, getattr(old, stepper.name), directed.along)
        context = Context(gradient.loss, slope, trial, low, coupled, cap=cap, rounding=rounding, most_ratio=most)
        record, after = policy.propose(rule, context)
        outcome = Outcome(int(record.outcome))
        self._notices.outcome(stepper.name, outcome)
        shared[stepper.name] = after
        if outcome is not Outcome.non_finite:
            stepper.rule = after
            if outcome is not Outcome.zero_gradient:
                stepper.past = directed.state
        return record, directed

    def _reach(self, loss: float, slope: float, directed: Directed, old: Point, sample: Sample) -> float | None:
        """Return how far the lower gradient follows x along a direction, where a Polyak rule seeks a first bound."""
        stepper = self._steppers["x"]
        policy = stepper.policy
        if not isinstance(policy, POLYAK) or policy.bound is not None or float(stepper.rule.found) > 0.0:
            return None
        before = self._oracle.lower_gradients(old.x, old.y, sample).lower

        def change(step: float) -> float:
            there = self._oracle.lower_gradients(add(old.x, directed.along, -step), old.y, sample).lower
            moved = add(there, before, -1.0)
            return math.sqrt(dot(moved, moved))

        most = most_ratio(loss, slope, old.x, directed.along)
        return reach(change, float(polyak_ratio(loss, slope, policy.lower_bound, 1.0, most)))

    def _search_upper(self, search: UpperSearch, stepper: Stepper, sample: Sample) -> None:
        state, gradient = self.state, stepper.seen
        assert gradient is not None
        searched = search.go(state.point, self._estimate, sample, state.lower_step)
        stepper.taken.append(searched.record)
        stepper.stepped = gradient.total
        state.point = state.point._replace(x=searched.x, y=searched.y)

    @property
    def _estimate(self) -> Estimate:
        """The last estimate of the hypergradient."""
        seen = self._steppers["x"].seen
        assert seen is not None and seen.estimate is not None
        return seen.estimate

    def _correct(self, old: Point, estimate: Estimate, sample: Sample) -> None:
        """Let y answer to the move of x: y*(x - d) = y*(x) + P C^T d to first order."""
        if not all(record.moved for record in self._steppers["x"].taken):
            return
        estimator, state = self._row.estimator, self.state
        assert isinstance(estimator, Responding)
        move = add(old.x, state.point.x, -1.0)
        answer = estimator.respond(self._oracle, old, sample, move, estimate.memory)
        factor = self._steppers["y"].last_step if self._row.correction == "bracketed" else 1.0
        if math.isfinite(dot(answer, answer)):
            state.point = state.point._replace(y=add(state.point.y, answer, factor))

    def advance(self, sample: Sample) -> None:
        """Carry over to the next iteration what estimators and multipliers remember."""
        state, solver, multiplier = self.state, self._row.inverse, self._row.multiplier
        estimate, point = self._estimate, state.point._replace(path=())
        if all(record.outcome != Outcome.non_finite for record in self._steppers["x"].taken):
            point = point._replace(memory=estimate.memory)
            if solver is not None and solver.warm_start:
                point = point._replace(v=estimate.v or ())
        if multiplier is not None:
            point = point._replace(multiplier=multiplier.after(state.count, self._oracle, self._from, sample))
        state.point = point
        state.count += 1
        self._oracle.forget()

    def _sample(self, pair: Pair) -> Sample:
        seed = int(torch.randint(2**62, (), generator=self.state.generator))
        solver = self._row.inverse
        products: tuple[Batch, ...] = ()
        if self._fresh and solver is not None and solver.resamples:
            products = tuple(self._source.draw().lower for _ in range(getattr(solver, "steps", 1)))
        return Sample(pair.upper, pair.lower, seed, pair.upper_id, pair.lower_id, products)

    def _full(self, sample: Sample) -> Sample | None:
        """Return the sample of all data, None if it is not known."""
        full = self._source.full
        return None if full is None else sample._replace(upper=full.upper, lower=full.lower, products=())

    def _projected(self, x: Vector) -> Vector:
        if self._project is None:
            return x
        copies = [t.clone() for t in x]
        with torch.no_grad():
            self._project(copies)
        return tuple(copies)

    def state_dict(self) -> PlainData:
        """Return all that the next iterations depend on: tensors, numbers and strings in dicts, lists and tuples."""
        return {
            **self.state.saved(),
            "batches": self._source.state_dict(),
            "evaluations": saved_counts(self._oracle.evaluations),
            "search": None if self._search is None else self._search.state_dict(),
        }

    def load_state_dict(self, saved: PlainData) -> None:
        """Go back, or on, to a state.

        Raises:
            OptionError: It is that of variables of other shapes.
        """
        self.state.load(saved)
        self._source.load_state_dict(saved["batches"])
        load_counts(self._oracle.evaluations, saved["evaluations"])
        if self._search is not None:
            self._search.load_state_dict(saved["search"])
        self._oracle.forget()


def _put(point: Point, variable: str, value: Vector) -> Point:
    """Return the point with another value of a variable."""
    return Point(**{**point._asdict(), variable: value})
