"""A run: a row on a problem as a stream of records, with early stop, progress, saving and resuming."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator

from ..errors import NonFiniteError, OptionError
from ..evaluation.counts import Evaluations
from ..evaluation.vectors import Vector, zeros_like
from ..hypergradient.estimate import Point
from ..hypergradient.trees import Tree, flatten
from ..policies import Outcome, validation
from .batches import Source
from .checks import check
from .driver import Driver
from .problem import BilevelProblem, Variable
from .record import IterationRecord, Losses, Steps, copied, spent
from .row import Row
from .state import PlainData

__all__ = ["Run"]


class Run(Iterator[IterationRecord]):
    """A run of a row on a problem: an iterator with one record for each iteration.

    To resume bitwise, save `state_dict()` between two records, and call ``run(..., resume=state)`` with the same
    arguments. The state contains tensors, numbers and strings only.

    Args:
        row: The row, its options replaced.
        problem: The problem.
        x: Initial x.
        y: Initial y.
        iterations: K. A resumed run ends at the same K.
        batches: See `Source`.
        fresh_batches: Whether to draw a new pair for the lower batch of each lower step, and of each product of an
            estimator that resamples, in place of one pair for each iteration.
        v: Initial v; zero by default.
        z: Initial z; y by default.
        seed: Seed of all random numbers inside losses and estimators.
        stop: record -> whether to end after it.
        budget: The run ends after the iteration whose `IterationRecord.total_cost` reaches it.
        progress: True shows a line of progress on stderr; a callable receives each record.
        max_skips: `NonFiniteError` is raised after so many iterations in a row with a non-finite loss or gradient.
        resume: A `state_dict()`.

    Raises:
        OptionError: An option is out of range, or the row's parts do not go together.
        TensorError: A variable holds no tensor that can be stepped.

    Attributes:
        row: The composition.

    >>> import torch
    >>> from adaptive_bilevel import methods
    >>> problem = methods.BilevelProblem(lambda x, y, _: (y - 1).square().sum(), lambda x, y, _: (y - x).square().sum())
    >>> given = {"iterations": 6, "upper_step": 0.5, "lower_step": 0.5}
    >>> run = methods.run("ba", problem, torch.tensor([4.0]), torch.tensor([0.0]), **given)
    >>> record, state = next(run), run.state_dict()
    >>> resumed = methods.run("ba", problem, torch.tensor([4.0]), torch.tensor([0.0]), **given, resume=state)
    >>> len(list(run)), len(list(resumed))
    (5, 5)
    """

    def __init__(
        self,
        row: Row,
        problem: BilevelProblem,
        x: Tree,
        y: Tree,
        *,
        iterations: int,
        batches: Iterable[object] | None = None,
        fresh_batches: bool = False,
        v: Tree | None = None,
        z: Tree | None = None,
        seed: int = 0,
        stop: Callable[[IterationRecord], bool] | None = None,
        budget: float | None = None,
        progress: bool | Callable[[IterationRecord], object] = False,
        max_skips: int = 100,
        resume: PlainData | None = None,
    ) -> None:
        check(row)
        if not isinstance(problem, BilevelProblem):
            raise OptionError(
                f"methods.run(problem={type(problem).__name__}): pass a BilevelProblem(upper_loss, lower_loss)"
            )
        validation.count("methods.run", "iterations", iterations)
        validation.count("methods.run", "max_skips", max_skips)
        validation.count("methods.run", "seed", seed, least=0)
        validation.positive("methods.run", "budget", budget, optional=True)
        self.row, self._iterations = row, iterations
        self._stop, self._budget, self._max_skips = stop, budget, max_skips
        self._show = (lambda record: _line(record, iterations)) if progress is True else progress or None
        self._upper, self._lower = Variable(x, "x"), Variable(y, "y")
        self._oracle = problem.oracle(self._upper, self._lower)
        start = self._lower.tensors
        point = Point(
            self._upper.tensors,
            start,
            v=_like("v", v, start) if "v" in row.variables else (),
            z=(start if z is None else _like("z", z, start)) if "z" in row.variables else (),
            multiplier=0.0 if row.multiplier is None else row.multiplier.initial,
        )
        tolerance = 1.0 / iterations if row.tolerance is None else row.tolerance
        self._driver = Driver(
            row,
            self._oracle,
            self._upper,
            Source(batches),
            point,
            fresh=fresh_batches,
            seed=seed,
            tolerance=tolerance,
        )
        self._skips, self._ended = 0, False
        if resume is not None:
            self.load_state_dict(resume)

    def __next__(self) -> IterationRecord:
        """Run one iteration; if anything raises, the run is where it was before."""
        driver = self._driver
        if self._ended or driver.state.count >= self._iterations:
            raise StopIteration
        state, before = driver.state_dict(), copied(self._oracle.evaluations)
        try:
            sample = driver.iterate()
            record = self._record(before)
            driver.advance(sample)
        except BaseException:
            driver.load_state_dict(state)
            raise
        self._ended = self._budget is not None and record.total_cost >= self._budget
        if self._stop is not None and self._stop(record):
            self._ended = True
        if self._show is not None:
            self._show(record)
        self._refuse_skips(record)
        return record

    def _record(self, before: Evaluations) -> IterationRecord:
        x, y, state = self._upper, self._lower, self._driver.state
        point, steppers = state.point, state.steppers
        upper, lower = steppers["x"].seen, steppers["y"].seen
        assert upper is not None and upper.estimate is not None
        now = copied(self._oracle.evaluations)
        return IterationRecord(
            iteration=state.count,
            x=x.tree(point.x),
            y=y.tree(point.y),
            losses=Losses(upper.loss, math.nan if lower is None else lower.loss),
            steps=Steps(steppers["x"].last_step, steppers["y"].last_step),
            evaluations=spent(now, before),
            total=now,
            hypergradient=x.tree(upper.estimate.hypergradient),
            auxiliary={name: y.tree(getattr(point, name)) for name in self.row.variables if name in "vz"},
            multiplier=point.multiplier,
            directions={
                name: (x if name == "x" else y).tree(stepper.stepped)
                for name, stepper in steppers.items()
                if stepper.stepped is not None
            },
            records={name: tuple(stepper.taken) for name, stepper in steppers.items()},
        )

    def _refuse_skips(self, record: IterationRecord) -> None:
        outcomes = [int(step.outcome) for taken in record.records.values() for step in taken]
        self._skips = self._skips + 1 if int(Outcome.non_finite) in outcomes else 0
        if self._skips >= self._max_skips:
            raise NonFiniteError(
                f"methods.run({self.row.name!r}): {self._skips} iterations in a row met a loss or gradient that is not "
                f"finite; what is not finite does not move. Take smaller steps or look at the data, or raise "
                f"max_skips={self._max_skips}"
            )

    def state_dict(self) -> PlainData:
        """Return the state of the run: tensors, numbers and strings in dicts, lists and tuples."""
        return {"row": self.row.name, "skips": self._skips, "ended": self._ended, **self._driver.state_dict()}

    def load_state_dict(self, state: PlainData) -> None:
        """Load the state of a run with the same arguments.

        Raises:
            OptionError: The state belongs to another row, or to variables of other shapes.
        """
        if state.get("row") != self.row.name:
            raise OptionError(f"methods.run({self.row.name!r}, resume=...): the state is that of {state.get('row')!r}")
        self._driver.load_state_dict(state)
        self._skips, self._ended = state["skips"], state["ended"]


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
