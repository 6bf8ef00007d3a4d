"""The one loop behind all rows."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import AdaptiveBilevelWarning, NonFiniteError, OptionError
from ..hypergradient._tensors import Tree, flatten
from ..hypergradient._vectors import Vector, add, inner, zeros_like
from ..hypergradient.estimate import Estimate, Point, Visit
from ..hypergradient.oracle import Sample
from ..optim.projection import as_projection
from ..policies import GradientNormState, Outcome, Record, _options
from ..policies._scalars import resolution
from .batches import Pair, Source
from .checks import SEARCHES, check
from .directions import Directed, Sampled
from .fields import Gradient
from .problem import BilevelProblem, Variable
from .record import IterationRecord, Losses, Steps, copied, spent
from .row import NAMES, Row
from .search import UpperSearch

__all__ = ["Run"]


_TOLD = {
    Outcome.search_failed: "Its next search starts as the last one did; often the loss is at its rounding floor.",
    Outcome.below_lower_bound: "Give the policy a lower_bound= that the loss never falls below.",
    Outcome.no_descent: "Its direction does not descend on the sampled loss.",
}


class Run(Iterator[IterationRecord]):
    """A row on a problem: an iterator of records, one per iteration.

    Between two records, `state_dict()` is all that is needed to go on bitwise: ``run(..., resume=state)`` with the same
    arguments. It holds tensors, numbers and strings only.

    Args:
        row: The row, its options replaced.
        problem: The problem.
        x: Initial x.
        y: Initial y.
        iterations: K; a resumed run ends at the same K.
        batches: See `Source`.
        fresh_batches: Draw a new pair for the lower batch of each lower step (and of each product of an estimator that
            resamples), in the place of one pair per iteration.
        v: Initial v; zero by default.
        z: Initial z; y by default.
        seed: Seed of all random numbers inside losses and estimators.
        stop: record -> whether to end after it.
        progress: True shows one line of progress on stderr; a callable gets each record.
        max_skips: So many iterations in a row with a loss or gradient that is not finite raise `NonFiniteError`.
        resume: A `state_dict()`.

    Raises:
        OptionError: An option is out of range, or the row's parts do not go together.
        TensorError: A variable holds no tensor that can be stepped.

    Attributes:
        row: The composition.
    """

    def __init__(
        self,
        row: Row,
        problem: BilevelProblem,
        x: Tree,
        y: Tree,
        *,
        iterations: int,
        batches: Any = None,
        fresh_batches: bool = False,
        v: Tree | None = None,
        z: Tree | None = None,
        seed: int = 0,
        stop: Callable[[IterationRecord], bool] | None = None,
        progress: bool | Callable[[IterationRecord], Any] = False,
        max_skips: int = 100,
        resume: dict[str, Any] | None = None,
    ) -> None:
        check(row)
        if not isinstance(problem, BilevelProblem):
            raise OptionError(
                f"methods.run(problem={type(problem).__name__}): pass a BilevelProblem(upper_loss, lower_loss)"
            )
        _options.count("methods.run", "iterations", iterations)
        _options.count("methods.run", "max_skips", max_skips)
        _options.count("methods.run", "seed", seed, least=0)
        self.row, self._iterations, self._fresh = row, iterations, fresh_batches
        self._upper, self._lower = Variable(x, "x"), Variable(y, "y")
        self._oracle = problem.oracle(self._upper, self._lower)
        self._source = Source(batches)
        self._stop, self._max_skips = stop, max_skips
        self._show = (lambda record: _line(record, iterations)) if progress is True else progress or None
        self._project = as_projection("methods.run", row.project)
        self._tolerance = 1.0 / iterations if row.tolerance is None else row.tolerance
        start = self._lower.tensors
        self._first = start
        self._point = Point(
            self._projected(self._upper.tensors),
            start,
            v=_like("v", v, start) if "v" in row.variables else (),
            z=(start if z is None else _like("z", z, start)) if "z" in row.variables else (),
            multiplier=0.0 if row.multiplier is None else row.multiplier.initial,
        )
        self._fields = {variable: row.field_of(variable) for variable in row.variables}
        self._rules = {variable: row.step_of(variable).init() for variable in row.variables}
        self._directions: dict[str, dict[str, Any]] = {variable: {} for variable in row.variables}
        self._offered: Vector | None = None
        self._lower_step = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._count, self._skips, self._ended = 0, 0, False
        self._told: set[Any] = set()
        searches = isinstance(row.upper_step, SEARCHES)
        # Where y moves together with x, there is no next lower step to take a prediction back.
        carry = row.carry if "x" in row.groups else False
        self._search = UpperSearch(row, self._oracle, self._point, carry=carry) if searches else None
        if resume is not None:
            self.load_state_dict(resume)

    # ------------------------------------------------------------------------------------------ iteration

    def __next__(self) -> IterationRecord:
        """Run one iteration."""
        if self._ended or self._count >= self._iterations:
            raise StopIteration
        before = copied(self._oracle.evaluations)
        self._taken: dict[str, list[Record]] = {variable: [] for variable in self.row.variables}
        self._seen: dict[str, Gradient] = {}
        self._stepped: dict[str, Vector] = {}
        pair = self._source.draw()
        sample = self._sample(pair)
        for group in self.row.groups:
            sample = self._group(group, sample)
        record = self._record(before)
        self._advance(sample)
        self._oracle.forget()
        self._ended = self._stop is not None and bool(self._stop(record))
        if self._show is not None:
            self._show(record)
        self._refuse_skips()
        return record

    def _group(self, group: str, sample: Sample) -> Sample:
        """Step the variables of a group, and return the last sample."""
        row = self.row
        if group == "y":
            self._point = self._point._replace(path=())
        for variable in group:
            if variable in row.start:
                begin = self._first if row.start[variable] == "first" else getattr(self._point, row.start[variable])
                self._point = _put(self._point, variable, begin)
            if variable in row.cold:
                self._rules[variable] = row.step_of(variable).init()
        repeats, ends = row.repeats(group), bool(row.until) and set(group) <= set(row.until)
        for t in range(repeats + ends):
            if self._fresh and group in ("y", "z") and t > 0:
                sample = self._sample(self._source.draw())._replace(upper=sample.upper, upper_id=sample.upper_id)
            if "x" in group and row.multiplier is not None:
                self._point = self._point._replace(multiplier=row.multiplier.before(self._oracle, self._point, sample))
            if group == "y" and self._offered is not None:
                self._choose(sample)
            # x first: its graph then also gives the gradient of y.
            found = {v: self._fields[v](self._oracle, self._point, sample) for v in reversed(group)}
            self._seen.update(found)
            if ends and all(inner(g.total, g.total) <= self._tolerance for g in found.values()):
                break
            if t == repeats:
                self._warn_cap(group)
                break
            self._move(group, found, sample)
        return sample

    def _choose(self, sample: Sample) -> None:
        """Start from where the upper search carried y to, or from where y was: whichever has the smaller loss."""
        assert self._offered is not None
        before = float(self._oracle.lower_value(self._point.x, self._offered, sample))
        here = float(self._oracle.lower_gradients(self._point.x, self._point.y, sample).loss)
        if before < here or (math.isnan(here) and not math.isnan(before)):
            self._point = self._point._replace(y=self._offered)
        self._offered = None

    def _move(self, group: str, found: dict[str, Gradient], sample: Sample) -> None:
        """Step all variables of a group from the present point."""
        old: Point = self._point
        shared: dict[str, Any] = {}
        if "x" in group:
            self._from = old
        for variable in group:
            if variable == "x" and self._search is not None:
                self._search_upper(found["x"], sample)
                continue
            record, directed = self._step(variable, found[variable], old, sample, shared)
            self._taken[variable].append(record)
            if not record.moved:
                continue
            moved = add(getattr(old, variable), directed.stepped, -float(record.step_size))
            self._stepped[variable] = directed.stepped
            self._point = _put(self._point, variable, self._projected(moved) if variable == "x" else moved)
            if group == "y":
                self._lower_step = float(record.step_size)
                if self.row.estimator.needs_path:
                    self._point = self._point._replace(path=(*self._point.path, Visit(old.y, self._lower_step, sample)))
        if "x" in group and self.row.correction != "none" and "y" in group:
            self._correct(old, found["x"].estimate, sample)

    def _step(
        self, variable: str, gradient: Gradient, old: Point, sample: Sample, shared: dict[str, Any]
    ) -> tuple[Record, Directed]:
        """Ask direction and step rule of a variable; their states advance unless something is not finite."""
        row, policy = self.row, self.row.step_of(variable)
        directed = row.direction_of(variable)(
            self._directions[variable], self._sampled(variable, gradient, old, sample)
        )
        state = self._rules[variable]
        if row.clock == "iterations" and hasattr(state, "count"):
            state = state._replace(count=self._count)
        extra: dict[str, Any] = {}
        if isinstance(policy, SEARCHES):
            objective, value = gradient.objective, getattr(old, variable)
            assert objective is not None
            extra["trial"] = lambda a: objective(add(value, directed.along, -a))
            extra["rounding"] = resolution(value[0])
        if variable == "y" and row.lower_bound is not None:
            extra["lower_bound"] = float(row.lower_bound(self._upper.arrange(old.x), sample.lower))
        slope = inner(directed.gradient, directed.along)
        states = [shared[other] for other in row.couplings.get(variable, "") if other in shared]
        coupled = [s for s in states if isinstance(s, GradientNormState)] or None
        record, after = policy.step(state, loss=gradient.loss, slope=slope, shared=coupled, **extra)
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
        searched = self._search.go(self._point, gradient.estimate, sample, self._lower_step)
        self._taken["x"].append(searched.record)
        self._stepped["x"] = gradient.total
        self._point = self._point._replace(x=searched.x, y=searched.y)
        self._offered = searched.offered

    def _correct(self, old: Point, estimate: Estimate | None, sample: Sample) -> None:
        """Let y answer to the move of x: y*(x - d) = y*(x) + P C^T d to first order."""
        if not all(record.moved for record in self._taken["x"]):
            return
        estimator: Any = self.row.estimator
        assert estimate is not None
        move = add(old.x, self._point.x, -1.0)
        answer = estimator.respond(self._oracle, old, sample, move, estimate.memory)
        factor = self._last_step("y") if self.row.correction == "bracketed" else 1.0
        if math.isfinite(inner(answer, answer)):
            self._point = self._point._replace(y=add(self._point.y, answer, factor))

    def _advance(self, sample: Sample) -> None:
        """Carry over to the next iteration what estimators and multipliers remember."""
        estimate = self._seen["x"].estimate
        assert estimate is not None
        keep: dict[str, Any] = {"path": ()}
        if all(record.outcome != Outcome.non_finite for record in self._taken["x"]):
            keep["memory"] = estimate.memory
            if getattr(getattr(self.row.estimator, "solver", None), "warm_start", False):
                keep["v"] = estimate.v
        if self.row.multiplier is not None:
            keep["multiplier"] = self.row.multiplier.after(self._count, self._oracle, self._from, sample)
        self._point = self._point._replace(**keep)
        self._count += 1

    # ------------------------------------------------------------------------------------------ parts

    def _sample(self, pair: Pair) -> Sample:
        seed = int(torch.randint(2**62, (), generator=self._generator))
        solver = getattr(self.row.estimator, "solver", None)
        products: tuple[Any, ...] = ()
        if self._fresh and getattr(solver, "resamples", False):
            products = tuple(self._source.draw().lower for _ in range(getattr(solver, "steps", 1)))
        return Sample(pair.upper, pair.lower, seed, pair.upper_id, pair.lower_id, products)

    def _sampled(self, variable: str, gradient: Gradient, point: Point, sample: Sample) -> Sampled:
        full = self._source.full
        everything = None if full is None else sample._replace(upper=full.upper, lower=full.lower, products=())

        def again(there: Point, on: Sample) -> Vector:
            return self._fields[variable](self._oracle, there, on).total

        return Sampled(gradient, point, sample, again, everything, self._count)

    def _projected(self, x: Vector) -> Vector:
        if self._project is None:
            return x
        copies = [t.clone() for t in x]
        with torch.no_grad():
            self._project(copies)
        return tuple(copies)

    def _last_step(self, variable: str) -> float:
        taken = self._taken[variable]
        return float(taken[-1].step_size) if taken else 0.0

    def _record(self, before: Any) -> IterationRecord:
        x, y = self._upper, self._lower
        seen, point = self._seen, self._point
        estimate = seen["x"].estimate
        assert estimate is not None
        now = copied(self._oracle.evaluations)
        lower = seen["y"].loss if "y" in seen else math.nan
        return IterationRecord(
            iteration=self._count,
            x=x.tree(point.x),
            y=y.tree(point.y),
            losses=Losses(float(estimate.loss), lower),
            steps=Steps(self._last_step("x"), self._last_step("y")),
            evaluations=spent(now, before),
            total=now,
            hypergradient=x.tree(estimate.hypergradient),
            auxiliary={name: y.tree(getattr(point, name)) for name in self.row.variables if name in "vz"},
            multiplier=point.multiplier,
            directions={name: (x if name == "x" else y).tree(d) for name, d in self._stepped.items()},
            records={name: tuple(taken) for name, taken in self._taken.items()},
        )

    def _refuse_skips(self) -> None:
        outcomes = [int(record.outcome) for taken in self._taken.values() for record in taken]
        self._skips = self._skips + 1 if int(Outcome.non_finite) in outcomes else 0
        if self._skips >= self._max_skips:
            raise NonFiniteError(
                f"methods.run({self.row.name!r}): {self._skips} iterations in a row met a loss or gradient that is not "
                f"finite; what is not finite does not move. Take smaller steps or look at the data, or raise "
                f"max_skips={self._max_skips}"
            )

    def _tell(self, variable: str, outcome: Outcome) -> None:
        """Warn of what training survives, once for each variable."""
        if outcome not in _TOLD or (variable, outcome) in self._told:
            return
        self._told.add((variable, outcome))
        warnings.warn(
            f"methods.run({self.row.name!r}), step of {variable} ({NAMES[variable]}): {outcome.sentence}. "
            f"{_TOLD[outcome]} (said once)",
            AdaptiveBilevelWarning,
            stacklevel=7,
        )

    def _warn_cap(self, group: str) -> None:
        if "cap" in self._told:
            return
        self._told.add("cap")
        warnings.warn(
            f"methods.run({self.row.name!r}): {self.row.repeats(group)} steps of {group} did not bring its squared "
            f"gradient norm to tolerance={self._tolerance:.3g}; raise lower_steps= or auxiliary_steps=, or the "
            "tolerance (said once)",
            AdaptiveBilevelWarning,
            stacklevel=5,
        )

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next iterations depend on: tensors, numbers and strings in dicts, lists and tuples."""
        counts = self._oracle.evaluations
        return {
            "row": self.row.name,
            "count": self._count,
            "skips": self._skips,
            "ended": self._ended,
            "point": self._point._asdict(),
            "first": self._first,
            "rules": {name: state._asdict() for name, state in self._rules.items()},
            "directions": self._directions,
            "offered": self._offered,
            "lower_step": self._lower_step,
            "generator": self._generator.get_state(),
            "batches": self._source.state_dict(),
            "evaluations": {"upper": dict(vars(counts.upper)), "lower": dict(vars(counts.lower))},
            "search": None if self._search is None else self._search.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run of the same arguments was saved.

        Raises:
            OptionError: The state is that of another row, or of variables of other shapes.
        """
        if state.get("row") != self.row.name:
            raise OptionError(f"methods.run({self.row.name!r}, resume=...): the state is that of {state.get('row')!r}")
        point = Point(**state["point"])
        for name, mine in (("x", self._point.x), ("y", self._point.y)):
            shapes = [tuple(t.shape) for t in getattr(point, name)]
            if shapes != [tuple(t.shape) for t in mine]:
                raise OptionError(
                    f"methods.run(resume=...): {name} was saved with shapes {shapes}, and now has "
                    f"{[tuple(t.shape) for t in mine]}"
                )
        self._point, self._first, self._offered = point, state["first"], state["offered"]
        self._count, self._skips, self._ended = state["count"], state["skips"], state["ended"]
        self._rules = {name: type(rule)(**state["rules"][name]) for name, rule in self._rules.items()}
        self._directions, self._lower_step = state["directions"], state["lower_step"]
        self._generator.set_state(state["generator"])
        self._source.load_state_dict(state["batches"])
        for name, counts in state["evaluations"].items():
            vars(getattr(self._oracle.evaluations, name)).update(counts)
        if self._search is not None:
            self._search.load_state_dict(state["search"])


def _put(point: Point, variable: str, value: Vector) -> Point:
    changed: dict[str, Any] = {variable: value}
    return point._replace(**changed)


def _like(name: str, given: Tree | None, y: Vector) -> Vector:
    if given is None:
        return zeros_like(y)
    tensors = tuple(t.detach().clone() for t in flatten(given, name)[0])
    if [t.shape for t in tensors] != [t.shape for t in y]:
        raise OptionError(f"methods.run({name}=...): shapes {[tuple(t.shape) for t in tensors]} are not those of y")
    return tensors


def _line(record: IterationRecord, iterations: int) -> None:
    end = "\n" if record.iteration + 1 == iterations else ""
    print(f"\r{record} of {iterations}", end=end, file=sys.stderr, flush=True)
