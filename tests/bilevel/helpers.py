"""What the tests of the upper level share: closures that remember their calls, and one loop of both levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS, OneStepBiSLS
from adaptive_bilevel.hypergradient import CG, assign, implicit
from adaptive_bilevel.optim.projection import Ball, Box, Simplex
from tests.optim.helpers import plain
from tests.problems import Instance, b2

EXACT = CG(max_iterations=100, tolerance=0.0)

Loss = Callable[[], Any]


def lower_search(y: Any) -> Any:
    """The lower rule of the random quadratics, whose lower losses have no bound that is known."""
    return SLS([y], 10.0, lower_bound=None)


class Traced:
    """A closure that remembers where it was called, and fails on demand.

    Attributes:
        points: Copies of the tensors, one entry per call.
        graphs: Whether gradients were enabled, one entry per call.
        values: What was returned.
        at: Index of the call at which `fault` happens.
        fault: An exception to raise, or a number to return (attached) in the loss's place.
    """

    def __init__(self, loss: Loss, tensors: Sequence[Tensor] = (), at: int = -1, fault: Any = None) -> None:
        self.loss, self.tensors, self.at, self.fault = loss, tensors, at, fault
        self.points: list[list[Tensor]] = []
        self.graphs: list[bool] = []
        self.values: list[float] = []

    def __call__(self) -> Any:
        self.points.append([t.detach().clone() for t in self.tensors])
        self.graphs.append(torch.is_grad_enabled())
        loss = self.loss()
        if len(self.points) - 1 == self.at:
            if isinstance(self.fault, float):
                loss = loss * self.fault
            else:
                raise self.fault
        self.values.append(float(torch.as_tensor(loss).detach()))
        return loss

    @property
    def calls(self) -> int:
        return len(self.points)


def iterate(inner: Any, outer: Any, problem: Instance, T: int = 1, solver: Any = EXACT, **step: Any) -> Any:
    """T lower steps, the hypergradient, one upper step; returns the upper record."""
    for _ in range(T):
        inner.step(problem.lower)
    assign([problem.x], implicit(problem.upper, problem.lower, [problem.x], [problem.y], solver=solver))
    outer.step(problem.upper, **step)
    return outer.record


def everything(tensors: Sequence[Tensor], *optimizers: Any, modules: Sequence[Any] = ()) -> Any:
    """All that a step may touch, comparable bitwise."""
    state = plain(
        {
            "tensors": list(tensors),
            "grads": [t.grad for t in tensors],
            "random": torch.get_rng_state(),
            "optimizers": [o.state_dict() for o in optimizers],
            "buffers": [m.state_dict() for m in modules],
        }
    )
    return repr(state)  # NaN equals itself there


def prepared(carry: Any = "auto", inner_class: Any = SLS, **options: Any) -> tuple[Instance, Any, Any]:
    point = b2().instance()
    inner = SLS([point.y], 0.1, lower_bound=None) if inner_class is SLS else inner_class([point.y], 0.1)
    outer = BiSLS([point.x], 1.0, lower=inner, carry=carry, solver=EXACT, **options)
    return point, inner, outer


def clamp(tensors: Any) -> None:
    for t in tensors:
        t.clamp_(-0.5, 0.25)


# What `project=` is tried with: sets that cut something off, and the searches that project.
BOX = (-0.5, 0.25)
SETS: dict[str, Any] = {"box": Box(*BOX), "callable": clamp, "simplex": Simplex(1.5)}
SEARCHES: dict[str, Any] = {
    "sgd": partial(BiSLS, solver=EXACT),
    "adam": partial(BiSLS, solver=EXACT, direction="adam", betas=(0.0, 0.9)),
    "step": OneStepBiSLS,
}
# Sets for tensors of which some stay where they are.
STAYING: dict[str, Any] = {
    "box": Box(*BOX),
    "ball": Ball(1.0),
    "simplex": Simplex(1.0),
    "callable": lambda tensors: [t.clamp_(-0.5, 0.25) for t in tensors],
}
