"""Random bilevel problems, first trials over ten decades and none: what diverges, fails or stands still, and why.

``python examples/benchmarks/fuzz.py --problems 1000 --output examples/benchmarks/results/fuzz.json``

Lower problems are g = <y, H y>/2 - <y, B x + b> (convex up to a condition of 1e8, singular, or with a quartic in the
place of the quadratic: non-convex), upper losses a squared distance (also saturating: nearly flat far out; also with
samples: noisy) or a sum of absolute values (non-smooth). f, g, x and y are each multiplied by a number in 1e-12..1e12,
T is in 1..20, and half of the runs have no number, the others first trials at both levels over ten decades around a
natural length. y*(x) is known, so that F is. ``--solver cg`` takes `CG` for hypergradient and response: searches are
then made rarely (`adaptive_bilevel.bilevel.pace`).

* Diverged: after any iteration, F is not finite, or both F and f at the present y are above 10 x their start (f without
  noise, at its first y).
* Away: F is above 10 x its start, but f is not. What every method sees is f and its gradient at the present y. Where
  that is far from y*(x) (conditions of 1e4 and above, by T first-order steps), f falls and F rises. So each such run is
  repeated with ten fixed steps, by decades: "fixed" is the highest F of the one that lowers f most.
* Failed searches at the upper level are explained where no step could have shown a decrease: what is promised there is
  lost in rounding, F is at the best value known, or f has a kink closer than the step.
* Behind: one of ten fixed steps (by decades) gains 10 % of F where ours gains less than 1 %, with the same lower rule,
  T and hypergradient. They are run only where gradient descent with the exact hypergradient gains as much.
* A stall: such a run gains less than 1 % of f at the present y, too. Where f falls and F does not, the loop does not
  stand still: its lower level is far from solved (conditions of 1e4 and above, by first-order steps). With noise, where
  the f of single samples tell nothing, F decides alone. The cause is what the outcomes of the run's steps are.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, AutoSLS, BiSLS
from adaptive_bilevel.hypergradient import CG, Lanczos, assign, implicit
from adaptive_bilevel.policies import Outcome
from fuzz_problems import Problem, make

SOLVERS: dict[str, Callable[[], Any]] = {"lanczos": Lanczos, "cg": CG}
LOWER: dict[str, Callable[..., Any]] = {"AutoSLS": AutoSLS, "SLS": SLS, "SLSB": SLSB}
ITERATIONS = 25
DECADES = [10.0**k for k in range(-7, 3)]


@dataclass
class Run:
    """What became of a run.

    Attributes:
        seed: The problem's.
        family: The problem's.
        lr: First trials of both levels, over a natural length; None: no number.
        lower: The lower rule.
        steps: T.
        start: F_0.
        best: The least F.
        gain: By which part f at the present y has fallen at least once since the first iteration; 0 with noise.
        reference: The least F of ten fixed steps.
        worst: The highest F.
        fixed: With F above 10 F_0: the highest F of the fixed step that lowers f most.
        diverged: Whether F was not finite, or F and f above 10 times their start.
        outcomes: Of the upper steps, by name.
        lower_outcomes: Of the lower steps.
        unexplained: Upper searches that failed although a decrease could have been seen.
        error: What was raised.
    """

    seed: int
    family: str
    lr: tuple[float, float] | None
    lower: str
    steps: int
    start: float = math.nan
    best: float = math.nan
    gain: float = 0.0
    reference: float = math.nan
    worst: float = -math.inf
    fixed: float = math.nan
    diverged: bool = False
    outcomes: dict[str, int] = field(default_factory=dict)
    lower_outcomes: dict[str, int] = field(default_factory=dict)
    unexplained: int = 0
    error: str = ""

    @property
    def away(self) -> bool:
        """Whether F was above 10 F_0."""
        return not self.worst <= 10.0 * self.start

    @property
    def behind(self) -> bool:
        """Whether a fixed step gains 10 % of F where this gains less than 1 %."""
        return self.reference < 0.9 * self.start and not self.best < 0.99 * self.start

    @property
    def stalled(self) -> bool:
        """Whether it is behind, and gains less than 1 % of f at the present y, too."""
        return self.behind and self.gain < 0.01


def fixed_steps(problem: Problem, start: Tensor) -> float:
    """Return the least F of gradient descent with ten fixed steps, by decades around F / |grad F|^2."""
    u = start.clone().requires_grad_()
    value = problem.total(u)
    (slope,) = torch.autograd.grad(value, u)
    natural = float(value.detach() / (slope @ slope))
    lengths = torch.tensor([[natural * k] for k in DECADES], dtype=torch.float64)
    rows, best = start.repeat(len(DECADES), 1), float(value.detach())
    for _ in range(ITERATIONS):
        rows = rows.detach().requires_grad_()
        total = problem.total(rows)
        (slopes,) = torch.autograd.grad(total.sum(), rows)
        rows = rows - lengths * slopes
        rows = torch.where(rows.isfinite(), rows, start)
        with torch.no_grad():
            best = min(best, float(problem.total(rows).nan_to_num(math.inf).min()))
    return best


def first_lengths(problem: Problem, x: Tensor, rng: random.Random) -> tuple[float, float]:
    """Return first trials of both levels over ten decades around F / |grad F|^2 and 1 / |H|."""
    u = (x.detach() / problem.scales["x"]).requires_grad_()
    value = problem.total(u)
    (slope,) = torch.autograd.grad(value, u)
    upper = float(value.detach() / (slope @ slope)) * problem.scales["x"] ** 2 / problem.scales["f"]
    lower = problem.scales["y"] ** 2 / problem.scales["g"]
    return upper * 10.0 ** rng.uniform(-5.0, 5.0), lower * 10.0 ** rng.uniform(-5.0, 5.0)


@dataclass
class Levels:
    """The variables of a run, its lower level, and its samples."""

    problem: Problem
    seed: int
    steps: int
    rule: Callable[..., Any]
    lr: tuple[float, float] | None
    solver: Any
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        """Put the variables at their start."""
        problem, self.noise = self.problem, torch.Generator().manual_seed(self.seed + 10**6)
        n, d = problem.cross.shape
        u = torch.randn(d, generator=self.noise, dtype=torch.float64)
        size = 0.0 if problem.family == "singular" else 0.1 * problem.scales["y"]
        self.x = (u * problem.scales["x"]).requires_grad_()
        self.y = torch.full((n,), size, dtype=torch.float64, requires_grad=True)
        self.inner = self.rule([self.y], **({} if self.lr is None else {"lr": self.lr[1]}))

    def sample(self, rows: int) -> Tensor | float:
        """Return what a sample adds to rows."""
        noise = self.problem.noise
        return noise * torch.randn(rows, generator=self.noise, dtype=torch.float64) if noise else 0.0

    def iterate(self) -> Callable[[], Tensor]:
        """Take T lower steps, put the hypergradient into x.grad, and return the upper loss."""
        problem, x, y = self.problem, self.x, self.y

        lower: Callable[[], Tensor] = functools.partial(problem.lower, x, y)
        for _ in range(self.steps):
            shift = problem.hessian @ self.sample(len(y)) if problem.noise else 0.0
            lower = functools.partial(problem.lower, x, y, shift)
            self.inner.step(lower)
            self.counts[Outcome(int(self.inner.record.outcome)).name] += 1
        upper = functools.partial(problem.upper, x, y, self.sample(len(problem.target)))
        assign([x], implicit(upper, lower, [x], [y], self.solver))
        return upper

    @property
    def seen(self) -> float:
        """F at the present x and y, without noise and without its scale."""
        with torch.no_grad():
            return float(self.problem.upper(self.x, self.y)) / self.problem.scales["f"]

    @property
    def total(self) -> float:
        """F at the present x, for the lower minimizer that the present y is near."""
        scales = self.problem.scales
        return float(self.problem.total(self.x.detach() / scales["x"], self.y.detach() / scales["y"]))


def run(seed: int, solver: str = "lanczos") -> Run:
    """Run BiSLS on the problem of a seed."""
    problem, rng = make(seed), random.Random(seed + 10**6)
    name = rng.choice(list(LOWER)) if problem.family != "noisy" else "AutoSLS"
    steps = round(20.0 ** rng.random())
    inverse = SOLVERS[solver]()
    start = Levels(problem, seed, steps, LOWER[name], None, inverse)
    lr = first_lengths(problem, start.x, rng) if rng.random() < 0.5 else None
    ran = Run(seed, problem.family, lr, name, steps, start=start.total, best=start.total)
    ran.reference = fixed_steps(problem, start.x.detach() / problem.scales["x"])
    levels = Levels(problem, seed, steps, LOWER[name], lr, inverse)
    direction = rng.choice(["sgd", "adam"])
    options: dict[str, Any] = {} if lr is None else {"lr": lr[0] if direction == "sgd" else problem.scales["x"]}
    outer = BiSLS([levels.x], **options, lower=levels.inner, direction=direction, solver=inverse)
    counts: collections.Counter[str] = collections.Counter()
    first: float | None = None
    start_of_f = math.nan
    try:
        for _ in range(ITERATIONS):
            upper = levels.iterate()
            start_of_f = levels.seen if first is None else start_of_f
            value = float(outer.step(upper))
            first = value if first is None else first
            if not problem.noise:
                ran.gain = max(ran.gain, (first - value) / abs(first))
            record: Any = outer.record
            outcome = Outcome(int(record.outcome))
            counts[outcome.name] += 1
            total = levels.total
            ran.best = min(ran.best, total)
            ran.worst = max(ran.worst, total if math.isfinite(total) else math.inf)
            ran.diverged |= not (total <= 10.0 * ran.start or levels.seen <= 10.0 * start_of_f)
            if outcome is Outcome.search_failed:
                ran.unexplained += not explained(problem, ran, outer, float(upper()))
    except Exception as error:  # what a user would see
        ran.error = f"{type(error).__name__}: {error}"
    ran.outcomes, ran.lower_outcomes = dict(counts), dict(levels.counts)
    if ran.behind:
        ran.reference = min(least for least, _, _ in same_level(ran, inverse))
    if ran.away:
        ran.fixed = min(same_level(ran, inverse), key=lambda found: found[2])[1]
    return ran


def same_level(ran: Run, solver: Any) -> list[tuple[float, float, float]]:
    """Return the least and the highest F, and the least f, of each of ten fixed steps, by decades.

    They have the run's own lower level and hypergradient, and end where f is above 10 times its start.
    """
    problem, found = make(ran.seed), []
    for decade in DECADES:
        levels = Levels(problem, ran.seed, ran.steps, LOWER[ran.lower], ran.lr, solver)
        length, totals, seen = 0.0, [ran.start], list[float]()
        for _ in range(ITERATIONS):
            upper, h = levels.iterate(), levels.x.grad
            assert h is not None
            length = length or decade * float(upper()) / float(h @ h)
            with torch.no_grad():
                levels.x -= length * h
            totals.append(levels.total)
            seen.append(levels.seen)
            if not (totals[-1] < math.inf and seen[-1] <= 10.0 * seen[0]):
                break
        found.append((min(totals), max(totals), min(seen)))
    return found


def explained(problem: Problem, ran: Run, outer: Any, value: float) -> bool:
    """Return whether no step could have shown a decrease."""
    if problem.family in ("nonsmooth", "noisy"):
        return True
    last = float(outer.param_groups[0]["step_size"])
    lost = last * float(outer.record.slope) < 1e3 * 2.0**-52 * abs(value)
    return lost or ran.best <= min(ran.reference, 1e-3 * ran.start)


def cause(ran: Run) -> str:
    """Return the most frequent outcomes of a stalled run's steps, in words."""
    if ran.error:
        return ran.error
    upper = max(ran.outcomes, key=ran.outcomes.__getitem__)
    below = max(ran.lower_outcomes, key=ran.lower_outcomes.__getitem__)
    given = "no number" if ran.lr is None else "first trials given"
    return f"{ran.family}, {given}, upper steps {upper}, lower steps {below}"


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the counts, and each run that is one of them."""
    behind = [r for r in runs if r.behind and not r.diverged]
    stalls = [r for r in behind if r.stalled]
    listed = collections.Counter(map(cause, stalls))
    failed = sum(r.outcomes.get("search_failed", 0) for r in runs)
    return {
        "problems": len(runs),
        "iterations": ITERATIONS,
        "diverged": [(r.seed, r.family) for r in runs if r.diverged],
        "away": [(r.seed, r.family, r.start, r.worst, r.fixed) for r in runs if r.away and not r.diverged],
        "errors": [(r.seed, r.error) for r in runs if r.error],
        "upper_searches_failed": failed,
        "upper_searches_failed_unexplained": [(r.seed, r.family, r.unexplained) for r in runs if r.unexplained],
        "improvable": sum(r.reference < 0.9 * r.start for r in runs),
        "behind": [(r.seed, cause(r), r.start, r.best, r.reference, r.gain) for r in behind],
        "stalls": [(r.seed, cause(r), r.start, r.best, r.reference) for r in stalls],
        "stalls_by_cause": dict(listed.most_common()),
    }


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--solver", choices=SOLVERS, default="lanczos", help="the inverse of both")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with concurrent.futures.ProcessPoolExecutor(options.jobs, initializer=_quiet) as pool:
        seeds = range(options.first, options.first + options.problems)
        found = summary(list(pool.map(functools.partial(run, solver=options.solver), seeds, chunksize=10)))
    text = json.dumps(found, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
