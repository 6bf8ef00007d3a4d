"""S1 of the golden rows, on Python floats alone: two quadratics, and the loop that leads a policy through them.

f_i(x) = (x - a_i)' H_i (x - a_i) / 2 with diagonal H_i; nothing here needs a framework.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_bilevel.policies import Policy, Record

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())

Point = list[float]


class Quadratic(NamedTuple):
    """sum_j h_j (x_j - a_j)^2 / 2 + least."""

    curvature: Sequence[float]
    center: Sequence[float]
    least: float = 0.0

    def loss(self, x: Sequence[float]) -> float:
        terms = zip(self.curvature, x, self.center, strict=True)
        return self.least + sum(0.5 * h * (value - a) ** 2 for h, value, a in terms)

    def gradient(self, x: Sequence[float]) -> Point:
        return [h * (value - a) for h, value, a in zip(self.curvature, x, self.center, strict=True)]


S1 = (Quadratic((1.0, 2.0), (1.0, 0.0)), Quadratic((4.0, 1.0), (-1.0, 1.0)))
X0 = (3.0, 2.0)
ORDER = (0, 1, 0)


class Visit(NamedTuple):
    """One step: the point before it, the record, the state after it, and every step size that was tried."""

    x: Point
    record: Record
    state: Any
    tried: list[float]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def moved(x: Sequence[float], step: float, direction: Sequence[float]) -> Point:
    return [value - step * d for value, d in zip(x, direction, strict=True)]


def run(
    policy: Policy[Any],
    *,
    samples: Sequence[Quadratic] = S1,
    x: Sequence[float] = X0,
    order: Sequence[int] = ORDER,
    step_order: Sequence[int] | None = None,
    kind: Callable[[float], Any] = float,
) -> tuple[list[Visit], Point]:
    """Return the visits of SGD with the policy's steps, and where it ends.

    In the 2-sample form, `step_order` are the samples of the steps.
    """
    visits: list[Visit] = []
    point, state = list(x), policy.init()
    for i, j in zip(order, step_order or order, strict=True):
        sample, tried, at = samples[j], [], point
        gradient = sample.gradient(at)

        def trial(step: float) -> Any:
            tried.append(step)
            return kind(sample.loss(moved(at, step, gradient)))

        record, state = policy.step(state, loss=kind(sample.loss(at)), slope=kind(dot(gradient, gradient)), trial=trial)
        visits.append(Visit(at, record, state, tried))
        point = moved(at, float(record.step_size), samples[i].gradient(at))
    return visits, point
